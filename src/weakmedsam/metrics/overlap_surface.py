"""Dice, Jaccard, ASSD and HD95, per class and per patient volume; ``docs/metrics.md`` defines each.

One rule runs through all of it: what is undefined is NaN and is left out of a mean *and counted*,
never replaced by a flattering number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_erosion, find_objects
from torch import Tensor
from torchmetrics import Metric

from weakmedsam.contracts import IGNORE

Spacing = tuple[float, float, float]
"""(slice distance, row, column) in mm."""

PERCENTILE = 95.0
"""The percentile of HD95."""


def overlap_counts(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count, per slice and class, the pixels that Dice and Jaccard are made of.

    Args:
        prediction: (..., H, W) class ids, 0 = background.
        truth: (..., H, W) class ids; pixels of ``IGNORE`` count nowhere, in the prediction neither.
        num_classes: C, without background.

    Returns:
        (..., C, 3) int64: intersection, predicted and true pixels of classes 1..C. They may be summed
        over slices before a ratio is taken.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} differ in shape")
    counts = []
    for class_id in range(1, num_classes + 1):
        predicted, true = _masks_of_class(prediction, truth, class_id)
        # Summed in int32, which a slice cannot overflow: three times as fast as in int64 on a CPU.
        sums = [m.flatten(-2).sum(-1, dtype=torch.int32) for m in (predicted & true, predicted, true)]
        counts.append(torch.stack(sums, dim=-1))
    return torch.stack(counts, dim=-2).long()


def _masks_of_class(prediction: Tensor, truth: Tensor, class_id: int) -> tuple[Tensor, Tensor]:
    return (prediction == class_id) & (truth != IGNORE), truth == class_id


def dice_from_counts(counts: Tensor) -> Tensor:
    """Dice, 2 I / (P + T), of (..., 3) counts I, P and T.

    Returns:
        (...) float in [0, 1]; NaN where the class is in neither, 0 where it is in one only.
    """
    intersection, predicted, true = counts.unbind(-1)
    return 2 * intersection / (predicted + true)


def jaccard_from_counts(counts: Tensor) -> Tensor:
    """Jaccard index (intersection over union), I / (P + T - I), of (..., 3) counts I, P and T.

    Returns:
        (...) float in [0, 1]; NaN where the class is in neither, 0 where it is in one only.
    """
    intersection, predicted, true = counts.unbind(-1)
    return intersection / (predicted + true - intersection)


class VolumeDice(Metric):
    """Dice per class, as mean over patient volumes, from slices that come in any order.

    Counts are kept by slice and summed over a volume only at the end. A slice that comes twice (a
    sampler that pads), late, or on another rank therefore changes nothing. A volume counts for a class
    if the class is in its truth or in its prediction; a false alarm in a volume without it counts as 0.

    Args:
        cases: the volume's name of each slice, by ``index``: one per slice of the split.
        num_classes: C, without background.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor
    volume_of_slice: Tensor

    def __init__(self, cases: Sequence[str], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.volumes = sorted(set(cases))
        row = {name: number for number, name in enumerate(self.volumes)}
        rows = torch.tensor([row[name] for name in cases], dtype=torch.int64)
        # Derived from the data, so it does not belong into a checkpoint.
        self.register_buffer("volume_of_slice", rows, persistent=False)
        # Zero is "not seen": the maximum over ranks is the count of the rank that saw the slice.
        zeros = torch.zeros(len(cases), num_classes, 3, dtype=torch.int64)
        self.add_state("counts", default=zeros, dist_reduce_fx="max")

    def update(self, prediction: Tensor, truth: Tensor, index: Tensor) -> None:
        """Take in slices.

        Args:
            prediction: (B, H, W) class ids.
            truth: (B, H, W) class ids; ``IGNORE`` is left out.
            index: (B,) row of each slice in ``cases``.
        """
        self.counts[index] = overlap_counts(prediction, truth, self.num_classes)

    def volume_counts(self) -> Tensor:
        """(V, C, 3) counts of what this rank saw, summed over the slices of each of ``volumes``."""
        sums = self.counts.new_zeros(len(self.volumes), self.num_classes, 3)
        return sums.index_add(0, self.volume_of_slice, self.counts)

    def compute(self) -> Tensor:
        """(C,) mean Dice over volumes; NaN for a class that no volume has and none was predicted in."""
        return dice_from_counts(self.volume_counts()).nanmean(dim=0)


@dataclass(frozen=True)
class VolumeScores:
    """Scores of one class in one volume, in three dimensions.

    Attributes:
        dice, jaccard: in [0, 1]; NaN if the class is in neither.
        assd_mm: average symmetric surface distance; the penalty if missed or a false alarm; NaN if the
            class is in neither.
        hd95_mm: 95th percentile Hausdorff distance; penalty and NaN as above.
        missed: there is truth and no prediction.
        false_alarm: there is a prediction and no truth.
        true_ml, predicted_ml: volume of the truth and of the prediction.
    """

    dice: float
    jaccard: float
    assd_mm: float
    hd95_mm: float
    missed: bool
    false_alarm: bool
    true_ml: float
    predicted_ml: float


@dataclass(frozen=True)
class SliceScores:
    """Scores of one class in one volume, slice by slice: to compare with papers that do so.

    Attributes:
        slice_dice, slice_jaccard: mean over the slices in which the class is in truth or prediction;
            NaN if in none.
        slice_assd_mm, slice_hd95_mm: mean over the slices in which it is in both; NaN if in none.
        slices_occupied: slices with the class in truth or prediction.
        slices_matched: slices with the class in both.
        published_dice, published_jaccard: mean over all slices, one with the class in neither counting
            as 1 (the definition of the authors' released code).
        slices: all slices, D.
    """

    slice_dice: float
    slice_jaccard: float
    slice_assd_mm: float
    slice_hd95_mm: float
    slices_occupied: int
    slices_matched: int
    published_dice: float
    published_jaccard: float
    slices: int


def grid_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Diagonal of a volume's box, in mm: no distance between two of its voxels is longer.

    Args:
        shape: (D, H, W) voxels.
        spacing: size of a voxel along each axis, mm.
    """
    return math.hypot(*(extent * size for extent, size in zip(shape, spacing, strict=True)))


def surface_distances(predicted: Tensor, true: Tensor, spacing: Sequence[float]) -> tuple[float, float]:
    """ASSD and HD95 between two masks, neither of them empty.

    Surfaces are those voxels of a mask that have a neighbour along an axis outside of it, in as many
    dimensions as the masks have. Taken on the box around both masks, which changes no value; the
    distances are MONAI's.

    Args:
        predicted: (D, H, W) or (H, W) bool.
        true: the same shape, bool.
        spacing: size of a voxel along each axis, mm.

    Returns:
        ASSD (mean over both surfaces' distances) and HD95 (the larger of both directions' 95th
        percentiles), in mm.
    """
    # Here, because monai takes a second to import, and only tests get this far.
    from monai.metrics.utils import get_surface_distance

    masks = [mask.cpu().numpy() for mask in (predicted, true)]
    (box,) = find_objects((masks[0] | masks[1]).view(np.uint8))
    # compute_average_surface_distance and compute_hausdorff_distance would each find the surfaces anew,
    # at 17 ms a slice. This is what happens inside them, once; a test holds that the values are theirs.
    one, other = (mask ^ binary_erosion(mask) for mask in (whole[box] for whole in masks))
    there = get_surface_distance(one, other, spacing=list(spacing))
    back = get_surface_distance(other, one, spacing=list(spacing))
    hd95 = max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE))
    return float(np.concatenate([there, back]).mean()), float(hd95)


def volume_metrics(
    prediction: Tensor, truth: Tensor, spacing: Spacing, num_classes: int, penalty_mm: float | None = None
) -> list[VolumeScores]:
    """Score each class 1..C of one patient volume in three dimensions.

    A volume of one slice has no surface in the third dimension: its distances are two-dimensional.

    Args:
        prediction: (D, H, W) class ids on the scan's own grid.
        truth: (D, H, W) class ids; ``IGNORE`` is left out.
        spacing: (slice distance, row, column), mm.
        num_classes: C, without background.
        penalty_mm: ASSD and HD95 of a miss and of a false alarm, mm; None takes the diagonal of the
            volume's box.

    Raises:
        ValueError: the shapes differ.
    """
    counts = overlap_counts(prediction, truth, num_classes).sum(dim=0)
    dice, jaccard = dice_from_counts(counts).tolist(), jaccard_from_counts(counts).tolist()
    penalty = grid_diagonal(truth.shape, spacing) if penalty_mm is None else penalty_mm
    millilitres = math.prod(spacing) / 1000
    grid: Sequence[float] = spacing
    if len(truth) == 1:
        prediction, truth, grid = prediction[0], truth[0], spacing[1:]
    scores = []
    for row, (_, predicted, true) in enumerate(counts.tolist()):
        assd, hd95 = (math.nan, math.nan) if predicted == true == 0 else (penalty, penalty)
        if predicted and true:
            assd, hd95 = surface_distances(*_masks_of_class(prediction, truth, row + 1), grid)
        scores.append(
            VolumeScores(
                dice=dice[row],
                jaccard=jaccard[row],
                assd_mm=assd,
                hd95_mm=hd95,
                missed=true > 0 and predicted == 0,
                false_alarm=predicted > 0 and true == 0,
                true_ml=true * millilitres,
                predicted_ml=predicted * millilitres,
            )
        )
    return scores


def slice_metrics(prediction: Tensor, truth: Tensor, spacing: Spacing, num_classes: int) -> list[SliceScores]:
    """Score each class 1..C of one volume slice by slice, in two dimensions, as many papers do.

    Args:
        prediction: (D, H, W) class ids on the scan's own grid.
        truth: (D, H, W) class ids; ``IGNORE`` is left out.
        spacing: (slice distance, row, column), mm; the first is not used.
        num_classes: C, without background.

    Raises:
        ValueError: the shapes differ.
    """
    counts = overlap_counts(prediction, truth, num_classes)
    dice, jaccard = dice_from_counts(counts), jaccard_from_counts(counts)
    matched = (counts[..., 1] > 0) & (counts[..., 2] > 0)
    scores = []
    for row in range(num_classes):
        distances = [
            surface_distances(*_masks_of_class(prediction[z], truth[z], row + 1), spacing[1:])
            for z in matched[:, row].nonzero()[:, 0].tolist()
        ]
        assd, hd95 = np.mean(distances, axis=0).tolist() if distances else (math.nan, math.nan)
        scores.append(
            SliceScores(
                slice_dice=float(dice[:, row].nanmean()),
                slice_jaccard=float(jaccard[:, row].nanmean()),
                slice_assd_mm=assd,
                slice_hd95_mm=hd95,
                slices_occupied=int((~dice[:, row].isnan()).sum()),
                slices_matched=len(distances),
                published_dice=float(dice[:, row].nan_to_num(nan=1.0).mean()),
                published_jaccard=float(jaccard[:, row].nan_to_num(nan=1.0).mean()),
                slices=len(dice),
            )
        )
    return scores
