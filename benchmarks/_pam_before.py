"""PAM as it was computed before it was made faster: what ``pam_speedup`` of ``benchmarks.pam`` compares with.

What was changed since version 9231564 of the decoder, the edge weights and the walk, as it was there, and masks laid
out one after the other while they are painted; the rest is the project's. Same formulas, same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn

from weakmedsam.backbones import pocket
from weakmedsam.backbones.prompting import Detail, _by_cell, _with_outputs
from weakmedsam.backbones.two_way import _among_tokens, _cells_attend, _tokens_attend
from weakmedsam.pam import affinity, occlusion, refiner, volume_affinity
from weakmedsam.pam.affinity import Offset, _overlap, random_walk
from weakmedsam.pam.config import Refinement

_TINY = torch.finfo(torch.float32).tiny
_paint_over = occlusion.paint_over


@contextmanager
def as_before() -> Iterator[None]:
    """Within, slices and volumes are mined as before."""
    with ExitStack() as stack:
        for module, name, function in (
            (pocket, "decode_points", decode_points),
            (volume_affinity, "edge_weights", edge_weights),
            (affinity, "_Spread", _Spread),
            (refiner, "_walked_by_class", _walked),
            (occlusion, "paint_over", _painted),
        ):
            stack.enter_context(patch.object(module, name, function))
        yield


def _walked(maps: Tensor, weights: Tensor, offsets: list[Offset], inside: Tensor, settings: Refinement) -> Tensor:
    deep, within = maps.movedim(0, 1)[None], inside.movedim(0, 1)[None]
    walk = settings.walk
    return random_walk(deep, weights, offsets, walk.steps, walk.rescale, within, walk.restart)[0].movedim(0, 1)


def _painted(image: Tensor, masks: Tensor, inside: Tensor) -> Tensor:
    return _paint_over(image, masks.contiguous(), inside)


def decode_points(
    prompt_encoder: PromptEncoder,
    mask_decoder: MaskDecoder,
    embedding: Tensor,
    points: Tensor,
    chunk: int = 16,
    detail: Detail | None = None,
    candidates: slice = slice(None),
    best: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decode one positive point at a time for each image."""
    if points.dim() == 2:
        points = points.expand(embedding.shape[0], -1, -1)
    images, prompts = points.shape[:2]
    positive = torch.ones(images * prompts, 1, dtype=torch.int64, device=points.device)
    sparse, dense = prompt_encoder(points=(points.reshape(-1, 1, 2) - 0.5, positive), boxes=None, masks=None)
    sparse = sparse.unflatten(0, (images, prompts))
    position = prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
    # The prompt encoder's dense part is one constant without mask prompts: added once per image.
    source = (embedding + dense[:1]).flatten(2).transpose(1, 2).contiguous()
    finer = None if detail is None else (_by_cell(detail[0], 1), _by_cell(detail[1], 2))
    together = max(1, chunk // prompts)
    rows = []
    for i in range(0, images, together):
        some = slice(i, i + together)
        columns = []
        for part in sparse[some].split(chunk, dim=1):
            tokens, cells = attend_both_ways(
                mask_decoder.transformer, source[some], position, _with_outputs(mask_decoder, part)
            )
            kernels, quality = _kernels(mask_decoder, tokens, candidates, best)
            inside = _upscale(mask_decoder, cells, None if finer is None else (finer[0][some], finer[1][some]))
            columns.append((_draw(kernels, inside, embedding.shape[-2:]), quality))
        rows.append([torch.cat(column, dim=1) for column in zip(*columns, strict=True)])
    logits, quality = (torch.cat(row) for row in zip(*rows, strict=True))
    return logits, quality


def _kernels(decoder: MaskDecoder, tokens: Tensor, candidates: slice, best: bool) -> tuple[Tensor, Tensor]:
    """What each mask is drawn with, (B, P, T', E / 8), and its predicted IoU, (B, P, T')."""
    quality = decoder.iou_prediction_head(tokens[:, :, 0])[..., candidates]
    numbers = range(decoder.num_mask_tokens)[candidates]
    kernels = torch.stack([decoder.output_hypernetworks_mlps[i](tokens[:, :, 1 + i]) for i in numbers], dim=2)
    if best:
        quality, chosen = quality.max(dim=2, keepdim=True)
        kernels = kernels.take_along_dim(chosen[..., None], dim=2)
    return kernels, quality


def _upscale(decoder: MaskDecoder, cells: Tensor, detail: Detail | None) -> Tensor:
    """(B, P, N, E) -> (B, P, N, 2, 2, 2, 2, E / 8): in each cell row and column of a quarter, then of its pixel."""
    double, norm, activation, again, last = decoder.output_upscaling
    coarse, fine = (None, None) if detail is None else detail
    quarters = _divided(double, cells, coarse)
    quarters = F.layer_norm(quarters, quarters.shape[-1:], norm.weight, norm.bias, norm.eps)
    return last(_divided(again, activation(quarters), fine))


def _divided(conv: nn.ConvTranspose2d, x: Tensor, detail: Tensor | None) -> Tensor:
    """A transposed convolution of kernel and stride 2, plus detail."""
    assert conv.bias is not None
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)
    if detail is None:
        return F.linear(x, weight, conv.bias.repeat(4)).unflatten(-1, (2, 2, -1))
    return F.linear(x, weight).unflatten(-1, (2, 2, -1)) + (detail + conv.bias)[:, None]


