"""Segmentations of unlabelled scans: drawn, and handed to the data module, which knows the scans' own space."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from weakmedsam.contracts import VolumeBatch
from weakmedsam.errors import ConfigError
from weakmedsam.figures import draw_segmentation, most_telling_slice
from weakmedsam.geometry import to_native
from weakmedsam.system.atomic_io import SEGMENTATIONS, write_whole
from weakmedsam.system.commands import command


@runtime_checkable
class NewScans(Protocol):
    """What is asked of a data module of unlabelled scans.

    Attributes:
        out: folder of the segmentations.
        class_names: names of the classes, id 1 first.
        scores: whether the scores behind the segmentations are written, too.
    """

    out: str
    class_names: list[str]
    scores: bool

    def save_scores(self, case: str, scores: NDArray[np.float32]) -> None:
        """Write (D, C, H0, W0) scores of a scan's own slices."""

    def save_segmentation(self, case: str, ids: NDArray[np.uint8]) -> None:
        """Write (D, H0, W0) class ids of a scan's own slices."""


def check_new_scans(data: object) -> NewScans:
    """The run's data module, where it is one of unlabelled scans.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(data, NewScans):
        raise ConfigError(
            f"predict with a segmentation network segments unlabelled scans: {command('predict', scans='FOLDER')}. The "
            "data set's own test cases are segmented by `test`"
        )
    return data


def save_segmentation(scans: NewScans, batch: VolumeBatch, ids: Tensor, scores: Tensor | None = None) -> None:
    """Draw ``pictures/<case>.png``, the slice of the largest area, write scores, then the segmentation.

    In this order: a scan whose segmentation is there is not looked at again.

    Args:
        scans: the data module.
        batch: the volume.
        ids: (D, H0, W0) uint8 class ids on the scan's own slices.
        scores: (D, C, H0, W0) float32 in [0, 1], the classes' probabilities or PAM's scores; None: not wanted.
    """
    ids, case = ids.cpu(), batch["case"]
    z = most_telling_slice(ids, ids)
    image = to_native(batch["image"][z : z + 1].float(), batch["frame"])[0, 0].cpu()
    title = f"{case}, slice {z}" if ids[z].any() else f"{case}: nothing found"
    write_whole(
        Path(scans.out) / "pictures" / f"{case}.png",
        draw_segmentation(image, ids[z], scans.class_names, batch["spacing"], title),
        SEGMENTATIONS,
    )
    if scores is not None:
        scans.save_scores(case, scores.numpy())
    scans.save_segmentation(case, ids.numpy())
