"""Positions of the scan in the working frame, and the way back to the scan's own slices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weakmedsam.contracts import Frame


def to_native(values: Tensor, frame: Frame) -> Tensor:
    """Bring values of the working frame to the scan's own slices.

    Linear, with pixel centres at integer + 0.5 and anti-aliased when shrinking: the same map as
    ``data_modules.resampling.values_from_frame``, on the device and differentiable; a test compares them.

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


def min_max(maps: Tensor) -> Tensor:
    """Bring every map (its last two dimensions) to [0, 1]; a constant map becomes 0.

    Args:
        maps: (..., h, w).
    """
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).eps)


def inside_box(box: Tensor, size: int, cells: int) -> Tensor:
    """Which cells of a map lie on the scan.

    Args:
        box: (B, 4) int64, (top, bottom, left, right) in pixels of the frame, ends excluded.
        size: side of the frame, pixels.
        cells: side of the map.

    Returns:
        (B, 1, cells, cells) bool: cells whose centre lies in the box.
    """
    at = (torch.arange(cells, device=box.device) + 0.5) * size / cells
    top, bottom, left, right = (edge[:, None] for edge in box.unbind(dim=1))
    rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def inside_cells(scan: Tensor, cells: int) -> Tensor:
    """The same from a map of the scan's pixels, which augmentation may have moved and turned.

    Args:
        scan: (B, 1, S, S) bool, where the scan lies in the frame.
        cells: side of the map.

    Returns:
        (B, 1, cells, cells) bool: cells more than half of which are scan.
    """
    return F.adaptive_avg_pool2d(scan.float(), cells) > 0.5


def min_max_inside(maps: Tensor, inside: Tensor) -> Tensor:
    """``min_max`` over the cells inside, 0 outside: padding neither scales a map nor lights up in it.

    Args:
        maps: (B, C, h, w).
        inside: (B, 1, h, w) bool, some cell of each.
    """
    low = maps.where(inside, torch.inf).amin(dim=(-2, -1), keepdim=True)
    high = maps.where(inside, -torch.inf).amax(dim=(-2, -1), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).eps)).where(inside, 0)
