"""EfficientSAM's image encoder: a plain vision transformer, patch 16, no windows.

Source: EfficientSAM (Xiong et al., arXiv 2312.00863). What the paper leaves open (epsilons, GELU, the
position table's resize) was settled against ``tests/data/efficient_sam_small.safetensors``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EFFICIENT_SAM_PATCH = 16
"""Side of a patch, pixels."""

TABLE = 14
"""Side of the position table, cells: the encoder was pre-trained at 224 pixels."""

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1], ImageNet's: what the official checkpoints expect."""


class Architecture(NamedTuple):
    """Sizes of one network: encoder width, depth and heads; then neck and decoder."""

    width: int
    depth: int
    heads: int
    neck: int = 256
    decoder_hidden: int = 2048
    upscaling: tuple[int, int] = (64, 32)
    quality_hidden: int = 256


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, explicit: bool) -> None:
        super().__init__()
        self.heads = heads
        self.explicit = explicit
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.explicit:
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class _Perceptron(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, explicit: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads, explicit)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Perceptron(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, EFFICIENT_SAM_PATCH, stride=EFFICIENT_SAM_PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ImageEncoder(nn.Module):
    """Vision transformer with absolute positions and no windows; the neck is called apart.

    Args:
        size: widths and depth.
        explicit: attention written out rather than ``scaled_dot_product_attention``.
        gradient_checkpointing: each trained block is computed again in the backward pass.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, size: Architecture, explicit: bool, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.patch_embed = _PatchEmbedding(size.width)
        # One entry for a class token comes first; it belongs to the checkpoint and is not used.
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + TABLE * TABLE, size.width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(_Block(size.width, size.heads, explicit) for _ in range(size.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(size.width, size.neck, 1, bias=False),
            LayerNorm2d(size.neck),
            nn.Conv2d(size.neck, size.neck, 3, padding=1, bias=False),
            LayerNorm2d(size.neck),
        )
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1], S a multiple of 16 -> (B, D, S/16, S/16), before the neck."""
        x = self.patch_embed((image - self.mean) / self.deviation)
        height, width = x.shape[-2:]
        x = x + self.positions(height, width)
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled() and _is_trained(block, x):
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x.transpose(1, 2).unflatten(2, (height, width))

    def positions(self, height: int, width: int) -> Tensor:
        """(1, D, height, width): the position table, bicubic where the map has another size."""
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (TABLE, TABLE))
        if (height, width) == (TABLE, TABLE):
            return table
        return F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)


def _is_trained(block: nn.Module, x: Tensor) -> bool:
    return x.requires_grad or any(p.requires_grad for p in block.parameters())
