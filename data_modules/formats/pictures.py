"""PNG, JPEG and TIFF: a picture is a volume of one slice, numbered pictures or pages are one of several.

They have no place, so that columns are taken to lead to the patient's left, rows to the back, and slices up: axial
slices then look as the pictures do.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from data_modules.formats.volume import (
    NO_SPACING,
    Reading,
    Volume,
    make_volume,
    not_given,
    place_picture,
    take_channel,
)
from weakmedsam.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
KIND = "picture"

MOST_BYTES = 2**31
"""What the pages of one file may take."""

GREY = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of one number a pixel."""


def read_pictures(path: str | Path, files: Sequence[str | Path], reading: Reading, labels: bool = False) -> Volume:
    """Read a picture, its pages, or numbered pictures.

    Args:
        path: of the scan, for messages.
        files: the pictures; several are sorted by the numbers in their names.
        reading: which channel of colour, and the size of a voxel.
        labels: of a mask: a picture with a palette gives the palette's numbers.

    Raises:
        DataError: unreadable, too large, of several sizes, or a number is missing.
    """
    ordered = sort_numbered([Path(file) for file in files])
    slices: list[NDArray[Any]] = []
    for file in ordered:
        for page in _pages(file, labels):
            slices.append(take_channel(page, reading.channel, file, "channels of colour"))
            if slices[-1].shape != slices[0].shape:
                sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (slices[-1], slices[0])]
                raise DataError(
                    f"{file}: has {sizes[0]} pixels, {ordered[0]} has {sizes[1]}: they are not one volume. Put them "
                    "into folders of their own."
                )
    unit = NO_SPACING if reading.spacing is None else "mm"
    affine = place_picture(reading.spacing or (1.0, 1.0, 1.0))
    return make_volume(np.stack(slices, axis=-1).transpose(1, 0, 2), affine, path, unit)


def sort_numbered(files: Sequence[Path]) -> list[Path]:
    """Pictures of a volume by the numbers in their names: 9 before 10.

    Raises:
        DataError: their names differ in more than numbers, or the last numbers do not count evenly: a slice is missing.
    """
    parts = {file: [int(part) for part in re.findall("[0-9]+", file.stem)] for file in files}
    ordered = sorted(files, key=lambda file: (parts[file], file.name))
    named = {file: re.sub("[0-9]+", "0", file.stem) for file in ordered}
    if other := [file for file in ordered if named[file] != named[ordered[0]]]:
        raise DataError(
            f"{other[0]}: differs from {ordered[0].name} in more than numbers: they are not one volume. Put masks and "
            "other volumes into folders of their own."
        )
    if len(files) < 3:
        return ordered
    numbers = [parts[file][-1] for file in ordered]
    steps = [after - before for before, after in pairwise(numbers)]
    usual = sorted(steps)[len(steps) // 2]
    for place, step in enumerate(steps):
        if step != usual:
            raise DataError(
                f"{ordered[place + 1]}: follows {ordered[place].name}, while other numbers are {usual} apart: a slice "
                "is missing, twice there or of another volume. Complete the folder, or number them anew."
            )
    return ordered


def _pages(path: Path, labels: bool) -> Iterator[NDArray[Any]]:
    """(rows, columns, channels) of each page."""
    taken = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as picture:
                for page in ImageSequence.Iterator(picture):
                    pixels = _pixels(page, labels)
                    taken += pixels.nbytes
                    if taken > MOST_BYTES:
                        raise DataError(
                            f"{path}: its pages take more than {MOST_BYTES // 2**30} GiB. Split it, or leave it out."
                        )
                    yield pixels
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(
                f"{path}: states more pixels than are read ({Image.MAX_IMAGE_PIXELS:,}). Cut it to tiles, or leave it "
                "out."
            ) from error
        except (DataError, MemoryError):
            raise
        except Exception as error:  # the library raises whatever a damaged file leads it to
            raise not_given(path, error, KIND) from error


def _pixels(page: Image.Image, labels: bool) -> NDArray[Any]:
    if page.mode == "P" and labels:
        return np.asarray(page)[..., None]
    if page.mode in ("LA", "La"):
        page = page.convert("L")
    if page.mode not in GREY:
        return np.asarray(page.convert("RGB"))
    pixels = np.asarray(page)
    pixels = pixels.astype(np.uint8) if page.mode == "1" else pixels
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)[..., None]
