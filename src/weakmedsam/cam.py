"""Class activation maps: where the class head looks.

Source: Zhou et al., CVPR 2016, in the form of WeakMedSAM (arXiv 2503.04106): the head's weights applied
to every feature cell, scaled by minimum and maximum, no ReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def min_max_inside(maps: Tensor, inside: Tensor) -> Tensor:
    """``min_max`` over the cells inside, 0 outside: padding neither scales a map nor lights up in it.

    Args:
        maps: (B, C, h, w).
        inside: (B, 1, h, w) bool, some cell of each.
    """
    low = maps.where(inside, torch.inf).amin(dim=(-2, -1), keepdim=True)
    high = maps.where(inside, -torch.inf).amax(dim=(-2, -1), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).eps)).where(inside, 0)


def class_activation_map(features: Tensor, weight: Tensor) -> Tensor:
    """The class head's evidence at every cell, each map scaled to [0, 1].

    The scaling makes a map say *where*, never *whether*: a class that is absent also reaches 1
    somewhere. Multiply by the image-level label before a threshold.

    Args:
        features: (B, D, h, w), of any precision.
        weight: (C, D) of the class head (a 1 x 1 convolution without bias).

    Returns:
        (B, C, h, w) float32 in [0, 1].
    """
    # In float32 under autocast too: bf16 moves a map by a hundredth.
    with torch.autocast(features.device.type, enabled=False):
        return min_max(torch.einsum("bdhw,cd->bchw", features.float(), weight.float()))
