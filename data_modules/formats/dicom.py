"""DICOM: a series of slices, or one file of several frames, as a volume with its place.

Slices are sorted by their position along the slice normal, and have to lie at equal distances. Nothing is resampled:
of a scan with tilted gantry the third axis of the affine is not at right angles to the slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_modules.formats.dicom_files import SEGMENTATION, damaged, is_dicom, quiet_pydicom
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

SAME_DIRECTION = 1e-3
"""How far the cosines of two slices' rows and columns may differ: rounding in headers stays below it."""

UNEQUAL = 0.05
"""How far distances of slices may differ, as a part of their median: positions are often rounded to 0.1 mm."""

SAME_POSITION = 1e-3
"""Slices that lie nearer than this, mm, lie at one position."""


@dataclass(frozen=True)
class Slice:
    """One slice or frame.

    Attributes:
        path: of its file.
        order: InstanceNumber, or number of the frame.
        pixels: (rows, columns, channels) as stored.
        position: (3,) mm of the first pixel's centre, LPS; None where the file says nothing of it.
        directions: (2, 3) to where the columns' and the rows' numbers grow, LPS.
        spacing: (between columns, between rows) mm; None where the file says nothing of it.
        thickness: mm to the next slice, as stated; 0 where it is not.
        scale: (slope, intercept).
        stated: how many slices the acquisition has, as stated; 0 where it is not.
    """

    path: Path
    order: int
    pixels: NDArray[Any]
    position: NDArray[np.float64] | None
    directions: NDArray[np.float64]
    spacing: tuple[float, float] | None
    thickness: float
    scale: tuple[float, float]
    stated: int = 0


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
    _check_alike(slices)
    first = slices[0]
    if first.position is None:
        return _stack(path, slices, reading)
    if len(slices) < first.stated:
        raise DataError(
            f"{path}: has {len(slices)} of the {first.stated} slices of its acquisition. Get the whole series, or "
            "leave it out."
        )
    chosen, channel = _choose_volume(path, _sorted(slices), reading.channel)
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
            return [_slice(path, held, number, pixels) for number, pixels in enumerate(frames)]
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


