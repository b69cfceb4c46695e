"""From the square working frame back to the scan's own slices."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weakmedsam.contracts import Frame


def to_native(maps: Tensor, frame: Frame) -> Tensor:
    """Bring scores (not class ids) from the working frame to the scan's own slices.

    Args:
        maps: (B, C, size, size).
        frame: how the working frame lies on the slices.

    Returns:
        (B, C, height, width): bilinear to the padded square, then its padding cut off.
    """
    square = F.interpolate(maps, size=(frame.side, frame.side), mode="bilinear", align_corners=False)
    top, left = (frame.side - frame.height) // 2, (frame.side - frame.width) // 2
    return square[..., top : top + frame.height, left : left + frame.width]
