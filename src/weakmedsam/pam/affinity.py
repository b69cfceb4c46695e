"""Prompt affinity mining (PAM): prompts of a grid of points tell which pixels belong together.

Source: WeakMedSAM (arXiv 2503.04106), prompt affinity mining; the random walk over a class activation
map follows AffinityNet (Ahn and Kwak, CVPR 2018). Two neighbouring pixels that the same prompts cover
belong together; the map flows between them and stops where masks end.

Nothing here builds an N x N matrix. Weights live on the *stencil*: for each of the O offsets of half a
disc (the other half is its mirror image), a map of the weight between a pixel and its neighbour at that
offset. Where a shape says (..., *space), space is (h, w) in a slice and (D, h, w) in a volume
(``volume_affinity.py``), and an offset has as many numbers.

Differs from the published code: the grid covers the image (published: all points in the top-left
corner); the P masks are compared one by one, each squashed to [0, 1] (published: raw logits summed into
one map, where a step of 0.5 in each of sixteen already weighs 1e-14); rows of the transition sum to one,
so that a constant map stays constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weakmedsam.geometry import min_max_inside


class CellEvidence(NamedTuple):
    """What prompts and the image say of each cell of the map, for B slices and P prompts.

    Attributes:
        grey: (B, 1, s, s) in [0, 1], the image.
        share: of the grey values where they stand beside masks, [0, 1].
        masks: (B, P, s, s) in [0, 1]; None without prompts.
        trust: (B, P), 0 or more, the weight of each mask; None = all alike.
        logits: (B, 1, s, s), raw mask logits summed over the trusted prompts; None unless the affinity asks for them.
    """

    grey: Tensor
    share: float
    masks: Tensor | None = None
    trust: Tensor | None = None
    logits: Tensor | None = None


Maps = tuple[Tensor, Tensor | None]
"""(B, Q, s, s) maps whose differences become edge weights, and (B, Q) their weights; None = all alike."""


class AffinityKind(NamedTuple):
    """An entry of ``AFFINITIES``.

    Attributes:
        maps: what pixels are compared by.
        prompted: it needs masks.
        logits: it needs raw logits beside them.
    """

    maps: Callable[[CellEvidence], Maps]
    prompted: bool
    logits: bool


AFFINITIES: dict[str, AffinityKind] = {}
"""By the name of the function: what ``model.pam.affinity.kind`` takes, beside ``none``."""


def affinity(
    prompted: bool = True, logits: bool = False
) -> Callable[[Callable[[CellEvidence], Maps]], Callable[[CellEvidence], Maps]]:
    """Register a function as an affinity, under its own name.

    Args:
        prompted: it needs masks; without, no prompt is decoded for it.
        logits: it needs raw logits, too.
    """

    def register(function: Callable[[CellEvidence], Maps]) -> Callable[[CellEvidence], Maps]:
        AFFINITIES[function.__name__] = AffinityKind(function, prompted, logits)
        return function

    return register


@affinity()
def per_prompt(evidence: CellEvidence) -> Maps:
    """Each prompt's mask by itself. Paper: -."""
    assert evidence.masks is not None
    return evidence.masks, evidence.trust


@affinity()
def with_intensity(evidence: CellEvidence) -> Maps:
    """Each prompt's mask, and grey values with the weight ``affinity.intensity_share``. Paper: -."""
    masks, trust, share = evidence.masks, evidence.trust, evidence.share
    assert masks is not None
    weight = masks.new_ones(masks.shape[:2]) if trust is None else trust
    whole = weight.sum(dim=1, keepdim=True)
    # Where no mask is trusted the grey values stand alone.
    weights = [(1 - share) * weight, share * whole.where(whole > 0, 1)]
    return torch.cat([masks, evidence.grey], dim=1), torch.cat(weights, dim=1)


@affinity()
def summed_masks(evidence: CellEvidence) -> Maps:
    """The mean of the masks, one map in [0, 1]. Paper: -."""
    masks, trust = evidence.masks, evidence.trust
    assert masks is not None
    if trust is None:
        return masks.mean(dim=1, keepdim=True), None
    total = trust.sum(dim=1).clamp_min(_TINY)
    mean = torch.einsum("bphw,bp->bhw", masks, trust)[:, None] / total[:, None, None, None]
    return mean, _any_trust(trust)


@affinity(logits=True)
def summed(evidence: CellEvidence) -> Maps:
    """The sum of the raw mask logits, one map without bound: the published form."""
    assert evidence.logits is not None
    return evidence.logits, None if evidence.trust is None else _any_trust(evidence.trust)


