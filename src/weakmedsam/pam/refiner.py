"""Prompt affinity mining, put together: activation of slices in, scores for their pseudo-labels out.

The formulas are in ``affinity.py``, ``volume_affinity.py``, ``occlusion.py``, ``mask_voting.py`` and
``thresholding.py``, settings in ``config.py``, masks of prompts in ``prompt_masks.py``; ``callbacks/pam.py`` does
it in a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weakmedsam.backbones.base import Backbone
from weakmedsam.geometry import inside_box, min_max_inside
from weakmedsam.pam.affinity import Offset, border_map, edge_weights, half_disc, random_walk
from weakmedsam.pam.config import Refinement
from weakmedsam.pam.mask_voting import vote
from weakmedsam.pam.occlusion import Drops, smallest_discriminative, with_discriminative_mask
from weakmedsam.pam.prompt_masks import MASKS, Answers, PamBatch, decode_prompts, place_prompts
from weakmedsam.pam.thresholding import UNREFINED, centre_scores, compete, gated_scores, profile_levels
from weakmedsam.pam.volume_affinity import half_ball, volume_weights

__all__ = ["Mined", "PamBatch", "Refined", "Refinement", "find_levels", "mine", "refine", "score_maps"]


class Mined(NamedTuple):
    """Activation before and after PAM, on maps.

    Attributes:
        cam: (B, C, h, w) in [0, 1], activation scaled over the scan (without ``rescale`` as it comes), 0 in the padding
            around it.
        affinity: (B, s, s) in [0, 1], a picture of the affinity within slices; 0 without one.
        start: (B, C, s, s) in [0, 1], activation on the map that is walked on.
        walked: (B, C, s, s) in [0, 1], activation after walk and vote.
    """

    cam: Tensor
    affinity: Tensor
    start: Tensor
    walked: Tensor

    def rows(self, rows: Tensor | slice) -> Mined:
        """Some of the slices."""
        return Mined(*(part[rows] for part in self))


class Refined(NamedTuple):
    """PAM's result for B slices.

    Attributes:
        cam: as in ``Mined``.
        affinity: as in ``Mined``.
        walked: as in ``Mined``.
        before: (B, C, S, S) gated scores of the activation as it was, moved so that ``UNREFINED`` lies at the settings'
            ``threshold``: walks fill regions and want another than what is not walked.
        after: (B, C, S, S) gated scores after walk and vote. Both are to be held against the settings'
            ``threshold``, under the profile's rule too.
    """

    cam: Tensor
    affinity: Tensor
    walked: Tensor
    before: Tensor
    after: Tensor


@torch.no_grad()
def refine(
    backbone: Backbone, slices: PamBatch, settings: Refinement, chunk: int, drops: Drops | None = None
) -> Refined:
    """Mine the affinity of slices, each by itself, and walk their activation along it.

    Images are not encoded again, unless ``drops`` does. Single slices have no profile: the threshold is fixed.

    Args:
        backbone: answers the prompts; S is its ``image_size``, s the settings' ``map_size``.
        slices: B of them.
        settings: the numbers of PAM.
        chunk: slices at once; bounds memory, changes nothing else.
        drops: as in ``mine``.
    """
    parts = []
    for first in range(0, len(slices.cam), chunk):
        some = slices.rows(slice(first, first + chunk))
        mined = mine(backbone, some, settings, chunk, drops=drops)
        parts.append(score_maps(mined, some, settings))
    return Refined(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def mine(
    backbone: Backbone,
    slices: PamBatch,
    settings: Refinement,
    chunk: int,
    positions: Tensor | None = None,
    thickness: float | None = None,
    drops: Drops | None = None,
) -> Mined:
    """Walk and vote, on maps.

    Args:
        backbone: answers the prompts.
        slices: B of them, each with some class; of one volume if ``thickness`` is given.
        settings: the numbers of PAM.
        chunk: slices at once; bounds memory, changes nothing else.
        positions: (B,) rising numbers of the slices in their volume: only those that follow each other
            are neighbours. None: they all do.
        thickness: ``volume_affinity.relative_thickness``. None, or ``settings.walk.extent`` "slice": every slice is
            walked by itself.
        drops: drop of each class logit under occlusion of each mask; needed where
            ``settings.occlusion.weight`` is above 0.
    """
    if settings.prompted:
        chunk = min(chunk, max(1, MASKS // settings.prompts.grid**2))
    if not settings.volumetric or thickness is None:
        chunks = [slices.rows(slice(i, i + chunk)) for i in range(0, len(slices.cam), chunk)]
        parts = [_mine_slices(backbone, some, settings, drops) for some in chunks]
    else:
        parts = [
            _mine_run(backbone, slices.rows(run), settings, chunk, thickness, drops)
            for run in _runs(len(slices.cam), positions)
        ]
    return Mined(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _runs(length: int, positions: Tensor | None) -> list[slice]:
    """Slices of rows whose positions follow each other without a gap."""
    if positions is None:
        return [slice(0, length)]
    breaks = ((positions.diff() != 1).nonzero().flatten() + 1).tolist()
    return [slice(a, b) for a, b in zip([0, *breaks], [*breaks, length], strict=True)]


def _mine_slices(backbone: Backbone, some: PamBatch, settings: Refinement, drops: Drops | None) -> Mined:
    """Each slice by itself."""
    offsets = half_disc(settings.affinity.radius)
    cam, start, inside = _start(backbone, some, settings)
    answers = decode_prompts(backbone, some, place_prompts(some, settings), settings)
    walked = _begun(start, answers, inside, some, settings, drops)
    picture = torch.zeros_like(start[:, 0])
    if answers.maps is not None:
        trust = None if answers.weight is None else answers.weight[..., None, None]
        weights = edge_weights(answers.maps, offsets, settings.affinity.beta, settings.affinity.contrast, trust)
        picture = border_map(weights, offsets, inside)
        walked = _walked(walked, weights, offsets, inside, settings)
    if settings.vote.when == "after":
        walked = _voted(walked, answers, inside, settings)
    return Mined(cam, picture, start, walked)


def _mine_run(
    backbone: Backbone,
    run: PamBatch,
    settings: Refinement,
    chunk: int,
    thickness: float,
    drops: Drops | None,
) -> Mined:
    """Adjacent slices of a volume, together. Prompts' masks are held for some slices at a time only."""
    offsets = half_ball(settings.affinity.radius, settings.walk.slice_reach, thickness)
    cam, start, inside = _start(backbone, run, settings)
    prompts = place_prompts(run, settings)
    pieces = [slice(i, i + chunk) for i in range(0, len(run.cam), chunk)]
    begun = []

    def compared() -> Iterator[tuple[Tensor, Tensor | None]]:
        for piece in pieces:
            some = run.rows(piece)
            answers = decode_prompts(backbone, some, prompts.rows(piece), settings)
            begun.append(_begun(start[piece], answers, inside[piece], some, settings, drops))
            assert answers.maps is not None
            yield answers.maps, answers.weight

    weights = volume_weights(
        compared(),
        offsets,
        settings.affinity.radius,
        thickness,
        settings.affinity.beta,
        settings.affinity.contrast,
    )
    walked = torch.cat(begun)
    # A slice without the class has no say about it: neither its own score nor its neighbours'.
    taking_part = inside & (run.label > 0)[:, :, None, None]
    walked = _walked_by_class(walked, weights, offsets, taking_part, settings)
    if settings.vote.when == "after":
        walked = torch.cat([
            _voted(walked[piece], decode_prompts(backbone, run.rows(piece), prompts.rows(piece), settings),
                   inside[piece], settings)
            for piece in pieces
        ])  # fmt: skip
    flat = [offset for offset in offsets if offset[0] == 0]
    picture = border_map(weights[:, : len(flat)], flat, _deep(inside))[0]
    return Mined(cam, picture, start, walked)