def _slice(path: Path, held: Any, number: int, pixels: NDArray[Any]) -> Slice:
    """A frame with its place: that of the frame, else what all frames share, else that of the file."""
    frames, shared = held.get("PerFrameFunctionalGroupsSequence"), held.get("SharedFunctionalGroupsSequence")
    groups = [part for part in (frames[number] if frames else None, shared[0] if shared else None) if part is not None]

    def find(sequence: str, name: str) -> Any:
        inside = [group[sequence][0] for group in groups if group.get(sequence)]
        values = [part.get(name) for part in inside if part.get(name) not in (None, "")]
        return values[0] if values else held.get(name)

    measures = "PixelMeasuresSequence"
    position = find("PlanePositionSequence", "ImagePositionPatient")
    several = len(pixels.shape) == 3 and int(held.get("NumberOfFrames") or 1) > 1
    if several and not any(group.get("PlanePositionSequence") for group in groups):
        position = None  # one place for all frames is none
    directions = find("PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = find(measures, "PixelSpacing") or held.get("ImagerPixelSpacing")
    thickness = find(measures, "SpacingBetweenSlices") or find(measures, "SliceThickness") or 0
    slope = find("PixelValueTransformationSequence", "RescaleSlope")
    intercept = find("PixelValueTransformationSequence", "RescaleIntercept")
    if position is not None and (directions is None or spacing is None):
        raise DataError(
            f"{path}: has a position, and no {'orientation' if directions is None else 'pixel spacing'}. Export it "
            "again, or leave it out."
        )
    return Slice(
        path,
        order=number if several else int(held.get("InstanceNumber") or 0),
        pixels=pixels,
        position=None if position is None else _numbers(position, 3),
        directions=_numbers(directions or (1, 0, 0, 0, 1, 0), 6).reshape(2, 3),
        spacing=_sizes(spacing) if spacing else None,
        thickness=abs(float(thickness)),
        scale=(1.0 if slope is None else float(slope), float(intercept or 0)),
        stated=0 if several else int(held.get("ImagesInAcquisition") or 0),
    )


def _numbers(values: Any, count: int) -> NDArray[np.float64]:
    """So many finite numbers; else ValueError, as of any damaged file."""
    found = np.array(values, np.float64)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise ValueError(f"{values} are not {count} numbers")
    return found


def _sizes(spacing: Any) -> tuple[float, float]:
    """(between columns, between rows), of a tag that has rows first."""
    down, across = _numbers(spacing, 2).tolist()
    if min(down, across) <= 0:
        raise ValueError(f"pixels of {spacing} mm")
    return across, down


def _check_alike(slices: Sequence[Slice]) -> None:
    """Raise DataError if two slices differ in what makes them slices of one volume."""
    first = slices[0]
    for part in slices[1:]:
        differing = None
        if part.pixels.shape != first.pixels.shape:
            shapes = [f"{x.pixels.shape[1]} x {x.pixels.shape[0]}" for x in (part, first)]
            differing = f"has {shapes[0]} pixels, {first.path} has {shapes[1]}"
        elif (part.position is None) != (first.position is None):
            differing = f"{first.path} has {'no' if first.position is None else 'a'} position, it is the other way"
        elif np.abs(part.directions - first.directions).max() > SAME_DIRECTION:
            differing = f"lies in another orientation than {first.path}"
        elif part.spacing != first.spacing and not np.allclose(part.spacing or 0, first.spacing or 0, rtol=1e-3):
            differing = f"has pixels of {part.spacing} mm, {first.path} of {first.spacing}"
        if differing:
            raise DataError(
                f"{part.path}: {differing}: they are not one volume. Leave the series out (data.series), or split it."
            )
    across, down = first.directions
    if np.abs([across @ across - 1, down @ down - 1, across @ down]).max() > SAME_DIRECTION * 10:
        raise DataError(
            f"{first.path}: its orientation cannot be used ({first.directions.ravel().tolist()}). Export it again."
        )


def _sorted(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices by position along the normal; at each position by their number."""
    normal = np.cross(*slices[0].directions)
    ordered = sorted(slices, key=lambda part: (float(normal @ _at(part)), part.order, str(part.path)))
    places: list[list[Slice]] = []
    for part in ordered:
        if places and abs(normal @ (_at(part) - _at(places[-1][0]))) < SAME_POSITION:
            places[-1].append(part)
        else:
            places.append([part])
    return [sorted(place, key=lambda part: (part.order, str(part.path))) for place in places]


def _choose_volume(path: str | Path, places: list[list[Slice]], channel: int | None) -> tuple[list[Slice], int | None]:
    """One slice of each position, and the channel that is still to be chosen."""
    count = len(places[0])
    if uneven := [place for place in places if len(place) != count]:
        place = max(uneven[0], places[0], key=len)
        raise DataError(
            f"{place[1].path}: lies at the position of {place[0].path}, and other positions have one slice fewer or "
            "more. Remove the slice that is too many, or get those that are missing."
        )
    if count == 1:
        return [place[0] for place in places], channel
    if channel is None or channel >= count:
        raise DataError(
            f"{path}: has {count} slices at each position (phases, echoes), {places[0][0].path} and others. Say which "
            f"are taken, data.channel: 0 to {count - 1}, by InstanceNumber; or leave the series out (data.series)."
        )
    return [place[channel] for place in places], None


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
        step = (_at(last) - _at(first)) / (len(slices) - 1)
        apart = np.diff([normal @ _at(part) for part in slices])
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
            aside = np.linalg.norm(_at(part) - _at(first) - number * step)
            if aside > 2 * UNEQUAL * max(usual, *first.spacing):
                raise DataError(
                    f"{part.path}: lies {aside:.2f} mm beside the line of the other slices: they are not one volume. "
                    "Leave the series out (data.series), or split it."
                )
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = (d * s for d, s in zip(first.directions, first.spacing, strict=True))
    affine[:3, 2], affine[:3, 3] = step, _at(first)
    return LPS_TO_RAS @ affine


def _at(part: Slice) -> NDArray[np.float64]:
    assert part.position is not None
    return part.position


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
