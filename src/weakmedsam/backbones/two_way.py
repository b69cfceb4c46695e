"""segment-anything's two-way transformer for many prompts per image, with fewer operations; equal up to rounding.

A mask decoder's transformer lets the few tokens of a prompt (T, seven for a point) and the many cells of an
image (N, 1,024 and more) attend to each other. segment-anything projects all N cells to keys, values and
queries, for each prompt anew. But a score is a product, ``q . (W x + b) = (W^T q) . x + q . b``, so W can be
applied to the token instead of to every cell; and weights sum to one, so the mean of values is the value of
the mean. So no cell is ever projected here: a head's tokens are brought into the space of the cells, as
multi-head latent attention does with its compressed keys (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Until
cells first attend to tokens, the cells of an image are the same for all its prompts and stored once.

Shapes: tokens (B, P, T, E) of P prompts for each of B images; cells (B, Q, N, E), where Q is 1 while all
prompts share them and P from then on.
"""

from __future__ import annotations

from typing import cast

import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor


def attend_both_ways(
    transformer: TwoWayTransformer, image: Tensor, position: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """``transformer.forward`` for P prompts of each image; equal to it but for rounding.

    Args:
        transformer: segment-anything's.
        image: (B, N, E), the image's embedding.
        position: (1, N, E), the positional encoding of the cells.
        tokens: (B, P, T, E).

    Returns:
        tokens (B, P, T, E) and cells (B, P, N, E).
    """
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
    """Tokens attend to cells: ``attention(q=queries, k=seen, v=cells)``.

    Queries (B, P, T, E), seen and cells (B, Q, N, E) -> (B, P, T, E).
    """
    query = _scaled(attention.q_proj(queries), attention)
    # The key's bias adds the same to all scores of a token, so the softmax cancels it.
    probes = torch.einsum("bpthd,hde->bphte", query, _per_head(attention.k_proj.weight, attention))
    share = (_grouped(probes, seen) @ _flat(seen).transpose(1, 2)).softmax(dim=-1)
    means = (share @ _flat(cells)).view_as(probes)
    values = torch.einsum("bphte,hde->bpthd", means, _per_head(attention.v_proj.weight, attention))
    return attention.out_proj(values.flatten(-2) + attention.v_proj.bias)


def _cells_attend(attention: Attention, seen: Tensor, keys: Tensor, values: Tensor, cells: Tensor) -> Tensor:
    """Cells attend to tokens, with a residual connection: ``cells + attention(q=seen, k=keys, v=values)``.

    Seen (B, Q, N, E), keys and values (B, P, T, E), cells (B, P, N, E) -> (B, P, N, E).
    """
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
