"""The curves of a run as one CSV that survives kills."""

from __future__ import annotations

import time
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from weakmedsam.system.atomic_io import rows_before, write_table


class History(Checkpoint):
    """Write ``history.csv`` under the run's folder, one row an epoch, every logged figure a column.

    Lightning's own CSV logger empties its folder when a run is continued; this file keeps the rows of
    the epochs before. A ``Checkpoint`` by kind, because those run after all figures of the epoch are in.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's row; rows of this and later epochs, of a run that was killed, go."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        path = Path(trainer.default_root_dir) / "history.csv"
        epoch = trainer.current_epoch
        rows = rows_before(path, epoch)
        seconds = time.monotonic() - self._started
        figures = {name: f"{float(value):.6g}" for name, value in sorted(trainer.callback_metrics.items())}
        rows.append({"epoch": str(epoch), "seconds": f"{seconds:.1f}", **figures})
        write_table(path, list(dict.fromkeys(name for row in rows for name in row)), rows)
