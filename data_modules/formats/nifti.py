"""NIfTI files: read strictly, and written with the header of the scan that they belong to.

Sizes that a header states are compared with the file before memory is taken. A compressed file is read to its end, so
that its checksum and length are compared. Files are told apart by content, not by name: a plain file named ``.nii.gz``
is read, too.

Voxel positions are those of the sform where its code is above 0, else of the qform where its code is above 0, else
voxel sizes alone, with nibabel's axes (left, anterior, superior). They are in mm, whatever unit the header states; a
header that states none is taken to be in mm.
"""

from __future__ import annotations

import gzip
import math
import os
import stat
import zlib
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_modules.formats.volume import (
    READ_BYTES,
    Place,
    Volume,
    check_affine,
    not_given,
    read_exactly,
    take_channel,
    unreadable,
    useless,
)
from weakmedsam.errors import DataError

Header: TypeAlias = nib.Nifti1Header  # Nifti2Header is a subclass

HEADERS: dict[int, tuple[type[Header], bytes]] = {
    348: (nib.Nifti1Header, b"n+1"),
    540: (nib.Nifti2Header, b"n+2"),
}
"""Size of the header in bytes -> its class, and the mark of a file that holds header and voxels."""

UNITS = {1: ("m", 1000.0), 2: ("mm", 1.0), 3: ("micron", 0.001)}
"""Code of the unit of length -> its name and its length in mm."""

NO_UNIT = ("unknown", 1.0)

DEFLATE_RATIO = 1032
"""Deflate makes nothing smaller than by this factor (zlib, technical details)."""

KIND = "NIfTI"


def read_nifti(path: str | Path, channel: int | None = None) -> Volume:
    """Read a volume, once.

    A slice (two axes) is a volume of one slice; further axes, and colours, are told apart by ``channel``.

    Args:
        path: NIfTI-1 or NIfTI-2 with header and voxels in one file, compressed by gzip or not.
        channel: which volume, or which channel of colour; None: there has to be one.

    Raises:
        DataError: not such a file, damaged, cut, of several volumes or of no numbers, or its header's geometry cannot
            be used.
        MemoryShortError: there is too little memory for its voxels.
    """
    try:
        with _open(path) as file:
            stream, most = _decompressed(file)
            header = _read_header(stream, path)
            shape, dtype = _shape(header, channel, path), _number_type(header, path)
            voxels = _read_voxels(stream, header, shape, dtype, most, path)
    except (OSError, EOFError, zlib.error) as error:
        raise not_given(path, error, KIND) from error
    affine, unit = _affine(header, len(shape), path)
    whole, volumes = (*shape, 1)[:3], math.prod(shape[3:])
    if dtype.names:  # colours of a voxel lie beside each other
        colours = voxels.view(dtype[0]).reshape((-1, len(dtype.names)))[:, :3]
        voxels = take_channel(colours, channel, path, "channels of colour")
    else:
        voxels = _scaled(take_channel(voxels.reshape((-1, volumes), order="F"), channel, path), header, path)
    if volumes > 1:  # what is written onto it is one
        header["dim"][0], header["dim"][4:] = 3, 1
    return Volume(voxels.reshape(whole, order="F"), affine, unit, header.binaryblock)


def read_nifti_place(path: str | Path, channel: int | None = None) -> Place:
    """Where a volume lies; no voxel is read.

    Args:
        path: as of ``read_nifti``.
        channel: as of ``read_nifti``.

    Raises:
        DataError: what ``read_nifti`` refuses by the header alone.
    """
    try:
        with _open(path) as file:
            header = _read_header(_decompressed(file)[0], path)
    except (OSError, EOFError, zlib.error) as error:
        raise not_given(path, error, KIND) from error
    shape = _shape(header, channel, path)
    _number_type(header, path)
    affine, unit = _affine(header, len(shape), path)
    return Place((shape[0], shape[1], (*shape, 1)[2]), affine, unit)


def read_description(path: str | Path) -> str:
    """The text that a header holds for people; no voxel is read.

    Raises:
        DataError: it is no NIfTI file, or damaged.
    """
    try:
        with _open(path) as file:
            header = _read_header(_decompressed(file)[0], path)
    except (OSError, EOFError, zlib.error) as error:
        raise not_given(path, error, KIND) from error
    return bytes(header["descrip"].item()).decode("ascii", "replace")


def write_labels(voxels: NDArray[np.uint8 | np.float32], header: bytes, description: str) -> bytes:
    """A compressed file of class ids, or of scores, that lies on a scan in any viewer; the same give the same bytes.

    Shape, qform, sform, their codes, units and voxel sizes are the scan's own bytes.

    Args:
        voxels: (X, Y, Z) uint8 class ids, or float32, along the scan's own axes.
        header: the scan's.
        description: up to 79 ASCII characters.
    """
    own = _parse(header)
    own["datatype"], own["bitpix"] = (2, 8) if voxels.dtype == np.uint8 else (16, 32)
    own["scl_slope"], own["scl_inter"], own["cal_max"], own["cal_min"] = 1, 0, 0, 0
    own["intent_code"], own["intent_p1"], own["intent_p2"], own["intent_p3"] = 0, 0, 0, 0
    own["intent_name"], own["descrip"] = b"", description.encode("ascii")
    own["vox_offset"] = len(header) + 4
    stored = voxels.astype(voxels.dtype.newbyteorder(own.endianness), copy=False)
    return gzip.compress(own.binaryblock + bytes(4) + stored.tobytes(order="F"), mtime=0)


