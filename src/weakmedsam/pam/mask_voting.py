"""Voting of prompts: masks that agree with the class activation map say where its class is.

Not in the paper. A walk only moves activation across affinity; a vote lets whole masks in. A mask that
lies on high activation counts much, one that also covers what the map leaves dark counts little.
"""

from __future__ import annotations

import torch
from torch import Tensor

VOTES = ("none", "alone", "before", "after")
NORMALISATIONS = ("none", "coverage")


def vote_weights(cam: Tensor, masks: Tensor, power: float = 4.0) -> Tensor:
    """Agreement of each mask with each map: ``w_p = (sum_x m_p cam / sum_x m_p) ** power``.

    Args:
        cam: (B, C, h, w) in [0, 1].
        masks: (B, P, h, w) in [0, 1]; an empty one agrees with nothing.
        power: 0 or more; the higher, the fewer masks decide.

    Returns:
        (B, C, P) in [0, 1].
    """
    inside = torch.einsum("bchw,bphw->bcp", cam, masks)
    area = masks.sum(dim=(-2, -1))[:, None]
    mean = inside / area.clamp_min(torch.finfo(masks.dtype).tiny)
    return (mean**power).where(area > 0, 0)


def vote(
    cam: Tensor,
    masks: Tensor,
    power: float = 4.0,
    normalise: str = "none",
    trust: Tensor | None = None,
    eps: float = 0.1,
) -> Tensor:
    """Masks weighted by their agreement: ``s(x) = sum_p w_p m_p(x)``, scaled to a maximum of 1.

    Args:
        cam: (B, C, h, w) in [0, 1].
        masks: (B, P, h, w) in [0, 1], 0 outside the scan.
        power: of ``vote_weights``.
        normalise: ``none``; or ``coverage``, which divides by ``sum_p m_p(x) + eps``, so that a pixel
            that many masks cover has no advantage.
        trust: (B, P) 0 or more, another weight of each mask, e.g. its predicted quality. None: all 1.
        eps: of the coverage, in masks: pixels that less than about so much of a mask covers stay dark.

    Returns:
        (B, C, h, w) in [0, 1], each map with a maximum of 1; all 0 where no mask has a vote.
    """
    masks = masks if trust is None else masks * trust[..., None, None]
    score = torch.einsum("bcp,bphw->bchw", vote_weights(cam, masks, power), masks)
    if normalise == "coverage":
        score = score / (masks.sum(dim=1, keepdim=True) + eps)
    return score / score.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
