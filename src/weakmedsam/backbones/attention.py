"""Multi-head attention with decomposed relative positions, in two equivalent implementations.

``explicit`` builds the whole score matrix with two matrix products and a softmax; ``sdpa`` hands the
position bias to ``torch.nn.functional.scaled_dot_product_attention`` as an additive mask.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention as SamAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weakmedsam.errors import ConfigError

ATTENTIONS = ("auto", "explicit", "sdpa")

SCORES = 2**24
"""Scores held at once where memory is to be saved: one image of 1,024 cells and 12 heads."""


def check_kind(attention: str) -> str:
    """Give the name back.

    Raises:
        ConfigError: not one of ``ATTENTIONS``.
    """
    if attention not in ATTENTIONS:
        raise ConfigError(f"model.backbone.attention: {attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    return attention


class RelativePosition(NamedTuple):
    """What the distance between query and key cell adds to a score, rows and columns apart.

    Attributes:
        rows: (B, heads, N, h), for each query and each row of keys.
        columns: (B, heads, N, w), for each query and each column of keys.
    """

    rows: Tensor
    columns: Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, position: RelativePosition | None, attention: str) -> Tensor:
    """softmax(Q K^T / sqrt(d) + position) V.

    Args:
        query: (B, heads, N, d).
        key: (B, heads, M, d); with ``position`` its M cells are h x w, row by row.
        value: (B, heads, M, d).
        position: added to the scores after their scaling; None adds nothing.
        attention: ``explicit``, ``sdpa`` or ``auto``. ``auto`` takes ``explicit`` for bf16 with a position
            bias on a CPU, where the mask was measured slower (a SAMUS ViT-B training step: 11.0 s against
            7.4 s), and ``sdpa`` otherwise.

    Returns:
        (B, heads, N, d).
    """
    if attention == "auto":
        slow_mask = position is not None and query.device.type == "cpu" and query.dtype == torch.bfloat16
        attention = "explicit" if slow_mask else "sdpa"
    if attention == "sdpa":
        mask = None
        if position is not None:
            mask = (position.rows[..., None] + position.columns[..., None, :]).flatten(-2)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if position is not None:
        grid = scores.unflatten(-1, (position.rows.shape[-1], position.columns.shape[-1]))
        # The sum's backward needs neither addend: adding in place saves one matrix of this size.
        scores = (grid + position.rows[..., None]).add_(position.columns[..., None, :]).flatten(-2)
    return scores.softmax(dim=-1) @ value


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return tokens.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """Self-attention over a grid of cells, with segment-anything's parameters under the same names.

    Args:
        parameters: the module of segment-anything whose parameters are taken over, as they are.
        attention: see ``attend``.
        gradient_checkpointing: keep no score matrix for the backward pass, and never those of more than
            ``SCORES`` scores at once: within a block that is computed again they are most of its memory.
    """

    def __init__(self, parameters: SamAttention, attention: str, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.heads = parameters.num_heads
        self.qkv, self.proj = parameters.qkv, parameters.proj
        self.rel_pos_h, self.rel_pos_w = parameters.rel_pos_h, parameters.rel_pos_w
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        height, width = x.shape[1:3]
        # (3, B, heads, N, d)
        query, key, value = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        grid = query.unflatten(2, (height, width))
        rows = torch.einsum("bnhwd,hkd->bnhwk", grid, self._by_distance(self.rel_pos_h, height))
        columns = torch.einsum("bnhwd,wkd->bnhwk", grid, self._by_distance(self.rel_pos_w, width))
        position = RelativePosition(rows.flatten(2, 3), columns.flatten(2, 3))
        if self.gradient_checkpointing and torch.is_grad_enabled() and query.requires_grad:
            mixed = self._attend_in_parts(query, key, value, position)
        else:
            mixed = attend(query, key, value, position, self.attention)
        return self.proj(merge_heads(mixed)).unflatten(1, (height, width))

    def _attend_in_parts(self, query: Tensor, key: Tensor, value: Tensor, position: RelativePosition) -> Tensor:
        """``attend``, some images (or windows) at a time, each part computed again in the backward pass."""

        def part(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            return attend(query, key, value, RelativePosition(rows, columns), self.attention)

        together = max(1, SCORES // (self.heads * query.shape[2] * key.shape[2]))
        inputs = zip(*(x.split(together) for x in (query, key, value, *position)), strict=True)
        parts = [checkpoint(part, *some, use_reentrant=False, preserve_rng_state=False) for some in inputs]
        return torch.cat(cast(list[Tensor], parts))

    @staticmethod
    def _by_distance(table: Tensor, cells: int) -> Tensor:
        """(2 * cells - 1, d) by distance -> (cells, cells, d) by query and key."""
        index = torch.arange(cells, device=table.device)
        return table[index[:, None] - index[None, :] + cells - 1]
