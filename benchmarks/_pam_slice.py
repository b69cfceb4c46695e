"""PAM of a slice with the repository's settings: for ``benchmarks.pam``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from data_modules.phantom_drawing import PhantomParameters, draw_volume
from weakmedsam.backbones.pocket import Pocket
from weakmedsam.classification.cam import Pooling
from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.geometry import min_max
from weakmedsam.pam.config import Affinity, Occlusion, Prompts, Refinement, Threshold, Walk
from weakmedsam.pam.occlusion import drops_under_occlusion
from weakmedsam.pam.prompt_masks import PamBatch
from weakmedsam.pam.refiner import mine

CLOCK = [time.perf_counter]
"""What ``seconds`` reads."""

PHANTOM = PhantomParameters(12, 64, (3.0, 3.0, 8.0), 1.5, 0.4, 0.6, 0.04, 0.15)
"""experiments/data/phantom.yaml"""

THICKNESS = 8 / 3
"""Of its slices, in cells of the map."""


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Best of some repeats, by ``CLOCK``."""
    times = []
    for _ in range(repeats):
        start = CLOCK[0]()
        work()
        times.append(CLOCK[0]() - start)
    return min(times)


def pam_of_slice(size: int, repeats: int) -> float:
    """Seconds a slice of PAM with the repository's settings.

    Args:
        size: side of the slices, pixels; the default phantom has 64.
        repeats: of which the best is taken.
    """
    torch.manual_seed(0)
    classes = ["a", "b"]
    model = WeakMedSAM(Pocket(size), classes, LocalEncoder(size), pooling=Pooling("log_sum_exp")).eval()
    drawing = draw_volume(replace(PHANTOM, size=size), 2)
    image = min_max(torch.as_tensor(drawing.image).float())[:, None]
    ids = torch.as_tensor(drawing.mask).flatten(1)
    label = torch.stack([(ids == c).sum(1) >= 10 for c in (1, 2)], dim=1).float()
    rows = label.any(dim=1).nonzero().flatten()
    image, box = image[rows], torch.tensor([[0, size, 0, size]]).expand(len(rows), 4)
    settings = Refinement(
        Prompts(8), Affinity("with_intensity", 0.67, contrast=15.0), Walk(32, extent="volume"), Occlusion(0.3),
        threshold=Threshold(0.75),
    )  # fmt: skip

    def work() -> None:
        seen = model(image, box)
        slices = PamBatch(image, seen.cam, model.embedding(seen, image), label[rows], box)
        mine(model.backbone, slices, settings, 16, rows, THICKNESS, drops_under_occlusion(model.evidence))

    return seconds(work, repeats) / len(rows)
