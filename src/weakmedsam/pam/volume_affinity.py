"""PAM's walk through a volume: neighbours in the adjacent slices too, so that a label is a volume.

Not in the paper, whose walk knows one slice. The formulas are those of ``affinity.py`` with space
(D, h, w) and offsets (slice, row, column). Lengths are in cells of the map; a slice is ``thickness``
cells from the next, by the scan's spacing in mm.

Two cells of different slices are compared as two cells of one: by what the same prompts say of both. An
edge between slices also fades with their distance, ``exp(-|dz| thickness / radius)``; within a slice
nothing fades, so that a volume of one slice is walked exactly as that slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from weakmedsam.pam.affinity import Offset, edge_weights, half_disc

EXTENTS = ("slice", "volume")


def relative_thickness(spacing: tuple[float, float, float], side: int, cells: int) -> float:
    """Distance of two adjacent slices, in cells of the map.

    Args:
        spacing: (slice distance, row, column) of the scan's own grid, mm.
        side: side of the padded square that the map covers, pixels of the scan's own slice.
        cells: side of the map.

    Returns:
        Slice distance over the cell's size, both mm; the latter is the geometric mean of its height and
        width.
    """
    return spacing[0] / (math.sqrt(spacing[1] * spacing[2]) * side / cells)


def half_ball(radius: float, reach: int, thickness: float) -> list[Offset]:
    """Offsets (slice, row, column) of the neighbours closer than ``radius``, one of each mirrored pair.

    Args:
        radius: cells.
        reach: slices either way, at most.
        thickness: of ``relative_thickness``.

    Returns:
        Those within the slice first, as in ``half_disc``; then, slice by slice, those with
        ``dy^2 + dx^2 + (dz thickness)^2 < radius^2``.
    """
    offsets: list[Offset] = [(0, *offset) for offset in half_disc(radius)]
    rows = range(-int(radius), int(radius) + 1)
    for dz in range(1, reach + 1):
        rest = radius * radius - (dz * thickness) ** 2
        offsets += [(dz, dy, dx) for dy in rows for dx in rows if dy * dy + dx * dx < rest]
    return offsets


def volume_weights(
    chunks: Iterable[tuple[Tensor, Tensor | None]],
    offsets: Sequence[Offset],
    radius: float,
    thickness: float,
    beta: float = 4.0,
    contrast: float = 10.0,
) -> Tensor:
    """``edge_weights`` of a volume whose maps come a few slices at a time.

    Never more maps are held than those of a chunk and of as many slices as an edge spans; the weights
    themselves take 4 O D h w bytes.

    Args:
        chunks: the volume's slices in order: maps (n, P, h, w), and trust (n, P) or None. P is the same
            throughout, and prompt p the same point.
        offsets: O offsets of ``half_ball``.
        radius: cells.
        thickness: of ``relative_thickness``.
        beta: exponent.
        contrast: scale of the differences.

    Returns:
        (1, O, D, h, w).
    """
    reach = max(offset[0] for offset in offsets)
    held: tuple[Tensor, Tensor | None] | None = None
    parts = []
    for maps, trust in chunks:
        if held is not None:
            maps = torch.cat([held[0], maps])
            trust = None if trust is None or held[1] is None else torch.cat([held[1], trust])
        complete = max(0, len(maps) - reach)
        parts.append(_slab_weights(maps, trust, offsets, beta, contrast)[:, :, :complete])
        held = maps[complete:], None if trust is None else trust[complete:]
    if held is not None:
        parts.append(_slab_weights(*held, offsets, beta, contrast))
    weights = torch.cat(parts, dim=2)
    fade = torch.tensor([math.exp(-offset[0] * thickness / radius) for offset in offsets])
    return weights.mul_(fade.to(weights)[:, None, None, None])


def _slab_weights(
    maps: Tensor, trust: Tensor | None, offsets: Sequence[Offset], beta: float, contrast: float
) -> Tensor:
    """(D, P, h, w) -> (1, O, D, h, w)."""
    deep = None if trust is None else trust.T[None, :, :, None, None]
    return edge_weights(maps.movedim(0, 1)[None], offsets, beta, contrast, deep)
