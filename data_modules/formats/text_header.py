"""NRRD and MetaImage: a header of text lines, and voxels behind it or in another file of the same folder."""

from __future__ import annotations

import bz2
import gzip
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from data_modules.formats.volume import (
    LPS_TO_RAS,
    NO_SPACING,
    Place,
    Reading,
    Volume,
    check_affine,
    make_volume,
    not_given,
    place_picture,
    read_exactly,
    take_channel,
    unreadable,
)
from weakmedsam.errors import DataError

LONGEST_HEADER = 2**20
"""Bytes of text before the voxels."""

MOST_AXES = 8

RATIO = {"raw": 1, "gzip": 1032, "zlib": 1032, "bzip2": 50_000}
"""How much smaller the encodings make voxels at most."""


@dataclass(frozen=True)
class Layout:
    """What a header says.

    Attributes:
        kind: of the file, for messages.
        shape: of the axes that are of space, fastest first.
        channels: values a voxel.
        channels_first: whether the values of a voxel lie beside each other, not volume behind volume.
        dtype: of the values.
        encoding: a key of ``RATIO``.
        data: name of the file of the voxels; empty: they follow the header.
        skip: bytes before the voxels, -1: all but the last that are needed.
        affine: (4, 4) RAS, None where the file says nothing of a place.
        unit: as of ``Volume``.
    """

    kind: str
    shape: tuple[int, ...]
    channels: int
    channels_first: bool
    dtype: np.dtype[Any]
    encoding: str
    data: str
    skip: int
    affine: NDArray[np.float64] | None
    unit: str = "mm"

    @property
    def size(self) -> int:
        """Bytes of the voxels."""
        return math.prod(self.shape) * self.channels * self.dtype.itemsize


def read_fields(file: BinaryIO, path: str | Path, kind: str, separator: str, last: str) -> dict[str, str]:
    """Lines ``name separator value`` -> name in lower case -> value; the file is left behind them.

    Args:
        file: at its beginning.
        path: for messages.
        kind: of file, for messages.
        separator: between a name and its value.
        last: name of the line that ends the header; empty: an empty line does.

    Raises:
        DataError: the header does not end.
    """
    fields: dict[str, str] = {}
    room = LONGEST_HEADER
    while (line := file.readline(room)) and room > 0:
        room -= len(line)
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text.strip() and not last:
            return fields
        name, found, value = text.partition(separator)
        if found and not text.startswith("#"):
            fields[name.strip().lower()] = value.removeprefix("=").strip()
            if name.strip().lower() == last:
                return fields
    if last or room <= 0:
        raise unreadable(path, "its header does not end", kind)
    return fields


