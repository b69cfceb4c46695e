"""Stage 1: classification with sub-classes, from image-level labels.

Source: WeakMedSAM (arXiv 2503.04106): features of a SAM-like encoder, averaged over the image, feed a
class head and a sub-class head; loss = BCE(class) + 0.5 * BCE(sub-class).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from weakmedsam.backbones.base import Backbone
from weakmedsam.backbones.checkpoints import check_fit
from weakmedsam.classification.cam import Pooling, class_activation_map, mean_inside, pool_evidence
from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.classification.scan_bags import ScanScores, bag_loss, infer_presence
from weakmedsam.contracts import SliceBatch, VolumeBatch
from weakmedsam.errors import CheckpointError, ConfigError, check_range
from weakmedsam.fsdp import shard
from weakmedsam.geometry import inside_box, inside_cells
from weakmedsam.metrics.image_labels import LabelScores
from weakmedsam.optimizers import check_optimiser, count_steps
from weakmedsam.sce.config import SubClassTask
from weakmedsam.sce.subclasses import subclass_loss

CHECKPOINT_KEY = "weakmedsam"
NETWORK = ("backbone.", "local_encoder.", "class_head.", "subclass_head.")


class Activation(NamedTuple):
    """What one look at B slices gives; PAM starts from it.

    Attributes:
        logits: (B, C) class logits.
        cam: (B, C, h, w) in [0, 1]: class activation, or what ``WeakMedSAM.start`` gives in its place.
        embedding: (B, E, h', w') for the mask decoder, where it comes with the features; None beside a local
            encoder: ``WeakMedSAM.embedding`` makes it for those slices that are prompted.
    """

    logits: Tensor
    cam: Tensor
    embedding: Tensor | None

    def rows(self, rows: Tensor) -> Activation:
        """That of some slices."""
        embedding = None if self.embedding is None else self.embedding[rows]
        return Activation(self.logits[rows], self.cam[rows], embedding)


@runtime_checkable
class Exploration(Protocol):
    """What ``WeakMedSAM`` asks of the callback that finds the sub-classes.

    Attributes:
        sub_classes: how many there are, which is the size of their head, and what their loss weighs.
    """

    sub_classes: SubClassTask


class WeakMedSAM(LightningModule):
    """A SAM-like backbone with a class head and a sub-class head.

    Differs from the published code: several classes at once; a slice without any class is "none
    present" (output 0) of the sub-class head; padding around a scan takes no part in the pooling.

    Args:
        backbone: see ``backbones/base.py``.
        class_names: C names, in the order of the label's columns; the command line takes them from the
            data.
        local_encoder: what is classified, clustered and activated instead of the backbone's features,
            which then answers prompts only; null takes the backbone's features, as published. See
            ``local_encoder.py`` for why.
        pooling: how a class's evidence over the cells becomes its logit; ``cam.Pooling`` has every setting.
        trainable: the backbone's freezing policy, by name.
        learning_rate: peak of the one-cycle schedule of AdamW, above 0; the paper uses 1e-4.
        weight_decay: of AdamW, 0 or more; the paper uses 0.01.
        slices_per_step: slices of a volume encoded at once in test and prediction; bounds memory only.
        sce: finds the sub-classes (``callbacks.SubClassExploration``); null trains without them.
        pam: refines activation maps (``callbacks.PromptAffinityMining``); null does without.

    Raises:
        ConfigError: a number out of its range.
    """

    subclass_ids: Tensor
    """(N, C) int64 by training index: 0 = class absent, 1..K."""
    subclass_counts: Tensor
    """(C,) int64, clusters of each class, at most K; 0 = not yet known."""
    operating_points: Tensor
    """(C,) float32, probability from which on a slice is said to have a class, of the last validation of a training."""

    def __init__(
        self,
        backbone: Backbone,
        class_names: list[str],
        local_encoder: LocalEncoder | None = None,
        pooling: Pooling = Pooling(),  # noqa: B008
        trainable: str = "published",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        slices_per_step: int = 16,
        sce: Callback | None = None,
        pam: Callback | None = None,
    ) -> None:
        super().__init__()
        check_range("model.slices_per_step", slices_per_step, 1, 65_536)
        check_optimiser(learning_rate, weight_decay)
        self.pooling = pooling
        self.backbone = backbone
        self.local_encoder = local_encoder
        self.class_names = list(class_names)
        # Without SCE the head is there all the same, so that the random numbers after it are the same.
        self.sub_classes = SubClassTask() if sce is None else _task(sce)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.slices_per_step = slices_per_step
        self._callbacks = [callback for callback in (sce, pam) if callback is not None]
        self.feature_dim = backbone.feature_dim if local_encoder is None else local_encoder.feature_dim
        self.members = 1 if local_encoder is None else local_encoder.members
        classes = len(self.class_names)
        self.class_head = self._head(classes)
        self.subclass_head = self._head(classes * self.sub_classes.most + 1)
        # Beside a local encoder no gradient reaches the backbone.
        backbone.set_trainable(trainable if local_encoder is None else "none")
        # Without sub-classes no gradient reaches their head, and DDP would wait for one.
        self.subclass_head.requires_grad_(sce is not None)
        self.register_buffer("subclass_ids", torch.zeros(0, classes, dtype=torch.int64))
        self.register_buffer("subclass_counts", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("operating_points", torch.zeros(classes))
        self.label_scores = LabelScores(self.class_names)
        self.scan_scores: ScanScores | None = None  # where labels are of scans
        self.finished_cases: set[str] = set()
        self.views: list[tuple[int, ...]] = [()]
        self.start: Callable[[Tensor], Tensor] | None = None  # image -> cam, in place of the activation

    def _head(self, outputs: int) -> nn.Conv2d:
        """(B, M * D, h, w) -> (B, M * outputs, h, w): each member's evidence from its own features."""
        return nn.Conv2d(self.feature_dim, self.members * outputs, 1, groups=self.members, bias=False)

    def _weights(self, head: nn.Conv2d) -> Tensor:
        """(M, outputs, D) of a head."""
        return head.weight.unflatten(0, (self.members, -1)).flatten(2)

    def configure_callbacks(self) -> list[Callback]:
        """SCE and PAM, as set in ``model.sce`` and ``model.pam``."""
        return self._callbacks

    def configure_model(self) -> None:
        """Share parameters out where ``TRAINER=fsdp`` asks for it."""
        shard(self, "training_step")

    def forward(self, image: Tensor, scan: Tensor) -> Activation:
        """Classify slices and say where the evidence lies.

        Args:
            image: (B, 1, H, W) in [0, 1].
            scan: (B, 4) or (B, 1, H, W) bool, where the scan lies: see ``pool``.
        """
        if self.local_encoder is None:
            features, embedding = self.backbone.encode(image)
        else:
            features, embedding = self.local_encoder(image), None
        logits = self.logits(self.class_head, features, scan).mean(dim=0)
        if self.start is not None:
            return Activation(logits, self.start(image), embedding)
        # The class head is linear: its evidence of the sum of the views is the sum of its evidence, and so of members.
        views = [self.features(image.flip(axes)).flip(axes).float() for axes in self.views[1:]]
        weight = self._weights(self.class_head).transpose(0, 1).flatten(1)
        cam = class_activation_map(sum(views, features.float()), weight)
        return Activation(logits, cam, embedding)

    def embedding(self, seen: Activation, image: Tensor) -> Tensor:
        """What prompts of slices are answered from: as it came with their features, or encoded now.

        It is not kept: who needs it twice holds it.

        Args:
            seen: of B slices.
            image: (B, 1, S, S), the same slices.

        Returns:
            (B, E, h', w').
        """
        if seen.embedding is not None:
            return seen.embedding
        with self._precision():
            return torch.cat([self.backbone.embed(some) for some in image.split(self.slices_per_step)])

    def evidence(self, image: Tensor, scan: Tensor) -> Tensor:
        """(B, C) class logits of slices, however many, without what ``forward`` gives beside them.

        They are compared with each other, so whatever the features are computed in, the head is in float32.
        """
        parts = []
        for some, box in zip(image.split(self.slices_per_step), scan.split(self.slices_per_step), strict=True):
            with self._precision():
                features = self.features(some)
            with torch.autocast(features.device.type, enabled=False):
                head, members = self.class_head.weight.float(), self.members
                parts.append(self._pool_members(F.conv2d(features.float(), head, groups=members), box).mean(dim=0))
        return torch.cat(parts)

    def _precision(self) -> AbstractContextManager[Any]:
        """The trainer's, for what callbacks ask: they run outside of its own steps."""
        return nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()

    def features(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, M * D, h, w): what is classified and clustered, of one member after another."""
        return self.backbone.features(image) if self.local_encoder is None else self.local_encoder(image)

    def logits(self, head: nn.Conv2d, features: Tensor, scan: Tensor, mean: Tensor | None = None) -> Tensor:
        """(B, M * D, h, w) -> each member's logits: (M, B, C) of the class head, (M, B, C * K + 1) of the other.

        Averaging and the head are linear, so with ``average`` the mean feature is taken first, as the paper has
        it; ``mean`` (B, M * D) spares it where it is known. ``scan`` as in ``pool``.
        """
        if self.pooling.kind != "average":
            return self._pool_members(head(features), scan)
        if mean is None:
            mean = mean_inside(features, self.inside(scan, features.shape[-1]))
        with torch.autocast(features.device.type, enabled=False):
            means = mean.unflatten(1, (self.members, -1)).transpose(0, 1)
            return torch.bmm(means, self._weights(head).float().transpose(1, 2))

    def _pool_members(self, evidence: Tensor, scan: Tensor) -> Tensor:
        """(B, M * C, h, w) -> (M, B, C)."""
        return self.pool(evidence, scan).unflatten(1, (self.members, -1)).transpose(0, 1)

    def pool(self, evidence: Tensor, scan: Tensor) -> Tensor:
        """(B, C, h, w) evidence of each class (or sub-class) at every cell -> (B, C) logits.

        ``scan`` is (B, 4), the box of the scan in the frame, or (B, 1, H, W) bool, its pixels.
        """
        inside = self.inside(scan, evidence.shape[-1])
        return pool_evidence(evidence, inside, self.pooling)

    def inside(self, scan: Tensor, cells: int) -> Tensor:
        """(B, 1, cells, cells) bool, which cells lie on the scan; ``scan`` as in ``pool``."""
        return inside_cells(scan, cells) if scan.ndim == 4 else inside_box(scan, self.backbone.image_size, cells)

    def describe(self, features: Tensor, scan: Tensor) -> Tensor:
        """(B, M * D, h, w) -> (B, M * D), the average over the scan, no gradient: what SCE clusters."""
        return mean_inside(features.detach(), self.inside(scan, features.shape[-1]))

    def on_train_start(self) -> None:
        """Refuse to lengthen a finished schedule.

        Raises:
            CheckpointError: the checkpoint's one-cycle schedule has another number of steps.
        """
        held = cast(OneCycleLR, self.trainer.lr_scheduler_configs[0].scheduler).total_steps
        wanted = count_steps(self.trainer)
        if held != wanted:
            raise CheckpointError(
                f"the checkpoint's one-cycle schedule has {held} steps, this run {wanted} (other data, epochs or batch "
                "size): continue with the same settings, or start anew without --ckpt_path"
            )

    def training_step(self, batch: SliceBatch, batch_idx: int) -> dict[str, Tensor]:
        """BCE over classes plus weighted BCE over sub-classes; SCE also gets the pooled features."""
        features = self.features(batch["image"])
        # Augmentation has moved the scan in its frame.
        scan = batch["scan"] if "scan" in batch else batch["box"]
        inside = self.inside(scan, features.shape[-1])
        mean = mean_inside(features, inside) if self.pooling.kind == "average" else None
        class_logits = self.logits(self.class_head, features, scan, mean)
        if "bag" in batch:
            class_loss = bag_loss(class_logits, batch["label"], batch["bag"])
        else:
            class_loss = F.binary_cross_entropy_with_logits(class_logits, batch["label"].expand_as(class_logits))
        loss, size = class_loss, len(batch["index"])
        figures = {"train/class_loss": class_loss}
        if len(self.subclass_ids):
            logits = self.logits(self.subclass_head, features, scan, mean)
            ids = self.subclass_ids[batch["index"]].repeat(self.members, 1)
            extra_loss = subclass_loss(logits.flatten(0, 1), ids, self.subclass_counts)
            loss = class_loss + self.sub_classes.weight * extra_loss
            figures["train/subclass_loss"] = extra_loss
        elif self.subclass_head.weight.requires_grad:
            # Before the first clustering (model.sce.first: bank); DDP waits for a gradient of every weight.
            loss = class_loss + 0 * self.subclass_head.weight.sum()
        # The mean over an epoch's slices on all ranks: one rank has seen its own share only.
        self.log_dict(figures, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)
        if not self.subclass_head.weight.requires_grad:
            return {"loss": loss}
        pooled = self.describe(features, scan) if mean is None else mean.detach()
        return {"loss": loss, "pooled": pooled, "logits": class_logits.detach().mean(dim=0)}

    def validation_step(self, batch: SliceBatch, batch_idx: int) -> Activation:  # type: ignore[override]
        """Class loss, AUROC and average precision; the activation goes on to PAM."""
        activation = self(batch["image"], batch["box"])
        if "bag" in batch:
            self.scan_scores = self.scan_scores or ScanScores(len(self.class_names)).to(self.device)
            self.scan_scores.update(activation.logits, batch["label"], batch["bag"])
        else:
            loss = F.binary_cross_entropy_with_logits(activation.logits, batch["label"])
            self.log("val/loss", loss, batch_size=len(batch["label"]), sync_dist=True)
        self.label_scores.update(activation.logits, batch["label"])
        return activation

    def test_step(self, batch: VolumeBatch, batch_idx: int) -> Activation:  # type: ignore[override]
        """The same figures over whole volumes."""
        activation = self.look_at_volume(batch)
        self.label_scores.update(activation.logits, batch["label"])
        return activation

    def predict_step(self, batch: VolumeBatch, batch_idx: int) -> Activation | None:
        """Look at a volume for PAM, unless its pseudo-label is there already.

        Of a scan that is labelled as a whole, ``label`` becomes what the classifier says of its slices.
        """
        if batch["case"] in self.finished_cases:
            return None
        activation = self.look_at_volume(batch)
        if "label" in batch:
            batch["label"] = infer_presence(activation.logits, batch["label"], self.operating_points)
        return activation

    def log_odds_of_presence(self, logits: Tensor) -> Tensor:
        """(B, C) of class logits: log-odds above the operating points of validation; infinite where a point is 0."""
        return logits.float() - self.operating_points.logit()

    def look_at_volume(self, batch: VolumeBatch) -> Activation:
        """``forward`` over the slices of a volume, a few at a time."""
        parts = [
            self(chunk, batch["box"].expand(len(chunk), 4)) for chunk in batch["image"].split(self.slices_per_step)
        ]
        embeddings = [part.embedding for part in parts if part.embedding is not None]
        return Activation(
            torch.cat([part.logits for part in parts]),
            torch.cat([part.cam for part in parts]),
            torch.cat(embeddings) if embeddings else None,
        )

    def on_validation_epoch_end(self) -> None:
        """Log ``val/auroc`` and ``val/ap``, per class and as their mean; keep the operating points of a training.

        With labels of scans ``val/loss`` and operating points are of scans; the others too, where no mask knows more.
        """
        scans = None if self.scan_scores is None else self.scan_scores.finish()
        if scans is not None:
            self.log("val/loss", scans.loss)
            if scans.open:
                self.label_scores.reset()
                self.label_scores.update(scans.highest, scans.label)
        self._log_scores("val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.operating_points.copy_(self.label_scores.points if scans is None else scans.points)

    def on_test_epoch_end(self) -> None:
        """Log ``test/auroc`` and ``test/ap``."""
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        for name, value in self.label_scores.finish().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "auroc")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on what is not frozen, with a one-cycle schedule over all steps.

        Raises:
            ConfigError: the run has no end.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = OneCycleLR(optimizer, self.learning_rate, total_steps=count_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put what the checkpoint is of beside its weights."""
        checkpoint[CHECKPOINT_KEY] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another model's checkpoint; make room for its sub-class ids.

        Raises:
            CheckpointError: another backbone, other classes or another number of sub-classes; names both.
        """
        theirs, ours = checkpoint.get(CHECKPOINT_KEY), self._identity()
        if theirs is None:
            raise CheckpointError(
                "the checkpoint is not one of WeakMedSAM's classification stage; "
                "pass one of runs/*/*/classify/checkpoints"
            )
        for key, value in ours.items():
            if theirs.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint was made with {key} {theirs.get(key)!r}, this run has {value!r}: "
                    "choose the checkpoint or the setting to fit"
                )
        # Of the same name a backbone can still have another shape: LoRA's rank, the frame it encodes.
        held = checkpoint["state_dict"]
        check_fit(self._network(self.state_dict()), self._network(held), "the checkpoint", self.backbone.name)
        self.subclass_ids = torch.zeros_like(held["subclass_ids"], device=self.device)
        for key in ("subclass_counts", "operating_points"):
            held.setdefault(key, torch.zeros_like(getattr(self, key)))  # of an earlier version

    @staticmethod
    def _network(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Backbone and heads: what has one shape whatever the data."""
        return {key: value for key, value in state.items() if key.startswith(NETWORK)}

    def _identity(self) -> dict[str, Any]:
        number = self.sub_classes.most
        return {
            "backbone": self.backbone.name,
            "class_names": self.class_names,
            "sub_classes": f"auto, at most {number}" if self.sub_classes.automatic else number,
            **{f"pooling.{key}": value for key, value in asdict(self.pooling).items()},
            "local_encoder": self.local_encoder is not None,
        }


def _task(sce: Callback) -> SubClassTask:
    """What SCE says of the sub-class head."""
    if not isinstance(sce, Exploration):
        raise ConfigError(
            f"model.sce is {type(sce).__name__}, which has no sub_classes; use "
            "weakmedsam.callbacks.SubClassExploration or one like it, or null"
        )
    return sce.sub_classes
