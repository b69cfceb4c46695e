"""LoRA: a frozen linear layer with a trainable low-rank update of its weight.

Source: Hu et al., arXiv 2106.09685. Built on ``torch.nn.utils.parametrize``: peft would add
transformers and accelerate as dependencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ORIGINAL = ".parametrizations.weight.original"
"""Suffix under which ``parametrize`` keeps a layer's own weight."""


class LowRank(nn.Module):
    """weight (out, in) -> weight + alpha / rank * up @ down; zero change at the start.

    Args:
        weight: of the layer that is adapted, for its shape.
        rank: of the change.
        alpha: its scale, times rank.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_low_rank(layer: nn.Linear, rank: int, alpha: float) -> None:
    """Give a layer's weight a low-rank change; its state is then under ``weight``'s parametrization."""
    parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha), unsafe=True)


def low_rank_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of every low-rank update in a module."""
    return [p for part in module.modules() if isinstance(part, LowRank) for p in part.parameters()]


def original_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state without LoRA, under the keys of its checkpoints."""
    changes = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, LowRank))
    return {
        key.replace(ORIGINAL, ".weight"): value
        for key, value in module.state_dict().items()
        if not (changes and key.startswith(changes))
    }
