"""SCE as a callback: gather features, cluster, hand the ids to the module. See ``docs/sce.md``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from weakmedsam.backbones.resnet18 import ResNet18
from weakmedsam.callbacks.feature_bank import FeatureBank
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.classification.scan_bags import infer_presence
from weakmedsam.contracts import SOMEWHERE, SliceBatch
from weakmedsam.errors import CheckpointError, ConfigError, check_choice, check_range
from weakmedsam.fsdp import gathered
from weakmedsam.sce.config import Clustering, SubClassTask
from weakmedsam.sce.figures import ClusterRow, draw_clusters
from weakmedsam.sce.kmeans import KMeans
from weakmedsam.sce.subclasses import SubClasses, explore, nearest_members

FEATURE_SOURCES = ("bank", "pass", "resnet18")
FIRSTS = ("pass", "bank")


class TrainingData(Protocol):
    """What ``SubClassExploration`` asks of the data module.

    Attributes:
        train_slices: N, how many training slices there are.
    """

    train_slices: int

    def train_labels(self) -> NDArray[np.float32]:
        """(N, C) in {0, 1, SOMEWHERE}, by the slice's index."""

    def train_cases(self) -> NDArray[np.int64]:
        """(N,) number of each slice's case, by the slice's index."""

    def features_dataloader(self, rank: int, world: int) -> DataLoader[SliceBatch]:
        """Each training slice once, unaugmented: this rank's share of ``world``."""


