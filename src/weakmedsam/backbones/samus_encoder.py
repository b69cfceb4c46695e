"""SAMUS's image encoder: SAM's vision transformer with a convolutional branch beside it.

Source: SAMUS (Lin et al., arXiv 2309.06824). Parameter names and numbers are those of the official
implementation; ``tests/data/samus_small.safetensors`` pins both.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Block, PatchEmbed
from torch import Tensor, nn

from weakmedsam.backbones.attention import Attention, attend, merge_heads, split_heads
from weakmedsam.backbones.sam_parts import (
    PRETRAINED_CELLS,
    SAM_PATCH,
    Size,
    layer_norm,
    make_neck,
    run_block,
)

STRIDE = 8
"""Pixels of the input frame a cell: half of SAM's patch, so that patches overlap."""

CNN_WIDTHS = (64, 128, 256)
"""Channels of the convolutional branch at strides 1, 2, 4; at stride 8 it has the transformer's width."""

TABLE_STRIDE = 2
"""The learned convolution brings SAM's 64 x 64 position table to 32 x 32."""


class ChannelNorm(LayerNorm2d):
    """segment-anything's ``LayerNorm2d`` in one kernel; no copy where the input is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w), normalised over C at every cell."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def _convolve(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), ChannelNorm(outputs), nn.GELU()]


def _three_channels(image: Tensor) -> Tensor:
    # Channels-last: tokens and convolutional features then share one layout, and ChannelNorm copies nothing.
    return image.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


class Convolve(nn.Module):
    """3 x 3 convolution, norm, GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*_convolve(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h, w)."""
        return self.conv(x)


class PoolAndConvolve(nn.Module):
    """Halve by maximum, then 3 x 3 convolution, norm, GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), *_convolve(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / 2, w / 2)."""
        return self.maxpool_conv(x)


class CnnBranch(nn.Module):
    """(B, 3, S, S) -> (B, D, S / 8, S / 8)."""

    def __init__(self, width: int, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.inc = Convolve(3, CNN_WIDTHS[0])
        steps = zip(CNN_WIDTHS, (*CNN_WIDTHS[1:], width), strict=True)
        self.downs = nn.ModuleList(PoolAndConvolve(i, o) for i, o in steps)
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """The image's features at the transformer's cells."""
        for stage in (self.inc, *self.downs):
            x = cast(Tensor, run_block(stage, x, checkpointing=self.gradient_checkpointing))
        return x


class PositionBranch(nn.Module):
    """SAM's position table (B, D, 64, 64) at half its side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.downs = nn.ModuleList([PoolAndConvolve(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h / 2, w / 2)."""
        for stage in self.downs:
            x = stage(x)
        return x


class Adapter(nn.Module):
    """Bottleneck MLP, initialised to zero output. (B, ..., D) -> the same."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.D_fc1 = nn.Linear(width, hidden)
        self.D_fc2 = nn.Linear(hidden, width)
        nn.init.zeros_(self.D_fc2.weight)
        nn.init.zeros_(self.D_fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Without a shortcut: the caller adds it."""
        return self.D_fc2(F.gelu(self.D_fc1(x)))


