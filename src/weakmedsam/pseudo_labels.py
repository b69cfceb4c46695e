"""From refined maps to pseudo-labels: threshold, confidence, quality, and the file they lie in.

Source: WeakMedSAM (arXiv 2503.04106): the refined map, upsampled and smoothed, times the image-level
label, thresholded at 0.5. Confidence and quality are this project's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from weakmedsam.contracts import BACKGROUND, DataError, PseudoLabelKeys
from weakmedsam.files import replacing


class PseudoLabel(NamedTuple):
    """The pseudo-labels of B slices.

    Attributes:
        label: (B, H, W) uint8, 0 = background, 1..C.
        confidence: (B, H, W) float32 in [0, 1].
        quality: (B, C) float32 in [0, 1], NaN where the class is absent.
    """

    label: Tensor
    confidence: Tensor
    quality: Tensor


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


def agreement(before: Tensor, after: Tensor, label: Tensor) -> Tensor:
    """Quality of a pseudo-label: Dice between the thresholded map before and after refinement.

    A walk that has to redraw most of what the classifier saw is not to be trusted.

    Args:
        before: (B, H, W) class ids without refinement.
        after: (B, H, W) class ids with it.
        label: (B, C) image-level label.

    Returns:
        (B, C) in [0, 1], NaN where the class is absent.
    """
    columns = []
    for c in range(label.shape[1]):
        a, b = (before == c + 1).flatten(1), (after == c + 1).flatten(1)
        dice = 2 * (a & b).sum(1) / (a.sum(1) + b.sum(1)).clamp_min(1)
        columns.append(torch.where(label[:, c] > 0.5, dice, torch.nan))
    return torch.stack(columns, dim=1).float()


def write_pseudo_label(path: Path, labels: PseudoLabel, settings: dict[str, Any]) -> None:
    """Write one volume's file, whole or not at all (``PseudoLabelKeys`` states its tensors)."""
    tensors: dict[str, NDArray[Any]] = {
        PseudoLabelKeys.label: labels.label.cpu().numpy(),
        PseudoLabelKeys.confidence: (labels.confidence * 255).round().to(torch.uint8).cpu().numpy(),
        PseudoLabelKeys.quality: labels.quality.cpu().numpy().astype(np.float32),
    }
    with replacing(path) as part:
        save_file(tensors, part, {PseudoLabelKeys.settings: json.dumps(settings, sort_keys=True)})


def read_settings(path: Path) -> dict[str, Any]:
    """The settings a pseudo-label file was made with.

    Raises:
        DataError: the file is not a pseudo-label file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(json.loads(file.metadata()[PseudoLabelKeys.settings]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a pseudo-label file ({error}): delete it and make the pseudo-labels again"
        ) from error


def read_quality(path: Path) -> NDArray[np.float32]:
    """(D, C) quality of a file's slices, NaN where a class is absent.

    Raises:
        DataError: the file is not a pseudo-label file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return np.asarray(file.get_tensor(PseudoLabelKeys.quality), np.float32)
    except SafetensorError as error:
        raise DataError(
            f"{path} is not a pseudo-label file ({error}): delete it and make the pseudo-labels again"
        ) from error
