"""A local encoder for classification: what a cell says follows from its surroundings alone.

A class activation map can only point at the target if a cell's evidence comes from the cell. Two things
common in networks break that: attention over the whole image, and normalisation by statistics of the
whole image (group, layer and instance norm over rows and columns). Through either, every cell learns
what kind of slice it lies in, and a slice is then recognised by whatever is easiest, anywhere. On the
left atrium, one network with batch norm and with group norm, all else equal: the activation map's Dice
was 0.35 and 0.15 (docs/results.md), while group norm classified better.

So this encoder has small kernels only, and batch norm, whose statistics are constants once trained. It
is what SAMUS's convolutional branch (arXiv 2309.06824) is to its transformer, kept apart from it.

Which of the cues that tell the class apart a network takes up depends on its first weights. Members, networks that
share nothing but the batches, take up different ones, and what they have in common is more often the target: a deep
ensemble (Lakshminarayanan et al., NeurIPS 2017) in one pass.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakmedsam.errors import ConfigError, check_range


class LocalEncoder(nn.Module):
    """Small convolutional networks side by side, of whose map each cell sees a part of the frame.

    (B, 1, S, S) in [0, 1] -> features (B, M * D, cells, cells), trained from random numbers. Stages of two
    convolutions: the first halve the map, as many as it takes to get down to ``cells``; those that follow widen what a
    cell sees, its own pixels in the middle, until that is ``field`` of the frame's side.

    Args:
        image_size: S, side of the frame, pixels.
        frame: largest side that is looked at. An image is reduced, antialiased, to the largest side of
            ``cells`` times a power of two that is neither above it nor above its own.
        cells: side of the feature map.
        field: what a cell sees, as a share of the frame's side, above 0 and at most 2; of what stages give, the
            nearest. With 16 cells the least is 0.34 at 64 pixels and 0.39 at 128.
        width: D, channels of a member's map; each halving before has half as many as the one after it.
        members: M, networks side by side that share no weight; channels of a member follow one another.

    Attributes:
        feature_dim: M * D.
        members: M.
        side: of the frame that is looked at, pixels.
        field: what a cell sees, pixels of that frame.

    Raises:
        ConfigError: halving does not bring the frame down to ``cells``, or a number out of its range.
    """

    def __init__(
        self,
        image_size: int = 128,
        frame: int = 128,
        cells: int = 16,
        field: float = 0.4,
        width: int = 96,
        members: int = 1,
    ) -> None:
        super().__init__()
        check_range("model.local_encoder.image_size", image_size, 1, 4096)
        check_range("model.local_encoder.frame", frame, 1, 4096)
        check_range("model.local_encoder.cells", cells, 1, 512)
        check_range("model.local_encoder.field", field, 0, 2, above=True)
        check_range("model.local_encoder.width", width, 1, 8192)
        check_range("model.local_encoder.members", members, 1, 64)
        side = min(image_size, frame)
        if cells > side:
            raise ConfigError(
                f"model.local_encoder: {side} pixels cannot be brought down to {cells} cells by halving; change "
                "data.image_size, or frame and cells of model.local_encoder"
            )
        halvings = int(math.log2(side / cells))
        self.side, self.feature_dim, self.members = cells * 2**halvings, members * width, members
        stages = max(halvings, 1)
        while abs(_field(halvings, stages + 1) - field * self.side) < abs(_field(halvings, stages) - field * self.side):
            stages += 1
        self.field = _field(halvings, stages)
        layers: list[nn.Module] = []
        inputs = 1
        for stage in range(stages):
            outputs = members * max(1, width >> max(halvings - 1 - stage, 0))
            # A kernel of 4 halves without moving the map: with one of 3 a cell's field lies half a cell off.
            kernel, stride = (4, 2) if stage < halvings else (3, 1)
            groups = members if stage else 1  # the first sees the image, which is every member's
            layers += _convolution(inputs, outputs, kernel, stride, groups)
            layers += _convolution(outputs, outputs, 3, 1, members)
            inputs = outputs
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """Features of slices (B, 1, S, S)."""
        if image.shape[-1] != self.side:
            image = F.interpolate(image, size=(self.side, self.side), mode="bilinear", antialias=True)
        # A window or percentiles have mapped a slice to [0, 1]; its deviation is about a quarter of that.
        x = ((image - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        return cast(Tensor, self.layers(x))


def _field(halvings: int, stages: int) -> int:
    """Side of what a cell sees, pixels: a kernel of k adds k - 1 of the pixels that its map's cells are apart."""
    side, apart = 1, 1
    for stage in range(stages):
        side += (3 if stage < halvings else 2) * apart
        apart *= 2 if stage < halvings else 1
        side += 2 * apart
    return side


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False, groups=groups)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
