"""Prompt affinity mining, put together: activation of slices in, scores for their pseudo-labels out.

The formulas are in ``affinity.py`` and ``pseudo_labels.py``; ``callbacks/mine.py`` does it in a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weakmedsam.affinity import (
    AFFINITIES,
    border_map,
    edge_weights,
    grid_points,
    half_disc,
    prompt_maps,
    random_walk,
)
from weakmedsam.backbones.base import Backbone
from weakmedsam.cam import inside_box, min_max_inside
from weakmedsam.contracts import ConfigError
from weakmedsam.pseudo_labels import gated_scores


@dataclass(frozen=True)
class Refinement:
    """The numbers of PAM; all that decides a pseudo-label but the network.

    Attributes:
        grid: points a side; the paper uses 4.
        affinity: ``per_prompt``, or ``summed`` as published.
        radius: of the neighbourhood, cells of the map, above 1 and at most ``map_size``; the paper uses 5.
        beta: exponent of the affinity, 0 or more; the paper uses 4.
        contrast: scale of mask differences before the exponent, 0 or more; published: 1.
        steps: of the random walk, 0 or more; the paper uses 4.
        map_size: side of the map that is walked on, cells; the paper uses 64.
        threshold: score above which a pixel belongs to a class, in (0, 1); the paper uses 0.5.
        sigma: of the smoothing before the threshold, pixels of the frame; 0 = none.

    Raises:
        ConfigError: an unknown affinity, or a number out of its range; names the key.
    """

    grid: int = 4
    affinity: str = "per_prompt"
    radius: float = 5.0
    beta: float = 4.0
    contrast: float = 10.0
    steps: int = 4
    map_size: int = 64
    threshold: float = 0.5
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if self.affinity not in AFFINITIES:
            raise ConfigError(
                f"model.pam.affinity: {self.affinity!r} is unknown; choose one of {', '.join(AFFINITIES)}"
            )
        for key, value, fits, range_ in (
            ("grid", self.grid, self.grid >= 1, "1 or more"),
            ("map_size", self.map_size, self.map_size >= 2, "2 or more"),
            # Within a radius of 1 a cell has no neighbour.
            ("radius", self.radius, 1 < self.radius <= self.map_size, "above 1 and at most map_size"),
            ("beta", self.beta, self.beta >= 0, "0 or more"),
            ("contrast", self.contrast, self.contrast >= 0, "0 or more"),
            ("steps", self.steps, self.steps >= 0, "0 or more"),
            ("threshold", self.threshold, 0 < self.threshold < 1, "between 0 and 1"),
            ("sigma", self.sigma, self.sigma >= 0, "0 or more"),
        ):
            if not fits:
                raise ConfigError(f"model.pam.{key} is {value}; it must be {range_}")


class Refined(NamedTuple):
    """PAM's result for B slices.

    Attributes:
        cam: (B, C, h, w) in [0, 1], activation scaled over the scan, 0 in the padding around it.
        affinity: (B, s, s) in [0, 1], a picture of the affinity.
        walked: (B, C, s, s) in [0, 1], activation after the random walk.
        before: (B, C, S, S) gated scores of the activation as it was.
        after: (B, C, S, S) gated scores after the walk.
    """

    cam: Tensor
    affinity: Tensor
    walked: Tensor
    before: Tensor
    after: Tensor


@torch.no_grad()
def refine(
    backbone: Backbone,
    cam: Tensor,
    embedding: Tensor,
    label: Tensor,
    box: Tensor,
    settings: Refinement,
    chunk: int,
) -> Refined:
    """Mine the affinity of slices and walk their activation along it. Images are not encoded again.

    Args:
        backbone: answers the prompts; S is its ``image_size``, s the settings' ``map_size``.
        cam: (B, C, h, w) class activation in [0, 1].
        embedding: (B, E, h', w') of ``backbone.encode``.
        label: (B, C) image-level label; an absent class gets an empty map.
        box: (B, 4) where the scan lies in the frame; the padding around it is background, takes no part
            in the walk and does not scale a map.
        settings: the numbers of PAM.
        chunk: slices at once; bounds memory, changes nothing else.
    """
    size, map_size = backbone.image_size, settings.map_size
    points = grid_points(settings.grid, size).to(cam.device)
    offsets = half_disc(settings.radius)
    parts = []
    for some, embedded, present, scan in zip(
        cam.split(chunk), embedding.split(chunk), label.split(chunk), box.split(chunk), strict=True
    ):
        some = min_max_inside(some.float(), inside_box(scan, size, some.shape[-1]))
        inside, frame = inside_box(scan, size, map_size), inside_box(scan, size, size)
        maps = prompt_maps(backbone.masks_at_points(embedded, points), map_size, settings.affinity)
        weights = edge_weights(maps, offsets, settings.beta, settings.contrast)
        # No edge leads from the scan into its padding: the difference there is 1, so its weight is 0.
        weights = weights * edge_weights(inside.float(), offsets, beta=1.0, contrast=1e4)
        start = F.interpolate(some, size=(map_size, map_size), mode="bilinear")
        walked = random_walk(min_max_inside(start, inside), weights, offsets, settings.steps, inside=inside)
        before = gated_scores(some, present, size, settings.sigma) * frame
        after = gated_scores(walked, present, size, settings.sigma) * frame
        parts.append(Refined(some, border_map(weights, offsets), walked, before, after))
    return Refined(*(torch.cat(column) for column in zip(*parts, strict=True)))
