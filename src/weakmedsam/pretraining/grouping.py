"""A dense lesson beside the prompts: which cells, and which pixels, belong to one piece.

A question teaches the encoder one region of an image; all pairs of cells teach it every region at a
small part of the cost of a mask. Metric learning as in De Brabandere et al., "Semantic Instance
Segmentation with a Discriminative Loss Function" (arXiv 1708.02551), here as a logistic loss over pairs.
The two projections are used in pre-training only and are no part of the network.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakmedsam.backbones.pocket import DETAIL, EMBED, FRAME, split_embedding


class Sample(NamedTuple):
    """Some places of B images.

    Attributes:
        values: (B, N, c) what was projected there.
        owners: (B, N) the piece they lie in.
        places: (B, N, 2) row and column, in parts of the frame.
    """

    values: Tensor
    owners: Tensor
    places: Tensor


class Grouping(nn.Module):
    """Loss over pairs: near in the projected embedding if and only if of one piece.

    Args:
        cells: cells compared in an image, drawn at random.
        window: side of the window whose pixels (of the map at half the frame) are compared.
        reach: farthest distance of two cells, and of two pixels, that are compared, as a part of the frame:
            what is farther apart is told apart by its position.
        channels: of both projections.
    """

    def __init__(
        self,
        cells: int = 256,
        window: int = 20,
        reach: tuple[float, float] = (0.4, 0.125),
        channels: int = 32,
    ) -> None:
        super().__init__()
        self.cells, self.window, self.reach = cells, window, reach
        self.of_cells = nn.Conv2d(EMBED, channels, 1)
        self.of_pixels = nn.Conv2d(EMBED // 4 + DETAIL[0], channels, 1)
        self.margin = nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, embedding: Tensor, pieces: Tensor, generator: torch.Generator) -> Tensor:
        """Embedding (B, 512, 32, 32) of ``Pocket.embed``, pieces (B, 128, 128) -> scalar."""
        cells, detail, _ = split_embedding(embedding)
        at_cells = _read_at(self.of_cells(cells).float(), pieces)
        chosen = torch.randperm(at_cells.values.shape[1], generator=generator)[: self.cells].to(cells.device)
        loss = self._compare(Sample(*(part[:, chosen] for part in at_cells)), 0)
        finer = self.of_pixels(torch.cat([F.pixel_shuffle(cells, 2), detail], dim=1)).float()
        room = finer.shape[-1] - self.window + 1
        top, left = torch.randint(0, room, (2,), generator=generator).tolist()
        share = pieces.shape[-1] // finer.shape[-1]
        here = slice(top, top + self.window), slice(left, left + self.window)
        there = tuple(slice(share * part.start, share * part.stop) for part in here)
        at_pixels = _read_at(finer[..., here[0], here[1]], pieces[:, there[0], there[1]])
        return loss + self._compare(at_pixels, 1)

    def _compare(self, sample: Sample, level: int) -> Tensor:
        """Logistic loss over all pairs in reach, both kinds weighing the same; level 0 = cells, 1 = pixels."""
        logits = self.margin[level] - torch.cdist(sample.values, sample.values).square()
        same = sample.owners[:, :, None] == sample.owners[:, None, :]
        near = torch.cdist(sample.places, sample.places) < self.reach[level]
        each = F.softplus(torch.where(same, -logits, logits))
        kinds = [(each * kind).sum() / kind.sum().clamp_min(1) for kind in (same & near, ~same & near)]
        return kinds[0] + kinds[1]


def _read_at(maps: Tensor, pieces: Tensor) -> Sample:
    """Every pixel of maps (B, c, h, w), with the piece (B, S, S) it lies in."""
    batch, _, height, width = maps.shape
    step = pieces.shape[-1] // width
    owners = pieces[:, step // 2 :: step, step // 2 :: step].flatten(1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).flatten(0, 1).to(maps) / FRAME * step
    return Sample(maps.flatten(2).transpose(1, 2), owners, places.expand(batch, -1, -1))