def _unreadable(path: str | Path, reason: str) -> DataError:
    return unreadable(path, reason, KIND)


def _open(path: str | Path) -> BinaryIO:
    path = Path(path)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise _unreadable(path, "it is no file")
    return path.open("rb")


def _decompressed(file: BinaryIO) -> tuple[BinaryIO, int]:
    """The content of a file, and an upper bound of its length in bytes."""
    size = os.fstat(file.fileno()).st_size
    compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if compressed:
        return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb")), size * DEFLATE_RATIO
    return file, size


def _read_header(stream: BinaryIO, path: str | Path) -> Header:
    start = stream.read(4)
    size = next((n for n in HEADERS if start in (n.to_bytes(4, "little"), n.to_bytes(4, "big"))), None)
    if size is None:
        raise _unreadable(path, "it does not begin as a NIfTI file")
    block = start + stream.read(size - 4)
    if len(block) < size:
        raise _unreadable(path, f"it ends within its header, after {len(block)} bytes")
    header = _parse(block)
    magic = header["magic"].item()
    if magic != HEADERS[size][1]:
        if magic[:2] == b"ni":
            raise DataError(f"{path}: is the header of a .hdr/.img pair. Convert the pair to one .nii.gz file.")
        raise _unreadable(path, "its header has no mark of NIfTI")
    if size == 540 and bytes(header["eol_check"]) not in (b"\r\n\x1a\n", bytes(4)):
        raise _unreadable(path, "it was transferred as text")
    return header


def _parse(block: bytes) -> Header:
    little = int.from_bytes(block[:4], "little") in HEADERS
    return HEADERS[len(block)][0](block, "<" if little else ">", check=False)


def _shape(header: Header, channel: int | None, path: str | Path) -> tuple[int, ...]:
    axes = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : axes + 1])
    if not 1 <= axes <= 7 or min(shape) < 1:
        raise _unreadable(path, f"its header states {axes} axes {shape}")
    if len(shape) < 2:
        raise DataError(f"{path}: has {len(shape)} axes {shape}, not 3. Store it as slices.")
    if (volumes := math.prod(shape[3:])) > 1 and channel is None:
        raise DataError(
            f"{path}: has {len(shape)} axes {shape}, not 3. Say which volume of an image is taken, data.channel: 0 to "
            f"{volumes - 1}; a mask has one."
        )
    return shape


def _number_type(header: Header, path: str | Path) -> np.dtype[Any]:
    try:
        dtype = header.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, KeyError) as error:
        raise _unreadable(path, f"its header states the data type {int(header['datatype'])}") from error
    if dtype.kind not in "iuf" and not dtype.names:  # names are those of colours
        raise DataError(f"{path}: holds {dtype}, not one number a voxel. Export it as greyscale.")
    return dtype


def _read_voxels(
    stream: BinaryIO,
    header: Header,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    most: int,
    path: str | Path,
) -> NDArray[Any]:
    """(N,) values as stored; the stream is read to its end.

    Args:
        stream: behind the header.
        header: of the file.
        shape: of the volume.
        dtype: of the values.
        most: bytes that the stream can have.
        path: for messages.
    """
    offset, needed = float(header["vox_offset"]), math.prod(shape) * dtype.itemsize
    if not header.single_vox_offset <= offset < 2**31:
        raise _unreadable(path, f"its header states that voxels begin at byte {offset:g}")
    if int(offset) + needed > most:
        raise _unreadable(
            path, f"its header states {shape} voxels, {needed:,} bytes; the file has no more than {most:,}"
        )
    skipped = len(header.binaryblock)
    while skipped < int(offset) and (part := stream.read(min(READ_BYTES, int(offset) - skipped))):
        skipped += len(part)
    return read_exactly(stream, needed, path, shape, KIND).view(dtype)


def _scaled(values: NDArray[Any], header: Header, path: str | Path) -> NDArray[Any]:
    try:
        slope, intercept = header.get_slope_inter()
    except nib.spatialimages.HeaderDataError as error:
        raise _unreadable(path, str(error)) from error
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if slope is not None:
        with np.errstate(all="ignore"):  # what becomes infinite is refused by whoever takes the values
            values = nib.volumeutils.apply_read_scaling(values, slope, intercept)
    return values.astype(np.float64) if values.dtype.itemsize > 8 else values


def _affine(header: Header, axes: int, path: str | Path) -> tuple[NDArray[np.float64], str]:
    """Voxel -> mm, and the name of the unit that the header states."""
    unit, length = UNITS.get(int(header["xyzt_units"]) & 7, NO_UNIT)
    header = header.copy()
    for name in ("sform_code", "qform_code") if header["sform_code"] == 0 else ("sform_code",):
        if not 0 <= header[name] <= 5:
            raise useless(path, f"{name} {int(header[name])} is unknown")
    handedness = header["pixdim"][0]
    if header["sform_code"] == 0 and handedness not in (-1, 0, 1):
        raise useless(path, f"pixdim[0] is {handedness:g}, not 1 or -1")
    header["pixdim"][0] = handedness if handedness in (-1, 1) else 1  # 0 is 1 in the standard
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])  # old programs write flips as negative sizes
    try:
        with np.errstate(all="ignore"):
            affine = np.array(header.get_best_affine(), np.float64)
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise useless(path, str(error)) from error
    if axes == 2 and not affine[:3, 2].any():  # a slice need not say how thick it is
        affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] /= (np.linalg.norm(affine[:3, 2]) or 1.0) * length
    affine[:3] *= length
    return check_affine(affine, path), unit
