"""What both trainings share: the range of AdamW's settings, and the length of the one-cycle schedule."""

from __future__ import annotations

import math

from lightning import Trainer

from weakmedsam.errors import LARGEST_WEIGHT, ConfigError, check_range


def check_optimiser(learning_rate: float, weight_decay: float) -> None:
    """See that AdamW can work with its settings; whether a training then converges is another matter.

    Raises:
        ConfigError: a number out of its range.
    """
    check_range("model.learning_rate", learning_rate, 0, LARGEST_WEIGHT, above=True)
    check_range("model.weight_decay", weight_decay, 0, LARGEST_WEIGHT)


def count_steps(trainer: Trainer) -> int:
    """How many steps the optimiser makes in all.

    Raises:
        ConfigError: the run has no end, or no step.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        raise ConfigError(
            "trainer.max_epochs is -1, but the one-cycle schedule needs to know the end: set trainer.max_epochs or "
            "trainer.max_steps"
        )
    if steps < 1:
        raise ConfigError(
            "there is no step to train: trainer.max_epochs, trainer.max_steps or trainer.limit_train_batches is 0"
        )
    return int(steps)