def to_numbers(text: str, path: str | Path, kind: str, count: int | None = None) -> list[float]:
    """The numbers of a field.

    Raises:
        DataError: they are none, or not so many.
    """
    try:
        found = [float(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise unreadable(path, f"{text[:60]!r} are no numbers", kind) from error
    if (count is not None and len(found) != count) or not np.isfinite(found).all():
        raise unreadable(path, f"{text[:60]!r} are not {count} numbers", kind)
    return found


def to_shape(text: str, path: str | Path, kind: str, count: int) -> list[int]:
    """The sizes of ``count`` axes.

    Raises:
        DataError: they are no sizes.
    """
    sizes = to_numbers(text, path, kind, count)
    if not 1 <= count <= MOST_AXES or any(size < 1 or size > 2**31 or size % 1 for size in sizes):
        raise unreadable(path, f"its header states {count} axes {text[:60]}", kind)
    return [int(size) for size in sizes]


def lack(path: str | Path, kind: str, fields: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise DataError if a header lacks one of these fields."""
    if missing := [name for name in names if name not in fields]:
        raise unreadable(path, f"its header lacks {', '.join(missing)}", kind)


def read_voxels(file: BinaryIO, layout: Layout, path: str | Path, reading: Reading) -> Volume:
    """The volume behind a header.

    Args:
        file: behind the header.
        layout: what the header says.
        path: of the header.
        reading: which channel, and the size of a voxel where the file says nothing of it.

    Raises:
        DataError: the voxels are not there, damaged, or in a file of another folder.
    """
    place = _data_file(Path(path), layout) if layout.data else None
    try:
        if place is None:
            values = _values(file, layout, path)
        else:
            with place.open("rb") as data:
                values = _values(data, layout, place)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise not_given(place or path, error, layout.kind) from error
    stored = values.view(layout.dtype).astype(layout.dtype.newbyteorder("="), copy=False)
    order = (layout.channels, -1) if layout.channels_first else (-1, layout.channels)
    several = stored.reshape(order, order="F")
    chosen = take_channel(several.T if layout.channels_first else several, reading.channel, path, "channels or volumes")
    voxels = chosen.reshape((*layout.shape, 1, 1)[:3], order="F")
    affine, unit = _affine_of(layout, reading)
    return make_volume(voxels, affine, path, unit)


def find_place(layout: Layout, path: str | Path, reading: Reading) -> Place:
    """Where the volume behind a header lies; no voxel is read.

    Raises:
        DataError: its geometry cannot be used.
    """
    affine, unit = _affine_of(layout, reading)
    shape = (*layout.shape, 1, 1)
    return Place((shape[0], shape[1], shape[2]), check_affine(affine, path), unit)


def _affine_of(layout: Layout, reading: Reading) -> tuple[NDArray[np.float64], str]:
    """Voxel -> mm, and its unit: of the header, else of the settings."""
    if layout.affine is not None:
        return layout.affine, layout.unit
    return place_picture(reading.spacing or (1.0, 1.0, 1.0)), NO_SPACING if reading.spacing is None else "mm"


def _data_file(path: Path, layout: Layout) -> Path:
    """The file of the voxels, beside the header."""
    place = path.parent / layout.data
    if os.path.sep in layout.data or "/" in layout.data or (place.is_symlink() and not _is_beside(place, path)):
        raise DataError(f"{path}: its voxels are in another folder ({layout.data[:100]}). Put them beside the header.")
    if not place.is_file():
        raise DataError(f"{path}: its voxels are not there ({place}). Get that file, too.")
    return place


def _is_beside(place: Path, path: Path) -> bool:
    return place.resolve().parent == path.resolve().parent


def _values(file: BinaryIO, layout: Layout, path: str | Path) -> NDArray[np.uint8]:
    length = os.fstat(file.fileno()).st_size
    if layout.size + max(layout.skip, 0) > length * RATIO[layout.encoding]:
        raise unreadable(
            path,
            f"its header states {layout.shape} voxels, {layout.size:,} bytes; the file has no more than "
            f"{length * RATIO[layout.encoding]:,}",
            layout.kind,
        )
    if layout.skip == -1:
        if layout.encoding != "raw":
            raise unreadable(path, "voxels at the end of a compressed file", layout.kind)
        file.seek(length - layout.size)
    with closing(_decoded(file, layout.encoding)) as stream:
        if layout.skip > 0:
            stream.read(layout.skip)
        return read_exactly(stream, layout.size, path, layout.shape, layout.kind)


def _decoded(file: BinaryIO, encoding: str) -> BinaryIO:
    if encoding == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
    if encoding == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(file, "rb"))
    return cast(BinaryIO, _Inflated(file)) if encoding == "zlib" else file


class _Inflated:
    """A zlib stream, read in parts."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._inflate = file, zlib.decompressobj()

    def readinto(self, target: memoryview) -> int:
        """Fill what can be filled; 0 at the end."""
        part = self.read(len(target))
        target[: len(part)] = part
        return len(part)

    def read(self, count: int) -> bytes:
        """At most so many bytes; none at the end."""
        while not self._inflate.eof:
            given = self._inflate.unconsumed_tail or self._file.read(2**16)
            found = self._inflate.decompress(given, count)
            if found or not given:
                if not found:
                    raise EOFError("it ends within its voxels")
                return found
        return b""

    def close(self) -> None:
        """Nothing: the file is its owner's."""


def lps_affine(axes: Sequence[Sequence[float]], origin: Sequence[float]) -> NDArray[np.float64]:
    """(4, 4) RAS of vectors from voxel to voxel and of the first one's centre, both LPS, two or three of three."""
    affine = np.eye(4)
    vectors = [np.array(axis, np.float64) for axis in axes]
    if len(vectors) == 2:
        normal = np.cross(vectors[0], vectors[1])
        vectors.append(normal / (np.linalg.norm(normal) or 1.0))
    affine[:3, :3], affine[:3, 3] = np.array(vectors).T, origin
    return LPS_TO_RAS @ affine


def refuse_type(path: str | Path, name: str) -> NoReturn:
    """Raise DataError: values are no numbers."""
    raise DataError(f"{path}: holds {name[:40]!r}, not numbers. Export it as whole numbers or floating point.")
