"""Features of drawn lesions whose number of appearances is known, for ``benchmarks.cluster_number``."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data_modules.phantom_drawing import LESION, MODES, PhantomParameters, draw_volume
from weakmedsam.backbones.pocket import Pocket
from weakmedsam.classification.cam import mean_inside
from weakmedsam.sce.kmeans import Points

SIZE = 128


@torch.no_grad()
def features_of_modes(modes: int, volumes: int = 16) -> dict[str, tuple[Points, NDArray[np.int64]]]:
    """Features by the embedded backbone, and the appearance of each slice with a lesion.

    Args:
        modes: number of appearances, 1 to 4.
        volumes: how many are drawn.

    Returns:
        By name: the mean over the slice, as SCE clusters it; and the mean over the lesion's own cells, by the
        expert mask, which shows whether the appearances are in the features at all.
    """
    parameters = PhantomParameters(slices=12, size=SIZE, modes=modes)
    backbone = Pocket(SIZE).eval()
    found: dict[str, list[torch.Tensor]] = {"slice": [], "lesion": []}
    owner: list[int] = []
    for number in range(volumes):
        drawing = draw_volume(parameters, number)
        rows = np.flatnonzero((drawing.mask == LESION).sum(axis=(1, 2)) >= 30)
        if not len(rows):
            continue
        low, high = np.percentile(drawing.image, (0.5, 99.5))
        image = ((torch.from_numpy(drawing.image[rows]).float() - low) / (high - low)).clamp(0, 1)
        features = backbone.features(image[:, None])
        cells = features.shape[-1]
        lesion = torch.from_numpy(drawing.mask[rows] == LESION).float()[:, None]
        inside = {
            "slice": torch.ones(len(rows), 1, cells, cells, dtype=torch.bool),
            "lesion": F.adaptive_avg_pool2d(lesion, cells) > 0.5,
        }
        for name, where in inside.items():
            found[name].append(mean_inside(features, where))
        owner += [MODES.index(drawing.mode)] * len(rows)
    return {name: (torch.cat(parts).numpy(), np.array(owner)) for name, parts in found.items()}
