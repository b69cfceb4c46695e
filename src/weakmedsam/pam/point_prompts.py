"""Where prompts are set: on a grid, on a grid where the image has content, or at the activation's peaks.

Every slice has P points; those it has no use for have ``used`` 0 and count nowhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weakmedsam.geometry import inside_box
from weakmedsam.pam.affinity import grid_points

PLACEMENTS = ("grid", "content", "peaks")


class PromptPoints(NamedTuple):
    """Points to prompt at.

    Attributes:
        points: (P, 2), the same for all slices, or (B, P, 2); (x, y) in pixels of the frame.
        used: (B, P) float, 1 or 0; None = all.
    """

    points: Tensor
    used: Tensor | None

    def rows(self, rows: slice) -> PromptPoints:
        """Those of some slices."""
        points = self.points if self.points.dim() == 2 else self.points[rows]
        return PromptPoints(points, None if self.used is None else self.used[rows])

    def split(self, size: int) -> list[PromptPoints]:
        """So many points at a time."""
        pieces = [slice(first, first + size) for first in range(0, self.points.shape[-2], size)]
        return [
            PromptPoints(self.points[..., piece, :], None if self.used is None else self.used[:, piece])
            for piece in pieces
        ]


def content_prompts(image: Tensor, box: Tensor, side: int, share: float = 0.1) -> PromptPoints:
    """Those points of the grid that lie on the scan and where the image is not dark.

    Args:
        image: (B, 1, S, S) in [0, 1].
        box: (B, 4) of the scan, see ``cam.inside_box``.
        side: points a side of the whole grid.
        share: a point is used if the mean intensity of its cell of the grid is at least so much of the
            slice's brightest cell, in [0, 1]. 0: all that lie on the scan.

    Returns:
        The P <= side * side points that some slice uses, in the grid's order (P >= 1).
    """
    size = image.shape[-1]
    cells = F.adaptive_avg_pool2d(image[:, 0].float(), side)
    bright = cells >= share * cells.amax(dim=(-2, -1), keepdim=True)
    used = (bright & inside_box(box, size, side)[:, 0]).flatten(1)
    kept = used.any(dim=0)
    kept[0] |= ~kept.any()
    return PromptPoints(grid_points(side, size).to(image.device)[kept], used[:, kept].float())


def peak_prompts(cam: Tensor, label: Tensor, box: Tensor, size: int, peaks: int = 8) -> PromptPoints:
    """The highest local peaks of the activation of each class that is present.

    A peak is a cell on the scan that is as high as any of its eight neighbours; of a level stretch every
    cell is one. It is prompted at its centre.

    Args:
        cam: (B, C, h, w) class activation.
        label: (B, C) image-level label.
        box: (B, 4) of the scan, see ``cam.inside_box``.
        size: side of the frame, pixels.
        peaks: of each class, at most so many.

    Returns:
        As many points as the slice with the most has (P >= 1); of each slice the highest come first,
        class by class.
    """
    cells = cam.shape[-1]
    inside = inside_box(box, size, cells)
    heights = cam.float().where(inside, -torch.inf)
    top = heights >= F.max_pool2d(heights, 3, stride=1, padding=1)
    heights = heights.where(top & inside & (label > 0.5)[:, :, None, None], -torch.inf).flatten(2)
    height, cell = heights.topk(min(peaks, heights.shape[-1]), dim=-1)
    used = (height > -torch.inf).flatten(1)
    at = torch.stack([cell % cells, cell // cells], dim=-1).flatten(1, 2)
    order = (~used).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, int(used.sum(dim=1).max()))]
    points = at.take_along_dim(order[..., None], dim=1)
    return PromptPoints((points + 0.5) * size / cells, used.take_along_dim(order, dim=1).float())
