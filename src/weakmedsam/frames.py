"""From the square working frame back to the scan's own slices."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weakmedsam.contracts import Frame


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
