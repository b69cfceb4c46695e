"""Parts shared by SAM and networks derived from it: sizes, blocks, prompt encoder and mask decoder.

Blocks, prompt encoder and mask decoder are segment-anything's own classes; only the attention inside a
block is ours (``attention.py``).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weakmedsam.errors import ConfigError

SAM_PATCH = 16
"""Side of SAM's patch embedding kernel, pixels."""

PRETRAINED_CELLS = 64
"""Side of SAM's position table, cells: 1024 pixels."""

layer_norm = partial(nn.LayerNorm, eps=1e-6)


class Size(NamedTuple):
    """A vision transformer and its decoder.

    Attributes:
        width: channels of a token, D.
        depth: blocks.
        heads: of each block.
        global_blocks: indices of blocks with global attention; the others use windows.
        window: side of a window, cells.
        embed: width of embedding, prompt encoder and mask decoder, E.
        decoder_mlp: hidden width of the decoder's transformer.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    window: int = 14
    embed: int = 256
    decoder_mlp: int = 2048


SAM_SIZES = {
    "vit_b": Size(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": Size(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": Size(1280, 32, 16, (7, 15, 23, 31)),
    "tiny": Size(48, 4, 4, (1, 3), embed=32, decoder_mlp=64),
}
"""SAM's published sizes; ``tiny`` is for tests and dry runs and has no official weights."""


def size_of(name: str) -> Size:
    """A size by its name.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
    """
    if name not in SAM_SIZES:
        raise ConfigError(f"model.backbone.size: {name!r} is unknown; choose one of {', '.join(SAM_SIZES)}")
    return SAM_SIZES[name]


def resize_frame(image: Tensor, side: int) -> Tensor:
    """(B, C, S, S) -> (B, C, side, side): bilinear, with anti-aliasing when it shrinks."""
    if image.shape[-1] == side:
        return image
    larger = image.shape[-1] > side
    return F.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=larger)


def make_prompt_encoder(size: Size, cells: int, image_size: int) -> PromptEncoder:
    """SAM's prompt encoder for an embedding of ``cells`` x ``cells`` and points in ``image_size`` pixels."""
    return PromptEncoder(
        embed_dim=size.embed,
        image_embedding_size=(cells, cells),
        input_image_size=(image_size, image_size),
        mask_in_chans=16,
    )


def make_mask_decoder(size: Size) -> MaskDecoder:
    """SAM's mask decoder: one single-mask output and three candidates."""
    transformer = TwoWayTransformer(depth=2, embedding_dim=size.embed, mlp_dim=size.decoder_mlp, num_heads=8)
    return MaskDecoder(
        num_multimask_outputs=3,
        transformer=transformer,
        transformer_dim=size.embed,
        iou_head_depth=3,
        iou_head_hidden_dim=size.embed,
    )


def make_neck(size: Size) -> nn.Sequential:
    """SAM's neck, (B, D, h, w) -> (B, E, h, w)."""
    return nn.Sequential(
        nn.Conv2d(size.width, size.embed, 1, bias=False),
        LayerNorm2d(size.embed),
        nn.Conv2d(size.embed, size.embed, 3, padding=1, bias=False),
        LayerNorm2d(size.embed),
    )


def run_block(block: nn.Module, *inputs: Tensor, checkpointing: bool) -> Tensor | tuple[Tensor, ...]:
    """Run a block, with gradient checkpointing if ``checkpointing`` and a gradient passes through it."""
    recorded = torch.is_grad_enabled() and (
        any(x.requires_grad for x in inputs) or any(p.requires_grad for p in block.parameters())
    )
    if checkpointing and recorded:
        # No block draws random numbers, so there is no generator state to keep.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)
