"""NRRD (``.nrrd``, ``.nhdr``): as 3D Slicer and ITK write it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_modules.formats.text_header import (
    Layout,
    find_place,
    lack,
    lps_affine,
    read_fields,
    read_voxels,
    refuse_type,
    to_numbers,
    to_shape,
)
from data_modules.formats.volume import LPS_TO_RAS, Place, Reading, Volume, not_given, place_picture, unreadable
from weakmedsam.errors import DataError

ENDINGS = (".nrrd", ".nhdr")
KIND = "NRRD"

TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}

ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}

SPACES = {"left-posterior-superior": "LPS", "right-anterior-superior": "RAS", "left-anterior-superior": "LAS"}


def read_nrrd(path: str | Path, reading: Reading) -> Volume:
    """Read a volume; colours and components of a voxel are channels.

    Raises:
        DataError: not such a file, damaged, of an encoding or a kind of space that is not read.
    """
    try:
        with Path(path).open("rb") as file:
            return read_voxels(file, _read_layout(file, path), path, reading)
    except OSError as error:
        raise not_given(path, error, KIND) from error


def read_nrrd_place(path: str | Path, reading: Reading) -> Place:
    """Where a volume lies; no voxel is read.

    Raises:
        DataError: what ``read_nrrd`` refuses by the header alone.
    """
    try:
        with Path(path).open("rb") as file:
            return find_place(_read_layout(file, path), path, reading)
    except OSError as error:
        raise not_given(path, error, KIND) from error


def _read_layout(file: BinaryIO, path: str | Path) -> Layout:
    if not re.match(rb"NRRD000\d", file.readline(16)):
        raise unreadable(path, "it does not begin as an NRRD file", KIND)
    return _layout(read_fields(file, path, KIND, ":", ""), path)


def _layout(fields: dict[str, str], path: str | Path) -> Layout:
    lack(path, KIND, fields, ("type", "dimension", "sizes", "encoding"))
    if fields["type"].lower() not in TYPES:
        refuse_type(path, fields["type"])
    encoding = ENCODINGS.get(fields["encoding"].lower())
    if encoding is None:
        raise DataError(f"{path}: has the encoding {fields['encoding'][:20]!r}. Save it as raw or gzip.")
    if (fields.get("line skip", "0"), fields.get("lineskip", "0")) != ("0", "0"):
        raise DataError(f"{path}: asks for lines to be skipped (line skip). Save it again without.")
    sizes = to_shape(fields["sizes"], path, KIND, int(to_numbers(fields["dimension"], path, KIND, 1)[0]))
    axes = _axes(fields, sizes, path)
    space = [number for number, axis in enumerate(axes) if axis is not None]
    others = [number for number in range(len(sizes)) if number not in space]
    if not 2 <= len(space) <= 3 or others not in ([], [0], [len(sizes) - 1]):
        raise DataError(f"{path}: has {len(sizes)} axes, {len(space)} of them of space. Save it as one volume.")
    vectors = [axes[number] for number in space]
    affine, unit = _affine(fields, vectors, path)
    little = fields.get("endian", "little").lower() != "big"
    return Layout(
        KIND,
        shape=tuple(sizes[number] for number in space),
        channels=sizes[others[0]] if others else 1,
        channels_first=others == [0],
        dtype=np.dtype(("<" if little else ">") + TYPES[fields["type"].lower()]),
        encoding=encoding,
        data=_data(fields, path),
        skip=int(to_numbers(fields.get("byte skip", fields.get("byteskip", "0")), path, KIND, 1)[0]),
        affine=affine,
        unit=unit,
    )


def _axes(fields: dict[str, str], sizes: list[int], path: str | Path) -> list[list[float] | None]:
    """The vector from voxel to voxel of each axis, None of one that is not of space."""
    if "space directions" in fields:
        found = re.findall(r"none|\([^)]*\)", fields["space directions"].lower())
        axes = [None if text == "none" else to_numbers(text.strip("()"), path, KIND) for text in found]
        if len(axes) == 4 and all(axis is not None and len(axis) == 4 for axis in axes):  # ITK's fourth axis is time
            axes = [*(axis[:3] for axis in axes[:3] if axis is not None), None]
    else:  # voxel sizes alone, or nothing
        words = fields.get("spacings", " ".join(["nan"] * len(sizes))).lower().split()
        kinds = (fields.get("kinds", "").lower().split() or ["domain"] * len(sizes))[: len(sizes)]
        if len(words) != len(sizes) or len(kinds) != len(sizes):
            raise unreadable(path, "spacings or kinds are not one an axis", KIND)
        domain = [kind in ("domain", "space") for kind in kinds]
        if len(sizes) > 3 and all(domain):
            domain[-1] = False
        axes, place = [], 0
        for word, is_space in zip(words, domain, strict=True):
            size = 1.0 if word == "nan" else to_numbers(word, path, KIND, 1)[0]
            axes.append([size * (number == place) for number in range(3)] if is_space else None)
            place += is_space
    if len(axes) != len(sizes) or any(axis is not None and len(axis) not in (2, 3) for axis in axes):
        raise unreadable(path, "its space directions are not one an axis", KIND)
    return axes


def _affine(fields: dict[str, str], vectors: list[Any], path: str | Path) -> tuple[Any, str]:
    """(affine or None, unit)."""
    if "space directions" not in fields:
        sizes = [float(np.linalg.norm(vector)) for vector in vectors]
        if "nan" in fields.get("spacings", "nan").lower():
            return None, "mm"
        return place_picture((*sizes, 1.0, 1.0)[:3]), "mm"  # type: ignore[arg-type]
    vectors = [(*vector, 0.0)[:3] for vector in vectors]
    origin = to_numbers(fields.get("space origin", "(0,0,0)").strip("()"), path, KIND)
    affine = lps_affine(vectors, (*origin, 0.0, 0.0)[:3])
    name = fields.get("space", "left-posterior-superior").lower()
    code = SPACES.get(name, name.upper())
    if code not in SPACES.values():
        raise DataError(f"{path}: lies in the space {name[:40]!r}. Save it in left-posterior-superior.")
    if code != "LPS":
        affine = np.diag([1.0 if code == "RAS" else -1.0, 1.0, 1.0, 1.0]) @ LPS_TO_RAS @ affine
    return affine, "mm" if "space" in fields else "unknown"


def _data(fields: dict[str, str], path: str | Path) -> str:
    name = fields.get("data file", fields.get("datafile", ""))
    if name.split(maxsplit=1)[:1] == ["LIST"] or "%" in name:
        raise DataError(f"{path}: its voxels are in several files. Save it as one .nrrd file.")
    return name.removeprefix("./")
