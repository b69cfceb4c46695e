"""What SCE adds to a training epoch, in one run.

Twice: with the embedded backbone's own features, averaged (published), and with the local encoder and
log-sum-exp (the default; a smaller network, so the share is larger).
Epochs with and without SCE are timed by a whole Trainer, alternating; the first epoch of each is left
out, and the one pass before training (``model.sce.first: bank`` spares it) is given beside as a share of an
epoch. Times are those of the processor, on one thread, and the shortest epochs are compared: what else
the machine does can only lengthen them, by more than SCE does.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings

import faiss
import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from weakmedsam.backbones.pocket import Pocket
from weakmedsam.callbacks import SubClassExploration
from weakmedsam.classification.cam import Pooling
from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.contracts import SliceBatch


class RandomSlices(LightningDataModule):
    """Random images with random labels, in memory: the loader costs nothing, so SCE's share is largest."""

    def __init__(self, slices: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(slices, 1, 128, 128, generator=generator)
        self.labels = (torch.rand(slices, 2, generator=generator) < 0.5).float()
        self.train_slices = slices

    def train_labels(self) -> NDArray[np.float32]:
        """(N, 2) in {0, 1}."""
        return self.labels.numpy()

    def train_dataloader(self) -> DataLoader[SliceBatch]:
        """Shuffled batches of 16."""
        return self._loader(shuffle=True)

    def features_dataloader(self, rank: int, world: int) -> DataLoader[SliceBatch]:
        """All slices in order; there is one process here."""
        return self._loader(shuffle=False)

    def _loader(self, shuffle: bool) -> DataLoader[SliceBatch]:
        return DataLoader(Items(self.images, self.labels), batch_size=16, shuffle=shuffle)


class Items(Dataset[SliceBatch]):
    """One slice an item."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> SliceBatch:
        item: SliceBatch = {
            "image": self.images[index], "label": self.labels[index], "index": torch.tensor(index),
            "box": torch.tensor([0, 128, 0, 128]),
        }  # fmt: skip
        return item


class Clock(Callback):
    """Processor's seconds of each epoch, and of what comes before the first."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.before = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the run's clock."""
        self.begin = time.process_time()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        if not self.epochs:
            self.before = time.process_time() - self.begin
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it."""
        self.epochs.append(time.process_time() - self.start)


def train(data: RandomSlices, epochs: int, with_sce: bool, local: bool) -> Clock:
    """A fresh network for some epochs."""
    clock = Clock()
    sce = SubClassExploration() if with_sce else None
    encoder = LocalEncoder(image_size=128) if local else None
    # In PAM's place the clock comes after SCE, so that the time of clustering is in the epoch; the
    # trainer would put one of its own before SCE.
    model = WeakMedSAM(
        Pocket(weights="none"), ["a", "b"], sce=sce, pam=clock,
        local_encoder=encoder, pooling=Pooling("log_sum_exp" if local else "average"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder, max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, data)
    return clock


def compare(data: RandomSlices, epochs: int, local: bool) -> dict[str, float]:
    """Seconds of an epoch without and with SCE, what it adds, and the pass before training, as shares."""
    runs: dict[bool, list[Clock]] = {False: [], True: []}
    for _ in range(2):
        for with_sce in (False, True):
            runs[with_sce].append(train(data, epochs, with_sce, local))
    # The last epoch clusters for nobody and draws pictures, so it does not count.
    times = {key: min(t for clock in clocks for t in clock.epochs[1:-1]) for key, clocks in runs.items()}
    first = (runs[True][0].before - runs[False][0].before) / times[False]
    added = times[True] / times[False] - 1
    return {"without": times[False], "with": times[True], "added": added, "first": first}


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="more slices and epochs")
    full = parser.parse_args().full
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    data, epochs = RandomSlices(960 if full else 128), 5 if full else 3
    own, local = (compare(data, epochs, local) for local in (False, True))
    table = Table(
        "", "own features, averaged", "local encoder, log-sum-exp",
        title=f"SCE, pocket, {data.train_slices} slices, 2 classes, 8 sub-classes; seconds of the processor",
    )  # fmt: skip
    table.add_row("epoch without SCE", *(f"{found['without']:.2f}" for found in (own, local)))
    table.add_row("epoch with SCE", *(f"{found['with']:.2f}" for found in (own, local)))
    table.add_row("added (bar 3 %)", *(f"{100 * found['added']:.1f} %" for found in (own, local)))
    table.add_row("pass before training, once", *(f"{found['first']:.2f} epochs" for found in (own, local)))
    Console().print(table)
    keys = {"epoch_overhead": own["added"], "default_epoch_overhead": local["added"]}
    print(json.dumps(keys | {"first_pass_epochs": own["first"]}))


if __name__ == "__main__":
    main()
