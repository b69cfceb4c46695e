"""Pictures for people: the steps of the method side by side, and predictions as outlines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import get_data_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no window system, no global state
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from weakmedsam.contracts import BACKGROUND, IGNORE, SLICE_BOX
from weakmedsam.system.atomic_io import replacing

CLASS_COLOURS = ("#ffb000", "#3ddbd9", "#fe6100", "#a56eff", "#78d64b", "#ff7eb6")
"""One a class, in order, told apart by colour-blind eyes too; reused beyond six."""


class PictureRow(NamedTuple):
    """One slice on its way, all on (rows, columns) grids of any size.

    Attributes:
        title: case, slice and class, for the reader.
        image: (H, W) in [0, 1].
        cam: (h, w) in [0, 1], the class's activation.
        affinity: (h, w) in [0, 1], 1 = pixels belong to their neighbours.
        refined: (h, w) in [0, 1], the activation after the random walk.
        pseudo_label: (H, W) class ids.
        mask: (H, W) class ids, None where there is no expert mask to show.
        unrefined: (H, W) class ids of the activation without refinement; None if they are not compared.
        start: what ``cam`` is; that of the first row heads the column.
    """

    title: str
    image: NDArray[np.float32]
    cam: NDArray[np.float32]
    affinity: NDArray[np.float32]
    refined: NDArray[np.float32]
    pseudo_label: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None
    unrefined: NDArray[np.uint8] | None = None
    start: str = "class activation"


def draw_grid(rows: list[PictureRow], path: Path) -> None:
    """Write the rows as one PNG: image, CAM, affinity, refined CAM, pseudo-label and, if any, mask.

    Every panel but the affinity lies on the slice; the expert mask is drawn as a green outline over the
    pseudo-label too, so that the eye can compare. Where mask and unrefined ids are there, a last panel
    shows what refinement did: green pixels it corrected, red ones it broke.
    """
    with_mask = any(row.mask is not None for row in rows)
    compared = any(row.mask is not None and row.unrefined is not None for row in rows)
    names = ["image", rows[0].start, "prompt affinity", "refined by PAM", "pseudo-label"]
    names += ["expert mask"] if with_mask else []
    names += ["PAM corrected / broke"] if compared else []
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
            if row.unrefined is not None:
                changes = mark_changes(row.unrefined, row.pseudo_label, row.mask)
                line[6].imshow(changes, extent=frame, interpolation="nearest")
        line[0].set_ylabel(row.title, fontsize=7)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=80)


def mark_changes(before: NDArray[np.uint8], after: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Where refinement helped and where it did harm, as colours.

    Args:
        before: (H, W) class ids without refinement.
        after: (H, W) class ids with it.
        mask: (H, W) expert class ids; pixels of ``IGNORE`` count nowhere.

    Returns:
        (H, W, 4) red, green, blue, opacity: green where only ``after`` is right, red where only ``before``
        was, transparent elsewhere.
    """
    known = mask != IGNORE
    colours = np.zeros((*mask.shape, 4))
    colours[known & (before != mask) & (after == mask)] = (0.13, 0.88, 0.13, 0.75)
    colours[known & (before == mask) & (after != mask)] = (0.9, 0.1, 0.1, 0.75)
    return colours


