"""Stage 2: a segmentation network learns the pseudo-labels; it is what is used and scored in the end."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule
from monai.losses import DiceLoss
from torch import Tensor, nn
from torchmetrics import MeanMetric

from weakmedsam.contracts import BACKGROUND, IGNORE, CheckpointError, ConfigError, Frame, SliceBatch, VolumeBatch
from weakmedsam.metrics import CaseScores, VolumeDice, slice_metrics, summarise, volume_metrics

_SIGNATURE = "segmenter"
TEST_METRICS = ("dice", "jaccard", "assd_mm", "hd95_mm")


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


def segmentation_loss(
    logits: Tensor, target: Tensor, kept: Tensor, background_weight: float, dice_weight: float
) -> Tensor:
    """Cross-entropy plus Dice loss over the pixels that are kept.

    Args:
        logits: (B, C + 1, H, W), background first.
        target: (B, H, W) int64 class ids; what stands at pixels not kept is not read.
        kept: (B, H, W) bool.
        background_weight: weight of a background pixel's cross-entropy; of the others it is 1.
        dice_weight: weight of the Dice loss, which is taken over the batch as a whole and over the
            classes without background, so that slices without a class do no harm.

    Returns:
        The loss, float32, a scalar; 0 with a gradient of 0 where no pixel is kept.
    """
    logits = logits.float()
    weights = logits.new_ones(logits.shape[1])
    weights[BACKGROUND] = background_weight
    known = target.where(kept, torch.full_like(target, IGNORE))
    entropy = F.cross_entropy(logits, known, weight=weights, ignore_index=IGNORE, reduction="none")
    readable = target.where(kept, torch.zeros_like(target))
    # reduction="mean" is NaN where all pixels are left out.
    total = (weights[readable] * kept).sum().clamp_min(torch.finfo(weights.dtype).tiny)
    loss = entropy.sum() / total
    if dice_weight > 0:
        classes = F.one_hot(readable, logits.shape[1]).movedim(-1, 1)
        inside = kept[:, None]
        overlap = DiceLoss(include_background=False, batch=True)
        loss = loss + dice_weight * overlap(logits.softmax(1) * inside, classes * inside)
    return loss


def to_native(values: Tensor, frame: Frame) -> Tensor:
    """Bring values of the working frame to the scan's own slices.

    Linear, with pixel centres at integer + 0.5 and anti-aliased when shrinking: the same map as
    ``data_modules.frames.values_from_frame``, on the device and differentiable; a test compares them.

    Args:
        values: (D, C, S, S) float, e.g. probabilities.
        frame: how the working frame lies on the slices; S = ``frame.size``.

    Returns:
        (D, C, ``frame.height``, ``frame.width``).
    """
    side = (frame.side, frame.side)
    square = F.interpolate(values, size=side, mode="bilinear", align_corners=False, antialias=True)
    top, left = (frame.side - frame.height) // 2, (frame.side - frame.width) // 2
    return square[..., top : top + frame.height, left : left + frame.width]


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
        network: (B, 1, S, S) in [0, 1] to logits (B, C + 1, S, S), background first. The image size is
            the network's to allow: MONAI's BasicUNet takes any from 16 pixels, its UNet multiples of
            the product of its strides.
        num_classes: C, without background.
        class_names: names of the classes, id 1 first; as many as ``num_classes``.
        background_weight: weight of a background pixel's cross-entropy against 1 for a class's, above
            0. Default 1, with the Dice loss against imbalance; published 10, which asks for few false
            positives.
        dice_weight: weight of the Dice loss beside the cross-entropy, 0 or more. Published 0.
        ignore_below: confidence in [0, 1] under which a pixel is left out of the loss; 0 (published)
            keeps all.
        learning_rate: peak of the one-cycle schedule, per step. Default 1e-3, which suits some hundred
            steps; published 1e-4.
        weight_decay: of AdamW; published 0.1.
        warmup: fraction of all steps, in (0, 1), over which the learning rate rises to its peak
            (one-cycle's default).
        slices_per_step: slices that go through the network at once in the test.

    Raises:
        ConfigError: arguments out of range or at odds with each other.
    """

    val_overlap: VolumeDice

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        class_names: list[str],
        background_weight: float = 1.0,
        dice_weight: float = 1.0,
        ignore_below: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.3,
        slices_per_step: int = 16,
    ) -> None:
        super().__init__()
        if len(class_names) != num_classes or num_classes < 1:
            raise ConfigError(f"num_classes is {num_classes}, class_names has {len(class_names)}: {class_names}.")
        if background_weight <= 0 or dice_weight < 0:
            raise ConfigError(f"background_weight {background_weight} or dice_weight {dice_weight} is too small.")
        if not 0 <= ignore_below <= 1:
            raise ConfigError(f"ignore_below: {ignore_below} is no confidence; it lies in [0, 1].")
        if not 0 < warmup < 1 or slices_per_step < 1:
            raise ConfigError(f"warmup {warmup} must lie in (0, 1), slices_per_step {slices_per_step} be 1 or more.")
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.num_classes = num_classes
        self.class_names = list(class_names)
        self.background_weight = background_weight
        self.dice_weight = dice_weight
        self.ignore_below = ignore_below
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.slices_per_step = slices_per_step
        self.val_loss = MeanMetric()
        self._scores: list[CaseScores] = []

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, S, S) in [0, 1] to logits (B, C + 1, S, S), background first.

        Raises:
            ConfigError: the network gives another number of channels.
        """
        logits = self.network(image)
        channels = logits.shape[1] if isinstance(logits, Tensor) else type(logits).__name__
        if channels != self.num_classes + 1:
            raise ConfigError(
                f"network gives {channels} channels; {self.num_classes} classes and background need "
                f"{self.num_classes + 1}. Set its out_channels (and no deep supervision)."
            )
        return logits

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
        if stage in ("fit", "validate"):
            self.val_overlap = VolumeDice(data.val_cases, self.num_classes)
            self._truth = "mask" if data.has_val_masks else "target"

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule over all steps.

        Raises:
            ConfigError: the run has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ConfigError("one-cycle needs to know the end: set trainer.max_epochs or trainer.max_steps.")
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=int(steps), pct_start=self.warmup
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what it is of."""
        checkpoint[_SIGNATURE] = {
            "network": network_signature(self.network),
            "class_names": list(self.class_names),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else, before its tensors fail to fit.

        Raises:
            CheckpointError: it is of another network, of other classes or of no Segmenter.
        """
        saved = checkpoint.get(_SIGNATURE)
        if saved is None:
            raise CheckpointError("The checkpoint is not of a Segmenter. Give one of the segmentation stage.")
        wanted = network_signature(self.network)
        if list(saved["class_names"]) != self.class_names:
            raise CheckpointError(
                f"The checkpoint is of the classes {list(saved['class_names'])}, the settings say {self.class_names}."
            )
        if saved["network"] != wanted:
            raise CheckpointError(
                f"The checkpoint is of the network {saved['network']}; the settings say {wanted}."
            )

    # Training and validation

    def training_step(self, batch: SliceBatch, batch_idx: int) -> Tensor:
        """Loss of a batch with ``target`` and, where there is one, ``confidence``."""
        loss = self._loss(self(batch["image"]), batch)
        size = len(batch["image"])
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)
        return loss

    def validation_step(self, batch: SliceBatch, batch_idx: int) -> None:
        """Count overlaps with ``mask``, or with ``target`` where there are no masks."""
        logits = self(batch["image"])
        truth = batch["mask"] if self._truth == "mask" else batch["target"]
        self.val_overlap.update(logits.argmax(1), truth, batch["index"])
        if self._truth == "target":
            self.val_loss.update(self._loss(logits, batch), len(logits))

    def on_validation_epoch_end(self) -> None:
        """Log Dice over all ranks and volumes; a class without a volume is left out of the mean."""
        dice = self.val_overlap.compute()
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
        kept = batch["target"] != IGNORE
        if "confidence" in batch:
            kept = kept & (batch["confidence"] >= self.ignore_below)
        return segmentation_loss(logits, batch["target"], kept, self.background_weight, self.dice_weight)

    # Test

    def segment_volume(self, image: Tensor, frame: Frame) -> Tensor:
        """Segment a volume on its own slices: probabilities are brought back, then the largest wins.

        Args:
            image: (D, 1, S, S) float in [0, 1], the working frame.
            frame: how it lies on the scan's own slices.

        Returns:
            (D, H0, W0) uint8 class ids.
        """
        parts = [
            to_native(self(part).float().softmax(1), frame).argmax(1).to(torch.uint8)
            for part in image.split(self.slices_per_step)
        ]
        return torch.cat(parts)

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._scores = []

    def test_step(self, batch: VolumeBatch, batch_idx: int) -> None:
        """Score one volume on its own slices and draw its picture."""
        frame, spacing, case = batch["frame"], batch["spacing"], batch["case"]
        prediction = self.segment_volume(batch["image"], frame).cpu()
        truth = batch["mask"].to(torch.uint8).cpu()
        volumes = volume_metrics(prediction, truth, spacing, self.num_classes)
        slices = slice_metrics(prediction, truth, spacing, self.num_classes)
        scores = [
            CaseScores(case, name, volume, slice_wise)
            for name, volume, slice_wise in zip(self.class_names, volumes, slices, strict=True)
        ]
        self._scores += scores
        z = most_telling_slice(prediction, truth)
        native = to_native(batch["image"][z : z + 1], frame)[0, 0].cpu()
        dice = ", ".join(f"{s.class_name} {s.volume.dice:.2f}" for s in scores)
        picture = draw_contours(native, prediction[z], truth[z], spacing, f"{case}, slice {z}\nDice {dice}")
        _write(Path(self.trainer.default_root_dir) / "pictures" / f"{case}.png", picture)

    def on_test_epoch_end(self) -> None:
        """Put the ranks' cases together, write the tables and log the means."""
        scores = self._scores
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, scores)
            scores = [score for share in shares for score in share]
        # A sampler that pads gives a case twice.
        unique = {(score.case, self.class_names.index(score.class_name)): score for score in scores}
        scores = [unique[key] for key in sorted(unique)]
        summary = summarise(scores, self.class_names)
        for metric in TEST_METRICS:
            self._log_number(f"test/{metric}", summary["mean"]["volume"][metric])
            for name in self.class_names:
                self._log_number(f"test/{metric}_{name}", summary["classes"][name]["volume"][metric]["mean"])
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir)
            _write(folder / "cases.csv", format_cases(scores))
            _write(folder / "summary.json", json.dumps(summary, indent=2).encode())

    def _log_number(self, name: str, value: float | None) -> None:
        self.log(name, math.nan if value is None else value, sync_dist=True)