def _walked_by_class(
    maps: Tensor, weights: Tensor, offsets: list[Offset], inside: Tensor, settings: Refinement
) -> Tensor:
    """Each class through the slices from its first to its last: (D, C, s, s), inside alike -> (D, C, s, s)."""
    walked = torch.zeros_like(maps)
    for c in range(maps.shape[1]):
        own = inside[:, c].flatten(1).any(dim=1).nonzero().flatten().tolist()
        if own:
            rows, one = slice(own[0], own[-1] + 1), slice(c, c + 1)
            volume = _deep(maps[rows, one]), weights[:, :, rows], offsets, _deep(inside[rows, one])
            walked[rows, one] = _walked(*volume, settings)[0].movedim(0, 1)
    return walked


def _deep(maps: Tensor) -> Tensor:
    """(D, C, h, w) slices -> (1, C, D, h, w), a volume."""
    return maps.movedim(0, 1)[None]


def _start(backbone: Backbone, some: PamBatch, settings: Refinement) -> tuple[Tensor, Tensor, Tensor]:
    """The activation over the scan, the same on the map, and the map's cells on the scan."""
    size, map_size = backbone.image_size, settings.walk.map_size
    cam = _over_scan(some.cam.float(), inside_box(some.box, size, some.cam.shape[-1]), settings)
    inside = inside_box(some.box, size, map_size)
    start = F.interpolate(cam, size=(map_size, map_size), mode="bilinear")
    return cam, _over_scan(start, inside, settings), inside


