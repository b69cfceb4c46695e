"""Prompt affinity mining (PAM): prompts of a grid of points tell which pixels belong together.

Source: WeakMedSAM (arXiv 2503.04106), prompt affinity mining; the random walk over a class activation
map follows AffinityNet (Ahn and Kwak, CVPR 2018). Two neighbouring pixels that the same prompts cover
belong together; the map flows between them and stops where masks end.

Nothing here builds an N x N matrix. Weights live on the *stencil*: for each of the O offsets of half a
disc (the other half is its mirror image), a map of the weight between a pixel and its neighbour at that
offset.

Differs from the published code: the grid covers the image (published: all points in the top-left
corner); the P masks are compared one by one, each squashed to [0, 1] (published: raw logits summed into
one map, where a step of 0.5 already weighs 1e-14); rows of the transition sum to one, so that a
constant map stays constant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weakmedsam.cam import min_max_inside

AFFINITIES = ("per_prompt", "summed")


def grid_points(side: int, size: int) -> Tensor:
    """A regular grid of prompts, symmetric in the frame.

    Args:
        side: points a side, g; the paper uses 4.
        size: side of the frame, pixels.

    Returns:
        (g * g, 2) float32, (x, y) pixels, (i + 0.5) * size / g, row by row.
    """
    at = (torch.arange(side) + 0.5) * size / side
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def half_disc(radius: float) -> list[tuple[int, int]]:
    """Offsets (row, column) of the neighbours closer than ``radius`` pixels, one of each mirrored pair.

    The pixel itself is not among them.
    """
    reach = range(-int(radius), int(radius) + 1)
    return [
        (dy, dx) for dy in reach for dx in reach if (dy, dx) > (0, 0) and dy * dy + dx * dx < radius * radius
    ]


def prompt_maps(logits: Tensor, size: int, affinity: str = "per_prompt") -> Tensor:
    """Masks of the prompts on the map the walk runs on.

    Args:
        logits: (B, P, h, w) mask logits.
        size: side of the map, cells; the paper uses 64.
        affinity: ``per_prompt`` squashes each mask to [0, 1] and keeps the P apart; ``summed`` is the
            published form, one map of summed logits.

    Returns:
        (B, P, size, size), or (B, 1, size, size) for ``summed``.
    """
    maps = logits.float().sigmoid() if affinity == "per_prompt" else logits.float().sum(dim=1, keepdim=True)
    if maps.shape[-1] > size and maps.shape[-1] % size == 0:
        return F.avg_pool2d(maps, maps.shape[-1] // size)
    return F.interpolate(maps, size=(size, size), mode="bilinear", antialias=True)


def edge_weights(
    maps: Tensor, offsets: list[tuple[int, int]], beta: float = 4.0, contrast: float = 10.0
) -> Tensor:
    """Affinity of each pixel with its neighbours: ``exp(-contrast * mean_p |m_p(i) - m_p(j)|) ** beta``.

    Args:
        maps: (B, P, h, w).
        offsets: O offsets (row, column) of ``half_disc``.
        beta: exponent; the paper uses 4.
        contrast: scale of the differences, 1 for ``summed`` (published). With masks in [0, 1] and 10,
            an edge that one prompt of sixteen sees weighs 0.08, one that four see 5e-5.

    Returns:
        (B, O, h, w): the weight between pixel (y, x) and (y + dy, x + dx); 0 where the neighbour lies
        outside, so that border pixels have fewer neighbours and no invented ones.
    """
    batch, _, height, width = maps.shape
    weights = maps.new_zeros(batch, len(offsets), height, width)
    for o, offset in enumerate(offsets):
        here, there = _overlap(offset, height, width)
        difference = (maps[..., here[0], here[1]] - maps[..., there[0], there[1]]).abs().mean(dim=1)
        weights[:, o, here[0], here[1]] = torch.exp(-beta * contrast * difference)
    return weights


def _overlap(
    offset: tuple[int, int], height: int, width: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where both a pixel and its neighbour exist: slices of the pixels, and of their neighbours."""
    dy, dx = offset
    here = slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx))
    there = slice(max(0, dy), height + min(0, dy)), slice(max(0, dx), width + min(0, dx))
    return here, there


def _spread(maps: Tensor, weights: Tensor, offsets: list[tuple[int, int]]) -> Tensor:
    """(B, C, h, w): each pixel's own value plus the weighted values of its neighbours (self weight 1)."""
    total = maps.clone()
    height, width = maps.shape[-2:]
    for o, offset in enumerate(offsets):
        here, there = _overlap(offset, height, width)
        weight = weights[:, o : o + 1, here[0], here[1]]
        total[..., here[0], here[1]] += weight * maps[..., there[0], there[1]]
        total[..., there[0], there[1]] += weight * maps[..., here[0], here[1]]
    return total


def random_walk(
    cam: Tensor,
    weights: Tensor,
    offsets: list[tuple[int, int]],
    steps: int = 4,
    rescale: bool = True,
    inside: Tensor | None = None,
) -> Tensor:
    """Spread class activation along the affinity: ``steps`` products with the transition matrix.

    Each pixel becomes the weighted mean of itself and its neighbours, so values stay within those of
    ``cam`` and a constant map is a fixed point.

    Args:
        cam: (B, C, h, w).
        weights: (B, O, h, w) of ``edge_weights``.
        offsets: the same O offsets.
        steps: t; the paper uses 4.
        rescale: scale each map to [0, 1] after each step (published); a constant map is left as it is.
        inside: (B, 1, h, w) bool, the part of the map that is scaled; outside it is 0. None = all.

    Returns:
        (B, C, h, w).
    """
    whole = torch.ones_like(cam[:, :1], dtype=torch.bool) if inside is None else inside
    neighbours = _spread(torch.ones_like(cam[:, :1]), weights, offsets)
    for _ in range(steps):
        cam = _spread(cam, weights, offsets) / neighbours
        if rescale:
            low = cam.where(whole, torch.inf).amin(dim=(-2, -1), keepdim=True)
            high = cam.where(whole, -torch.inf).amax(dim=(-2, -1), keepdim=True)
            cam = torch.where(high - low < 1e-6, cam, min_max_inside(cam, whole))
    return cam


def border_map(weights: Tensor, offsets: list[tuple[int, int]]) -> Tensor:
    """A picture of the affinity: (B, h, w), 1 = belongs to all its neighbours, 0 = to none."""
    ones = torch.ones_like(weights[:, :1])
    most = _spread(ones, torch.ones_like(weights), offsets)
    return ((_spread(ones, weights, offsets) - 1) / (most - 1)).squeeze(1)
