"""Stage 2: a segmentation network learns the pseudo-labels; it is what is used and scored in the end."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from weakmedsam.contracts import IGNORE, Frame, SliceBatch, VolumeBatch
from weakmedsam.errors import CheckpointError, ConfigError, check_range
from weakmedsam.fsdp import shard
from weakmedsam.geometry import to_native
from weakmedsam.metrics.overlap_surface import VolumeDice
from weakmedsam.optimizers import check_optimiser, count_steps
from weakmedsam.segmentation.evaluator import Evaluation
from weakmedsam.segmentation.loss import Loss, segmentation_loss
from weakmedsam.segmentation.prediction_writer import check_new_scans, save_segmentation
from weakmedsam.system.library_errors import is_short_of_memory

SIGNATURE = "segmenter"
"""Key of a checkpoint under which it says what it is of."""


class SegmentationData(Protocol):
    """What ``Segmenter`` asks of the data module.

    Attributes:
        class_names: names of the classes, id 1 first.
        has_val_masks: whether validation batches hold ``mask``; if not, they hold ``target``.
        val_cases: the case of each validation slice, by ``index``.
    """

    class_names: list[str]
    has_val_masks: bool
    val_cases: list[str]


def build_network(name: str, arguments: dict[str, Any], num_classes: int) -> nn.Module:
    """A network (B, 1, S, S) -> logits (B, C + 1, S, S), background first, by its class's import path.

    Raises:
        ConfigError: there is no such class, or it does not take these arguments; the message names both.
    """
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ConfigError(f"model.network: {name!r} is no class of networks (torch.nn.Module)")
        return kind(spatial_dims=2, in_channels=1, out_channels=num_classes + 1, **arguments)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.network: {name!r} cannot be built ({error}); e.g. monai.networks.nets.BasicUNet"
        ) from error
    except (TypeError, RuntimeError) as error:
        if is_short_of_memory(error):
            raise
        raise ConfigError(f"model.network_args: {name} does not take {arguments} ({error})") from error


def network_signature(network: nn.Module) -> str:
    """A network in a line: its class, its size, and a checksum of its parameters' names and shapes."""
    shapes = [(name, tuple(value.shape)) for name, value in network.state_dict().items()]
    count = sum(parameter.numel() for parameter in network.parameters())
    return f"{type(network).__name__}, {count:,} parameters, shapes {zlib.crc32(repr(shapes).encode()):08x}"


