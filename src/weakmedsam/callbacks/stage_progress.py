"""The one bar of a stage: of the whole training, with the time left of it, or of a test's or prediction's volumes."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from weakmedsam.system.progress import ProgressLine, is_verbose

LINE_EVERY = 60.0
"""Seconds between two lines about a test's or prediction's volumes in a file, at least."""


class StageProgress(ProgressBar):
    """Draw one bar a command, with the metric that chooses the checkpoint; in a file, a line an epoch or minute.

    Training and validation batches of all epochs are the units of a training's bar, so the time left is the stage's.
    Rank 0 alone prints.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._line: ProgressLine | None = None
        self._said = 0.0  # when the last line about volumes was printed

    def disable(self) -> None:
        """Print nothing from here on: Lightning asks for it on ranks above 0."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw an empty bar: what is done before the first batch may take a while. If verbose, not into the summary."""
        if not is_verbose():
            self._open("getting ready")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, with what an earlier call has trained."""
        if self._line is None:
            self._open("getting ready")
        if self._line is not None:
            total, each = _batches(trainer)
            self._line.begin(total, each * trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which epoch it is."""
        self._advance(_epoch_of(trainer), 0)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count the batch."""
        self._advance(_epoch_of(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw a bar, where nothing but a validation is run."""
        if self._line is None and not trainer.sanity_checking:
            self._open(*_counted("batch", trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count the batch."""
        if not trainer.sanity_checking:
            training = trainer.state.fn == "fit"
            self._advance(_epoch_of(trainer) if training else self._count("batch", trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar, where nothing but a validation is run."""
        if trainer.state.fn != "fit":
            self._close()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the metric; in a file, one line."""
        if self._line is None:
            return
        metric = _metric(trainer)
        self._line.show(metric)
        self._print(_epoch_of(trainer), metric)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar; it is not full where the training has stopped early."""
        self._close(whole=trainer.current_epoch >= (trainer.max_epochs or 0))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar."""
        self._open(*_counted("volume", trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count the volume; in a file, a line a minute."""
        self._volume_done(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar."""
        self._close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar."""
        self._open(*_counted("volume", trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count the volume; in a file, a line a minute."""
        self._volume_done(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the bar where it is, so that a message stands below it."""
        self._close(whole=False)

    def _open(self, label: str, total: float = 0) -> None:
        if self._enabled:
            if self._line is not None:
                self._line.close(whole=False)
            self._line, self._said = ProgressLine(label, total), time.monotonic()
            self._line.open()
            if total:
                self._line.begin(total)

    def _advance(self, label: str, units: float = 1.0) -> None:
        if self._line is not None:
            self._line.advance(label, units)

    def _volume_done(self, trainer: Trainer) -> None:
        label = self._count("volume", trainer)
        self._advance(label)
        if time.monotonic() - self._said >= LINE_EVERY:
            self._print(label)

    def _print(self, label: str, metric: str = "") -> None:
        """One line, where no bar is drawn."""
        self._said = time.monotonic()
        if self._line is not None and not sys.stdout.isatty():
            print("  " + "  ".join(filter(None, (label, self._line.time_left(), metric))), flush=True)

    def _count(self, unit: str, trainer: Trainer) -> str:
        """As "volume 3/6"; of several processes each sees its own, and no number is said."""
        if self._line is None or trainer.world_size > 1:
            return f"{unit}s"
        return f"{unit} {self._line.done + 1:g}/{self._line.total:g}"

    def _close(self, whole: bool = True) -> None:
        if self._line is not None:
            self._line.close(whole)
            self._line = None


def _sum(batches: Any) -> float:
    """Of all loaders; 0 where a loader has no length."""
    total = float(sum(batches)) if isinstance(batches, list) else float(batches)
    return total if math.isfinite(total) else 0.0


def _counted(unit: str, batches: Any) -> tuple[str, float]:
    """What a bar of so many units says before the first is done, and how many they are."""
    total = _sum(batches)
    return (f"{unit} 0/{total:g}" if total else unit), total


def _batches(trainer: Trainer) -> tuple[float, float]:
    """Batches of the whole training, those of its validations included, and of an epoch in the mean; 0 if unknown."""
    epochs, training = trainer.max_epochs or -1, _sum(trainer.num_training_batches)
    if epochs < 0 or not training:
        return 0.0, 0.0
    every = trainer.check_val_every_n_epoch or 1
    validated = (
        epochs // every * max(int(training // (trainer.val_check_batch or training)), 1)
        if trainer.enable_validation
        else 0
    )
    total = epochs * training + validated * _sum(trainer.num_val_batches)
    return total, total / epochs


def _epoch_of(trainer: Trainer) -> str:
    epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{epochs}"


def _metric(trainer: Trainer) -> str:
    """What chooses the checkpoint, as "val/auroc 0.991"; empty where nothing does or it is not measured yet."""
    chosen = [kept.monitor for kept in trainer.checkpoint_callbacks if isinstance(kept, ModelCheckpoint)]
    for name in chosen:
        if name and name in trainer.callback_metrics:
            return f"{name} {float(trainer.callback_metrics[name]):.3f}"
    return ""
