"""segment-anything's two-way transformer for many prompts per image, with fewer operations; equal up to rounding.

A mask decoder's transformer lets the few tokens of a prompt (T, seven for a point) and the many cells of an
image (N, 1,024 and more) attend to each other. segment-anything projects all N cells to keys, values and
queries, for each prompt anew. Until cells first attend to tokens, the cells of an image are the same for all its
prompts: they are stored, and projected, once. From then on no cell is projected: a score is a product,
``q . (W x + b) = (W^T q) . x + q . b``, so W can be applied to the token instead of to every cell; and weights
sum to one, so the mean of values is the value of the mean. A head's tokens are brought into the space of the
cells, as multi-head latent attention does with its compressed keys (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

Shapes: tokens (B, P, T, E) of P prompts for each of B images; cells (B, Q, N, E), where Q is 1 while all
prompts share them and P from then on.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor


class Image(NamedTuple):
    """What all prompts of an image share.

    Attributes:
        cells: (B, 1, N, E), the image's embedding.
        seen: (B, 1, N, E), with the positional encoding: keys, and queries.
        queries: (B, H, d, N), ``seen`` as the first layer's cells ask the tokens.
        position: (1, 1, N, E).
    """

    cells: Tensor
    seen: Tensor
    queries: Tensor
    position: Tensor

    def rows(self, rows: slice) -> Image:
        """Those of some images."""
        return Image(self.cells[rows], self.seen[rows], self.queries[rows], self.position)


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
    shared = prepare_image(transformer, image, position)
    looked = look_first(transformer, shared, tokens)
    last, cells = attend_on(transformer, shared, tokens, looked)
    return look_last(transformer, tokens, last, cells + shared.position, cells), cells


def prepare_image(transformer: TwoWayTransformer, image: Tensor, position: Tensor) -> Image:
    """What the prompts of (B, N, E) share; position (1, N, E)."""
    cells, position = image[:, None], position[:, None]
    seen = cells + position
    attention = _layers(transformer)[0].cross_attn_image_to_token
    return Image(cells, seen, _by_head(attention.q_proj(seen), attention).transpose(2, 3), position)


def look_first(transformer: TwoWayTransformer, image: Image, tokens: Tensor) -> Tensor:
    """The tokens' part of the first layer, while the cells are those of the image: (B, P, T, E) -> (B, P, T, E)."""
    return _tokens_step(_layers(transformer)[0], tokens, tokens, image.seen, image.cells)


