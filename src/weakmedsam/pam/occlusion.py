"""Occlusion: by how much a class logit drops when what a prompt's mask covers is painted over.

Not in the paper. An activation map shows where the classifier reads its evidence, and with fields larger than a
target that is often its border or a place beside it. Painting a mask over asks the classifier itself: without
the target it has nothing to go by. That is occlusion (Zeiler and Fergus, ECCV 2014) with the prompts' masks as
occluders, where others take squares or random grids (RISE, Petsiuk et al., BMVC 2018).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from weakmedsam.geometry import inside_box
from weakmedsam.pam.prompt_masks import PamBatch
from weakmedsam.pam.thresholding import smooth

ClassEvidence = Callable[[Tensor, Tensor], Tensor]
"""Image (B, 1, S, S) and the scan's box (B, 4) -> class logits (B, C)."""

Drops = Callable[[PamBatch, Tensor], Tensor]
"""B slices and their masks (B, P, s, s) -> (B, C, P) of ``logit_drops``."""

AROUND = 1 / 21
"""Width of the ring whose mean a mask is painted with, of the frame's side: 6 of 128 pixels."""

ALIKE = 0.9
"""IoU from which on two masks are one: only the first of them is painted over."""

PAINTED_AT_ONCE = 64
"""Images of 128 x 128 pixels painted at once, of larger ones fewer; memory only."""

SMALLEST_DROP = 1e-3
"""Of a logit, or of 1 where that is less than 1: a smaller loss is rounding."""


def same_as(masks: Tensor, alike: float = ALIKE) -> Tensor:
    """Prompts in one region are answered by one mask: the first mask that each is the same as.

    Args:
        masks: (B, P, h, w) in [0, 1], compared where they are above 0.5; one that is so nowhere is the same as
            none but those that are 0 everywhere, if it is so itself.
        alike: IoU above which two masks are the same. A mask that is the same as an earlier one stands for
            no later one.

    Returns:
        (B, P) int64; p itself for a mask that is like none before it.
    """
    inside = (masks > 0.5).flatten(2).float()
    both = inside @ inside.transpose(1, 2)
    area = inside.sum(dim=2)
    either = area[:, :, None] + area[:, None] - both
    empty = masks.amax(dim=(-2, -1)) < 1e-3
    overlap = torch.where(empty[:, :, None] & empty[:, None], 1, both / either.clamp_min(1))
    count = masks.shape[1]
    first = torch.arange(count, device=masks.device).repeat(len(masks), 1)
    own = first[0].clone()
    for p in range(1, count):
        found = (overlap[:, p, :p] > alike) & (first[:, :p] == own[:p])
        first[:, p] = torch.where(found.any(dim=1), found.float().argmax(dim=1), p)
    return first


def paint_over(image: Tensor, masks: Tensor, inside: Tensor) -> Tensor:
    """Each mask painted with the mean of a ring around it, with soft edges.

    Args:
        image: (B, 1, S, S).
        masks: (B, P, S, S) in [0, 1].
        inside: (B, 1, S, S) bool, the scan; rings are taken on it. A mask without a ring on it is painted with
            the scan's mean.

    Returns:
        (B, P, S, S): image b without what mask p covers.
    """
    ring = (_widened(masks, max(1, int(image.shape[-1] * AROUND))) - masks) * inside
    # A thousandth of a pixel is no ring: the scan's own mean then decides.
    weight = ring + 1e-6 * inside
    colour = (weight * image).sum((-2, -1), keepdim=True) / weight.sum((-2, -1), keepdim=True).clamp_min(1e-9)
    soft = smooth(_widened(masks, 1), 1.0).to(image.dtype)
    return torch.lerp(image.expand_as(soft), colour.expand_as(soft), soft)


def _widened(masks: Tensor, reach: int) -> Tensor:
    """The largest value within ``reach`` rows and columns, which is that of columns of that of rows."""
    side = 2 * reach + 1
    rows = F.max_pool2d(masks, (side, 1), stride=1, padding=(reach, 0))
    return F.max_pool2d(rows, (1, side), stride=1, padding=(0, reach))


