"""A baseline that looks at no image: ellipsoids in the middle of the frame, as long as the labels of their class.

What a result does not beat, image-level labels and the position of the scan's frame explain alone. The radius in the
slice is the best one on the scored cases themselves, class by class: the baseline is favoured, never the method.
"""

from __future__ import annotations

import torch
from torch import Tensor

RADII = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Half-axes in the slice, as shares of the frame's height and width."""


def centred_ellipsoids(label: Tensor, height: int, width: int, radius: float) -> Tensor:
    """One ellipsoid per class, from its first to its last labelled slice, empty in slices without the class.

    Args:
        label: (D, C) image-level labels of a volume's slices, in order.
        height: of the scan's own slices, pixels.
        width: of the scan's own slices, pixels.
        radius: half-axes in the slice at the ellipsoid's middle, as shares of height and width.

    Returns:
        (D, C, height, width) bool.
    """
    present = label > 0
    slices = torch.arange(len(label), device=label.device, dtype=torch.float32)[:, None]
    first = slices.where(present, torch.full_like(slices, torch.inf)).amin(dim=0)
    last = slices.where(present, torch.full_like(slices, -torch.inf)).amax(dim=0)
    along = (slices - (first + last) / 2) / ((last - first + 1) / 2)
    half_axis = radius * (1 - along.square()).clamp_min(0).sqrt()  # (D, C)
    y = (torch.arange(height, device=label.device) + 0.5) / height - 0.5
    x = (torch.arange(width, device=label.device) + 0.5) / width - 0.5
    inside = y.square()[:, None] + x.square() <= half_axis.square()[..., None, None]
    return inside & present[..., None, None]


def ellipsoid_dice(label: Tensor, truth: Tensor) -> Tensor:
    """Dice of the ellipsoids of all ``RADII`` in a volume.

    Args:
        label: (D, C) image-level labels.
        truth: (D, H0, W0) class ids on the scan's own slices.

    Returns:
        (C, R) float; NaN where a class is neither labelled nor in the truth.
    """
    classes = range(1, label.shape[1] + 1)
    true = torch.stack([truth == c for c in classes], dim=1)
    found = []
    for radius in RADII:
        drawn = centred_ellipsoids(label, truth.shape[-2], truth.shape[-1], radius)
        both, either = (drawn & true).sum(dim=(0, 2, 3)), drawn.sum(dim=(0, 2, 3)) + true.sum(dim=(0, 2, 3))
        found.append(2 * both / either)
    return torch.stack(found, dim=1)
