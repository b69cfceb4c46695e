"""From refined maps to pseudo-labels: thresholds, confidence and quality.

Source: WeakMedSAM (arXiv 2503.04106): the refined map, upsampled and smoothed, times the image-level
label, thresholded at 0.5. Confidence and quality are this project's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weakmedsam.contracts import BACKGROUND

_LEVELS = (0.01, 0.99)
"""Of a slice's own threshold: within them all scores can be moved to the common one."""

UNREFINED = 0.5
"""Threshold of an activation, or of a segmentation network's probability, that is not walked: the paper's."""


class PseudoLabel(NamedTuple):
    """The pseudo-labels of B slices.

    Attributes:
        label: (B, H, W) uint8, 0 = background, 1..C.
        confidence: (B, H, W) float32 in [0, 1].
        quality: (B, C) float32 in [0, 1], NaN where the class is absent: ``mean_confidence``, times ``stability``
            where that was measured.
        stability: (B, C) float32 in [0, 1], agreement with the pseudo-label of the mirrored image; NaN
            where the class is absent or nothing was mirrored.
    """

    label: Tensor
    confidence: Tensor
    quality: Tensor
    stability: Tensor


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of (B, C, H, W) maps, sigma in pixels, borders repeated."""
    if sigma <= 0:
        return maps
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(maps.shape[1], 1, 1, -1)
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    groups = maps.shape[1]
    return F.conv2d(F.conv2d(padded, kernel, groups=groups), kernel.transpose(2, 3), groups=groups)


def gated_scores(maps: Tensor, label: Tensor, size: int, sigma: float = 1.0) -> Tensor:
    """Maps on the working frame, empty for every class the slice does not have.

    Args:
        maps: (B, C, h, w) in [0, 1].
        label: (B, C) image-level label (given, or predicted), in [0, 1].
        size: side of the frame, pixels.
        sigma: of the smoothing, pixels.

    Returns:
        (B, C, size, size) in [0, 1].
    """
    maps = F.interpolate(maps.float(), size=(size, size), mode="bilinear", align_corners=False)
    return smooth(maps, sigma).clamp(0, 1) * label[:, :, None, None]


def compete(scores: Tensor, power: float = 1.0) -> Tensor:
    """Let the classes of a pixel, and the background, share it.

    ``s_c / (sum_c' s_c' + (1 - max_c' s_c') ** power)``: the second summand is the background's score, as
    AffinityNet states it (Ahn and Kwak, CVPR 2018, eq. 2). With power 1 the score of a pixel of a single
    class stays as it is.

    Args:
        scores: (B, C, H, W) in [0, 1], 0 for a class that is absent, which so takes no part.
        power: above 0; the higher, the less there is of background. AffinityNet uses 4 to 24.

    Returns:
        (B, C, H, W) in [0, 1]; with the background's share they sum to 1.
    """
    background = (1 - scores.amax(dim=1, keepdim=True)) ** power
    total = scores.sum(dim=1, keepdim=True) + background
    return scores / total.clamp_min(torch.finfo(scores.dtype).tiny)


def profile_levels(scores: Tensor, positions: Tensor, depth: int, inside: Tensor, threshold: float) -> Tensor:
    """Thresholds with which the areas of a class along a volume come nearer to those of an ellipsoid's sections.

    Maps that are scaled slice by slice are cut too wide where the target is small: at its ends. The image-level labels
    say where these are. In each run of slices with the class, a slice's area becomes the geometric mean of its area at
    the common threshold and of its share of the run's volume in an ellipsoid, 1 - (2 t - 1) ** 2, t from 0 to 1 along
    the run; the volume stays. Of a class that is in all slices of the volume no end is known. Not in the paper.

    Args:
        scores: (n, h, w) in [0, 1], one class of the slices that have it, in their order.
        positions: (n,) numbers of these slices in the volume; a gap begins another run.
        depth: slices of the volume.
        inside: (n, h, w) bool, the scan.
        threshold: the common one, in (0, 1).

    Returns:
        (n,) a threshold a slice; NaN in a run of all slices, or where no cell reaches the common one.
    """
    levels = scores.new_full((len(scores),), torch.nan)
    ordered = scores.where(inside, 0).flatten(1).sort(dim=1, descending=True).values
    starts = ((positions.diff() != 1).nonzero().flatten() + 1).tolist()
    for first, last in zip([0, *starts], [*starts, len(scores)], strict=True):
        areas = (ordered[first:last] > threshold).sum(dim=1).double()
        along = (torch.arange(last - first, device=scores.device, dtype=torch.float64) + 0.5) / (last - first)
        section = 1 - (2 * along - 1) ** 2
        wanted = (areas.clamp_min(1) * section).sqrt()
        wanted = (wanted * (areas.sum() / wanted.sum())).round().long().clamp(1, ordered.shape[1] - 1)
        if areas.sum() > 0 and last - first < depth:
            rows = ordered[first:last]
            levels[first:last] = rows.gather(1, torch.stack([wanted - 1, wanted], dim=1)).mean(dim=1)
    return levels.clamp(*_LEVELS)


def centre_scores(scores: Tensor, found: Tensor, threshold: float) -> Tensor:
    """Move each class's own threshold to the common one, by two straight lines through 0 and 1.

    Margins, and with them the confidence of ``threshold_scores``, are then those of the own threshold.

    Args:
        scores: (B, C, H, W) in [0, 1].
        found: (B, C) each class's own threshold, in (0, 1); NaN leaves the class as it is.
        threshold: the common one, in (0, 1).
    """
    own = found.where(found.isfinite(), threshold).to(scores)[:, :, None, None]
    above = threshold + (scores - own) / (1 - own) * (1 - threshold)
    return torch.where(scores > own, above, scores / own * threshold)


def threshold_scores(scores: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """The winning class of each pixel, and how sure it is.

    Args:
        scores: (B, C, H, W) of ``gated_scores``.
        threshold: the background's score; the paper uses 0.5.

    Returns:
        label (B, H, W) uint8; confidence (B, H, W): the margin between the winner and the runner-up
        (classes and background), 0 on the border between two, 1 at the sure ends. A pixel of a slice
        without any class is background with confidence 1.
    """
    best, winner = scores.max(dim=1)
    label = torch.where(best > threshold, winner + 1, BACKGROUND).to(torch.uint8)
    above, below = (best - threshold) / (1 - threshold), (threshold - best) / threshold
    confidence = torch.where(best > threshold, above, below)
    if scores.shape[1] > 1:
        second = scores.topk(2, dim=1).values[:, 1]
        confidence = torch.where(
            best > threshold, torch.minimum(confidence, (best - second) / (1 - threshold)), confidence
        )
    return label, confidence.clamp(0, 1)


def mean_confidence(ids: Tensor, confidence: Tensor, label: Tensor) -> Tensor:
    """Mean confidence of the pixels that a class has in each slice.

    Of what was tried without masks it says most about the Dice of a pseudo-label (docs/results.md, quality).

    Args:
        ids: (B, H, W) class ids.
        confidence: (B, H, W) of ``threshold_scores``.
        label: (B, C) image-level label.

    Returns:
        (B, C) in [0, 1], 0 where the class has no pixel, NaN where it is absent.
    """
    columns = []
    for c in range(label.shape[1]):
        own = (ids == c + 1).flatten(1)
        mean = (confidence.flatten(1) * own).sum(1) / own.sum(1).clamp_min(1)
        columns.append(torch.where(label[:, c] > 0.5, mean, torch.nan))
    return torch.stack(columns, dim=1).float()


def agreement(ids: Tensor, mirrored: Tensor, label: Tensor) -> Tensor:
    """Dice between the labels of each slice and those of its mirrored image.

    Args:
        ids: (B, H, W) class ids.
        mirrored: (B, H, W) class ids, mirrored back.
        label: (B, C) image-level label.

    Returns:
        (B, C) in [0, 1], NaN where the class is absent.
    """
    columns = []
    for c in range(label.shape[1]):
        a, b = (ids == c + 1).flatten(1), (mirrored == c + 1).flatten(1)
        dice = 2 * (a & b).sum(1) / (a.sum(1) + b.sum(1)).clamp_min(1)
        columns.append(torch.where(label[:, c] > 0.5, dice, torch.nan))
    return torch.stack(columns, dim=1).float()
