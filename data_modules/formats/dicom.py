"""DICOM: a series of slices, or one file of several frames, as a volume with its place.

Slices are sorted by their position along the slice normal, and have to lie at equal distances. Nothing is resampled:
of a scan with tilted gantry the third axis of the affine is not at right angles to the slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_modules.formats.dicom_files import SEGMENTATION, damaged, is_dicom, quiet_pydicom
from data_modules.formats.dicom_slices import Slice, check_alike, choose_volume, make_slice, position_of, sort_slices
from data_modules.formats.volume import (
    LPS_TO_RAS,
    NO_SPACING,
    Reading,
    Volume,
    make_volume,
    place_picture,
    take_channel,
)
from weakmedsam.errors import DataError

MOST_BYTES = 2**31
"""What the frames of one file may take: a compressed file of a few bytes can state any size."""

UNEQUAL = 0.05
"""How far distances of slices may differ, as a part of their median: positions are often rounded to 0.1 mm."""


def read_dicom(path: str | Path, files: Sequence[str | Path], reading: Reading) -> Volume:
    """Read the slices of a scan.

    Args:
        path: of the scan, for messages.
        files: its files.
        reading: which volume where several slices lie at each position (phases, echoes; in the order of
            InstanceNumber), or which channel of colour.

    Raises:
        DataError: unreadable, or no volume: several sizes, orientations or spacings, a gap, a slice twice.
    """
    slices = [part for file in files for part in _read_file(Path(file))]
    check_alike(slices)
    first = slices[0]
    if first.position is None:
        return _stack(path, slices, reading)
    if len(slices) < first.stated:
        raise DataError(
            f"{path}: has {len(slices)} of the {first.stated} slices of its acquisition. Get the whole series, or "
            "leave it out."
        )
    chosen, channel = choose_volume(path, sort_slices(slices), reading.channel)
    affine = _affine(chosen)
    return make_volume(_voxels(path, chosen, channel), affine, path)


def _stack(path: str | Path, slices: Sequence[Slice], reading: Reading) -> Volume:
    """Of files without positions, as of ultrasound and X-ray: frames in their order."""
    x, y, z = reading.spacing or (1.0, 1.0, 1.0)
    known = slices[0].spacing
    (x, y), z = (known, slices[0].thickness or z) if known else ((x, y), z)
    unit = "mm" if known or reading.spacing else NO_SPACING
    voxels = _voxels(path, sorted(slices, key=lambda part: part.order), reading.channel)
    return make_volume(voxels, place_picture((x, y, z)), path, unit)


def _read_file(path: Path) -> list[Slice]:
    """The slices of a file, one a frame."""
    if not is_dicom(path):
        raise damaged(path, ValueError("it does not begin as a DICOM file"))
    with quiet_pydicom() as pydicom:
        try:
            held = pydicom.dcmread(path)
            if held.get("SOPClassUID") == SEGMENTATION:
                raise DataError(f"{path}: is a DICOM segmentation object. Convert it to NIfTI (dcmqi, highdicom).")
            if "MOSAIC" in str(held.get("ImageType")).upper():
                raise DataError(f"{path}: is a mosaic, slices in one picture. Convert the series to NIfTI (dcm2niix).")
            frames = _decode(pydicom, path, held)
            return [make_slice(path, held, number, pixels) for number, pixels in enumerate(frames)]
        except (DataError, MemoryError):
            raise
        except Exception as error:  # the library raises whatever a damaged file leads it to
            raise damaged(path, error) from error


def _decode(pydicom: Any, path: Path, held: Any) -> NDArray[Any]:
    """(frames, rows, columns, channels) as stored; light is high."""
    count = int(held.get("NumberOfFrames") or 1)
    colours, bits = int(held.get("SamplesPerPixel") or 1), int(held.BitsAllocated)
    if (needed := count * held.Rows * held.Columns * colours * bits // 8) > MOST_BYTES:
        raise DataError(
            f"{path}: its header states {count} frame(s) of {held.Rows} x {held.Columns} pixels, {needed / 2**30:.1f} "
            f"GiB; {MOST_BYTES // 2**30} are read of one file. Split it, or leave it out."
        )
    syntax = held.file_meta.TransferSyntaxUID
    try:
        pixels = pydicom.pixels.pixel_array(held)
    except Exception as error:
        if not syntax.is_compressed:
            raise
        raise DataError(
            f"{path}: is compressed as {syntax.name}, and cannot be decoded. It is damaged, or of a kind that is not "
            "read: save the series uncompressed (gdcmconv --raw, dcmdjpeg)."
        ) from error
    if held.get("PhotometricInterpretation") == "MONOCHROME1":
        stored = int(held.BitsStored)
        lowest = -(2 ** (stored - 1)) if held.get("PixelRepresentation") else 0
        pixels = (2 * lowest + 2**stored - 1 - pixels.astype(np.int64)).astype(pixels.dtype)
    return np.asarray(pixels).reshape((count, held.Rows, held.Columns, colours))


def _affine(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """(4, 4) RAS; slices are sorted.

    Raises:
        DataError: a slice is missing, or distances are unequal.
    """
    first, last = slices[0], slices[-1]
    assert first.spacing is not None
    normal = np.cross(*first.directions)
    step = normal * (first.thickness or min(first.spacing))
    if len(slices) > 1:
        step = (position_of(last) - position_of(first)) / (len(slices) - 1)
        apart = np.diff([normal @ position_of(part) for part in slices])
        usual = float(np.median(apart))
        for number in np.flatnonzero(np.abs(apart - usual) > UNEQUAL * usual).tolist():
            before, after, found = slices[number].path, slices[number + 1].path, apart[number]
            missing = round(found / usual) - 1
            said = f"{missing} slice(s) are missing" if missing > 0 else "distances of slices are unequal"
            raise DataError(
                f"{after}: lies {found:.2f} mm from {before}, other slices {usual:.2f} mm: {said}. Get the whole "
                "series, or leave it out."
            )
        for number, part in enumerate(slices):
            aside = np.linalg.norm(position_of(part) - position_of(first) - number * step)
            if aside > 2 * UNEQUAL * max(usual, *first.spacing):
                raise DataError(
                    f"{part.path}: lies {aside:.2f} mm beside the line of the other slices: they are not one volume. "
                    "Leave the series out (data.series), or split it."
                )
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = (d * s for d, s in zip(first.directions, first.spacing, strict=True))
    affine[:3, 2], affine[:3, 3] = step, position_of(first)
    return LPS_TO_RAS @ affine


def _voxels(path: str | Path, slices: Sequence[Slice], channel: int | None) -> NDArray[Any]:
    """(columns, rows, slices): whole numbers stay so where their scale is whole and the same for all slices."""
    pixels = [take_channel(part.pixels, channel, path, "channels of colour") for part in slices]
    scales = {part.scale for part in slices}
    stored = np.stack(pixels, axis=-1).transpose(1, 0, 2)
    if scales == {(1.0, 0.0)}:
        return stored
    if len(scales) == 1 and all(value.is_integer() for value in slices[0].scale) and stored.dtype.itemsize <= 2:
        slope, intercept = map(int, slices[0].scale)
        scaled = stored.astype(np.int32) * slope + intercept
        return scaled.astype(np.int16) if scaled.min() >= -32768 and scaled.max() <= 32767 else scaled
    slopes, intercepts = np.array([part.scale for part in slices]).T
    exact = np.float32 if stored.dtype.itemsize <= 2 else np.float64
    return (stored * slopes + intercepts).astype(exact)