def _over_scan(maps: Tensor, inside: Tensor, settings: Refinement) -> Tensor:
    """Maps scaled over the cells inside, or as they come; 0 outside."""
    return min_max_inside(maps, inside) if settings.walk.rescale else maps * inside


def _walked(
    maps: Tensor,
    weights: Tensor,
    offsets: list[Offset],
    inside: Tensor,
    settings: Refinement,
) -> Tensor:
    if not settings.walks:
        return maps
    return random_walk(
        maps, weights, offsets, settings.walk.steps, settings.walk.rescale, inside, settings.walk.restart
    )


def _voted(maps: Tensor, answers: Answers, inside: Tensor, settings: Refinement) -> Tensor:
    assert answers.masks is not None
    masks = answers.masks * inside
    return vote(maps, masks, settings.vote.power, settings.vote.normalise, answers.trust)


def _begun(
    start: Tensor,
    answers: Answers,
    inside: Tensor,
    some: PamBatch,
    settings: Refinement,
    drops: Drops | None,
) -> Tensor:
    """What is walked: the activation, with the most discriminative mask, or what the masks vote."""
    if settings.occlusion.weight > 0:
        assert answers.masks is not None
        assert drops is not None
        masks = answers.masks * inside
        if answers.trust is not None:
            masks = masks * (answers.trust > 0)[..., None, None]
        discriminative = smallest_discriminative(masks, drops(some, masks), settings.occlusion.share, answers.trust)
        start = with_discriminative_mask(start, discriminative, settings.occlusion.weight)
    if settings.vote.when in ("alone", "before"):
        start = _voted(start, answers, inside, settings)
    return start


def find_levels(mined: Mined, slices: PamBatch, settings: Refinement, positions: Tensor, depth: int) -> Tensor | None:
    """Thresholds of the refined maps of a volume, over the map's cells on the scan of slices that have the class.

    Args:
        mined: of the slices.
        slices: the same, of one volume, in their order.
        settings: the numbers of PAM.
        positions: (B,) numbers of these slices in the volume.
        depth: slices of the volume, those without a class included.

    Returns:
        (B, C), NaN where the fixed threshold holds; None under the fixed rule.
    """
    if settings.threshold.rule != "profile":
        return None
    size, cells = slices.image.shape[-1], settings.walk.map_size
    inside = inside_box(slices.box, size, cells)[:, 0]
    # Smoothed as on the frame: it lowers the peaks of small sections, whose thresholds would lie above them.
    scores = gated_scores(mined.walked, slices.label, cells, settings.threshold.sigma * cells / size)
    scores = _competed(scores, settings)
    levels = torch.full(slices.label.shape, torch.nan, device=scores.device)
    for c in range(scores.shape[1]):
        rows = (slices.label[:, c] > 0).nonzero().flatten()
        if len(rows):
            some = scores[rows, c], positions[rows], depth, inside[rows]
            levels[rows, c] = profile_levels(*some, settings.threshold.value)
    return levels


def _competed(scores: Tensor, settings: Refinement) -> Tensor:
    return compete(scores, settings.threshold.background_power) if settings.threshold.competition == "share" else scores


def score_maps(mined: Mined, slices: PamBatch, settings: Refinement, levels: Tensor | None = None) -> Refined:
    """Bring maps to the frame: upsampled, smoothed, gated, in competition, about one threshold.

    Args:
        mined: of B slices.
        slices: the same.
        settings: the numbers of PAM.
        levels: (B, C) of ``find_levels``, for the same slices; None: the fixed threshold.
    """
    size = slices.image.shape[-1]
    frame = inside_box(slices.box, size, size)
    fixed = torch.full_like(slices.label, UNREFINED, dtype=torch.float32)
    both = []
    for maps, level in ((mined.cam, fixed), (mined.walked, levels)):
        scores = gated_scores(maps, slices.label, size, settings.threshold.sigma) * frame
        scores = _competed(scores, settings)
        both.append(scores if level is None else centre_scores(scores, level, settings.threshold.value))
    return Refined(mined.cam, mined.affinity, mined.walked, both[0], both[1])
