"""A local encoder for classification: what a cell says follows from its surroundings alone.

A class activation map can only point at the target if a cell's evidence comes from the cell. Two things
common in networks break that: attention over the whole image, and normalisation by statistics of the
whole image (group, layer and instance norm over rows and columns). Through either, every cell learns
what kind of slice it lies in, and a slice is then recognised by whatever is easiest, anywhere. On the
left atrium, one network with batch norm and with group norm, all else equal: the activation map's Dice
was 0.35 and 0.15 (docs/results.md), while group norm classified better.

So this encoder has small kernels only, and batch norm, whose statistics are constants once trained. It
is what SAMUS's convolutional branch (arXiv 2309.06824) is to its transformer, kept apart from it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakmedsam.errors import ConfigError, check_range


class LocalEncoder(nn.Module):
    """(B, 1, S, S) in [0, 1] -> features (B, D, cells, cells), trained from random numbers.

    Each width is a stage of two convolutions; the first stages halve the map, as many as it takes to get
    down to ``cells``. At 128 pixels and 16 cells a cell sees 82 pixels a side, its own in the middle.

    Args:
        image_size: S, side of the frame, pixels.
        frame: largest side that is looked at. An image is reduced, antialiased, to the largest side of
            ``cells`` times a power of two that is neither above it nor above its own.
        cells: side of the feature map.
        widths: channels of each stage; D is the last.

    Attributes:
        feature_dim: D.

    Raises:
        ConfigError: the stages cannot bring the frame down to ``cells`` by halving.
    """

    def __init__(
        self,
        image_size: int = 128,
        frame: int = 128,
        cells: int = 16,
        widths: tuple[int, ...] = (24, 48, 96, 96),
    ) -> None:
        super().__init__()
        check_range("model.local_encoder.image_size", image_size, 1, 4096)
        check_range("model.local_encoder.frame", frame, 1, 4096)
        check_range("model.local_encoder.cells", cells, 1, 512)
        for width in widths:
            check_range("model.local_encoder.widths", width, 1, 8192)
        side = min(image_size, frame)
        halvings = int(math.log2(side / cells)) if cells <= side else -1
        if not 0 <= halvings <= len(widths) or not widths:
            raise ConfigError(
                f"model.local_encoder: {len(widths)} stages cannot bring {side} pixels to {cells} cells by "
                "halving; change data.image_size, or frame, cells and widths of model.local_encoder"
            )
        self.side = cells * 2**halvings
        self.feature_dim = widths[-1]
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(zip((1, *widths[:-1]), widths, strict=True)):
            # A kernel of 4 halves without moving the map: with one of 3 a cell's field lies half a cell off.
            kernel, stride = (4, 2) if number < halvings else (3, 1)
            layers += _convolution(inputs, outputs, kernel, stride) + _convolution(outputs, outputs, 3, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """Features of slices (B, 1, S, S)."""
        if image.shape[-1] != self.side:
            image = F.interpolate(image, size=(self.side, self.side), mode="bilinear", antialias=True)
        # A window or percentiles have mapped a slice to [0, 1]; its deviation is about a quarter of that.
        x = ((image - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        return cast(Tensor, self.layers(x))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
