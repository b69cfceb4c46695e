"""Clicks as a careful reader would set them, from an expert mask: what a correction by clicks can reach.

The protocol of interactive segmentation: the next click goes into the middle of the largest error (Xu et al., "Deep
interactive object selection", CVPR 2016; Sofiiuk et al., "Reviving iterative training", ICIP 2022), here the largest
of all slices of a volume.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from weakmedsam.contracts import BACKGROUND
from weakmedsam.run.clicks import Click


def next_click(
    label: NDArray[np.uint8], reference: NDArray[np.uint8], present: NDArray[np.bool_], class_names: Sequence[str]
) -> Click | None:
    """The click into the middle of the largest error of a volume.

    An error is a connected part of a slice where a class is missing, or one that is too much there. Its middle is the
    pixel farthest from its border.

    Args:
        label: (D, S, S) class ids, as they are.
        reference: (D, S, S) class ids, as they should be.
        present: (D, C) which classes slices are said to have; elsewhere nothing can be added.
        class_names: of the classes, id 1 first.

    Returns:
        The click, without case and time; None where nothing is wrong.
    """
    best: tuple[int, Click] | None = None
    for number in np.flatnonzero((label != reference).any(axis=(1, 2))).tolist():
        now, wanted = label[number], reference[number]
        for class_id, name in enumerate(class_names, start=1):
            missing = (wanted == class_id) & (now != class_id) & bool(present[number, class_id - 1])
            extra = (now == class_id) & (wanted == BACKGROUND)
            for sign, wrong in ((1, missing), (-1, extra)):
                found = _largest(wrong)
                if found is not None and (best is None or found[0] > best[0]):
                    best = found[0], Click("", number, found[2], found[1], sign, name)
    return best[1] if best else None


def _largest(wrong: NDArray[np.bool_]) -> tuple[int, int, int] | None:
    """(pixels, row, column) of the largest connected part and the pixel farthest from its border."""
    parts, count = ndimage.label(wrong)
    if not count:
        return None
    areas = np.bincount(parts.ravel())[1:]
    part = np.pad(parts == 1 + areas.argmax(), 1)  # the border of the frame is a border, too
    row, column = np.unravel_index(ndimage.distance_transform_edt(part).argmax(), part.shape)
    return int(areas.max()), int(row) - 1, int(column) - 1
