"""How fast a run is, how long it waits for data, and how much GPU memory it takes."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Protocol, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.utilities import rank_zero_warn

from weakmedsam.contracts import SliceBatch, VolumeBatch
from weakmedsam.errors import check_range
from weakmedsam.system.atomic_io import rows_before, write_table
from weakmedsam.system.progress import is_verbose

COLUMNS = ("epoch", "images_per_second", "loader_wait", "gpu_memory_gib")


class LoadedData(Protocol):
    """What ``Throughput`` asks of the data module.

    Attributes:
        batch_size: slices a step and process.
        num_workers: processes that read slices, of each process.
    """

    batch_size: int
    num_workers: int


FETCHES = ("train_dataloader_next", "test_next", "predict_next")
"""Ends of the names by which Lightning's loops announce that they want a batch; validation's is left out."""


class LoaderClock(Profiler):
    """Adds up the seconds that a loop waits for its next batch; all else it lets pass.

    A profiler because that is where Lightning tells when it asks the loader and when it has the batch;
    a callback's hooks would count transfer and augmentation too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0
        self._asked = 0.0

    def start(self, action_name: str) -> None:
        """The loop asks for a batch."""
        if action_name.endswith(FETCHES):
            self._asked = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """The loop has it."""
        if action_name.endswith(FETCHES):
            self.waited += time.perf_counter() - self._asked


class Throughput(Callback):
    """Measure each epoch's training, tests and predictions; say, if verbose, what a step learns from.

    Writes ``throughput.csv`` under the run's folder, one row an epoch (of a test or prediction, one row, epoch 0),
    and sends the same to the loggers as ``throughput/...``. These figures are not among the trainer's metrics: two
    runs of the same settings have the same metrics, but not the same times.

    - ``images_per_second``: of all processes, from the first batch of an epoch to its last, without
      validation and without clustering; of a test or prediction with all that is made of the slices. Volumes whose
      pseudo-labels were there already do not count.
    - ``loader_wait``: share of that time in which process 0 waited for its loader; NaN with a profiler of
      the user's own (``trainer.profiler``).
    - ``gpu_memory_gib``: most that torch held at once on GPU 0 during the epoch; NaN without a GPU.

    Args:
        warn_share: loader wait, share of the epoch in [0, 1], above which a warning names what to turn.
        warn_batches: epochs of fewer batches give no warning; the workers' start is most of them.

    Raises:
        ConfigError: a share outside [0, 1], or less than one batch.
    """

    def __init__(self, warn_share: float = 0.3, warn_batches: int = 20) -> None:
        check_range("throughput.warn_share", warn_share, 0, 1)
        check_range("throughput.warn_batches", warn_batches, 1)
        self.warn_share = warn_share
        self.warn_batches = warn_batches
        self._clock: LoaderClock | None = None
        self._images = 0
        self._batches = 0
        self._begun = self._ended = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the clock in, where the user has no profiler."""
        if stage in ("fit", "test", "predict") and type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
            self._clock = LoaderClock()
            trainer.profiler = self._clock  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many slices a step learns from, where that is wanted."""
        if is_verbose():
            trainer.print(describe_batch(trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch's account."""
        self._begin(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the test's account."""
        self._begin(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the prediction's account."""
        self._begin(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: SliceBatch, batch_idx: int
    ) -> None:
        """Count the batch's slices."""
        self._count(batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the volume's slices."""
        self._count(batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the volume's slices, unless it was passed over."""
        if outputs is not None:
            self._count(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the epoch's figures, and warn where the loader is too slow."""
        wait = self._tell(trainer, pl_module, trainer.current_epoch)
        if trainer.is_global_zero and wait > self.warn_share and self._batches >= self.warn_batches:
            rank_zero_warn(_advice(wait, cast(LoadedData, trainer.datamodule).num_workers))  # type: ignore[attr-defined]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the test's figures."""
        self._tell(trainer, pl_module, 0)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the prediction's figures."""
        self._tell(trainer, pl_module, 0)

    def _begin(self, pl_module: LightningModule) -> None:
        self._images = self._batches = 0
        self._begun = self._ended = time.perf_counter()
        if self._clock is not None:
            self._clock.waited = 0.0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def _count(self, batch: SliceBatch | VolumeBatch) -> None:
        self._images += len(batch["image"])
        self._batches += 1
        self._ended = time.perf_counter()

    def _tell(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> float:
        """Write a row and send it to the loggers; returns the share of waiting, NaN if nothing was measured."""
        seconds = self._ended - self._begun
        if not trainer.is_global_zero or seconds <= 0:
            return math.nan
        memory = math.nan
        if pl_module.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        wait = self._clock.waited / seconds if self._clock is not None else math.nan
        figures = (self._images * trainer.world_size / seconds, min(wait, 1.0), memory)
        _keep(Path(trainer.default_root_dir) / "throughput.csv", epoch, figures)
        found = {f"throughput/{name}": v for name, v in zip(COLUMNS[1:], figures, strict=True) if v == v}
        for logger in trainer.loggers:
            logger.log_metrics(found | {"epoch": epoch}, step=trainer.global_step)
        return wait


def describe_batch(trainer: Trainer) -> str:
    """How many slices a step learns from, and that the learning rate is not scaled by it."""
    batch = cast(LoadedData, trainer.datamodule).batch_size  # type: ignore[attr-defined]
    processes, gathered = trainer.world_size, trainer.accumulate_grad_batches
    return (
        f"a step learns from {processes * batch * gathered} slices: {processes} process(es) x data.batch_size "
        f"{batch} x trainer.accumulate_grad_batches {gathered}; model.learning_rate is taken as it stands"
    )


def _advice(wait: float, workers: int) -> str:
    return (
        f"the loader keeps the device waiting for {wait:.0%} of the epoch. Raise --data.num_workers (now "
        f"{workers}; this machine has {os.cpu_count()} processors), or put the store (--data.prepare.store_dir) on a "
        "faster disk"
    )


def _keep(path: Path, epoch: int, figures: tuple[float, ...]) -> None:
    """Add an epoch's row; rows of this and later epochs, of a run that was killed, go."""
    rows = rows_before(path, epoch)
    texts = [f"{value:.4g}" if math.isfinite(value) else "" for value in figures]
    rows.append(dict(zip(COLUMNS, (str(epoch), *texts), strict=True)))
    write_table(path, COLUMNS, rows)
