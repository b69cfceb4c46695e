"""What SCE adds to a training epoch, with the embedded backbone, in one run.

Epochs with and without SCE are timed by a whole Trainer, alternating; the first epoch of each is left
out, and the one pass before training is given beside as a share of an epoch.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from weakmedsam.backbones.pocket import Pocket
from weakmedsam.callbacks import SubClassExploration
from weakmedsam.classify import WeakMedSAM


class RandomSlices(LightningDataModule):
    """Random images with random labels, in memory: the loader costs nothing, so SCE's share is largest."""

    def __init__(self, slices: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(slices, 1, 128, 128, generator=generator)
        self.labels = (torch.rand(slices, 2, generator=generator) < 0.5).float()
        self.train_slices = slices

    def train_labels(self) -> np.ndarray:
        return self.labels.numpy()

    def train_dataloader(self, shuffle: bool = True) -> DataLoader:
        items = [
            {"image": image, "label": label, "index": i}
            for i, (image, label) in enumerate(zip(self.images, self.labels, strict=True))
        ]
        return DataLoader(items, batch_size=16, shuffle=shuffle)

    def features_dataloader(self, rank: int, world: int) -> DataLoader:
        return self.train_dataloader(shuffle=False)


class Clock(Callback):
    """Seconds of each epoch, and of what comes before the first."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.before = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.begin = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.epochs:
            self.before = time.perf_counter() - self.begin
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # configure_callbacks puts SCE before this one's turn only if it is attached first: see below.
        self.epochs.append(time.perf_counter() - self.start)


def train(data: RandomSlices, epochs: int, with_sce: bool) -> Clock:
    """A fresh network for some epochs."""
    clock = Clock()
    sce = SubClassExploration() if with_sce else None
    model = WeakMedSAM(Pocket(weights="none"), ["a", "b"], sce=sce)
    model.configure_callbacks = lambda: [*([sce] if sce else []), clock]  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder, max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, data)
    return clock


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="more slices and epochs")
    full = parser.parse_args().full
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    data, epochs = RandomSlices(960 if full else 192), 5 if full else 3
    runs: dict[bool, list[Clock]] = {False: [], True: []}
    for _ in range(2):
        for with_sce in (False, True):
            runs[with_sce].append(train(data, epochs, with_sce))
    # The last epoch clusters for nobody, so it does not count.
    times = {
        key: statistics.median(t for clock in clocks for t in clock.epochs[1:-1] or clock.epochs[1:])
        for key, clocks in runs.items()
    }
    overhead = times[True] / times[False] - 1
    first = (runs[True][0].before - runs[False][0].before) / times[False]
    table = Table("", "seconds", title=f"SCE, pocket, {data.train_slices} slices, 2 classes, 8 sub-classes")
    table.add_row("epoch without SCE", f"{times[False]:.2f}")
    table.add_row("epoch with SCE", f"{times[True]:.2f}")
    table.add_row("added", f"{100 * overhead:.1f} %")
    table.add_row("pass before training, once", f"{first:.2f} epochs")
    Console().print(table)
    print(json.dumps({"epoch_overhead": overhead, "first_pass_epochs": first}))


if __name__ == "__main__":
    main()