class CrossAttention(nn.Module):
    """Cross-attention of tokens to the convolutional branch, without positions; initialised to zero output."""

    def __init__(self, width: int, heads: int, attention: str) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.attention = attention

    def forward(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """Tokens (B, h, w, D), cells (B, h, w, D) -> (B, h, w, D)."""
        queries, sources = tokens.flatten(1, 2), cells.flatten(1, 2)
        query, key, value = (
            split_heads(layer(x), self.heads) for layer, x in ((self.q, queries), (self.k, sources), (self.v, sources))
        )
        mixed = attend(query, key, value, None, self.attention)
        return self.proj(merge_heads(mixed)).unflatten(1, tokens.shape[1:3])


class AdaptedBlock(Block):
    """A block of global attention with SAMUS's adapters.

    The cross-attention's answer is added to what self-attention sees, the adapter runs beside the MLP on
    the same normalised tokens, and the convolutional features leave the block refined.
    """

    def __init__(self, size: Size, cells: int, attention: str, adapter_ratio: float, scale: float) -> None:
        super().__init__(size.width, size.heads, norm_layer=layer_norm, use_rel_pos=True, input_size=(cells, cells))
        self.MLP_Adapter = Adapter(size.width, adapter_ratio)
        self.Space_Adapter = CrossAttention(size.width, size.heads, attention)
        self.refine_Adapter = Convolve(size.width, size.width)
        self.scale = scale

    def forward(self, x: Tensor, cnn: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, h, w, D) and convolutional features (B, D, h, w), both new."""
        normed = self.norm1(x)
        x = x + self.attn(normed + self.Space_Adapter(normed, cnn.permute(0, 2, 3, 1)))
        normed = self.norm2(x)
        x = x + self.mlp(normed) + self.scale * self.MLP_Adapter(normed)
        return x, self.refine_Adapter(cnn)


class SamusEncoder(nn.Module):
    """(B, 1, S, S) in [0, 1] -> features (B, D, S / 8, S / 8), before the neck.

    The grey channel is repeated to three and used as it is: no mean or deviation is taken off. For the
    patch embedding the image is resized to S + 8 pixels, so that 16-pixel patches at stride 8 give S / 8
    cells; the convolutional branch sees it at S.

    Args:
        size: of the transformer.
        image_size: S, pixels; published: 256. With another S the position table is resized after its
            convolution, and the relative tables of the global blocks are 2 * S / 8 - 1 long.
        attention: see ``attention.attend``.
        gradient_checkpointing: for each block, and each stage of the convolutional branch.
        adapter_ratio: hidden width of an adapter over D; published: 0.25.
        adapter_scale: of the adapter beside the MLP; published: 0.5.
        cnn_scale: of the convolutional features in the output; published: 0.5.
    """

    def __init__(
        self,
        size: Size,
        image_size: int,
        attention: str,
        gradient_checkpointing: bool,
        adapter_ratio: float = 0.25,
        adapter_scale: float = 0.5,
        cnn_scale: float = 0.5,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.cells = image_size // STRIDE
        self.cnn_scale = cnn_scale
        self.gradient_checkpointing = gradient_checkpointing
        self.pos_embed = nn.Parameter(torch.zeros(1, PRETRAINED_CELLS, PRETRAINED_CELLS, size.width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.cnn_embed = CnnBranch(size.width, gradient_checkpointing)
        self.patch_embed = PatchEmbed((SAM_PATCH, SAM_PATCH), (STRIDE, STRIDE), embed_dim=size.width)
        self.post_pos_embed = PositionBranch(size.width)
        self.blocks = nn.ModuleList(
            AdaptedBlock(size, self.cells, attention, adapter_ratio, adapter_scale)
            if i in size.global_blocks
            else Block(
                size.width,
                size.heads,
                norm_layer=layer_norm,
                use_rel_pos=True,
                window_size=size.window,
                input_size=(self.cells, self.cells),
            )
            for i in range(size.depth)
        )
        for block in self.blocks:
            block.attn = Attention(block.attn, attention, gradient_checkpointing)
        self.neck = make_neck(size)
        self.input_Adapter = Adapter(size.width, adapter_ratio)

    def forward(self, image: Tensor) -> Tensor:
        """Features before the neck."""
        side = self.image_size + SAM_PATCH - STRIDE
        larger = F.interpolate(image, size=(side, side), mode="bilinear")
        patches = self.patch_embed(_three_channels(larger))
        cnn = self.cnn_embed(_three_channels(image))
        tokens = patches + self.input_Adapter(patches) + self._positions()
        for block in self.blocks:
            if isinstance(block, AdaptedBlock):
                tokens, cnn = run_block(block, tokens, cnn, checkpointing=self.gradient_checkpointing)
            else:
                tokens = cast(Tensor, run_block(block, tokens, checkpointing=self.gradient_checkpointing))
        return tokens.permute(0, 3, 1, 2) + self.cnn_scale * cnn

    def _positions(self) -> Tensor:
        """(1, h, w, D)."""
        table = self.post_pos_embed(self.pos_embed.permute(0, 3, 1, 2))
        if self.cells != PRETRAINED_CELLS // TABLE_STRIDE:
            table = F.interpolate(table, size=(self.cells, self.cells), mode="bicubic")
        return table.permute(0, 2, 3, 1)
