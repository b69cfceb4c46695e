"""Fully sharded training (PyTorch's FSDP2): parameters, gradients and optimiser shared out over the processes.

Where Lightning's own strategies stop: its FSDP refuses processors, and its strategy for FSDP2 divides by machines
unless told how many processes there are, loads a checkpoint before a module can make room for it, and numbers
the optimiser's state in its own way. Here a checkpoint is that of any other strategy, and goes on under any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from weakmedsam.errors import check_range

# Whole tensors in the host's memory, on rank 0.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all processes of all machines; the module's ``configure_model`` has to call ``shard``.

    Args:
        least_parameters: layers of a ``ModuleList`` (the blocks of a transformer) with at least so many are
            gathered one at a time while they are used; what is left, all together. 1 or more.

    Raises:
        ConfigError: a number out of its range.
    """

    def __init__(self, least_parameters: int = 1_000_000) -> None:
        check_range("trainer.strategy.least_parameters", least_parameters, 1)
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.least_parameters = least_parameters

    def setup_environment(self) -> None:
        """One group of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimiser's state is in the checkpoint that ``load_checkpoint`` gives."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights on rank 0, nothing on the others."""
        return get_model_state_dict(self._module(), options=_WHOLE)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's whole state on rank 0, parameters numbered in its own order, as ``state_dict`` does."""
        found = get_optimizer_state_dict(self._module(), _bare(optimizer), options=_WHOLE)
        state = cast(dict[str, Any], found)
        names = [name for group in state.get("param_groups", []) for name in group["params"]]
        return _renamed(state, {name: number for number, name in enumerate(names)})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file; the module sees it before weights are put into their places."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Every process takes its share."""
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self._module(), checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The same of the optimisers' states."""
        names = {id(parameter): name for name, parameter in self._module().named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            groups = _bare(optimizer).param_groups
            ordered = [names[id(parameter)] for group in groups for parameter in group["params"]]
            set_optimizer_state_dict(
                self._module(),
                _bare(optimizer),
                _renamed(state, dict(enumerate(ordered))),
                options=StateDictOptions(full_state_dict=True),
            )

    def on_validation_start(self) -> None:
        """Weights are whole in validation: processes may have different numbers of slices to look at."""
        gather_weights(self._module())

    def on_validation_end(self) -> None:
        """And shared out again."""
        release(self._module())

    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)


def shard(module: LightningModule, *steps: str) -> None:
    """Share a module's parameters out in training, where ``FullySharded`` asks for it; otherwise do nothing.

    Weights are then whole only while a forward method runs, which every process has to call equally often. Where
    that is not so, in validation and other looks at the data, they are ``gathered``; in test and prediction each
    process has all of them.

    Args:
        module: its ``forward`` is a forward method.
        steps: other ones, which must not call each other: FSDP2 takes the inner one's end for the end of both.
    """
    strategy = module.trainer.strategy
    fits = module.trainer.state.fn == TrainerFn.FITTING
    if not fits or not isinstance(strategy, FullySharded) or isinstance(module, FSDPModule):
        return
    mesh = strategy.device_mesh["data_parallel"]
    for layer in large_layers(module, strategy.least_parameters):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for step in steps:
        register_fsdp_forward_method(module, step)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole weights, and no process waits for another at a forward method; nothing where none are shared out."""
    gather_weights(module)
    try:
        yield
    finally:
        release(module)


def gather_weights(module: nn.Module) -> None:
    """Begin of ``gathered``."""
    for part in _shared_out(module):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def release(module: nn.Module) -> None:
    """End of ``gathered``."""
    for part in _shared_out(module):
        # The module itself, in whose step all else runs, is freed after the backward pass only (FSDP2's own rule).
        part.set_reshard_after_forward(part is not module, recurse=False)
        part.reshard()


def _shared_out(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def large_layers(module: nn.Module, least: int) -> list[nn.Module]:
    """Elements of ``ModuleList`` with at least ``least`` parameters: the blocks of a transformer."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    layers = [layer for part in lists for layer in part]
    return [layer for layer in layers if sum(p.numel() for p in layer.parameters()) >= least]


def _bare(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimiser's state under other names of its parameters; an empty one stays so."""
    if not state:
        return {}
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}
