"""Random numbers of an epoch that depend on nothing before it."""

from __future__ import annotations

import hashlib
import os

from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch import Callback

from weakmedsam.contracts import SliceBatch


class Reseed(Callback):
    """Seed torch, numpy and Python anew at each epoch's first step, by (``seed_everything``, epoch, rank).

    So dropout, and whatever else draws from the global generators, draws the same in a continued run as in an
    uninterrupted one, on every rank and device, and no generator's state has to be kept. At the first step and
    not at the epoch's start: between the two a loader draws a seed for its workers, in a new run one time
    more than in a continued one. Slices, augmentation and clustering have generators of their own.
    """

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: SliceBatch, batch_idx: int
    ) -> None:
        """Before the epoch's first step."""
        seed = os.environ.get("PL_GLOBAL_SEED")  # set by seed_everything; absent where that is false
        if batch_idx == 0 and seed is not None:
            seed_everything(epoch_seed(int(seed), trainer.current_epoch, trainer.global_rank), verbose=False)
            os.environ["PL_GLOBAL_SEED"] = seed


def epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """A seed in [0, 2^32) from the run's seed, the epoch's number and the process's."""
    digest = hashlib.sha256(f"{seed} {epoch} {rank}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
