"""MetaImage (``.mha``, ``.mhd``): as ITK writes it. An own reader: SimpleITK and faiss-gpu clash in one process."""

from __future__ import annotations

from pathlib import Path

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
from data_modules.formats.volume import Place, Reading, Volume, not_given
from weakmedsam.errors import DataError

ENDINGS = (".mha", ".mhd")
KIND = "MetaImage"

TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}


def read_metaimage(path: str | Path, reading: Reading) -> Volume:
    """Read a volume; components of a voxel, and volumes of a fourth axis, are channels.

    Raises:
        DataError: not such a file, damaged, or as text.
    """
    try:
        with Path(path).open("rb") as file:
            fields = read_fields(file, path, KIND, "=", "elementdatafile")
            return read_voxels(file, _layout(fields, path), path, reading)
    except OSError as error:
        raise not_given(path, error, KIND) from error


def read_metaimage_place(path: str | Path, reading: Reading) -> Place:
    """Where a volume lies; no voxel is read.

    Raises:
        DataError: what ``read_metaimage`` refuses by the header alone.
    """
    try:
        with Path(path).open("rb") as file:
            return find_place(_layout(read_fields(file, path, KIND, "=", "elementdatafile"), path), path, reading)
    except OSError as error:
        raise not_given(path, error, KIND) from error


def _layout(fields: dict[str, str], path: str | Path) -> Layout:
    lack(path, KIND, fields, ("ndims", "dimsize", "elementtype"))
    element = fields["elementtype"].upper().removesuffix("_ARRAY")
    if element not in TYPES:
        refuse_type(path, fields["elementtype"])
    count = int(to_numbers(fields["ndims"], path, KIND, 1)[0])
    sizes = to_shape(fields["dimsize"], path, KIND, count)
    if not 2 <= count <= 4:
        raise DataError(f"{path}: has {count} axes. Save it as one volume.")
    components = int(to_numbers(fields.get("elementnumberofchannels", "1"), path, KIND, 1)[0])
    if components < 1 or (components > 1 and count == 4):
        raise DataError(f"{path}: has {components} values a voxel in {count} axes. Save it as one volume.")
    data = fields["elementdatafile"]
    if data.split(maxsplit=1)[:1] == ["LIST"] or "%" in data:
        raise DataError(f"{path}: its voxels are in several files. Save it as one .mha file.")
    if not _is(fields, "binarydata", "true"):
        raise DataError(f"{path}: its voxels are text. Save it as binary.")
    big = _is(fields, "binarydatabyteordermsb", "false") or _is(fields, "elementbyteordermsb", "false")
    return Layout(
        KIND,
        shape=tuple(sizes[:3]),
        channels=sizes[3] if count == 4 else components,
        channels_first=count < 4,
        dtype=np.dtype((">" if big else "<") + TYPES[element]),
        encoding="zlib" if _is(fields, "compresseddata", "false") else "raw",
        data="" if data.upper() == "LOCAL" else data,
        skip=int(to_numbers(fields.get("headersize", "0"), path, KIND, 1)[0]) if data.upper() != "LOCAL" else 0,
        affine=_affine(fields, count, path),
    )


def _is(fields: dict[str, str], name: str, default: str) -> bool:
    return fields.get(name, default).lower() in ("true", "1")


def _affine(fields: dict[str, str], count: int, path: str | Path) -> np.ndarray | None:
    """(4, 4) RAS; None where the file states no voxel size."""
    sizes = fields.get("elementspacing", fields.get("elementsize"))
    if sizes is None:
        return None
    spacing = to_numbers(sizes, path, KIND, count)
    first = next((fields[name] for name in ("offset", "position", "origin") if name in fields), "0 " * count)
    turned = next((fields[name] for name in ("transformmatrix", "rotation", "orientation") if name in fields), None)
    matrix = np.eye(count) if turned is None else np.array(to_numbers(turned, path, KIND, count**2))
    # A row of the matrix is where an axis of the voxels leads.
    axes, used = matrix.reshape(count, count), min(count, 3)
    vectors = [(*(axes[number, :used] * spacing[number]), 0.0)[:3] for number in range(used)]
    return lps_affine(vectors, (*to_numbers(first, path, KIND, count)[:used], 0.0)[:3])
