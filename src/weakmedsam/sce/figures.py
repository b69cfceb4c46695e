"""What a class's sub-classes look like: the slices nearest to each cluster's centroid."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from weakmedsam.system.atomic_io import replacing


class ClusterRow(NamedTuple):
    """One cluster.

    Attributes:
        title: its id and size, for the reader.
        images: (H, W) slices in [0, 1], nearest to the centroid first.
    """

    title: str
    images: list[NDArray[np.float32]]


def draw_clusters(rows: list[ClusterRow], title: str, path: Path, side: int = 96) -> None:
    """Write one PNG: a row a cluster, its slices side by side.

    Args:
        rows: the clusters; they may have different numbers of slices.
        title: above all.
        path: the file.
        side: pixels a slice at most, by leaving out rows and columns; bounds time and size.
    """
    most = max(1, max(len(row.images) for row in rows))
    figure = Figure(figsize=(1.1 * most + 0.6, 1.2 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, row in zip(axes, rows, strict=True):
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(row.title, fontsize=8)
        axis.imshow(_strip(row.images, most, side), cmap="gray", vmin=0, vmax=1)
    figure.suptitle(title, fontsize=9)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=80)


def _strip(images: list[NDArray[np.float32]], places: int, side: int) -> NDArray[np.float32]:
    """(side, places * side): the slices from the left; what is left over stays white."""
    small = [image[:: -(-max(image.shape) // side), :: -(-max(image.shape) // side)] for image in images]
    height = max((image.shape[0] for image in small), default=side)
    width = max((image.shape[1] for image in small), default=side)
    strip = np.ones((height, places * width), np.float32)
    for place, image in enumerate(small):
        strip[: image.shape[0], place * width : place * width + image.shape[1]] = image
    return strip
