"""PAM as it was computed before it was made faster: what ``pam_speedup`` of ``benchmarks.pam`` compares with.

The decoder, the edge weights and the walk of version 9231564, word for word but for their docstrings, and masks laid
out one after the other while they are painted. Same formulas, same numbers up to rounding. Nothing else uses this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn

from weakmedsam.backbones import pocket
from weakmedsam.pam import occlusion, refiner, volume_affinity
from weakmedsam.pam.affinity import Offset, _overlap, _rescaled
from weakmedsam.pam.config import Refinement

Detail = tuple[Tensor, Tensor]
_TINY = torch.finfo(torch.float32).tiny
_paint_over = occlusion.paint_over


@contextmanager
def as_before() -> Iterator[None]:
    """Within, slices and volumes are mined as before."""
    with ExitStack() as stack:
        for module, name, function in (
            (pocket, "decode_points", decode_points),
            (volume_affinity, "edge_weights", edge_weights),
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


def _with_outputs(decoder: MaskDecoder, sparse: Tensor) -> Tensor:
    """(B, P, t, E) of the prompts -> (B, P, 1 + T + t, E), those of quality and masks before them."""
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    return torch.cat([outputs.expand(*sparse.shape[:2], -1, -1), sparse], dim=2)


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


def _by_cell(maps: Tensor, halvings: int) -> Tensor:
    """(B, C, f * h, f * w), f = 2^halvings -> (B, h * w, 2, 2, ..., C), as ``_upscale`` divides a cell."""
    twos = (2,) * halvings
    split = maps.unflatten(3, (-1, *twos)).unflatten(2, (-1, *twos))
    # (B, C, h, 2.., w, 2..): row and column of each division beside each other, channels last.
    rows, columns = range(2, 3 + halvings), range(3 + halvings, 4 + 2 * halvings)
    pairs = [axis for pair in zip(rows, columns, strict=True) for axis in pair]
    return split.permute(0, *pairs, 1).flatten(1, 2).contiguous()


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


def _among_tokens(layer: TwoWayAttentionBlock, tokens: Tensor, initial: Tensor) -> Tensor:
    """Self-attention; the first layer has neither position nor residual connection."""
    flat = tokens.flatten(0, 1)
    if layer.skip_first_layer_pe:
        return layer.self_attn(q=flat, k=flat, v=flat).view_as(tokens)
    known = flat + initial.flatten(0, 1)
    return tokens + layer.self_attn(q=known, k=known, v=flat).view_as(tokens)


def _tokens_attend(attention: Attention, queries: Tensor, seen: Tensor, cells: Tensor) -> Tensor:
    """Tokens attend to cells: ``attention(q=queries, k=seen, v=cells)``."""
    query = _scaled(attention.q_proj(queries), attention)
    # The key's bias adds the same to all scores of a token, so the softmax cancels it.
    probes = torch.einsum("bpthd,hde->bphte", query, _per_head(attention.k_proj.weight, attention))
    share = (_grouped(probes, seen) @ _flat(seen).transpose(1, 2)).softmax(dim=-1)
    means = (share @ _flat(cells)).view_as(probes)
    values = torch.einsum("bphte,hde->bpthd", means, _per_head(attention.v_proj.weight, attention))
    return attention.out_proj(values.flatten(-2) + attention.v_proj.bias)


def _cells_attend(attention: Attention, seen: Tensor, keys: Tensor, values: Tensor, cells: Tensor) -> Tensor:
    """Cells attend to tokens, with a residual connection: ``cells + attention(q=seen, k=keys, v=values)``."""
    batch, prompts, tokens, _ = keys.shape
    heads = attention.num_heads
    key = _scaled(attention.k_proj(keys), attention)
    probes = torch.einsum("bpthd,hde->bphte", key, _per_head(attention.q_proj.weight, attention))
    bias = torch.einsum("bpthd,hd->bpht", key, _per_head(attention.q_proj.bias, attention))
    scores = torch.baddbmm(_grouped(bias[..., None], seen), _grouped(probes, seen), _flat(seen).transpose(1, 2))
    share = scores.view(batch * prompts, heads, tokens, -1).softmax(dim=2).flatten(1, 2)
    value = attention.v_proj(values).unflatten(-1, (heads, -1))
    outward = attention.out_proj.weight.unflatten(1, (heads, -1))
    # Each head's weights sum to one, so each adds its share of the bias.
    values_out = torch.einsum("bpthd,ehd->bphte", value, outward) + attention.out_proj.bias / heads
    added = torch.baddbmm(cells.flatten(0, 1), share.transpose(1, 2), values_out.flatten(0, 1).flatten(1, 2))
    return added.view_as(cells)


def _scaled(projected: Tensor, attention: Attention) -> Tensor:
    """(B, P, T, H * d) -> (B, P, T, H, d), over the root of d."""
    split = projected.unflatten(-1, (attention.num_heads, -1))
    return split / split.shape[-1] ** 0.5


def _per_head(parameter: Tensor, attention: Attention) -> Tensor:
    """(H * d, ...) -> (H, d, ...)."""
    return parameter.unflatten(0, (attention.num_heads, -1))


def _grouped(rows: Tensor, cells: Tensor) -> Tensor:
    """(B, P, H, T, X) -> (B * Q, P / Q * H * T, X): rows grouped by the cells they attend to."""
    batch, groups = cells.shape[:2]
    return rows.reshape(batch * groups, -1, rows.shape[-1])


def _flat(cells: Tensor) -> Tensor:
    """(B, Q, N, E) -> (B * Q, N, E)."""
    return cells.flatten(0, 1)


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
        affinity = torch.exp(-beta * contrast * difference.mean(dim=1, keepdim=True))
        weights[:, o : o + 1][here] = affinity if known is None else affinity.where(known > 0, 0)
    return weights


def _spread(maps: Tensor, weights: Tensor, offsets: Sequence[Offset]) -> Tensor:
    """(B, C, *space): each pixel's own value plus the weighted values of its neighbours (self weight 1)."""
    total = maps.clone()
    for o, offset in enumerate(offsets):
        here, there = _overlap(offset, maps)
        weight = weights[:, o : o + 1][here]
        total[here] += weight * maps[there]
        total[there] += weight * maps[here]
    return total


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
    """Spread class activation along the affinity: ``x <- (1 - restart) T x + restart x0``, ``steps`` times."""
    whole = torch.ones_like(cam[:, :1], dtype=torch.bool) if inside is None else inside
    start = x = cam.where(whole, 0)
    neighbours = _spread(whole.to(cam.dtype), weights, offsets).where(whole, 1)
    for _ in range(max_steps if steps is None else steps):
        last, x = x, (_spread(x, weights, offsets) / neighbours).where(whole, 0)
        x = x if restart == 0 else (1 - restart) * x + restart * start
        if steps is not None:
            x = _rescaled(x, whole) if rescale else x
        elif not (x - last).abs().max() > tolerance:
            break
    return _rescaled(x, whole) if rescale and steps is None else x
