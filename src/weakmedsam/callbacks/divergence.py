"""A training whose loss is no number any more ends at once, and leaves no checkpoint of what it has become."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from weakmedsam.errors import DivergenceError

EVERY = 50
"""Steps between two looks where a look makes the host wait for a GPU or for other ranks."""


class EndDiverged(Callback):
    """End a training, on all ranks, at a loss of NaN or infinity, or before such weights are used or written.

    One process on a processor looks at every step's loss. On a GPU, and among several ranks, the first such step is
    kept on the device and asked for every ``EVERY`` steps, at the end of the epoch and before a checkpoint is
    written: training does not wait for it. A gradient that overflows under mixed precision is no divergence, since
    the scaler leaves that step out.

    Raises:
        DivergenceError: names stage, epoch, step, loss and learning rate, and what to lower.
    """

    def __init__(self) -> None:
        # (3,): step, loss and learning rate of the first one that is no number; step -1: none.
        self._first: Tensor | None = None
        self._rate = math.nan

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the step's learning rate: at its end the schedule has gone on."""
        if trainer.optimizers:
            self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the step's loss, or keep it."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):  # the step was left out
            return
        loss = loss.detach().float()
        if loss.device.type == "cpu" and trainer.world_size == 1:
            if not math.isfinite(value := loss.item()):
                raise _diverged(trainer, f"the loss is {value}", batch_idx, self._rate)
            return
        if self._first is None:
            self._first = loss.new_full((3,), -1.0)
        now = torch.stack([torch.full_like(loss, batch_idx), loss, torch.full_like(loss, self._rate)])
        self._first = torch.where(~loss.isfinite() & (self._first[0] < 0), now, self._first)
        if (batch_idx + 1) % EVERY == 0 or trainer.is_last_batch:
            self._ask(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that what is validated are numbers; the last step's loss does not tell what the step made of them."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._see_weights(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation's loss, where it has one; it is the same on all ranks."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn == "fit" and not trainer.sanity_checking and loss is not None and not loss.isfinite():
            raise _diverged(trainer, f"the loss in validation is {float(loss)}", None, self._rate)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See that only numbers are written; what was written before stays."""
        if trainer.state.fn == "fit":
            self._ask(trainer)
            self._see_weights(trainer, pl_module)

    def _ask(self, trainer: Trainer) -> None:
        """Whether any rank has kept a loss that is no number."""
        if self._first is None:
            return
        step, loss, rate = self._first.tolist()
        if trainer.strategy.reduce_boolean_decision(step >= 0, all=False):
            said = f"the loss is {loss}" if step >= 0 else "the loss of another process is no number"
            raise _diverged(trainer, said, int(step) if step >= 0 else None, rate if step >= 0 else None)

    def _see_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        learnt = (p.detach() for p in pl_module.parameters() if p.requires_grad)
        shares = [p.to_local() if isinstance(p, DTensor) else p for p in learnt]
        found = torch.stack([part.isfinite().all() for part in shares]) if shares else torch.ones(1)
        if trainer.strategy.reduce_boolean_decision(not bool(found.all()), all=False):
            raise _diverged(trainer, "weights are NaN or infinite", None, self._rate)


def _diverged(trainer: Trainer, said: str, batch_idx: int | None, rate: float | None) -> DivergenceError:
    step = "" if batch_idx is None else f", step {batch_idx}"
    now = "" if rate is None else f" (learning rate {rate:.3g})"
    folder = Path(trainer.default_root_dir)
    return DivergenceError(
        f"{folder.name} has diverged: {said} in epoch {trainer.current_epoch}{step}{now}, both counted from 0. Lower "
        "model.learning_rate or the weights of the losses, set trainer.gradient_clip_val 1, or take trainer.precision "
        f"32-true; checkpoints of earlier epochs in {folder / 'checkpoints'} are kept"
    )