class SubClassExploration(Callback):
    """Recompute the sub-classes from the features of the network being trained.

    Before the first epoch every training slice is looked at once. After an epoch the ids for the next
    one are found from the features that its training batches have left in a bank, so clustering needs
    no further pass. The ids lie in the module's buffer ``subclass_ids``, by the slice's index, and so in
    every checkpoint and within reach of any loader's worker.

    With labels of scans the slices of a class are those that the network itself finds in them. Before the first epoch
    it finds none: there is then no clustering, as with ``first: bank``.

    Logs per class and epoch: ``sce/kept``, ``sce/case_information``, ``sce/inertia``, ``sce/used``,
    ``sce/size_min``, ``sce/size_max`` and ``sce/imbalance``. Draws the slices nearest to each centroid at the
    first and the last clustering into ``subclasses/`` of the run's folder. ``docs/sce.md`` defines them.

    Differs from the published code: it clusters once, before training, on ResNet-18 features, and
    includes validation and test patients.

    Args:
        sub_classes: how many there are, and what their loss weighs. This and the next: ``sce.config``.
        kmeans: how k-means starts, and what it measures.
        every_n_epochs: epochs between two clusterings, 0 to 1,000,000; 0, as published: once, at the start.
        source: ``bank``, features of the epoch's own, augmented training batches, no further pass | ``pass``, every
            training slice once more after each epoch, unaugmented | ``resnet18``, as published: the 512 pooled features
            of torchvision's ResNet-18, unaugmented, before training; ``every_n_epochs`` must be 0.
        first: features of the first clustering: ``pass``, every slice before the first epoch | ``bank`` of the first
            epoch, which then has no sub-class loss; with source ``bank`` only.
        weights: of ``resnet18``: ``official`` | ``none`` (random) | a path.
        pictures: slices shown of each cluster, 0 to 1,000; 0: no pictures.

    Raises:
        ConfigError: an unknown source, settings that contradict each other, or a number out of its range.
    """

    def __init__(
        self,
        sub_classes: SubClassTask = SubClassTask(),  # noqa: B008
        kmeans: Clustering = Clustering(),  # noqa: B008
        every_n_epochs: int = 1,
        source: str = "bank",
        first: str = "pass",
        weights: str = "official",
        pictures: int = 8,
    ) -> None:
        check_choice("model.sce.source", source, FEATURE_SOURCES)
        check_choice("model.sce.first", first, FIRSTS)
        if first == "bank" and source != "bank":
            raise ConfigError(f"model.sce.first is bank, which model.sce.source {source} does not fill; set pass")
        check_range("model.sce.every_n_epochs", every_n_epochs, 0, 1_000_000)
        if source == "resnet18" and every_n_epochs:
            raise ConfigError(
                f"model.sce.every_n_epochs is {every_n_epochs}, but the features of model.sce.source resnet18 do not "
                "change with training; set 0"
            )
        check_range("model.sce.pictures", pictures, 0, 1000)
        self.sub_classes = sub_classes
        self.every_n_epochs = every_n_epochs
        self.source = source
        self.first = first
        self.weights = weights
        self.pictures = pictures
        self.kmeans = KMeans(**asdict(kmeans))
        self.bank = FeatureBank()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """First clustering, unless a checkpoint has brought the ids or the bank of epoch 0 is to do.

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
        waits = self.first == "bank" or (self.source != "resnet18" and _by_scan(trainer))
        if not held and not waits:
            features = self._published(trainer, module) if self.source == "resnet18" else self._pass(trainer, module)
            self._cluster(trainer, module, features)
        self.bank.clear()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: SliceBatch,
        batch_idx: int,
    ) -> None:
        """Put the batch's features into the bank, if a clustering follows this epoch."""
        if self.source == "bank" and self._is_due(trainer, cast(WeakMedSAM, pl_module)):
            found = cast(Mapping[str, Tensor], outputs)
            rows = torch.cat([found["pooled"], found["logits"]], dim=1) if "bag" in batch else found["pooled"]
            self.bank.add(batch["index"], rows)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cluster for the next epoch, and log."""
        module = cast(WeakMedSAM, pl_module)
        found = None
        if self._is_due(trainer, module):
            found = self._cluster(trainer, module, self._features(trainer, module))
        self._log(module, found)
        self.bank.clear()

    def _is_due(self, trainer: Trainer, module: WeakMedSAM) -> bool:
        if not len(module.subclass_ids):
            return True
        return bool(self.every_n_epochs) and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _features(self, trainer: Trainer, module: WeakMedSAM) -> NDArray[np.float32] | None:
        if self.source == "bank":
            slices = _data(trainer).train_slices
            found, complete = self.bank.gather(slices, _columns(trainer, module), trainer.strategy, module.device)
            self.bank.clear()
            if complete:  # a shortened epoch (trainer.limit_train_batches) leaves holes
                return found
        return self._pass(trainer, module)

    @torch.no_grad()
    def _pass(self, trainer: Trainer, module: WeakMedSAM) -> NDArray[np.float32] | None:
        """(N, D) pooled features of all training slices, on rank 0, and with labels of scans C logits beside them.

        Each rank looks at its share.
        """
        by_scan = _by_scan(trainer)

        def look(batch: SliceBatch) -> Tensor:
            box = batch["box"].to(module.device)
            with trainer.precision_plugin.forward_context():
                features = module.features(batch["image"].to(module.device))
                logits = [module.logits(module.class_head, features, box).mean(dim=0)] if by_scan else []
            return torch.cat([module.describe(features, box), *logits], dim=1)

        training = module.training
        module.eval()
        with gathered(module):
            found = _look_at_all(trainer, module.device, look, _columns(trainer, module))
        module.train(training)
        return found

    @torch.no_grad()
    def _published(self, trainer: Trainer, module: WeakMedSAM) -> NDArray[np.float32] | None:
        """(N, 512) features of ResNet-18, on rank 0."""
        network = ResNet18(self.weights).to(module.device)
        return _look_at_all(
            trainer,
            module.device,
            lambda batch: network(batch["image"].to(module.device)),
            network.feature_dim,
        )

    def _cluster(self, trainer: Trainer, module: WeakMedSAM, features: NDArray[np.float32] | None) -> SubClasses:
        """One clustering, on rank 0; every rank gets the same ids."""
        mine: SubClasses | None = None
        is_first = not len(module.subclass_ids)
        if features is not None:
            features, labels = self._labelled(trainer, module, features)
            mine = explore(
                features,
                labels,
                module.class_names,
                self.sub_classes.most,
                self.kmeans.on(module.device.index if module.device.type == "cuda" else None),
                previous=None if is_first else module.subclass_ids.cpu().numpy(),
                counts=module.subclass_counts.cpu().numpy(),
                automatic=self.sub_classes.automatic,
                cases=_data(trainer).train_cases(),
            )
        found = cast(SubClasses, trainer.strategy.broadcast(mine))
        module.subclass_ids = torch.from_numpy(found.ids).to(module.device)
        module.subclass_counts = torch.from_numpy(found.counts).to(module.device)
        if self.pictures and trainer.is_global_zero and (is_first or self._is_last(trainer)):
            self._draw(trainer, module.class_names, found)
        return found

    def _labelled(
        self, trainer: Trainer, module: WeakMedSAM, kept: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(N, D) features and (N, C) labels of slices, those of scans replaced by what the logits beside them say."""
        labels = _data(trainer).train_labels()
        if not _by_scan(trainer):
            return kept, labels
        if self.source == "resnet18":  # which knows of no class
            return kept, (labels != 0).astype(np.float32)
        features, logits = np.split(kept, [module.feature_dim], axis=1)
        given, points = torch.from_numpy(labels), module.operating_points.cpu()
        found = infer_presence(torch.from_numpy(logits), given, points, torch.from_numpy(_data(trainer).train_cases()))
        return np.ascontiguousarray(features), found.numpy()

    def _is_last(self, trainer: Trainer) -> bool:
        epochs, n = trainer.max_epochs or 0, self.every_n_epochs
        return n > 0 and trainer.current_epoch + 1 == epochs - epochs % n

    def _log(self, module: WeakMedSAM, found: SubClasses | None) -> None:
        ids, counts = module.subclass_ids.cpu().numpy(), module.subclass_counts.tolist()
        for c, name in enumerate(module.class_names):
            sizes = np.bincount(ids[:, c], minlength=counts[c] + 1)[1 : counts[c] + 1]
            figures = {
                # NaN in an epoch without clustering: a figure that is not logged would keep its last value.
                "inertia": float(found.inertia[c]) if found else math.nan,
                "kept": float(found.kept[c]) if found else math.nan,
                "case_information": float(found.case_information[c]) if found else math.nan,
                "used": float((sizes > 0).sum()),
                "size_min": float(sizes.min()),
                "size_max": float(sizes.max()),
                "imbalance": float(sizes.max() / sizes.mean()),
            }
            for figure, value in figures.items():
                module.log(f"sce/{figure}/{name}", value, rank_zero_only=True)

    def _draw(self, trainer: Trainer, class_names: list[str], found: SubClasses) -> None:
        data = _data(trainer).features_dataloader(0, 1).dataset
        paths = []
        for c, name in enumerate(class_names):
            rows = []
            for k, members in enumerate(nearest_members(found, c, self.pictures), start=1):
                images = [data[int(row)]["image"][0].numpy() for row in members]
                rows.append(ClusterRow(f"{k}: {(found.ids[:, c] == k).sum()}", images))
            safe = re.sub(r"[^\w-]+", "_", name)
            folder = Path(trainer.default_root_dir) / "subclasses"
            paths.append(folder / f"epoch_{trainer.current_epoch:03d}_{safe}.png")
            title = f"{name}, epoch {trainer.current_epoch}: slices nearest to each centroid (cluster: size)"
            draw_clusters(rows, title, paths[-1])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("subclasses", [str(path) for path in paths], step=trainer.global_step)


def _look_at_all(
    trainer: Trainer, device: torch.device, look: Callable[[SliceBatch], Tensor], dimension: int
) -> NDArray[np.float32] | None:
    """(N, D), on rank 0, of what ``look`` makes of each batch of this rank's share."""
    data, bank = _data(trainer), FeatureBank()
    for batch in data.features_dataloader(trainer.global_rank, trainer.world_size):
        bank.add(batch["index"].to(device), look(batch))
    found, complete = bank.gather(data.train_slices, dimension, trainer.strategy, device)
    assert complete
    return found


def _by_scan(trainer: Trainer) -> bool:
    """Whether of some training slices only is known what their scan shows."""
    return bool((_data(trainer).train_labels() == SOMEWHERE).any())


def _columns(trainer: Trainer, module: WeakMedSAM) -> int:
    """Columns that are kept of a slice: its features, and with labels of scans its logits."""
    return module.feature_dim + (len(module.class_names) if _by_scan(trainer) else 0)


def _data(trainer: Trainer) -> TrainingData:
    return cast(TrainingData, trainer.datamodule)  # type: ignore[attr-defined]
