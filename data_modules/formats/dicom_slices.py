"""Slices of DICOM files with their places, and which of them are one volume. No pixels are read here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_modules.formats.dicom_files import damaged, quiet_pydicom
from data_modules.formats.volume import Reading
from weakmedsam.errors import DataError

SAME_DIRECTION = 1e-3
"""How far the cosines of two slices' rows and columns may differ: rounding in headers stays below it."""

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


def list_slices(path: str | Path, files: Sequence[str | Path], reading: Reading) -> tuple[list[Slice], dict[Path, Any]]:
    """The slices of a scan in the order of its voxels, and the headers of their files; pixels are left out.

    Args:
        path: of the scan, for messages.
        files: its files.
        reading: which volume where several slices lie at each position.

    Raises:
        DataError: as of ``read_dicom``, but for what pixels alone show.
    """
    slices, headers = [], {}
    with quiet_pydicom() as pydicom:
        for file in map(Path, files):
            try:
                held = pydicom.dcmread(file, stop_before_pixels=True)
                pixels = np.broadcast_to(np.uint8(0), (held.Rows, held.Columns, int(held.get("SamplesPerPixel") or 1)))
                slices += [make_slice(file, held, n, pixels) for n in range(int(held.get("NumberOfFrames") or 1))]
            except DataError:
                raise
            except Exception as error:  # the library raises whatever a damaged file leads it to
                raise damaged(file, error) from error
            headers[file] = held
    check_alike(slices)
    if slices[0].position is None:
        return sorted(slices, key=lambda part: part.order), headers
    return choose_volume(path, sort_slices(slices), reading.channel)[0], headers


def make_slice(path: Path, held: Any, number: int, pixels: NDArray[Any]) -> Slice:
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


def check_alike(slices: Sequence[Slice]) -> None:
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


def sort_slices(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices by position along the normal; at each position by their number."""
    normal = np.cross(*slices[0].directions)
    ordered = sorted(slices, key=lambda part: (float(normal @ position_of(part)), part.order, str(part.path)))
    places: list[list[Slice]] = []
    for part in ordered:
        if places and abs(normal @ (position_of(part) - position_of(places[-1][0]))) < SAME_POSITION:
            places[-1].append(part)
        else:
            places.append([part])
    return [sorted(place, key=lambda part: (part.order, str(part.path))) for place in places]


def choose_volume(path: str | Path, places: list[list[Slice]], channel: int | None) -> tuple[list[Slice], int | None]:
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


def position_of(part: Slice) -> NDArray[np.float64]:
    """Of a slice that has one."""
    assert part.position is not None
    return part.position
