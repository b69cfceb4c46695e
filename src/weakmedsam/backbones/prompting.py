"""Point prompts through segment-anything's prompt encoder and mask decoder, for every backbone.

segment-anything's decoder repeats *all* image embeddings by the number of prompts, so a batch of
images cannot go in as it is (its issue 365). Here image and prompt are paired first, and the pairs
decoded a chunk at a time: on a CPU 64 pairs of a full-size decoder at once took 2.7 times as long as
four calls of 16.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from torch import Tensor


def decode_points(
    prompt_encoder: PromptEncoder,
    mask_decoder: MaskDecoder,
    embedding: Tensor,
    points: Tensor,
    chunk: int = 16,
    detail: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode one positive point at a time for each image.

    Args:
        prompt_encoder: knows the input frame's size, in which points are given.
        mask_decoder: gives T mask tokens; token 0 is SAM's single-mask output, 1..T-1 the candidates
            of an ambiguous prompt.
        embedding: (B, E, h, w).
        points: (P, 2), the same for every image, or (B, P, 2); (x, y) in pixels of the input frame,
            pixel centres at + 0.5. segment-anything adds the half itself, so it is taken off here.
        chunk: pairs of image and point decoded at once; bounds memory, changes no result.
        detail: (B, E / 4, 2h, 2w) and (B, E / 8, 4h, 4w), added before the two non-linearities of the
            decoder's upscaling; None leaves the decoder as published.

    Returns:
        logits (B, P, T, 4h, 4w) and predicted IoU (B, P, T).
    """
    if points.dim() == 2:
        points = points.expand(embedding.shape[0], -1, -1)
    images, prompts = points.shape[:2]
    positive = torch.ones(images * prompts, 1, dtype=torch.int64, device=points.device)
    sparse, dense = prompt_encoder(points=(points.reshape(-1, 1, 2) - 0.5, positive), boxes=None, masks=None)
    sparse = sparse.unflatten(0, (images, prompts))
    image_pe = prompt_encoder.get_dense_pe()
    # The prompt encoder's dense part is one constant without mask prompts: added once per image.
    source = embedding + dense[:1]
    together = max(1, chunk // prompts)
    rows = []
    for i in range(0, images, together):
        some = slice(i, i + together)
        finer = None if detail is None else (detail[0][some], detail[1][some])
        columns = [
            _decode_pairs(mask_decoder, source[some], image_pe, asked, finer)
            for asked in sparse[some].split(chunk, dim=1)
        ]
        rows.append([torch.cat(column, dim=1) for column in zip(*columns, strict=True)])
    logits, quality = (torch.cat(row) for row in zip(*rows, strict=True))
    return logits, quality


def best_candidate(logits: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """Of the T candidates of each point the one with the best predicted quality.

    Args:
        logits: (B, P, T, h, w).
        quality: (B, P, T) predicted IoU.

    Returns:
        (B, P, h, w) and (B, P).
    """
    best, chosen = quality.max(dim=2)
    return logits.take_along_dim(chosen[:, :, None, None, None], dim=2).squeeze(2), best


def _decode_pairs(
    decoder: MaskDecoder,
    source: Tensor,
    image_pe: Tensor,
    sparse: Tensor,
    detail: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """``MaskDecoder.predict_masks`` for some images, each with prompts of its own.

    Source (b, E, h, w), sparse (b, p, t, E) -> logits (b, p, T, 4h, 4w), quality (b, p, T).
    """
    images, prompts = sparse.shape[:2]
    height, width = source.shape[-2:]
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(images * prompts, -1, -1), sparse.flatten(0, 1)], dim=1)
    # Expanded, not indexed: the gradient of an index is scattered back one row at a time.
    paired = source[:, None].expand(-1, prompts, -1, -1, -1).flatten(0, 1)
    tokens, paired = decoder.transformer(paired, image_pe.expand(len(paired), -1, -1, -1), tokens)
    maps = _upscale(decoder, paired.transpose(1, 2).unflatten(2, (height, width)), detail, prompts)
    weights = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = torch.einsum("ntc,nchw->nthw", torch.stack(weights, dim=1), maps)
    quality = decoder.iou_prediction_head(tokens[:, 0])
    return logits.unflatten(0, (images, prompts)), quality.unflatten(0, (images, prompts))


def _upscale(
    decoder: MaskDecoder, cells: Tensor, detail: tuple[Tensor, Tensor] | None, prompts: int
) -> Tensor:
    """(b * p, E, h, w) -> (b * p, E / 8, 4h, 4w)."""
    if detail is None:
        return decoder.output_upscaling(cells)
    double, norm, activation, again, last = decoder.output_upscaling
    coarse, fine = (one[:, None] for one in detail)
    cells = (double(cells).unflatten(0, (-1, prompts)) + coarse).flatten(0, 1)
    cells = (again(activation(norm(cells))).unflatten(0, (-1, prompts)) + fine).flatten(0, 1)
    return last(cells)
