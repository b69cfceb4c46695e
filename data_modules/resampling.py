"""The square working frame: a slice padded to a square and resized, and the way back.

Coordinates follow the pixel-centre convention: pixel i covers [i, i + 1). The slice lies in the middle
of the square; what is padded is 0.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from weakmedsam.contracts import BACKGROUND, Frame


def make_frame(height: int, width: int, size: int) -> Frame:
    """The working frame of slices of ``height`` x ``width`` pixels, ``size`` pixels a side."""
    return Frame(height=height, width=width, side=max(height, width), size=size)


def frame_offset(frame: Frame) -> tuple[int, int]:
    """(top, left): where the slice begins in the padded square, pixels of the scan's own slice."""
    return (frame.side - frame.height) // 2, (frame.side - frame.width) // 2


@lru_cache(maxsize=32)
def frame_box(frame: Frame) -> tuple[int, int, int, int]:
    """Where the scan lies in the working frame; outside is padding.

    Returns:
        (top, bottom, left, right), pixels of the working frame, ends excluded: the pixels whose centres
        lie on the scan.
    """
    top, left = frame_offset(frame)
    scale = frame.size / frame.side
    edges = (top, top + frame.height, left, left + frame.width)
    first, last, begin, end = (round(edge * scale) for edge in edges)
    return first, max(last, first + 1), begin, max(end, begin + 1)


def resize_matrix(source: int, target: int) -> NDArray[np.float32]:
    """Linear interpolation of ``source`` samples at ``target`` places, as a matrix (target, source).

    When shrinking, the triangle is widened by the factor, so that every sample counts and nothing
    aliases (Pillow's and torch's "antialias"). Rows sum to one: a constant stays constant, and every
    result lies within the range of its input.
    """
    ratio = source / target
    reach = max(ratio, 1.0)
    centres = (np.arange(target) + 0.5) * ratio
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / reach
    weights = np.clip(1.0 - distance, 0.0, None)
    matrix = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    matrix.flags.writeable = False  # shared by every caller through the cache
    return matrix


def values_to_frame(values: NDArray[np.float32], frame: Frame) -> NDArray[np.float32]:
    """Resize a slice to the working frame, anti-aliased.

    Args:
        values: (..., H0, W0).
        frame: where it goes.

    Returns:
        (..., S, S) float32, 0 where the square was padded.
    """
    top, left = frame_offset(frame)
    matrix = resize_matrix(frame.side, frame.size)
    # Padding with 0 adds nothing to the sums, so the padded columns of the matrix are left out.
    rows, columns = matrix[:, top : top + frame.height], matrix[:, left : left + frame.width]
    return rows @ values.astype(np.float32, copy=False) @ columns.T


def values_from_frame(values: NDArray[np.float32], frame: Frame) -> NDArray[np.float32]:
    """Bring values of the working frame, e.g. probabilities, to the scan's own slices, linearly.

    Args:
        values: (..., S, S).
        frame: where they lie.

    Returns:
        (..., H0, W0) float32.
    """
    top, left = frame_offset(frame)
    matrix = resize_matrix(frame.size, frame.side)
    rows, columns = matrix[top : top + frame.height], matrix[left : left + frame.width]
    return rows @ values.astype(np.float32, copy=False) @ columns.T


def labels_to_frame(labels: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    """Class ids of the scan's own slices on the working frame, by the nearest pixel.

    Args:
        labels: (..., H0, W0).
        frame: where they go.

    Returns:
        (..., S, S), background where the square was padded.
    """
    top, left = frame_offset(frame)
    nearest = ((np.arange(frame.size) + 0.5) * frame.side / frame.size).astype(np.int64)
    rows, columns = nearest - top, nearest - left
    inside = ((rows >= 0) & (rows < frame.height))[:, None] & ((columns >= 0) & (columns < frame.width))
    rows, columns = rows.clip(0, frame.height - 1), columns.clip(0, frame.width - 1)
    framed = labels[..., rows[:, None], columns]
    return np.where(inside, framed, np.asarray(BACKGROUND, dtype=labels.dtype))


def labels_from_frame(labels: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    """Class ids of the working frame on the scan's own slices, by the nearest pixel.

    Args:
        labels: (..., S, S).
        frame: where they lie.

    Returns:
        (..., H0, W0).
    """
    top, left = frame_offset(frame)
    scale = frame.size / frame.side
    rows = ((np.arange(frame.height) + top + 0.5) * scale).astype(np.int64)
    columns = ((np.arange(frame.width) + left + 0.5) * scale).astype(np.int64)
    return labels[..., rows[:, None], columns]