def most_telling_slice(prediction: Tensor, truth: Tensor) -> int:
    """The slice with the largest true area, or predicted area where there is no truth.

    Args:
        prediction: (D, H, W) class ids.
        truth: (D, H, W) class ids.
    """
    areas = [((ids != BACKGROUND) & (ids != IGNORE)).sum((1, 2)) for ids in (truth, prediction)]
    area = areas[0] if areas[0].any() else areas[1]
    return int(area.argmax()) if area.any() else len(truth) // 2


def format_cases(scores: Sequence[CaseScores]) -> bytes:
    """The content of ``cases.csv``: a row per case and class; a figure that does not exist is empty."""
    rows = [score.row() for score in scores]
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return text.getvalue().encode()


def draw_contours(
    image: Tensor, prediction: Tensor, truth: Tensor, spacing: tuple[float, float, float], title: str
) -> bytes:
    """Draw a slice with the contours of truth (green) and prediction (magenta), near what is in them.

    Args:
        image: (H, W) float.
        prediction: (H, W) class ids.
        truth: (H, W) class ids.
        spacing: (slice distance, row, column), mm; pixels are drawn in their true proportion.
        title: above the picture.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(5, 5.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    low, high = torch.quantile(image.flatten()[:: max(1, image.numel() // 100_000)], torch.tensor([0.01, 0.99]))
    axes.imshow(image, cmap="gray", vmin=float(low), vmax=max(float(high), float(low) + 1e-6))
    for ids, colour in ((truth, "lime"), (prediction, "magenta")):
        for class_id in set(ids.unique().tolist()) - {BACKGROUND, IGNORE}:
            axes.contour(ids == class_id, levels=[0.5], colors=colour, linewidths=1.2)
    occupied = ((truth != BACKGROUND) & (truth != IGNORE)) | (prediction != BACKGROUND)
    for axis, limit in ((0, axes.set_ylim), (1, axes.set_xlim)):
        inside = occupied.any(dim=1 - axis).nonzero()
        length = occupied.shape[axis]
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, length - 1)
        # At least half the slice, so that one sees where in the body it is.
        reach = max(0.65 * (last - first + 1), 0.25 * length)
        begin, end = max(0, (first + last) / 2 - reach), min(length - 1, (first + last) / 2 + reach)
        limit(*((end + 0.5, begin - 0.5) if axis == 0 else (begin - 0.5, end + 0.5)))
    axes.set_aspect(spacing[1] / spacing[2])
    axes.set_axis_off()
    axes.set_title(title, fontsize=11)
    handles = [Line2D([], [], color=c, label=n) for c, n in (("lime", "truth"), ("magenta", "prediction"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; two ranks may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
