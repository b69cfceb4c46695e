"""SCE as a callback: gather features, cluster, hand the ids to the module."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor

from weakmedsam.contracts import CheckpointError, ConfigError, SliceBatch
from weakmedsam.subclasses import SubClasses, explore

SOURCES = ("bank", "pass")


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
        slices = trainer.datamodule.train_slices  # type: ignore[attr-defined]
        held = len(pl_module.subclass_ids)
        if held not in (0, slices):
            raise CheckpointError(
                f"the checkpoint was trained on {held} slices, the data have {slices}: it belongs to another data set or split"
            )
        if not held:
            self._cluster(trainer, pl_module, self._pass(trainer, pl_module))
        self._empty_bank(pl_module, slices)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: SliceBatch, batch_idx: int
    ) -> None:
        """Put the batch's features into the bank."""
        if self.source == "bank" and self.every_n_epochs:
            self._sum.index_add_(0, batch["index"], outputs["pooled"].float())
            self._seen.index_add_(0, batch["index"], torch.ones_like(batch["index"], dtype=torch.float32))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cluster for the next epoch."""
        found = None
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            found = self._cluster(trainer, pl_module, self._features(trainer, pl_module))
        for c, name in enumerate(pl_module.class_names):
            # NaN in an epoch without clustering: a figure that is not logged would keep its last value.
            pl_module.log(
                f"sce/inertia/{name}", float(found.inertia[c]) if found else math.nan, rank_zero_only=True
            )
            pl_module.log(
                f"sce/kept/{name}", float(found.kept[c]) if found else math.nan, rank_zero_only=True
            )
        self._sum.zero_()
        self._seen.zero_()

    def _empty_bank(self, module: LightningModule, slices: int) -> None:
        features = module.subclass_centroids.shape[-1]
        self._sum = torch.zeros(slices, features, device=module.device)
        self._seen = torch.zeros(slices, device=module.device)

    def _features(self, trainer: Trainer, module: LightningModule) -> Tensor:
        if self.source == "pass":
            return self._pass(trainer, module)
        # A sampler that pads lets two ranks see one slice: sums and counts, then their ratio.
        total = trainer.strategy.reduce(self._sum, reduce_op="sum")
        seen = trainer.strategy.reduce(self._seen, reduce_op="sum")
        if (seen == 0).any():  # a shortened epoch (trainer.limit_train_batches) leaves holes
            return self._pass(trainer, module)
        return total / seen[:, None]

    @torch.no_grad()
    def _pass(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """(N, D) pooled features of all training slices; each rank looks at its share."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        pooled = torch.zeros(data.train_slices, module.subclass_centroids.shape[-1], device=module.device)
        training = module.training
        module.eval()
        for batch in data.features_dataloader(trainer.global_rank, trainer.world_size):
            with trainer.precision_plugin.forward_context():
                features = module.backbone.encode(batch["image"].to(module.device)).features
            pooled[batch["index"].to(module.device)] = module.pool(features).flatten(1).float()
        module.train(training)
        return trainer.strategy.reduce(pooled, reduce_op="sum")

    def _cluster(self, trainer: Trainer, module: LightningModule, features: Tensor) -> SubClasses:
        """One clustering, on rank 0; every rank gets the same ids."""
        found: SubClasses | None = None
        labels = trainer.datamodule.train_labels()  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            previous = None
            if len(module.subclass_ids):
                nothing = torch.full((len(module.class_names),), torch.nan).numpy()
                held = module.subclass_ids.cpu().numpy(), module.subclass_centroids.float().cpu().numpy()
                previous = SubClasses(*held, nothing, nothing)
            gpu = module.device.index if module.device.type == "cuda" else None
            found = explore(
                features.cpu().numpy(),
                labels,
                module.class_names,
                module.sub_classes,
                self.seed,
                previous,
                gpu,
            )
        found = trainer.strategy.broadcast(found)
        module.subclass_ids = torch.from_numpy(found.ids).to(module.device)
        module.subclass_centroids = torch.from_numpy(found.centroids).to(module.device)
        return found
