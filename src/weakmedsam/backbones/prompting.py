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

    Returns:
        logits (B, P, T, 4h, 4w) and predicted IoU (B, P, T).
    """
    if points.dim() == 2:
        points = points.expand(embedding.shape[0], -1, -1)
    images, prompts = points.shape[:2]
    positive = torch.ones(images * prompts, 1, dtype=torch.int64, device=points.device)
    sparse, dense = prompt_encoder(points=(points.reshape(-1, 1, 2) - 0.5, positive), boxes=None, masks=None)
    image_pe = prompt_encoder.get_dense_pe()
    owner = torch.arange(images, device=points.device).repeat_interleave(prompts)
    # The prompt encoder's dense part is one constant without mask prompts: added once per image.
    source = embedding + dense[:1]
    parts = [
        _decode_pairs(mask_decoder, source[owner[i : i + chunk]], image_pe, sparse[i : i + chunk])
        for i in range(0, len(owner), chunk)
    ]
    logits, quality = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits.unflatten(0, (images, prompts)), quality.unflatten(0, (images, prompts))


def _decode_pairs(
    decoder: MaskDecoder, source: Tensor, image_pe: Tensor, sparse: Tensor
) -> tuple[Tensor, Tensor]:
    """``MaskDecoder.predict_masks`` for pairs that belong together: source (N, E, h, w), sparse (N, t, E)."""
    pairs, _, height, width = source.shape
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(pairs, -1, -1), sparse], dim=1)
    tokens, source = decoder.transformer(source, image_pe.expand(pairs, -1, -1, -1), tokens)
    maps = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, (height, width)))
    weights = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = torch.einsum("ntc,nchw->nthw", torch.stack(weights, dim=1), maps)
    return logits, decoder.iou_prediction_head(tokens[:, 0])
