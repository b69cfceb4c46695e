"""SCE as a callback: gather features, cluster, hand the ids to the module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol, cast

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from numpy.typing import NDArray
from torch import Tensor

from weakmedsam.classify import WeakMedSAM
from weakmedsam.contracts import CheckpointError, ConfigError, SliceBatch, check_least
from weakmedsam.subclasses import SubClasses, explore

SOURCES = ("bank", "pass")


class TrainingData(Protocol):
    """What ``SubClassExploration`` asks of the data module.

    Attributes:
        train_slices: N, how many training slices there are.
    """

    train_slices: int

    def train_labels(self) -> NDArray[np.float32]:
        """(N, C) in {0, 1}, by the slice's index."""

    def features_dataloader(self, rank: int, world: int) -> Iterable[SliceBatch]:
        """Each training slice once, unaugmented: this rank's share of ``world``."""


class SubClassExploration(Callback):
    """Recompute the sub-classes from the features of the network being trained.

    Before the first epoch every training slice is looked at once. After an epoch the ids for the next
    one are found from the features that its training batches have left in a bank, so clustering needs
    no further pass. The ids lie in the module's buffer ``subclass_ids``, by the slice's index, and so in
    every checkpoint and within reach of any loader's worker.

    Differs from the published code: it clusters once, before training, on ResNet-18 features, and
    includes validation and test patients.

    Args:
        every_n_epochs: epochs between two clusterings; 0 = once, before training.
        source: ``bank`` uses features of the (augmented) training batches; ``pass`` looks at every
            training slice again, unaugmented, which costs a forward pass an epoch.
        seed: of k-means.

    Raises:
        ConfigError: an unknown source.
    """

    def __init__(self, every_n_epochs: int = 1, source: str = "bank", seed: int = 0) -> None:
        if source not in SOURCES:
            raise ConfigError(f"model.sce.source: {source!r} is unknown; choose one of {', '.join(SOURCES)}")
        check_least("model.sce.every_n_epochs", every_n_epochs, 0)
        self.every_n_epochs = every_n_epochs
        self.source = source
        self.seed = seed
        self._sum = torch.zeros(0)
        self._seen = torch.zeros(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """First clustering, unless a checkpoint has brought the ids.

        Raises:
            CheckpointError: the checkpoint's ids are of other training data.
        """
        module = cast(WeakMedSAM, pl_module)
        slices, held = _data(trainer).train_slices, len(module.subclass_ids)
        if held not in (0, slices):
            raise CheckpointError(
                f"the checkpoint was trained on {held} slices, the data have {slices}: it belongs to another "
                "data set or split"
            )
        if not held:
            self._cluster(trainer, module, self._pass(trainer, module))
        self._empty_bank(module, slices)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: SliceBatch,
        batch_idx: int,
    ) -> None:
        """Put the batch's features into the bank."""
        if self.source == "bank" and self.every_n_epochs:
            pooled = cast(Mapping[str, Tensor], outputs)["pooled"]
            self._sum.index_add_(0, batch["index"], pooled.float())
            self._seen.index_add_(0, batch["index"], torch.ones_like(batch["index"], dtype=torch.float32))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cluster for the next epoch."""
        module = cast(WeakMedSAM, pl_module)
        found = None
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            found = self._cluster(trainer, module, self._features(trainer, module))
        for c, name in enumerate(module.class_names):
            # NaN in an epoch without clustering: a figure that is not logged would keep its last value.
            inertia, kept = (found.inertia[c], found.kept[c]) if found else (math.nan, math.nan)
            module.log(f"sce/inertia/{name}", float(inertia), rank_zero_only=True)
            module.log(f"sce/kept/{name}", float(kept), rank_zero_only=True)
        self._sum.zero_()
        self._seen.zero_()

    def _empty_bank(self, module: WeakMedSAM, slices: int) -> None:
        features = module.feature_dim
        self._sum = torch.zeros(slices, features, device=module.device)
        self._seen = torch.zeros(slices, device=module.device)

    def _features(self, trainer: Trainer, module: WeakMedSAM) -> Tensor:
        if self.source == "pass":
            return self._pass(trainer, module)
        # A sampler that pads lets two ranks see one slice: sums and counts, then their ratio.
        total = trainer.strategy.reduce(self._sum, reduce_op="sum")
        seen = trainer.strategy.reduce(self._seen, reduce_op="sum")
        if (seen == 0).any():  # a shortened epoch (trainer.limit_train_batches) leaves holes
            return self._pass(trainer, module)
        return total / seen[:, None]

    @torch.no_grad()
    def _pass(self, trainer: Trainer, module: WeakMedSAM) -> Tensor:
        """(N, D) pooled features of all training slices; each rank looks at its share."""
        data = _data(trainer)
        pooled = torch.zeros(data.train_slices, module.feature_dim, device=module.device)
        training = module.training
        module.eval()
        for batch in data.features_dataloader(trainer.global_rank, trainer.world_size):
            with trainer.precision_plugin.forward_context():
                features = module.features(batch["image"].to(module.device))
            pooled[batch["index"].to(module.device)] = module.describe(
                features, batch["box"].to(module.device)
            ).float()
        module.train(training)
        return trainer.strategy.reduce(pooled, reduce_op="sum")

    def _cluster(self, trainer: Trainer, module: WeakMedSAM, features: Tensor) -> SubClasses:
        """One clustering, on rank 0; every rank gets the same ids."""
        mine: SubClasses | None = None
        labels = _data(trainer).train_labels()
        if trainer.is_global_zero:
            previous = module.subclass_ids.cpu().numpy() if len(module.subclass_ids) else None
            gpu = module.device.index if module.device.type == "cuda" else None
            names, clusters = module.class_names, module.sub_classes
            mine = explore(features.cpu().numpy(), labels, names, clusters, self.seed, previous, gpu)
        found = cast(SubClasses, trainer.strategy.broadcast(mine))
        module.subclass_ids = torch.from_numpy(found.ids).to(module.device)
        return found


def _data(trainer: Trainer) -> TrainingData:
    return cast(TrainingData, trainer.datamodule)  # type: ignore[attr-defined]