def _draw(kernels: Tensor, inside: Tensor, shape: torch.Size) -> Tensor:
    """(B, P, T, c) times (B, P, h * w, 2, 2, 2, 2, c) -> (B, P, T, 4h, 4w)."""
    height, width = shape
    masks = kernels.flatten(0, 1) @ inside.flatten(0, 1).flatten(1, 5).transpose(1, 2)
    placed = masks.view(*kernels.shape[:3], height, width, 2, 2, 2, 2).permute(0, 1, 2, 3, 5, 7, 4, 6, 8)
    return placed.reshape(*kernels.shape[:3], 4 * height, 4 * width)


def attend_both_ways(
    transformer: TwoWayTransformer, image: Tensor, position: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """``transformer.forward`` for P prompts of each image; equal to it but for rounding."""
    prompts, cells = tokens.shape[1], image[:, None]
    initial, where = tokens, position[:, None]
    for module in transformer.layers:
        layer = cast(TwoWayAttentionBlock, module)
        tokens = layer.norm1(_among_tokens(layer, tokens, initial))
        seen = cells + where
        answer = _tokens_attend(layer.cross_attn_token_to_image, tokens + initial, seen, cells)
        tokens = layer.norm2(tokens + answer)
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        cells = cells.expand(-1, prompts, -1, -1)
        cells = layer.norm4(_cells_attend(layer.cross_attn_image_to_token, seen, tokens + initial, tokens, cells))
    answer = _tokens_attend(transformer.final_attn_token_to_image, tokens + initial, cells + where, cells)
    return transformer.norm_final_attn(tokens + answer), cells.expand(-1, prompts, -1, -1)


def edge_weights(
    maps: Tensor,
    offsets: Sequence[Offset],
    beta: float = 4.0,
    contrast: float = 10.0,
    trust: Tensor | None = None,
) -> Tensor:
    """Affinity of each pixel with its neighbours: ``exp(-contrast * mean_p |m_p(i) - m_p(j)|) ** beta``."""
    weights = maps.new_zeros(len(maps), len(offsets), *maps.shape[2:])
    trust = None if trust is None else trust.expand(*maps.shape[:-2], 1, 1)
    for o, offset in enumerate(offsets):
        here, there = _overlap(offset, maps)
        difference = (maps[here] - maps[there]).abs()
        known = None
        if trust is not None:
            # Trust is one number a slice, so only the slices of the regions are taken of it.
            both = (trust[here[:-2]] * trust[there[:-2]]).sqrt()
            known = both.sum(dim=1, keepdim=True)
            difference = difference * (both * both.shape[1] / known.clamp_min(_TINY))
        alike = torch.exp(-beta * contrast * difference.mean(dim=1, keepdim=True))
        weights[:, o : o + 1][here] = alike if known is None else alike.where(known > 0, 0)
    return weights


class _Spread:
    """Each pixel's own value plus the weighted values of its neighbours (self weight 1), an offset after the other."""

    def __init__(self, maps: Tensor, weights: Tensor, offsets: Sequence[Offset]) -> None:
        self.weights, self.offsets = weights, offsets

    def __call__(self, maps: Tensor) -> Tensor:
        total = maps.clone()
        for o, offset in enumerate(self.offsets):
            here, there = _overlap(offset, maps)
            weight = self.weights[:, o : o + 1][here]
            total[here] += weight * maps[there]
            total[there] += weight * maps[here]
        return total
