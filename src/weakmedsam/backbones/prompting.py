"""Point prompts through segment-anything's prompt encoder and mask decoder, for every backbone.

segment-anything's decoder repeats *all* image embeddings by the number of prompts, so a batch of
images cannot go in as it is (its issue 365), and processes the image anew for each prompt. Here the prompts of an
image share its embedding (``two_way.py``). The transposed convolutions have kernel and stride 2, so each sees one
cell: they are computed as products over a cell's channels, and pixels are rearranged at the end. Pairs of image and
prompt are decoded in chunks: on a CPU 64 pairs at once took segment-anything's full-size decoder 2.7 times as long
as four calls of 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor, nn

from weakmedsam.backbones.two_way import attend_both_ways

Detail = tuple[Tensor, Tensor]


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
    """Decode one positive point at a time for each image.

    Equals ``mask_decoder.predict_masks`` of each point separately, up to rounding.

    Args:
        prompt_encoder: defines the input frame in which points are given.
        mask_decoder: gives T mask tokens; token 0 is SAM's single-mask output, 1..T-1 the candidates
            of an ambiguous prompt.
        embedding: (B, E, h, w).
        points: (P, 2), the same for every image, or (B, P, 2); (x, y) in pixels of the input frame,
            pixel centres at + 0.5. segment-anything adds 0.5 itself, so it is subtracted here.
        chunk: pairs of image and point decoded at once; bounds memory, changes no result.
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
    """A transposed convolution of kernel and stride 2, plus detail.

    (B, P, ..., C) and detail (B, ..., 2, 2, O) -> (B, P, ..., 2, 2, O).
    """
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
