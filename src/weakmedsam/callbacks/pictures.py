"""Picture grids: one row a slice, one column a step of the method."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

COLOURS = ("#ffb000", "#3ddbd9", "#fe6100", "#a56eff", "#78d64b", "#ff7eb6")
"""One a class, in order, told apart by colour-blind eyes too; reused beyond six."""


class Row(NamedTuple):
    """One slice on its way, all on (rows, columns) grids of any size.

    Attributes:
        title: case, slice and class, for the reader.
        image: (H, W) in [0, 1].
        cam: (h, w) in [0, 1], the class's activation.
        affinity: (h, w) in [0, 1], 1 = pixels belong to their neighbours.
        refined: (h, w) in [0, 1], the activation after the random walk.
        pseudo_label: (H, W) class ids.
        mask: (H, W) class ids, None where there is no expert mask to show.
    """

    title: str
    image: NDArray[np.float32]
    cam: NDArray[np.float32]
    affinity: NDArray[np.float32]
    refined: NDArray[np.float32]
    pseudo_label: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None


def draw_grid(rows: list[Row], path: Path) -> None:
    """Write the rows as one PNG: image, CAM, affinity, refined CAM, pseudo-label and, if any, mask.

    Every panel but the affinity lies on the slice; the expert mask is drawn as a green outline over the
    pseudo-label too, so that the eye can compare.
    """
    with_mask = any(row.mask is not None for row in rows)
    names = ["image", "class activation", "prompt affinity", "refined by PAM", "pseudo-label"]
    names += ["expert mask"] if with_mask else []
    figure = Figure(figsize=(2.1 * len(names), 2.25 * len(rows) + 0.25), layout="constrained")
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        frame = (0.0, float(row.image.shape[1]), float(row.image.shape[0]), 0.0)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.imshow(row.image, cmap="gray", vmin=0, vmax=1, extent=frame)
        line[1].imshow(row.cam, cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=frame)
        line[2].imshow(row.affinity, cmap="gray", vmin=0, vmax=1, extent=frame)
        line[3].imshow(row.refined, cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=frame)
        line[4].imshow(_overlay(row.pseudo_label), extent=frame, interpolation="nearest")
        if row.mask is not None:
            _outline(line[4], row.mask > 0, frame)
            line[5].imshow(_overlay(row.mask), extent=frame, interpolation="nearest")
        line[0].set_ylabel(row.title, fontsize=7)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    figure.savefig(temporary, format="png", dpi=80)
    temporary.replace(path)


def _overlay(ids: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W) class ids -> (H, W, 4) colours, background transparent."""
    colours = np.zeros((*ids.shape, 4))
    for c in np.unique(ids[ids > 0]):
        code = COLOURS[(int(c) - 1) % len(COLOURS)].lstrip("#")
        colours[ids == c] = [*(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)), 0.55]
    return colours


def _outline(axis: object, inside: NDArray[np.bool_], frame: tuple[float, float, float, float]) -> None:
    if inside.any() and not inside.all():
        axis.contour(inside[::-1], levels=[0.5], colors="#20e020", linewidths=1.2, extent=(frame[0], frame[1], frame[2], frame[3]))  # type: ignore[attr-defined]
