"""Slices with their masks for W&B: each mask can be shown and hidden on the page of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from numpy.typing import NDArray
from torch import Tensor

from weakmedsam.contracts import BACKGROUND, IGNORE, SliceBatch
from weakmedsam.errors import check_range
from weakmedsam.figures import PictureRow

if TYPE_CHECKING:  # it imports monai, which takes a second
    from weakmedsam.segmentation.module import Segmenter

KEY = "val/overlays"
"""What both stages' overlays are called on W&B's page."""

Shown = TypeVar("Shown")


class FixedSlices(Generic[Shown]):
    """A few slices to show, the same in every epoch and stage: of each case the one with the largest mask.

    Args:
        count: how many cases, spread evenly over all by name.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[str, tuple[int, Shown]] = {}

    def clear(self) -> None:
        """Forget all, at the start of an epoch."""
        self._kept.clear()

    def wants(self, case: str, area: int) -> bool:
        """Whether a slice whose mask has ``area`` pixels takes the place of its case's earlier one."""
        return area > (self._kept[case][0] if case in self._kept else 0)

    def keep(self, case: str, area: int, shown: Shown) -> None:
        """Put a slice in its case's place."""
        self._kept[case] = area, shown

    def chosen(self) -> list[Shown]:
        """What is shown, by case."""
        cases = sorted(self._kept)
        step = max(1, len(cases) // self.count)
        return [self._kept[case][1] for case in cases[::step][: self.count]]


def mask_areas(mask: Tensor) -> list[int]:
    """(B, H, W) class ids -> pixels of some class in each slice."""
    return ((mask != BACKGROUND) & (mask != IGNORE)).sum((1, 2)).tolist()


class Overlay(NamedTuple):
    """One slice and what can be laid over it.

    Attributes:
        caption: case and slice.
        image: (H, W) in [0, 1].
        masks: name -> (H, W) uint8 class ids.
    """

    caption: str
    image: NDArray[np.float32]
    masks: dict[str, NDArray[np.uint8]]


def overlay_of(row: PictureRow) -> Overlay:
    """A row of PAM's pictures with its masks: ``cam``, ``pseudo_label``, and ``ground_truth`` if it is there."""
    masks = {"cam": row.unrefined, "pseudo_label": row.pseudo_label, "ground_truth": row.mask}
    caption = row.title.splitlines()[0]
    return Overlay(caption, row.image, {name: ids for name, ids in masks.items() if ids is not None})


def send_overlays(trainer: Trainer, overlays: list[Overlay], class_names: list[str]) -> None:
    """Log them to W&B where it is a logger; does nothing for others."""
    labels = {BACKGROUND: "background", **dict(enumerate(class_names, start=1)), IGNORE: "unknown"}
    for logger in trainer.loggers:
        if overlays and isinstance(logger, WandbLogger):
            logger.log_image(
                KEY,
                [(overlay.image * 255).round().astype(np.uint8) for overlay in overlays],
                step=trainer.global_step,
                caption=[overlay.caption for overlay in overlays],
                masks=[
                    {name: {"mask_data": ids, "class_labels": labels} for name, ids in overlay.masks.items()}
                    for overlay in overlays
                ],
            )


class PredictionOverlays(Callback):
    """Show the segmentation network's validation on W&B: ``prediction`` over ``ground_truth``.

    Without expert masks the pseudo-label is what it is compared with: ``pseudo_label``. Under several
    processes these are slices of the first one.

    Args:
        pictures: slices shown, of as many cases, 1 or more.

    Raises:
        ConfigError: a number out of its range.
    """

    def __init__(self, pictures: int = 6) -> None:
        check_range("PredictionOverlays.pictures", pictures, 1, 1000)
        self._slices: FixedSlices[Overlay] = FixedSlices(pictures)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last epoch's."""
        self._slices.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: SliceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the slices to show; ``outputs`` are the predicted ids, (B, H, W)."""
        if not trainer.is_global_zero:
            return
        prediction = cast(Tensor, outputs)
        name, truth = ("ground_truth", batch["mask"]) if "mask" in batch else ("pseudo_label", batch["target"])
        for i, area in enumerate(mask_areas(truth)):
            case = batch["case"][i]
            if self._slices.wants(case, area):
                masks = {"prediction": prediction[i], name: truth[i]}
                ids = {key: mask.cpu().numpy().astype(np.uint8) for key, mask in masks.items()}
                image = batch["image"][i, 0].float().cpu().numpy()
                self._slices.keep(case, area, Overlay(f"{case} slice {int(batch['slice'][i])}", image, ids))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send them."""
        if not trainer.sanity_checking:
            send_overlays(trainer, self._slices.chosen(), cast("Segmenter", pl_module).class_names)
