"""What can be guessed of scans that nobody has described: plane, window, classes, ...; each guess with its reason.

Some of the scans are read for it, as training would read them. Loads no torch.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_modules.cases import Case
from data_modules.folder_files import Layout, find_folder_cases, list_layout
from data_modules.formats.read import read_scan
from data_modules.formats.volume import NO_SPACING, Reading
from data_modules.label_tables import SCANS
from data_modules.survey_classes import MOST_CLASSES, Look, classes_of_table, guess_classes
from data_modules.survey_layout import Guess, guess_layout
from data_modules.volumes import PLANES, Geometry
from weakmedsam.errors import DataError
from weakmedsam.system.progress import tracked

MOST_READ = 12
"""How many scans are read."""

MOST_MASKS = 60
"""How many masks are read."""

MOST_SECONDS = 60.0
"""After so long no more are read."""

CT = (-500.0, 300.0)
"""Values on both sides of which only Hounsfield units lie: air, and bone."""

THICKER = 1.3
"""How much further apart slices lie than pixels, so that they are taken for those of the scanner."""

SIDES = re.compile(r"(^|[^a-z])(left|right|l|r|lt|rt)([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Survey:
    """What a folder holds, and the settings for it.

    Attributes:
        layout: where scans lie.
        cases: all of them.
        titles: modality and description of DICOM series -> how many cases.
        looks: scans that were read.
        problems: what is wrong with those that cannot be.
        table: name and kind of the label table; empty where there is none.
        passed_over: what looks like scans and is not taken.
        guesses: key -> guess.
    """

    layout: Layout
    cases: list[Case]
    titles: Mapping[str, int]
    looks: list[Look]
    problems: list[str]
    table: str
    passed_over: list[Path]
    guesses: dict[str, Guess]


def look_into(folder: Path) -> Survey:
    """Survey a folder.

    Raises:
        DataError: no scan that can be read, or a table with faults.
    """
    layout, guesses = guess_layout(folder)
    root, images, _ = list_layout(layout)
    names, table = classes_of_table(root)
    quiet = logging.getLogger("data_modules")
    before, quiet.disabled = quiet.disabled, True
    try:
        cases = find_folder_cases(layout, names or ["target"])
    finally:
        quiet.disabled = before
    usable = [case for case in cases if case.image and images.files[case.name].problem is None]
    looks, problems = _read_some(usable)
    problems += [scan.problem for scan in images.files.values() if scan.problem]
    if not looks:
        raise DataError("\n".join(["no scan can be read:", *(f"  {problem}" for problem in problems[:5])]))
    by_slice = table not in ("", ",".join(SCANS))
    plane = _plane(looks, by_slice)
    looks = [look._replace(geometry=_in_plane(look.geometry, plane.value)) for look in looks]
    classes = guess_classes(root, looks, names, table)
    titles = Counter(scan.title for scan in images.files.values() if scan.title)
    found = {
        **guesses,
        "channel": _channel(looks),
        "spacing": _spacing(looks),
        "classes": classes,
        "plane": plane,
        "image_size": _image_size(looks),
        "min_pixels": _min_pixels(looks, by_slice),
        **_intensity(looks, titles),
        "fractions": _fractions(cases),
        "flip_columns": _flip(classes.value, plane.value),
    }
    return Survey(layout, cases, titles, looks, problems, table, images.passed_over, found)


# Reading


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    places = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int).tolist()
    return [items[place] for place in dict.fromkeys(places)]


def _read_some(cases: Sequence[Case]) -> tuple[list[Look], list[str]]:
    looks: list[Look] = []
    problems: list[str] = []
    chosen = _evenly(cases, MOST_READ)
    masked = _evenly([case for case in cases if case.mask and case not in chosen], MOST_MASKS - MOST_READ)
    started = time.monotonic()
    for case in tracked([*chosen, *masked], len(chosen) + len(masked), "scan", kept=False):
        if looks and time.monotonic() - started > MOST_SECONDS:
            continue
        try:
            looks.append(_read(case, None))
        except DataError as error:
            problems.append(str(error))
    return looks, problems


def _read(case: Case, channel: int | None) -> Look:
    try:
        voxels, affine, unit, _ = read_scan(case.image, case.image_files, Reading(channel))
    except DataError:
        if channel is not None:
            raise
        return _read(case, 0)._replace(channels=True)  # or the fault is another one, and is told
    rows = tuple(tuple(float(x) for x in row) for row in affine)
    shape = (int(voxels.shape[0]), int(voxels.shape[1]), int(voxels.shape[2]))
    presence: dict[int, NDArray[np.int64]] = {}
    if case.mask:
        mask = np.rint(read_scan(case.mask, case.mask_files, labels=True).voxels)
        values = [int(value) for value in np.unique(mask) if 0 < value < 256][: MOST_CLASSES + 1]
        presence = {value: (mask == value).sum(axis=(0, 1)) for value in values}
    finite = voxels[np.isfinite(voxels)] if voxels.dtype.kind == "f" else voxels
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    whole = voxels.dtype.kind != "f" or bool((finite == np.rint(finite)).all())
    return Look(case, Geometry(shape, rows, "axial", unit), low, high, whole, False, presence)


# Guesses


def _in_plane(geometry: Geometry, plane: str) -> Geometry:
    return Geometry(geometry.shape, geometry.affine, plane, geometry.unit)


def _size(look: Look) -> tuple[int, int]:
    """(rows, columns) of a slice."""
    shape = look.geometry.to_slices(np.broadcast_to(0, look.geometry.shape)).shape
    return int(shape[1]), int(shape[2])


def _plane(looks: Sequence[Look], by_slice: bool) -> Guess:
    """The plane whose slices the scanner took."""
    names = {sides[0]: plane for plane, sides in PLANES.items()}
    opposite = dict(zip("SIAPRL", "SSAARR", strict=True))
    votes: Counter[str] = Counter()
    clear = 0
    for look in looks:
        sizes = nib.affines.voxel_sizes(np.asarray(look.geometry.affine))
        codes = nib.aff2axcodes(np.asarray(look.geometry.affine))
        thin = [axis for axis, length in enumerate(look.geometry.shape) if length == 1]
        axis = thin[0] if len(thin) == 1 else int(np.argmax(sizes))
        is_clear = len(thin) == 1 or sizes[axis] > THICKER * np.median(sizes)
        clear += is_clear
        votes[names[opposite[codes[axis if is_clear and not by_slice else 2]]]] += 1
    plane = votes.most_common(1)[0][0]
    if by_slice:
        return Guess(plane, "labels.csv counts slices along the file's third axis")
    if clear > len(looks) / 2:
        return Guess(plane, "pixels are finest in it: slices were taken so")
    axial = "axial" if clear == 0 else plane
    return Guess(axial, "voxels are nearly equal in all directions: any plane will do")


def _channel(looks: Sequence[Look]) -> Guess:
    several = [look.case.image for look in looks if look.channels]
    if several:
        return Guess(0, f"the first: {len(several)} of {len(looks)} files have several volumes or colours")
    return Guess(None, "files have one volume")


def _spacing(looks: Sequence[Look]) -> Guess:
    if any(look.geometry.unit == NO_SPACING for look in looks):
        return Guess(None, "files do not say it: [x, y, z] mm, or 1 is taken and distances are in pixels")
    return Guess(None, "the files say it")


def _image_size(looks: Sequence[Look]) -> Guess:
    longest = float(np.median([max(_size(look)) for look in looks]))
    size = int(min(256, max(64, -(-longest // 16) * 16)))  # the embedded backbone takes no smaller frame
    reason = f"slices have {longest:.0f} pixels (median of the longer side); a multiple of 16, from 64 to 256"
    return Guess(size, reason)


def _intensity(looks: Sequence[Look], titles: Mapping[str, int]) -> dict[str, Guess]:
    low, high = min(look.low for look in looks), max(look.high for look in looks)
    by_tag = bool(titles) and all(title.split()[:1] == ["CT"] for title in titles)
    by_value = all(look.low <= CT[0] and look.high >= CT[1] and look.whole for look in looks)
    if by_tag or by_value:
        why = "DICOM says CT" if by_tag else f"values from {low:g} to {high:g} look like HU"
        return {
            "window": Guess([40, 400], f"[level, width]: {why}; soft tissue. Lung [-600, 1500], bone [400, 1800]"),
            "percentiles": Guess(None, "a window is set"),
        }
    return {
        "window": Guess(None, f"not HU: values from {low:g} to {high:g}"),
        "percentiles": Guess([0.5, 99.5], "of the voxels above the minimum, %, become 0 and 1: units are not absolute"),
    }


def _min_pixels(looks: Sequence[Look], by_slice: bool) -> Guess:
    if by_slice:
        return Guess(10, "not used for cases in labels.csv, which says what is present")
    areas = [np.median(counts[counts > 0]) for look in looks for counts in look.presence.values() if (counts > 0).any()]
    smallest = float(min(areas, default=100))
    if smallest < 30:
        return Guess(
            max(1, round(smallest / 5)), f"the smallest target has {smallest:.0f} pixels in half of its slices"
        )
    return Guess(10, "pixels that a class needs in a slice to count as present: fewer are a blurred end")


def _fractions(cases: Sequence[Case]) -> Guess:
    patients = len({case.patient for case in cases})
    if patients < 20:
        return Guess([0.6, 0.2, 0.2], f"train, val, test: {patients} patient(s) are too few for a tenth to test on")
    return Guess([0.8, 0.1, 0.1], f"train, val, test of {patients} patient(s)")


def _flip(classes: Mapping[str, Any], plane: str) -> Guess:
    sided = [name for name in classes if SIDES.search(name.replace("_", " "))]
    if sided and plane != "sagittal":
        return Guess(0.0, f"no left-right mirror: {sided[0]} is on one side")
    said = "front-back" if plane == "sagittal" else "left-right"
    return Guess(0.5, f"probability of a {said} mirror; 0 where a class can only be on one side")
