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


def class_activation_map(features: Tensor, weight: Tensor) -> Tensor:
    """The class head's evidence at every cell, each map scaled to [0, 1].

    The scaling makes a map say *where*, never *whether*: a class that is absent also reaches 1
    somewhere. Multiply by the image-level label before a threshold.

    Args:
        features: (B, D, h, w).
        weight: (C, D) of the class head (a 1 x 1 convolution without bias).

    Returns:
        (B, C, h, w) in [0, 1].
    """
    return min_max(torch.einsum("bdhw,cd->bchw", features, weight))
