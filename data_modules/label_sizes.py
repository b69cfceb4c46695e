"""Unsure pseudo-labels that are larger than others of their class are trimmed to a size between theirs and the others'.

Where a classifier is unsure of a scan, the walk runs out of the target, and a segmentation network learns from that to
fill whole organs. How sure it is shows in the confidence of the pixels (docs/results.md, quality of pseudo-labels); how
large the class is elsewhere, in the other scans. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVELS = 256
"""Confidences that a file tells apart."""
POWER = 3.0
"""How fast the trust in a label's own size falls with its mean confidence (docs/results.md)."""
TOLERANCE = 1.25
"""A label that has not this many times the pixels that it is to have stays as it is: scans differ."""


class LabelSize(NamedTuple):
    """What the pseudo-label of a volume says of its classes.

    Attributes:
        histogram: (C, LEVELS) pixels of each class by confidence.
        slices: (C,) slices that have the class.
    """

    histogram: NDArray[np.int64]
    slices: NDArray[np.int64]


def least_confidences(sizes: Mapping[str, LabelSize]) -> dict[str, NDArray[np.uint8]]:
    """The confidence from which on a pixel stays in its class, for each volume.

    With a the mean area of a class in the slices of a volume that have it, q the mean confidence of its pixels and m
    the geometric mean of all a, weighted by q: a volume is to have at most a ** t * m ** (1 - t), where t is
    (q / median of all q) ** POWER, at most 1. So sure labels and small ones stay as they are.

    Args:
        sizes: by case, all of the same classes.

    Returns:
        (C,) by case; 0 leaves a class as it is.
    """
    found = {case: np.zeros(len(size.slices), np.uint8) for case, size in sizes.items()}
    classes = max((len(size.slices) for size in sizes.values()), default=0)
    for c in range(classes):
        rows = {case: size.histogram[c] for case, size in sizes.items() if size.slices[c] and size.histogram[c].any()}
        if not rows:
            continue
        counts = np.stack(list(rows.values())).astype(np.float64)
        slices = np.array([sizes[case].slices[c] for case in rows])
        areas = counts.sum(axis=1) / slices
        sure = counts @ np.arange(LEVELS) / counts.sum(axis=1) / (LEVELS - 1)
        if not sure.any():
            continue
        typical = np.average(np.log(areas), weights=sure)
        trust = np.minimum(sure / max(np.median(sure), 1e-6), 1) ** POWER
        wanted = np.exp(trust * np.log(areas) + (1 - trust) * typical) * slices
        above = counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # pixels of at least each confidence
        for case, pixels, most in zip(rows, above, wanted, strict=True):
            if pixels[0] > TOLERANCE * most:
                enough = np.flatnonzero(pixels >= most)
                found[case][c] = enough[-1]  # no smaller than wanted: levels are coarse
    return found


def trim_label(
    label: NDArray[np.uint8], confidence: NDArray[np.uint8], least: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels below their class's least confidence become background that nothing is known of: confidence 0.

    Args:
        label: (...) class ids, 0 for background.
        confidence: (...) of the pixels.
        least: (C,) of ``least_confidences``.

    Returns:
        Label and confidence.
    """
    out = confidence < np.concatenate([np.zeros(1, np.uint8), least])[label]
    return np.where(out, 0, label).astype(np.uint8), np.where(out, 0, confidence).astype(np.uint8)