def logit_drops(evidence: ClassEvidence, image: Tensor, box: Tensor, masks: Tensor) -> Tensor:
    """What each mask takes from a class's logit, over what the mask that takes most does.

    Args:
        evidence: the classifier.
        image: (B, 1, S, S).
        box: (B, 4) where the scan lies.
        masks: (B, P, s, s) in [0, 1], brought to the frame's size here.

    Returns:
        (B, C, P) in [0, 1]: ``max(0, z - z_p) / max_q (z - z_q)``; 0 where no drop exceeds ``SMALLEST_DROP``.
        Masks that are the same (``same_as``) take the same.
    """
    size = image.shape[-1]
    at_once = max(1, PAINTED_AT_ONCE * 128**2 // size**2)
    inside = inside_box(box, size, size)
    whole = evidence(image, box).float()
    first = same_as(masks)
    taken = []
    for b in range(len(image)):
        painted, place = first[b].unique(return_inverse=True)
        left = []
        for some in masks[b, painted][None].float().split(at_once, dim=1):
            full = F.interpolate(some, size=(size, size), mode="bilinear", antialias=some.shape[-1] > size)
            # Masks beside each other at each pixel: what is done to all of them runs over them.
            full = full.contiguous(memory_format=torch.channels_last)
            without = paint_over(image[b : b + 1].float(), full, inside[b : b + 1]).transpose(0, 1)
            left.append(evidence(without.to(image.dtype), box[b].expand(len(without), 4)).float())
        taken.append((whole[b] - torch.cat(left)).clamp_min(0)[place].T)
    drops = torch.stack(taken)
    most = drops.amax(dim=-1, keepdim=True)
    told = most >= SMALLEST_DROP * whole.abs().clamp_min(1)[..., None]
    return torch.where(told, drops / most.clamp_min(SMALLEST_DROP), 0)


def drops_under_occlusion(evidence: ClassEvidence) -> Drops:
    """``logit_drops`` as a function of slices and masks."""
    return lambda some, masks: logit_drops(evidence, some.image, some.box, masks)


def smallest_discriminative(masks: Tensor, drops: Tensor, share: float, trust: Tensor | None = None) -> Tensor:
    """Of each class the smallest mask whose drop is at least ``share`` of the largest one.

    The mask of the whole body takes most of all; the smallest that takes nearly as much is the target.

    Args:
        masks: (B, P, h, w) in [0, 1], 0 outside the scan.
        drops: (B, C, P) of ``logit_drops``.
        share: in (0, 1]; 1 takes the mask of the largest drop whatever its size.
        trust: (B, P) of each mask; one without trust is not taken. None: all are trusted.

    Returns:
        (B, C, h, w), each map with a maximum of 1; 0 where no mask takes anything.
    """
    drops = drops if trust is None else drops * (trust > 0)[:, None]
    most = drops.amax(dim=-1, keepdim=True)
    area = masks.sum((-2, -1))[:, None].expand_as(drops)
    chosen = area.masked_fill(drops < share * most, torch.inf).argmin(dim=-1)
    found = masks.gather(1, chosen[..., None, None].expand(-1, -1, *masks.shape[2:])) * (most[..., None] > 0)
    return found / found.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)


def with_discriminative_mask(maps: Tensor, discriminative: Tensor, weight: float) -> Tensor:
    """Activation and most discriminative mask together: ``(1 - weight) x + weight m``, scaled to a maximum of 1.

    Both are (B, C, h, w) in [0, 1]. Where no mask tells anything the map stays as it is.
    """
    found = discriminative.amax((-2, -1), keepdim=True) > 0
    both = (1 - weight) * maps + weight * discriminative
    both = both / both.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(both.dtype).tiny)
    return torch.where(found, both, maps)
