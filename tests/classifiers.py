"""Tiny classification networks and their training, for the tests of what is around them."""

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from pam_settings import pam_callback
from tiny import TinyBackbone

from weakmedsam.callbacks import History, SubClassExploration
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.sce.config import SubClassTask

NAMES = ["lesion", "cyst"]


def explorer(number=3, maximum=8, **changes):
    return SubClassExploration(SubClassTask(number, maximum), **changes)


def module(sce=True, pam=False, **changes):
    torch.manual_seed(0)
    if isinstance(sce, bool):
        sce = explorer() if sce else None
    miner = pam_callback(walk__map_size=16, affinity__radius=2.0) if pam else None
    return WeakMedSAM(TinyBackbone(), NAMES, sce=sce, pam=miner, **{"learning_rate": 1e-2, **changes})


def trainer(folder, epochs=3, *callbacks):
    shared = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    best = ModelCheckpoint(
        folder / "checkpoints",
        "best",
        monitor="val/auroc",
        mode="max",
        auto_insert_metric_name=False,
        **shared,
    )
    last = ModelCheckpoint(folder / "checkpoints", "last", **shared)
    return Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[History(), best, last, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


class Die(Callback):
    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise RuntimeError("killed")