@affinity(prompted=False)
def intensity(evidence: CellEvidence) -> Maps:
    """Grey values alone; no prompt is decoded. Paper: -."""
    return evidence.grey, None


def _any_trust(trust: Tensor) -> Tensor:
    """(B, P) -> (B, 1): 1 where some mask is trusted."""
    return (trust.sum(dim=1, keepdim=True) > 0).float()


Offset = tuple[int, ...]
Region = tuple[slice, ...]

_TINY = torch.finfo(torch.float32).tiny


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


def half_disc(radius: float) -> list[Offset]:
    """Offsets (row, column) of the neighbours closer than ``radius`` pixels, one of each mirrored pair.

    The pixel itself is not among them.
    """
    reach = range(-int(radius), int(radius) + 1)
    return [(dy, dx) for dy in reach for dx in reach if (dy, dx) > (0, 0) and dy * dy + dx * dx < radius * radius]


def onto_map(values: Tensor, size: int) -> Tensor:
    """Average (B, P, h, w) onto the map the walk runs on: (B, P, size, size), bilinear where larger."""
    if values.shape[-1] > size and values.shape[-1] % size == 0:
        return F.avg_pool2d(values, values.shape[-1] // size)
    return F.interpolate(values, size=(size, size), mode="bilinear", antialias=True)


def edge_weights(
    maps: Tensor,
    offsets: Sequence[Offset],
    beta: float = 4.0,
    contrast: float = 10.0,
    trust: Tensor | None = None,
) -> Tensor:
    """Affinity of each pixel with its neighbours: ``exp(-contrast * mean_p |m_p(i) - m_p(j)|) ** beta``.

    Args:
        maps: (B, P, *space).
        offsets: O offsets of ``half_disc``, or of ``volume_affinity.half_ball``.
        beta: exponent; the paper uses 4.
        contrast: scale of the differences, 1 for ``summed`` (published). With masks in [0, 1] and 10,
            an edge that one prompt of sixteen sees weighs 0.08, one that four see 5e-5.
        trust: (B, P, 1, 1), in a volume (B, P, D, 1, 1), 0 or more: the weight of each prompt in the mean
            (this project's), between two slices the geometric mean of both. Where no prompt is trusted
            there is no affinity. None: all alike, as published.

    Returns:
        (B, O, *space): the weight between a pixel and its neighbour at the offset; 0 where the neighbour
        lies outside, so that border pixels have fewer neighbours and no invented ones.
    """
    weights = maps.new_zeros(len(maps), len(offsets), *maps.shape[2:])
    trust = maps.new_ones(()) if trust is None else trust
    # Slice by slice, prompts after it: the mean over prompts is then one product.
    trust = trust.expand(*maps.shape[:-2], 1, 1).movedim(1, -3).flatten(-3)
    by_slice = maps.movedim(1, -3).contiguous()
    room = maps.new_empty(maps.numel())
    for o, offset in enumerate(offsets):
        here, there = _overlap(offset, maps)
        inside = weights[:, o][here[:1] + here[2:]]
        if not inside.numel():
            continue
        every = slice(None)
        one, other = (region[:1] + region[2:-2] + (every,) + region[-2:] for region in (here, there))
        here_maps, there_maps = by_slice[one], by_slice[other]
        difference = room[: here_maps.numel()].view(here_maps.shape)
        difference = torch.sub(here_maps, there_maps, out=difference).abs_().flatten(-2)
        # Trust is one number a slice, so only the slices of the regions are taken of it.
        both = (trust[here[:1] + here[2:-2]] * trust[there[:1] + there[2:-2]]).sqrt()
        known = both.sum(dim=-1)[..., None, None]
        mean = (both[..., None, :] @ difference).view(inside.shape) / known.clamp_min(_TINY)
        inside.copy_(torch.exp(-beta * contrast * mean).where(known > 0, 0))
    return weights


def _overlap(offset: Offset, maps: Tensor) -> tuple[Region, Region]:
    """Where (B, X, *space) has both a pixel and its neighbour: the pixels, and their neighbours."""
    every = slice(None)
    steps = list(zip(offset, maps.shape[2:], strict=True))
    here = [slice(max(0, -step), max(0, length - max(0, step))) for step, length in steps]
    there = [slice(max(0, step), max(0, length + min(0, step))) for step, length in steps]
    return (every, every, *here), (every, every, *there)


def _spread(maps: Tensor, weights: Tensor, offsets: Sequence[Offset]) -> Tensor:
    """(B, C, *space): each pixel's own value plus the weighted values of its neighbours (self weight 1)."""
    return _Spread(maps, weights, offsets)(maps)


class _Spread:
    """``_spread``, again and again: for maps of one shape.

    Space is laid out in one row, where a neighbour lies so many cells ahead, or back: a long row each way is two
    operations an offset. Where that is no neighbour, but a cell of the next row, the weight is 0.
    """

    def __init__(self, maps: Tensor, weights: Tensor, offsets: Sequence[Offset]) -> None:
        self.source, self.total = torch.empty_like(maps), torch.empty_like(maps)
        source, total = self.source.flatten(2), self.total.flatten(2)
        strides = [math.prod(maps.shape[axis + 1 :]) for axis in range(2, maps.dim())]
        self.steps = []
        for o, offset in enumerate(offsets):
            ahead = sum(step * stride for step, stride in zip(offset, strides, strict=True))
            if all(abs(step) < length for step, length in zip(offset, maps.shape[2:], strict=True)):
                weight = weights[:, o : o + 1].flatten(2)[..., :-ahead]
                self.steps.append((total[..., :-ahead], weight, source[..., ahead:]))
                self.steps.append((total[..., ahead:], weight, source[..., :-ahead]))

    def __call__(self, maps: Tensor) -> Tensor:
        """The result holds until the next call."""
        self.source.copy_(maps)
        self.total.copy_(maps)
        for total, weight, source in self.steps:
            total.addcmul_(weight, source)
        return self.total


def random_walk(
    cam: Tensor,
    weights: Tensor,
    offsets: Sequence[Offset],
    steps: int | None = 4,
    rescale: bool = True,
    inside: Tensor | None = None,
    restart: float = 0.0,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
) -> Tensor:
    """Spread class activation along the affinity: ``x <- (1 - restart) T x + restart x0``, ``steps`` times.

    T is the transition matrix: each pixel becomes the weighted mean of itself and its neighbours, so
    values stay within those of ``cam`` and a constant map is a fixed point.

    Args:
        cam: (B, C, *space), x0.
        weights: (B, O, *space) of ``edge_weights``.
        offsets: the same O offsets.
        steps: t; the paper uses 4. None: the steady state, walked without rescaling until no value
            changes by more than ``tolerance``, or ``max_steps``. It is ``restart (I - (1 - restart) T)^-1
            x0``, missed by at most ``tolerance * (1 - restart) / restart``; without restart a constant.
        rescale: scale each map of a slice to [0, 1] after each step (published; once at the end for
            ``steps`` None); a constant map is left as it is.
        inside: (B, 1 or C, *space) bool, the part that walks and is scaled; outside it is 0. None = all.
        restart: probability of going back to the start, in [0, 1); published: 0.
        tolerance: of the steady state.
        max_steps: at most so many steps to the steady state.

    Returns:
        (B, C, *space).
    """
    whole = torch.ones_like(cam[:, :1], dtype=torch.bool) if inside is None else inside
    start = x = cam.where(whole, 0)
    neighbours = _spread(whole.to(cam.dtype), weights, offsets).where(whole, 1)
    spread = _Spread(x, weights, offsets)
    for _ in range(max_steps if steps is None else steps):
        last, x = x, (spread(x) / neighbours).where(whole, 0)
        x = x if restart == 0 else (1 - restart) * x + restart * start
        if steps is not None:
            x = _rescaled(x, whole) if rescale else x
        elif not (x - last).abs().max() > tolerance:
            break
    return _rescaled(x, whole) if rescale and steps is None else x


def _rescaled(maps: Tensor, inside: Tensor) -> Tensor:
    """``min_max_inside``, which leaves constant maps (and slices without an inside) as they are."""
    low = maps.where(inside, torch.inf).amin(dim=(-2, -1), keepdim=True)
    high = maps.where(inside, -torch.inf).amax(dim=(-2, -1), keepdim=True)
    return torch.where(high - low < 1e-6, maps, min_max_inside(maps, inside))


def border_map(weights: Tensor, offsets: Sequence[Offset], inside: Tensor | None = None) -> Tensor:
    """A picture of the affinity: (B, *space), 1 = belongs to all its neighbours, 0 = to none.

    Args:
        weights: (B, O, *space) of ``edge_weights``.
        offsets: the same O offsets.
        inside: (B, 1, *space) bool, the part that walks; None = all.
    """
    ones = torch.ones_like(weights[:, :1])
    there = ones if inside is None else inside.to(weights.dtype)
    # Where all is alike an edge weighs 1, and 0 out of the map.
    most = _spread(ones, edge_weights(torch.zeros_like(ones), offsets), offsets)
    belongs = (_spread(there, weights, offsets) - there) / (most - 1)
    return (belongs * there).squeeze(1)
