"""The picture sheet of a check: of each case its most telling slice, as stored, with the outline of its mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_modules.findings import Checked
from data_modules.resampling import frame_box
from data_modules.store import SliceReader
from data_modules.store_index import Entry
from weakmedsam.system.atomic_io import replacing
from weakmedsam.system.progress import tracked

MOST_DRAWN = 200
"""Cases that are drawn, those with findings first."""

SIDE = 240
"""Pixels of a picture's longer side."""

COLOURS = ("#00d000", "#ff9a1a", "#3fb6ff", "#ff5ad1", "#ffe14d", "#9d7bff")
"""Of the outlines of classes 1, 2, ...; the seventh has the first one's again."""

_GREYS = 256 - len(COLOURS)
_MARK, _VERSION = "drawn from", 1


def draw_sheet(checked: Checked, folder: Path) -> Mapping[str, str]:
    """Draw the pictures that are not there yet or of other slices, each whole or not at all.

    Args:
        checked: what was looked at.
        folder: of the page; pictures go to ``pictures/<case>.png`` in it.

    Returns:
        Case -> caption, in the order of the sheet.
    """
    named = dict.fromkeys(finding.case for finding in checked.findings if finding.case in checked.entries)
    chosen = [*named, *(name for name in checked.entries if name not in named)][:MOST_DRAWN]
    reader, captions = SliceReader(checked.store), {}
    for name in tracked(chosen, len(chosen), "picture", kept=False):
        entry, slices = checked.entries[name], checked.labelled[name]
        number = slices[len(slices) // 2] if slices else entry.depth // 2
        _draw(reader, entry, number, folder / "pictures" / f"{name}.png")
        shown = f"{checked.split[name]}, " if checked.split else ""
        of_file = entry.depth - 1 - number if entry.geometry.slice_axis[1] else number
        captions[name] = f"{shown}slice {of_file}{'' if slices else ', no class'}"
    for path in (folder / "pictures").glob("*.png"):  # of cases that are no more: they are patients' pictures
        if path.stem not in captions and _mark_of(path):
            path.unlink()
    return captions


def _draw(reader: SliceReader, entry: Entry, number: int, path: Path) -> None:
    mark = f"{_VERSION} {entry.files} {number} {entry.geometry.spacing}"
    if _mark_of(path) == mark:
        return
    mask = reader.mask(entry.name)[number] if entry.has_mask else None
    picture = render(reader.image(entry.name)[number], mask, entry)
    note = PngInfo()
    note.add_text(_MARK, mark)
    with replacing(path) as part:
        picture.save(part, "PNG", pnginfo=note)


def _mark_of(path: Path) -> str:
    try:
        with Image.open(path) as picture:
            return str(picture.info.get(_MARK, ""))
    except (OSError, SyntaxError, ValueError):  # none, or damaged
        return ""


def render(image: NDArray[np.uint16], mask: NDArray[np.uint8] | None, entry: Entry) -> Image.Image:
    """A slice in its true proportions, grey, with the outline of each class in its colour.

    Args:
        image: (S, S) as stored.
        mask: (S, S) class ids, None where there is no mask.
        entry: of the case.
    """
    top, bottom, left, right = frame_box(entry.frame)
    _, row, column = entry.geometry.spacing
    tall, wide = row * entry.frame.height, column * entry.frame.width
    scale = SIDE / max(tall, wide)
    size = (max(1, round(wide * scale)), max(1, round(tall * scale)))
    grey = Image.fromarray((image[top:bottom, left:right] >> 8).astype(np.uint8))
    pixels = np.asarray(grey.resize(size, Image.Resampling.BILINEAR)).astype(np.uint16) * (_GREYS - 1) // 255
    if mask is not None:
        ids = Image.fromarray(np.ascontiguousarray(mask[top:bottom, left:right]))
        outlined = np.asarray(ids.resize(size, Image.Resampling.NEAREST))
        edge = outline(outlined)
        pixels[edge] = _GREYS + (outlined[edge].astype(np.uint16) - 1) % len(COLOURS)
    picture = Image.fromarray(pixels.astype(np.uint8))
    greys = [level * 255 // (_GREYS - 1) for level in range(_GREYS)]
    colours = [int(colour[n : n + 2], 16) for colour in COLOURS for n in (1, 3, 5)]
    picture.putpalette([part for level in greys for part in (level,) * 3] + colours)
    return picture


def outline(ids: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels of a class beside which, left, right, above or below, another one or none lies.

    Args:
        ids: (H, W) class ids, 0 for none.

    Returns:
        (H, W).
    """
    padded = np.pad(ids, 1)
    near = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return (ids > 0) & np.any([ids != other for other in near], axis=0)
