"""What every part agrees on: the batch, the pseudo-label file, the names of stages.

A leaf: it imports nothing of the project, and torch for its annotations only, so that readers of
volumes can use it without loading torch. The backbone's contract is in ``backbones/base.py``.

Dimensions, everywhere: B images, C classes, D feature channels (or, in a volume, its slices),
H W pixels, h w feature cells, K sub-classes of a class, P prompt points. Arrays of a slice are
(row, column); points are (x, y) = (column, row) in pixels of the input frame, pixel centres at
integer + 0.5 (the convention of segment-anything's point encoding).
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

BACKGROUND = 0
"""Class id of "none of the classes" in a mask or pseudo-label; classes are 1..C."""

IGNORE = 255
"""Id of a pixel that no loss may look at."""

SOMEWHERE = -1
"""Label of a class that a scan shows, where nobody has said in which slices."""

SLICE_BOX = "slice box"
"""PNG text of a case's picture: left, top, right and bottom of the slice in it, without title and legend, pixels."""


class SliceBatch(TypedDict, total=False):
    """A batch of slices.

    Keys:
        image: (B, 1, H, W) float32 in [0, 1].
        label: (B, C) float32, 1 where the class is present in the slice; ``SOMEWHERE`` where only the scan is known
            to show it.
        bag: (B,) int64, number of the slice's scan within its split; only where labels of scans are among them, in
            training and validation.
        index: (B,) int64, the slice's row within its split; the same under any shuffling.
        case: B case names.
        slice: (B,) int64, the slice's number within its volume.
        box: (B, 4) int64, (top, bottom, left, right) of the scan in the frame, ends excluded, before
            augmentation; outside is padding.
        scan: (B, 1, H, W) bool, where the scan lies after augmentation; augmented batches only.
        mask: (B, H, W) int64 expert class ids, 0..C; validation only, never in training.
        target: (B, H, W) int64 class ids to learn (pseudo-label), ``IGNORE`` outside the frame;
            segmentation training only.
        confidence: (B, H, W) float32 in [0, 1], how sure the target is; beside ``target`` only.
        quality: (B,) float32 in [0, 1], of the slice's pseudo-label: of its worst class, 1 where it has
            none; beside ``target`` only.
        trusted: (B,) bool, whether a person has corrected or accepted the target; beside ``target``, and only where a
            run's pseudo-labels have been reviewed.
    """

    image: Tensor
    label: Tensor
    bag: Tensor
    index: Tensor
    case: list[str]
    slice: Tensor
    box: Tensor
    scan: Tensor
    mask: Tensor
    target: Tensor
    confidence: Tensor
    quality: Tensor
    trusted: Tensor


class VolumeBatch(TypedDict, total=False):
    """One whole volume, its slices in order: what prediction and test get.

    Keys:
        image: (D, 1, H, W) float32 in [0, 1], the working frame.
        label: (D, C) float32, as of ``SliceBatch``; not of unlabelled scans.
        case: the case's name.
        index: the case's row within its split.
        frame: how the working frame lies on the scan's own slices.
        spacing: (slice distance, row, column) of the scan's own grid, in mm.
        box: (4,) int64, (top, bottom, left, right) of the scan in the frame, ends excluded.
        mask: (D, H0, W0) int64 expert class ids on the scan's own slices; test only, and only
            where there is one.
    """

    image: Tensor
    label: Tensor
    case: str
    index: int
    frame: Frame
    spacing: tuple[float, float, float]
    box: Tensor
    mask: Tensor


class Frame(NamedTuple):
    """How a square working frame lies on the scan's own slices.

    A slice (``height``, ``width``) is padded, centred, to a square of side ``side`` pixels and
    resized to ``size`` x ``size``.

    Attributes:
        height: rows of the scan's own slice, pixels.
        width: columns of the scan's own slice, pixels.
        side: side of the padded square, pixels of the scan's own slice.
        size: side of the working frame, pixels.
    """

    height: int
    width: int
    side: int
    size: int


class PseudoLabelKeys:
    """Tensors of a pseudo-label file (safetensors, one file a volume, ``<case>.safetensors``).

    ``label`` (D, H, W) uint8 class ids on the working frame; ``confidence`` (D, H, W) uint8,
    255 = certain; ``quality`` (D, C) float32 in [0, 1], NaN where the class is absent; ``stability``
    (D, C), the part of it that mirrored images gave, NaN where that was not measured; ``histogram`` (C, 256) int64,
    pixels of each class by confidence, so that sizes are known without reading the pixels. The file's metadata hold
    what it was made of, as one JSON string under ``about``: ``case``, the ``settings`` that made it, ``volume``, a hash
    of slices and labels, and ``content``, the CRC-32 of the tensors above in that order.
    """

    label = "label"
    confidence = "confidence"
    quality = "quality"
    stability = "stability"
    histogram = "histogram"
    about = "about"


class SliceState(IntEnum):
    """What a review has made of a slice of a pseudo-label.

    ``unchanged``; ``changed`` because a neighbour was corrected; ``trusted``: corrected or accepted by a person;
    ``left_out`` of training.
    """

    unchanged = 0
    changed = 1
    trusted = 2
    left_out = 3


class CorrectionKeys:
    """Tensors of a corrected pseudo-label file, beside the original and of the same name.

    ``label`` (D, H, W) uint8 class ids on the working frame; ``state`` (D,) uint8, a ``SliceState``. The metadata's
    ``about`` hold ``case``, ``original`` (``content`` of the original's), ``reviewed`` (hash of clicks and decisions)
    and ``network`` (which answered the clicks).
    """

    label = PseudoLabelKeys.label
    state = "state"
    about = PseudoLabelKeys.about
    needed = frozenset({label, state})


def in_round(name: str, number: int) -> str:
    """A stage's name in a round: ``segment``, ``segment_2``, ``segment_3``."""
    return name if number == 1 else f"{name}_{number}"


def split_round(name: str) -> tuple[str, int]:
    """``segment_2`` -> ("segment", 2); of another name round 1."""
    found = re.fullmatch(r"(pseudo_labels|segment|test_maps|test|threshold|refined)_([2-9]|[1-9]\d+)", name)
    return (found[1], int(found[2])) if found else (name, 1)
