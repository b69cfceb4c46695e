"""Point prompts through segment-anything's prompt encoder and mask decoder, for every backbone.

segment-anything's decoder repeats *all* image embeddings by the number of prompts, so a batch of
images cannot go in as it is (its issue 365), and processes the image anew for each prompt. Here the prompts of an
image share its embedding (``two_way.py``). The transposed convolutions have kernel and stride 2, so each sees one
cell: they are computed as products over a cell's channels, and pixels are rearranged at the end. Pairs of image and
prompt are decoded in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor

from weakmedsam.backbones.two_way import Image, attend_on, look_first, look_last, prepare_image

Detail = tuple[Tensor, Tensor]

AT_ONCE = 4
"""Pairs of image and prompt whose intermediate results stay in a CPU's caches."""


def decode_points(
    prompt_encoder: PromptEncoder,
    mask_decoder: MaskDecoder,
    embedding: Tensor,
    points: Tensor,
    chunk: int | None = None,
    detail: Detail | None = None,
    candidates: slice = slice(None),
    best: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decode one positive point at a time for each image.

    Equals ``mask_decoder.predict_masks`` of each point separately, up to rounding.

    Args:
        prompt_encoder: defines the input frame in which points are given.
        mask_decoder: gives T mask tokens; token 0 is SAM's single-mask output, 1..T-1 the candidates
            of an ambiguous prompt.
        embedding: (B, E, h, w).
        points: (P, 2), the same for every image, or (B, P, 2); (x, y) in pixels of the input frame,
            pixel centres at + 0.5. segment-anything adds 0.5 itself, so it is subtracted here.
        chunk: pairs of image and point decoded at once; bounds memory, changes no result. None: ``AT_ONCE`` on a CPU,
            16 elsewhere, where each call costs more than what it computes.
        detail: (B, E / 4, 2h, 2w) and (B, E / 8, 4h, 4w), added before the two non-linearities of the
            decoder's upscaling; None leaves the decoder as published.
        candidates: which of the T masks are drawn.
        best: draw only that candidate of each point whose predicted IoU is highest.

    Returns:
        logits (B, P, T', 4h, 4w) and predicted IoU (B, P, T') of the T' candidates, 1 with ``best``.
    """
    if points.dim() == 2:
        points = points.expand(embedding.shape[0], -1, -1)
    images, prompts = points.shape[:2]
    positive = torch.ones(images * prompts, 1, dtype=torch.int64, device=points.device)
    sparse, dense = prompt_encoder(points=(points.reshape(-1, 1, 2) - 0.5, positive), boxes=None, masks=None)
    initial = _with_outputs(mask_decoder, sparse.unflatten(0, (images, prompts)))
    position = prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
    # The prompt encoder's dense part is one constant without mask prompts: added once per image.
    source = (embedding + dense[:1]).flatten(2).transpose(1, 2).contiguous()
    shared = prepare_image(mask_decoder.transformer, source, position)
    upscaling = _upscaling(mask_decoder, detail, _pixel_order(*embedding.shape[-2:]).to(embedding.device))
    chunk = chunk or (AT_ONCE if embedding.device.type == "cpu" else 16)
    together = max(1, chunk // prompts)
    rows = []
    for i in range(0, images, together):
        some = slice(i, i + together)
        image, finer = shared.rows(some), upscaling.rows(some)
        looked = look_first(mask_decoder.transformer, image, initial[some])
        pieces = zip(initial[some].split(chunk, dim=1), looked.split(chunk, dim=1), strict=True)
        columns = [_decode(mask_decoder, image, *piece, finer, candidates, best) for piece in pieces]
        rows.append([torch.cat(column, dim=1) for column in zip(*columns, strict=True)])
    logits, quality = (torch.cat(row) for row in zip(*rows, strict=True))
    return logits.unflatten(-1, (4 * embedding.shape[-2], -1)), quality


def _decode(
    decoder: MaskDecoder,
    image: Image,
    initial: Tensor,
    tokens: Tensor,
    upscaling: Upscaling,
    candidates: slice,
    best: bool,
) -> tuple[Tensor, Tensor]:
    """From tokens after their first look (B, P, T, E) to masks (B, P, T', 16 N) and predicted IoU (B, P, T')."""
    tokens, cells = attend_on(decoder.transformer, image, initial, tokens)
    seen = cells + image.position

    def look(numbers: Tensor) -> Tensor:
        """The tokens of these numbers, (B, P, t), when they have looked at the cells."""
        was, now = (part.take_along_dim(numbers[..., None], dim=2) for part in (initial, tokens))
        return look_last(decoder.transformer, was, now, seen, cells)

    first = torch.zeros(*tokens.shape[:2], 1, dtype=torch.int64, device=tokens.device)
    kernels, quality = _kernels(decoder, look, first, candidates, best)
    drawn = kernels @ upscaling(cells).transpose(2, 3)
    return drawn.index_select(-1, upscaling.order), quality


def best_candidate(logits: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """Select the candidate with the highest predicted quality for each point.

    Args:
        logits: (B, P, T, h, w).
        quality: (B, P, T) predicted IoU.

    Returns:
        (B, P, h, w) and (B, P).
    """
    best, chosen = quality.max(dim=2)
    return logits.take_along_dim(chosen[:, :, None, None, None], dim=2).squeeze(2), best


def _with_outputs(decoder: MaskDecoder, sparse: Tensor) -> Tensor:
    """(B, P, t, E) of the prompts -> (B, P, 1 + T + t, E), those of quality and masks before them."""
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    return torch.cat([outputs.expand(*sparse.shape[:2], -1, -1), sparse], dim=2)


def _kernels(
    decoder: MaskDecoder, look: Callable[[Tensor], Tensor], first: Tensor, candidates: slice, best: bool
) -> tuple[Tensor, Tensor]:
    """What each mask is drawn with, (B, P, T', E / 8), and its predicted IoU, (B, P, T').

    ``look`` as in ``_decode``; ``first`` (B, P, 1) is the number of the token of qualities, 0.
    """
    quality = decoder.iou_prediction_head(look(first).squeeze(2))[..., candidates]
    networks = list(decoder.output_hypernetworks_mlps)[candidates]
    numbers = torch.arange(1, 1 + decoder.num_mask_tokens, device=first.device)[candidates]
    if not best:
        tokens = look(first + numbers)
        return torch.stack([network(tokens[:, :, i]) for i, network in enumerate(networks)], dim=2), quality
    quality, chosen = quality.max(dim=2, keepdim=True)
    token = look(numbers[chosen]).squeeze(2)
    kernels = torch.stack([network(token) for network in networks], dim=2)
    return kernels.take_along_dim(chosen[..., None], dim=2), quality


class Upscaling(NamedTuple):
    """The decoder's upscaling as products for each cell, with the detail of images.

    Attributes:
        weights: (4 c, E) and (4 c / 2, c), c = E / 4: of the quarters of a cell, and of the pixels of a quarter.
        added: (B or 1, 1, N or 1, 4 c) and (B or 1, 1, N or 1, 4 or 1, 4 c / 2): biases and detail.
        decoder: has the norm and the activations between.
        order: (16 N,), where each pixel of a mask is among those of the cells.
    """

    weights: tuple[Tensor, Tensor]
    added: tuple[Tensor, Tensor]
    decoder: MaskDecoder
    order: Tensor

    def rows(self, rows: slice) -> Upscaling:
        """That of some images."""
        coarse, fine = (part[rows] if len(part) > 1 else part for part in self.added)
        return self._replace(added=(coarse, fine))

    def __call__(self, cells: Tensor) -> Tensor:
        """(B, P, N, E) -> (B, P, 16 N, E / 8): of each cell the quarters row by row, of each of these the pixels."""
        _, norm, activation, _, last = self.decoder.output_upscaling
        quarters = F.linear(cells, self.weights[0]).add_(self.added[0]).unflatten(-1, (4, -1))
        variance = quarters.square() @ torch.full_like(norm.weight, 1 / len(norm.weight))
        normed = torch.addcmul(norm.bias, quarters * torch.rsqrt(variance + norm.eps)[..., None], norm.weight)
        pixels = F.linear(activation(normed), self.weights[1]).add_(self.added[1])
        return last(pixels).unflatten(-1, (4, -1)).flatten(2, 4)


def _upscaling(decoder: MaskDecoder, detail: Detail | None, order: Tensor) -> Upscaling:
    """Transposed convolutions of kernel and stride 2 as products; detail, which is added to both, by cell."""
    convolutions = decoder.output_upscaling[0], decoder.output_upscaling[3]
    coarse, fine = (conv.weight.permute(2, 3, 1, 0).flatten(0, 1) for conv in convolutions)
    first, second = (
        conv.bias.expand(1, 1, *shape) for conv, shape in zip(convolutions, ((4, -1), (1, 4, -1)), strict=True)
    )
    if detail is not None:
        first = first + _by_cell(detail[0], 1).flatten(2, 3)
        second = second + _by_cell(detail[1], 2).flatten(4, 5).flatten(2, 3)
    # The norm takes the mean over channels away. It is linear: taken away here, once, a mean square is left to do.
    coarse, first = coarse - coarse.mean(dim=1, keepdim=True), first - first.mean(dim=-1, keepdim=True)
    added = first.flatten(2)[:, None], second.flatten(3)[:, None]
    return Upscaling((coarse.flatten(0, 1), fine.flatten(0, 1)), added, decoder, order)


def _by_cell(maps: Tensor, halvings: int) -> Tensor:
    """(B, C, f * h, f * w), f = 2^halvings -> (B, h * w, 2, 2, ..., C), as ``_upscale`` divides a cell."""
    twos = (2,) * halvings
    split = maps.unflatten(3, (-1, *twos)).unflatten(2, (-1, *twos))
    # (B, C, h, 2.., w, 2..): row and column of each division beside each other, channels last.
    rows, columns = range(2, 3 + halvings), range(3 + halvings, 4 + 2 * halvings)
    pairs = [axis for pair in zip(rows, columns, strict=True) for axis in pair]
    return split.permute(0, *pairs, 1).flatten(1, 2).contiguous()


def _pixel_order(height: int, width: int) -> Tensor:
    """(16 h w,) where each pixel of a mask, row by row, is among those of ``Upscaling``."""
    cells = torch.arange(16 * height * width).view(height, width, 2, 2, 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten()