class Segmenter(LightningModule):
    """A segmentation network that is trained on pseudo-labels and tested against expert masks.

    Logs ``train/loss``; ``val/score``, which chooses the checkpoint, and what it is: ``val/dice`` and
    ``val/dice/<class>`` where there are expert masks, else ``val/agreement`` and
    ``val/agreement/<class>`` with the pseudo-labels, and ``val/loss``; ``test/...`` as in
    ``docs/metrics.md``. The test writes ``cases.csv``, ``summary.json`` and ``pictures/<case>.png``
    into the trainer's ``default_root_dir``.

    Args:
        network: import path of a network class with MONAI's arguments ``spatial_dims``, ``in_channels``
            and ``out_channels``, which are set here to 2, 1 and C + 1. The image size is the network's to
            allow: MONAI's BasicUNet takes any from 16 pixels, its UNet multiples of the product of its
            strides.
        class_names: names of the classes, id 1 first; the command line takes them from the data.
        network_args: its other arguments.
        loss: weights of the loss, and what is left out of it; ``loss.Loss`` has every setting.
        learning_rate: peak of the one-cycle schedule, per step, above 0. Default 1e-3, which suits some hundred
            steps; published 1e-4.
        weight_decay: of AdamW, 0 or more; published 0.1.
        warmup: fraction of all steps, in (0, 1), over which the learning rate rises to its peak
            (one-cycle's default).
        slices_per_step: slices that go through the network at once in the test.

    Raises:
        ConfigError: arguments out of range or at odds with each other.
    """

    val_overlap: VolumeDice

    def __init__(
        self,
        network: str,
        class_names: list[str],
        network_args: dict[str, Any] | None = None,
        loss: Loss = Loss(),  # noqa: B008
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.3,
        slices_per_step: int = 16,
    ) -> None:
        super().__init__()
        check_range("model.warmup", warmup, 0, 1, above=True, below=True)
        check_range("model.slices_per_step", slices_per_step, 1, 65_536)
        check_optimiser(learning_rate, weight_decay)
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.network = build_network(network, network_args or {}, self.num_classes)
        self._made_by: dict[str, Any] = {"class_path": network, "arguments": dict(network_args or {})}
        self.loss = loss
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.slices_per_step = slices_per_step
        self.val_loss = MeanMetric()
        self._evaluation: Evaluation | None = None
        self._image_size: int | None = None  # side of the frames that it is trained on, pixels

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, S, S) in [0, 1] to logits (B, C + 1, S, S), background first.

        Raises:
            ConfigError: the network gives another number of channels, or does not take frames of this size.
        """
        logits = self._ask_network(image)
        channels = logits.shape[1] if isinstance(logits, Tensor) else type(logits).__name__
        if channels != self.num_classes + 1:
            raise ConfigError(
                f"network gives {channels} channels; {self.num_classes} classes and background need "
                f"{self.num_classes + 1}. It must obey out_channels, without deep supervision."
            )
        return logits

    def _ask_network(self, image: Tensor) -> Tensor:
        try:
            return cast(Tensor, self.network(image))
        except (RuntimeError, ValueError) as error:
            # Whether it is the size shows on zeros: other faults (of a device, say) keep their own words.
            if self._image_size is not None or is_short_of_memory(error) or self._takes(image.shape[-1]):
                raise
            raise ConfigError(
                f"data.image_size is {image.shape[-1]}, which model.network {self._made_by['class_path']} does not "
                f"take ({str(error).partition(chr(10))[0]})"
            ) from error

    def _takes(self, size: int) -> bool:
        """Whether a network of this kind takes slices of this size."""
        network = build_network(self._made_by["class_path"], self._made_by["arguments"], self.num_classes)
        try:
            network.train(self.network.training)(torch.zeros(1, 1, size, size))
        except (RuntimeError, ValueError):
            return False
        return True

    # Setting up

    def setup(self, stage: str) -> None:
        """Meet the data.

        Raises:
            ConfigError: no data module, or one of other classes.
        """
        if getattr(self.trainer, "datamodule", None) is None:  # Lightning sets it only where there is one
            raise ConfigError("Segmenter needs a data module: it says which case a validation slice is of.")
        data = cast(SegmentationData, self.trainer.datamodule)  # type: ignore[attr-defined]
        if list(data.class_names) != self.class_names:
            raise ConfigError(f"class_names are {self.class_names}, the data's are {list(data.class_names)}.")
        if stage == "predict":
            check_new_scans(data)
        if stage in ("fit", "validate"):
            self.val_overlap = VolumeDice(data.val_cases, self.num_classes)
            self._truth = "mask" if data.has_val_masks else "target"

    def configure_model(self) -> None:
        """Share parameters out where ``TRAINER=fsdp`` asks for it."""
        shard(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a one-cycle schedule over all steps.

        Raises:
            ConfigError: the run has no end.
        """
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=count_steps(self.trainer), pct_start=self.warmup
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what it is of."""
        checkpoint[SIGNATURE] = {
            "network": network_signature(self.network),
            "class_names": self.class_names,
            "made_by": self._made_by,
            "image_size": self._image_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else, before its tensors fail to fit.

        Raises:
            CheckpointError: it is of another network, of other classes or of no Segmenter.
        """
        saved = checkpoint.get(SIGNATURE)
        if saved is None:
            raise CheckpointError("The checkpoint is not of a Segmenter. Give one of the segmentation stage.")
        wanted = network_signature(self.network)
        if list(saved["class_names"]) != self.class_names:
            raise CheckpointError(
                f"The checkpoint is of the classes {list(saved['class_names'])}, the settings say {self.class_names}."
            )
        if saved["network"] != wanted:
            raise CheckpointError(f"The checkpoint is of the network {saved['network']}; the settings say {wanted}.")

    # Training and validation

    def training_step(self, batch: SliceBatch, batch_idx: int) -> Tensor:
        """Loss of a batch with ``target`` and, where there is one, ``confidence``."""
        loss = self._loss(self(batch["image"]), batch)
        size, self._image_size = len(batch["image"]), batch["image"].shape[-1]
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)
        return loss

    def validation_step(self, batch: SliceBatch, batch_idx: int) -> Tensor:
        """Count overlaps with ``mask``, or with ``target`` where there are no masks.

        Returns:
            (B, H, W) predicted class ids, for pictures.
        """
        logits = self(batch["image"])
        truth = batch["mask"] if self._truth == "mask" else batch["target"]
        prediction = logits.argmax(1)
        self.val_overlap.update(prediction, truth, batch["index"])
        if self._truth == "target":
            self.val_loss.update(self._loss(logits, batch), len(logits))
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log Dice over all ranks and volumes; a class without a volume is left out of the mean."""
        # torchmetrics drops the dimension of a single class.
        dice = torch.atleast_1d(self.val_overlap.compute())
        self.val_overlap.reset()
        name = "val/dice" if self._truth == "mask" else "val/agreement"
        score = dice.nanmean()
        values = {name: score}
        values |= {f"{name}/{c}": value for c, value in zip(self.class_names, dice, strict=True)}
        if self._truth == "target":
            values["val/loss"] = self.val_loss.compute()
            self.val_loss.reset()
        # The metrics are synchronised already; sync_dist, a mean of equal numbers, only says so.
        self.log("val/score", score, prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)

    def _loss(self, logits: Tensor, batch: SliceBatch) -> Tensor:
        if "target" not in batch:
            raise ConfigError(
                "data.labels.supervision is image, which gives nothing to learn a segmentation from; set it to pseudo, "
                "with data.labels.pseudo_labels_dir, or to expert"
            )
        kept = batch["target"] != IGNORE
        if "confidence" in batch:
            kept = kept & (batch["confidence"] >= self.loss.ignore_below)
        weight = None
        if "quality" in batch:
            kept = kept & (batch["quality"] >= self.loss.min_quality)[:, None, None]
            weight = batch["quality"] if self.loss.quality_weight else None
        if "trusted" in batch:
            trust = torch.where(batch["trusted"], self.loss.trusted_weight, 1.0)
            weight = trust if weight is None else weight * trust
        return segmentation_loss(logits, batch["target"], kept, self.loss, weight)

    # Test

    def native_probabilities(self, image: Tensor, frame: Frame) -> Iterator[Tensor]:
        """Probabilities of a volume on its own slices, a few slices at a time.

        Args:
            image: (D, 1, S, S) float in [0, 1], the working frame.
            frame: how it lies on the scan's own slices.

        Yields:
            (d, C + 1, H0, W0) float32, background first.
        """
        for part in image.split(self.slices_per_step):
            yield to_native(self(part).float().softmax(1), frame)

    def segment_volume(self, image: Tensor, frame: Frame) -> Tensor:
        """Segment a volume on its own slices: probabilities are brought back, then the largest wins.

        Args:
            image: (D, 1, S, S) float in [0, 1], the working frame.
            frame: how it lies on the scan's own slices.

        Returns:
            (D, H0, W0) uint8 class ids.
        """
        return torch.cat([part.argmax(1).to(torch.uint8) for part in self.native_probabilities(image, frame)])

    def on_test_epoch_start(self) -> None:
        """Begin a table."""
        self._evaluation = Evaluation(self.class_names, Path(self.trainer.default_root_dir))

    def test_step(self, batch: VolumeBatch, batch_idx: int) -> None:
        """Score one volume on its own slices and draw its picture."""
        assert self._evaluation is not None
        self._evaluation.add(batch, self.segment_volume(batch["image"], batch["frame"]))

    def on_test_epoch_end(self) -> None:
        """Write the tables and log the means."""
        assert self._evaluation is not None
        means = self._evaluation.finish(self.trainer.is_global_zero)
        self.log_dict({f"test/{name}": value for name, value in means.items()}, sync_dist=True)

    # Unlabelled scans

    def predict_step(self, batch: VolumeBatch, batch_idx: int) -> Tensor:
        """Segment a scan of which nothing is known, and write that.

        Returns:
            (D, H0, W0) uint8 class ids on the scan's own slices.
        """
        scans = check_new_scans(self.trainer.datamodule)  # type: ignore[attr-defined]
        ids, scores = [], []
        for part in self.native_probabilities(batch["image"], batch["frame"]):
            ids.append(part.argmax(1).to(torch.uint8))
            if scans.scores:
                scores.append(part[:, 1:].cpu())
        found = torch.cat(ids)
        save_segmentation(scans, batch, found, torch.cat(scores) if scores else None)
        return found