def _overlay(ids: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W) class ids -> (H, W, 4) colours, background transparent."""
    colours = np.zeros((*ids.shape, 4))
    for c in np.unique(ids[ids > 0]):
        code = CLASS_COLOURS[(int(c) - 1) % len(CLASS_COLOURS)].lstrip("#")
        colours[ids == c] = [*(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)), 0.55]
    return colours


def _outline(axis: Axes, inside: NDArray[np.bool_], frame: tuple[float, float, float, float]) -> None:
    """Draw the border of a mask that fills the frame (left, right, bottom, top) of its panel."""
    if inside.any() and not inside.all():
        rows, columns = inside.shape
        # A contour runs half-way between values, and these stand at the centres of the pixels.
        x = frame[0] + (frame[1] - frame[0]) * (np.arange(columns) + 0.5) / columns
        y = frame[3] + (frame[2] - frame[3]) * (np.arange(rows) + 0.5) / rows
        axis.contour(x, y, inside, levels=[0.5], colors="#20e020", linewidths=1.2)


def most_telling_slice(prediction: Tensor, truth: Tensor) -> int:
    """The slice with the largest true area, or predicted area where there is no truth.

    Args:
        prediction: (D, H, W) class ids.
        truth: (D, H, W) class ids.
    """
    areas = [((ids != BACKGROUND) & (ids != IGNORE)).sum((1, 2)) for ids in (truth, prediction)]
    area = areas[0] if areas[0].any() else areas[1]
    return int(area.argmax()) if area.any() else len(truth) // 2


def draw_contours(
    image: Tensor, prediction: Tensor, truth: Tensor, spacing: tuple[float, float, float], title: str
) -> bytes:
    """Draw a slice with the contours of truth (green) and prediction (magenta), near what is in them.

    Args:
        image: (H, W) float.
        prediction: (H, W) class ids.
        truth: (H, W) class ids.
        spacing: (slice distance, row, column), mm; pixels are drawn in their true proportion.
        title: above the picture.

    Returns:
        A PNG.
    """
    outlines = [
        Outline([ids == number for number in set(ids.unique().tolist()) - {BACKGROUND, IGNORE}], colour, name)
        for ids, colour, name in ((truth, "lime", "truth"), (prediction, "magenta", "prediction"))
    ]
    return _draw_outlines(image, outlines, spacing, title)


def draw_segmentation(
    image: Tensor,
    prediction: Tensor,
    class_names: Sequence[str],
    spacing: tuple[float, float, float],
    title: str,
) -> bytes:
    """Draw a slice with the contours of each class, of which no truth is known, near what is in them.

    Args:
        image: (H, W) float.
        prediction: (H, W) class ids.
        class_names: names of the classes, id 1 first.
        spacing: as of ``draw_contours``.
        title: above the picture.

    Returns:
        A PNG.
    """
    outlines = [
        Outline([prediction == number], CLASS_COLOURS[(number - 1) % len(CLASS_COLOURS)], name)
        for number, name in enumerate(class_names, BACKGROUND + 1)
    ]
    return _draw_outlines(image, outlines, spacing, title)


class Outline(NamedTuple):
    """What is outlined in one colour.

    Attributes:
        regions: (H, W) bool each.
        colour: of Matplotlib.
        name: for the legend.
    """

    regions: list[Tensor]
    colour: str
    name: str


SIDE = 560
"""Longer side of a slice in a picture with outlines, pixels."""


def _draw_outlines(image: Tensor, outlines: list[Outline], spacing: tuple[float, float, float], title: str) -> bytes:
    """By Pillow, in a fifth of the time that Matplotlib takes: there is one for each scan."""
    rows, columns = _around(
        torch.stack(
            [region for one in outlines for region in one.regions] or [torch.zeros_like(image, dtype=torch.bool)]
        )
    )
    part = image[rows, columns].float()
    low, high = torch.quantile(image.flatten()[:: max(1, image.numel() // 100_000)], torch.tensor([0.01, 0.99]))
    height, width = len(part) * spacing[1], part.shape[1] * spacing[2]
    scale = SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    grey = ((part - low) / max(float(high - low), 1e-6)).clamp(0, 1)
    pixels = _resized(grey, size, "nearest-exact")[..., None].repeat(1, 1, 3).mul(255).byte().numpy()
    for outline in outlines:
        for region in outline.regions:
            # Half-way between pixels, as a contour runs.
            inside = (_resized(region[rows, columns].float(), size, "bilinear") > 0.5).numpy()
            pixels[_border(inside)] = ImageColor.getrgb(outline.colour)
    return _framed(Image.fromarray(pixels), title, [(outline.name, outline.colour) for outline in outlines])


def _around(regions: Tensor) -> tuple[slice, slice]:
    """Rows and columns near (N, H, W) regions: at least half the slice, so that one sees where in the body it is."""
    occupied = regions.any(0)
    window = []
    for axis in (0, 1):
        length = occupied.shape[axis]
        inside = occupied.any(dim=1 - axis).nonzero()
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, length - 1)
        reach = max(0.65 * (last - first + 1), 0.25 * length)
        middle = (first + last + 1) / 2
        window.append(slice(max(0, round(middle - reach)), min(length, max(1, round(middle + reach)))))
    return window[0], window[1]


def _resized(values: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(values[None, None], size=size, mode=mode)[0, 0]


def _border(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels with a neighbour across the border, two pixels wide."""
    border = np.zeros_like(inside)
    across, along = inside[1:] != inside[:-1], inside[:, 1:] != inside[:, :-1]
    border[1:] |= across
    border[:-1] |= across
    border[:, 1:] |= along
    border[:, :-1] |= along
    return border


def _framed(picture: Image.Image, title: str, legend: list[tuple[str, str]]) -> bytes:
    """A PNG of a picture with a title above it and a legend below; its ``SLICE_BOX`` says where the picture lies."""
    font, lines = _font(18), title.split("\n")
    step, mark, gap = 26, "\N{EM DASH} ", "   "
    keys = [legend[i : i + 4] for i in range(0, len(legend), 4)]
    wide = [font.getlength("".join(mark + name + gap for name, _ in row)) for row in keys]
    side = max(picture.width, *(round(length) for length in (*wide, *map(font.getlength, lines)))) + 20
    page = Image.new("RGB", (side, picture.height + step * (len(lines) + len(keys)) + 20), "white")
    left, top = (side - picture.width) // 2, step * len(lines) + 10
    page.paste(picture, (left, top))
    draw = ImageDraw.Draw(page)
    draw.multiline_text((side / 2, 5), title, "black", font, anchor="ma", align="center", spacing=4)
    for number, row in enumerate(keys):
        x, y = (side - wide[number]) / 2, page.height - step * (len(keys) - number) - 3
        for name, colour in row:
            draw.text((x, y), mark, colour, font, stroke_width=1)
            draw.text((x + font.getlength(mark), y), name, "black", font)
            x += font.getlength(mark + name + gap)
    png, facts = io.BytesIO(), PngInfo()
    facts.add_text(SLICE_BOX, f"{left} {top} {left + picture.width} {top + picture.height}")
    page.save(png, format="png", compress_level=3, pnginfo=facts)
    return png.getvalue()


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own, which comes with it."""
    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