def attend_on(transformer: TwoWayTransformer, image: Image, initial: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """All that follows ``look_first`` but the last attention of tokens to cells.

    Args:
        transformer: segment-anything's.
        image: of ``prepare_image``.
        initial: (B, P, T, E), the tokens as they came.
        tokens: (B, P, T, E) of ``look_first``.

    Returns:
        tokens (B, P, T, E) and cells (B, P, N, E).
    """
    first, *later = _layers(transformer)
    cells = image.cells.expand(-1, tokens.shape[1], -1, -1)
    cells = first.norm4(_cells_attend_first(first.cross_attn_image_to_token, image, tokens + initial, tokens, cells))
    for layer in later:
        seen = cells + image.position
        tokens = _tokens_step(layer, tokens, initial, seen, cells)
        cells = layer.norm4(_cells_attend(layer.cross_attn_image_to_token, seen, tokens + initial, tokens, cells))
    return tokens, cells


def look_last(transformer: TwoWayTransformer, initial: Tensor, tokens: Tensor, seen: Tensor, cells: Tensor) -> Tensor:
    """The last attention of tokens to cells; each token looks for itself, so some of them can be asked alone.

    Args:
        transformer: segment-anything's.
        initial: (B, P, t, E), as they came.
        tokens: (B, P, t, E), the same, of ``attend_on``.
        seen: (B, P, N, E), cells with their position.
        cells: (B, P, N, E) of ``attend_on``.

    Returns:
        (B, P, t, E).
    """
    attention = transformer.final_attn_token_to_image
    answer = _tokens_attend(attention, tokens + initial, seen, cells)
    return transformer.norm_final_attn(tokens + answer)


def _layers(transformer: TwoWayTransformer) -> list[TwoWayAttentionBlock]:
    return [cast(TwoWayAttentionBlock, layer) for layer in transformer.layers]


def _tokens_step(layer: TwoWayAttentionBlock, tokens: Tensor, initial: Tensor, seen: Tensor, cells: Tensor) -> Tensor:
    """What a layer does with its tokens: among themselves, to the cells, and each for itself."""
    tokens = layer.norm1(_among_tokens(layer, tokens, initial))
    attend = _tokens_attend_shared if cells.shape[1] == 1 else _tokens_attend
    tokens = layer.norm2(tokens + attend(layer.cross_attn_token_to_image, tokens + initial, seen, cells))
    return layer.norm3(tokens + layer.mlp(tokens))


def _among_tokens(layer: TwoWayAttentionBlock, tokens: Tensor, initial: Tensor) -> Tensor:
    """Self-attention; the first layer has neither position nor residual connection."""
    flat = tokens.flatten(0, 1)
    if layer.skip_first_layer_pe:
        return layer.self_attn(q=flat, k=flat, v=flat).view_as(tokens)
    known = flat + initial.flatten(0, 1)
    return tokens + layer.self_attn(q=known, k=known, v=flat).view_as(tokens)


def _tokens_attend_shared(attention: Attention, queries: Tensor, seen: Tensor, cells: Tensor) -> Tensor:
    """``_tokens_attend`` to cells that all prompts share: projected once, as usual."""
    query = _by_head(attention.q_proj(queries).flatten(1, 2)[:, None], attention)
    key, value = _by_head(attention.k_proj(seen), attention), _by_head(attention.v_proj(cells), attention)
    answer = F.scaled_dot_product_attention(query, key, value)
    return attention.out_proj(answer.transpose(1, 2).flatten(2).view(*queries.shape[:3], -1))


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

    Seen (B, P, N, E), keys and values (B, P, T, E), cells (B, P, N, E) -> (B, P, N, E).
    """
    key = _scaled(attention.k_proj(keys), attention)
    probes = torch.einsum("bpthd,hde->bphte", key, _per_head(attention.q_proj.weight, attention))
    bias = torch.einsum("bpthd,hd->bpht", key, _per_head(attention.q_proj.bias, attention))
    scores = torch.baddbmm(_grouped(bias[..., None], seen), _grouped(probes, seen), _flat(seen).transpose(1, 2))
    return _add_values(attention, scores.view(*probes.shape[:4], -1), values, cells)


def _cells_attend_first(attention: Attention, image: Image, keys: Tensor, values: Tensor, cells: Tensor) -> Tensor:
    """``_cells_attend`` of cells whose queries all prompts share."""
    key = _scaled(attention.k_proj(keys), attention).transpose(2, 3)
    return _add_values(attention, key @ image.queries[:, None], values, cells)


def _add_values(attention: Attention, scores: Tensor, values: Tensor, cells: Tensor) -> Tensor:
    """Scores (B, P, H, T, N) and values (B, P, T, E): what each cell gets of the tokens, beside what it is."""
    share = scores.softmax(dim=3).flatten(0, 1).flatten(1, 2)
    value = attention.v_proj(values).unflatten(-1, (attention.num_heads, -1))
    outward = attention.out_proj.weight.unflatten(1, (attention.num_heads, -1))
    # Each head's weights sum to one, so each adds its share of the bias.
    values_out = torch.einsum("bpthd,ehd->bphte", value, outward) + attention.out_proj.bias / attention.num_heads
    added = torch.baddbmm(cells.flatten(0, 1), share.transpose(1, 2), values_out.flatten(0, 1).flatten(1, 2))
    return added.view_as(cells)


def _by_head(projected: Tensor, attention: Attention) -> Tensor:
    """(B, 1, N, H * d) -> (B, H, N, d)."""
    return projected.squeeze(1).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


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
