"""What the prompts say of slices: asked of the backbone once, reduced to the map that is walked on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weakmedsam.backbones.base import Backbone
from weakmedsam.pam.affinity import AFFINITIES, CellEvidence, grid_points, onto_map
from weakmedsam.pam.config import Refinement
from weakmedsam.pam.point_prompts import PromptPoints, content_prompts, peak_prompts

DECODED_AT_ONCE = 256
"""Pairs of slice and prompt whose masks are held at the decoder's own size at once; memory only."""

MASKS = 4096
"""Masks held at the map's size at once: of a grid of 32 those of four slices; memory only."""


class PamBatch(NamedTuple):
    """B slices, as PAM needs them.

    Attributes:
        image: (B, 1, S, S) in [0, 1].
        cam: (B, C, h, w) class activation in [0, 1].
        embedding: (B, E, h', w') of ``backbone.embed``; None where no prompt is asked.
        label: (B, C) image-level label; an absent class gets an empty map.
        box: (B, 4) where the scan lies in the frame; the padding around it is background, takes no part
            in the walk and does not scale a map.
    """

    image: Tensor
    cam: Tensor
    embedding: Tensor | None
    label: Tensor
    box: Tensor

    def rows(self, rows: Tensor | slice) -> PamBatch:
        """Some of them."""
        image, cam, embedding, label, box = self
        kept = None if embedding is None else embedding[rows]
        return PamBatch(image[rows], cam[rows], kept, label[rows], box[rows])


class Answers(NamedTuple):
    """Masks on the map, and what pixels are compared by.

    Attributes:
        masks: (B, P, s, s) in [0, 1], of each prompt; None if none was asked.
        trust: (B, P) in [0, 1], the weight of each mask; None = all alike.
        maps: (B, Q, s, s), what pixels are compared by; None without an affinity.
        weight: (B, Q) of these maps; None = all alike.
    """

    masks: Tensor | None
    trust: Tensor | None
    maps: Tensor | None
    weight: Tensor | None


def place_prompts(some: PamBatch, settings: Refinement) -> PromptPoints:
    """Where the settings want slices to be prompted."""
    size = some.image.shape[-1]
    if settings.prompts.placement == "content":
        return content_prompts(some.image, some.box, settings.prompts.grid, settings.prompts.content_share)
    if settings.prompts.placement == "peaks":
        return peak_prompts(some.cam, some.label, some.box, size, settings.prompts.peaks)
    return PromptPoints(grid_points(settings.prompts.grid, size).to(some.cam.device), None)


def decode_prompts(backbone: Backbone, some: PamBatch, prompts: PromptPoints, settings: Refinement) -> Answers:
    """Put prompts to the decoder, some at a time; no more than ``DECODED_AT_ONCE`` masks are held at its own size."""
    size, kind = settings.walk.map_size, AFFINITIES.get(settings.affinity.kind)
    evidence = CellEvidence(onto_map(some.image.float(), size), settings.affinity.intensity_share)
    if not settings.prompted:
        return Answers(None, None, *((None, None) if kind is None else kind.maps(evidence)))
    assert some.embedding is not None
    summed = torch.zeros((), device=some.cam.device)
    parts: list[Tensor] = []
    trusts: list[Tensor] = []
    for asked in prompts.split(max(1, DECODED_AT_ONCE // len(some.cam))):
        logits, trust = _masks_of(backbone, some.embedding, asked, settings)
        parts.append(onto_map(logits.float().sigmoid(), size))
        trusts += [] if trust is None else [trust]
        if kind is not None and kind.logits:
            trusted = logits if trust is None else logits * trust[..., None, None]
            summed = summed + onto_map(trusted.float().sum(dim=1, keepdim=True), size)
    masks, trust = torch.cat(parts, dim=1), torch.cat(trusts, dim=1) if trusts else None
    if kind is None:
        return Answers(masks, trust, None, None)
    return Answers(masks, trust, *kind.maps(evidence._replace(masks=masks, trust=trust, logits=summed)))


def _masks_of(
    backbone: Backbone, embedding: Tensor, prompts: PromptPoints, settings: Refinement
) -> tuple[Tensor, Tensor | None]:
    """Logits (B, P, h, w) and trust (B, P): whether a point is used, and the quality that is predicted."""
    if not settings.prompts.rated:
        return backbone.masks_at_points(embedding, prompts.points), prompts.used
    logits, quality = backbone.prompted(embedding, prompts.points)
    quality = quality.float().clamp(0, 1)
    trust = (quality >= settings.prompts.min_quality) * (quality if settings.prompts.weigh_by_quality else 1.0)
    return logits, trust if prompts.used is None else trust * prompts.used
