"""What a data set is to the rest: its cases, its facts, and how values become classes.

Plain data without torch or Lightning, so that the worker processes that read volumes start quickly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from data_modules.nifti_files import ScanFile, Tree, case_name, describe_folder, name_paths
from weakmedsam.contracts import BACKGROUND, SOMEWHERE
from weakmedsam.errors import ConfigError, DataError, check_range

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SliceRange:
    """A row of a table of ranges.

    Attributes:
        first: slice, by its number along the *file's own* third axis.
        last: slice, included.
        number: position of the class among the chosen ones; None: no class is present.
        where: table and line, for messages.
    """

    first: int
    last: int
    number: int | None
    where: str


@dataclass(frozen=True)
class SliceRanges:
    """What a table of ranges says of a case: a class is present in its ranges and absent elsewhere.

    Attributes:
        ranges: rows of the case.
        classes: how many there are, C.
    """

    ranges: tuple[SliceRange, ...]
    classes: int

    def by_slice(self, depth: int) -> dict[int, tuple[int, ...]]:
        """Slice -> 0 or 1 per class, of a case of ``depth`` slices.

        Raises:
            DataError: a range ends behind the last slice.
        """
        labels = [[0] * self.classes for _ in range(depth)]
        for part in self.ranges:
            if part.last >= depth:
                raise DataError(
                    f"{part.where}: slices {part.first} to {part.last}, but the scan has slices 0 to {depth - 1}. "
                    "Correct the row."
                )
            for number in range(part.first, part.last + 1):
                if part.number is not None:
                    labels[number][part.number] = 1
        return {number: tuple(slice_labels) for number, slice_labels in enumerate(labels)}


@dataclass(frozen=True)
class ScanLabels:
    """What a table of scans says of a case: a class is in some of its slices, or in none.

    Attributes:
        present: 0 or 1 per class.
    """

    present: tuple[int, ...]

    def by_slice(self, depth: int) -> dict[int, tuple[int, ...]]:
        """Slice -> 0 or ``SOMEWHERE`` per class, of a case of ``depth`` slices."""
        return dict.fromkeys(range(depth), tuple(SOMEWHERE if present else 0 for present in self.present))


CaseLabels: TypeAlias = Mapping[int, tuple[int, ...]] | SliceRanges | ScanLabels
"""Of a case: slice -> 0 or 1 per class, or ranges of slices, or what the scan shows."""


@dataclass(frozen=True)
class Case:
    """One scan: where its files are. Plain data: it is pickled to worker processes.

    Attributes:
        name: unique within the data set; also the name of its folder in the store.
        patient: who was scanned; cases of one patient are never split.
        image: path of the volume; of one that has several files, of their folder.
        mask: path of the expert mask, None where there is none.
        table: image-level labels per slice, by the slice's number along the *file's own* third axis,
            one 0 or 1 per class in the order of the chosen classes; or the ranges of slices in which classes are
            present; or the classes of the scan. None: labels come from the mask.
        problem: what is already known to be wrong with it and how to mend it; it is then not read.
        image_files: of a volume that has several, a DICOM series or numbered pictures.
        mask_files: of a mask that has several.
    """

    name: str
    patient: str
    image: str
    mask: str | None = None
    table: CaseLabels | None = None
    problem: str | None = None
    image_files: tuple[str, ...] = ()
    mask_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Intensity:
    """How the values of a volume become [0, 1]: linear from ``low`` to ``high``, clipped outside.

    Attributes:
        window: (level, width) in the file's units, HU for CT: low, high = level -+ width / 2. The
            same for every volume. None: by percentiles.
        percentiles: (lower, upper) in percent, of the voxels above the volume's minimum, so that the
            air or the zeros around the body do not count; each volume has its own low and high.

    Raises:
        ConfigError: a window without width, or percentiles out of order.
    """

    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __post_init__(self) -> None:
        if self.window is not None:
            check_range("data.slices.window's level", self.window[0])
            check_range("data.slices.window's width", self.window[1], 0, above=True)
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ConfigError(f"data.slices.percentiles: {self.percentiles} are not (lower, upper) between 0 and 100.")


@dataclass(frozen=True)
class DatasetInfo:
    """The facts of a data set.

    Attributes:
        name: short name, used for the store's folder.
        classes: what may be chosen: class name -> mask values. Empty: the user names the classes.
        default: the classes taken when none are chosen.
        values: mask values known to occur, without 0; any other value is an error.
        intensity: how values become [0, 1].
        layout: the expected files as a small tree, for the message when nothing is found.
        home: where to get the data set.
        example: image and mask of the case number ``{number}``, below ``data_dir``: the tests draw small scans there.
            None: the data set draws its own.
        published_split: CSV (case, split) used when all its cases are there.
        false_spacing: (x, y, z) mm known to be a wrong entry of the header: warned of.
    """

    name: str
    classes: Mapping[str, tuple[int, ...]]
    default: tuple[str, ...]
    values: tuple[int, ...]
    intensity: Intensity
    layout: str
    home: str
    example: tuple[str, str] | None = None
    published_split: Path | None = None
    false_spacing: tuple[float, float, float] | None = None


def choose_classes(info: DatasetInfo, wanted: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """The classes to learn, in order: class ids are 1, 2, ... in this order.

    Args:
        info: of the data set.
        wanted: class name -> mask values, as configured; None takes the data set's default.

    Returns:
        Class name -> mask values.

    Raises:
        ConfigError: no class, an unknown or impossible name, a value the data set does not have, or a value that
            belongs to two classes.
    """
    if wanted is None:
        wanted = {name: info.classes[name] for name in info.default}
    if not wanted:
        raise ConfigError("classes: at least one class is needed, e.g. classes: {tumour: [1]}.")
    unknown = [name for name in wanted if info.classes and name not in info.classes]
    if unknown:
        raise ConfigError(f"classes: {info.name} has no class {unknown}; it has {sorted(info.classes)}.")
    owner: dict[int, str] = {}
    for name, values in wanted.items():
        if not name.isprintable() or not name.strip() or name != name.strip() or set(name) & set("/\\"):
            raise ConfigError(
                f"classes: {name!r} cannot be the name of a class: it stands in tables and in names of figures, so it "
                "needs a character that is seen, no / or \\, and no blanks around it."
            )
        if not values:
            raise ConfigError(f"classes: {name} has no mask value; give at least one, e.g. {name}: [1].")
        for value in values:
            if info.classes and value not in info.values:
                raise ConfigError(f"classes: {name} asks for mask value {value}; {info.name} has {info.values}.")
            if not 0 < value < 256:
                raise ConfigError(f"classes: {name} asks for mask value {value}; 1 to 255 are possible.")
            if value in owner:
                raise ConfigError(f"classes: mask value {value} is in both {owner[value]} and {name}.")
            owner[value] = name
    return {name: tuple(values) for name, values in wanted.items()}


def class_ids(classes: Mapping[str, tuple[int, ...]]) -> dict[int, int]:
    """Mask value -> class id (1..C); values of no class become background."""
    return {value: number for number, values in enumerate(classes.values(), BACKGROUND + 1) for value in values}


def require_cases(cases: list[Case], info: DatasetInfo, root: Path) -> list[Case]:
    """The cases, sorted by name, or an error that says what should have been there.

    Raises:
        DataError: no case, two cases of one name, or one scan under the names of two patients.
    """
    if not cases:
        raise DataError(
            f"No {info.name} data in {root} ({describe_folder(root)}). Expected:\n{info.layout}\n"
            f"Get it from: {info.home}\nThen give the folder as DATA_DIR (data_dir in the configuration)."
        )
    ordered = sorted(cases, key=lambda case: case.name)
    for first, second in pairwise(ordered):
        if first.name == second.name:
            raise DataError(
                f"Two cases are named {first.name}: {first.image or first.mask} and "
                f"{second.image or second.mask}. Remove or rename one."
            )
    scans: dict[str, Case] = {}
    for case in ordered:
        if case.image and case.problem is None:
            first = scans.setdefault(os.path.realpath(case.image_files[0] if case.image_files else case.image), case)
            if first.patient != case.patient:
                raise DataError(
                    f"{first.image} and {case.image} are links to one scan, which would be two patients. Remove one."
                )
    return ordered


def case_of(
    name: str,
    image: ScanFile | None,
    mask: ScanFile | None,
    problem: str | None = None,
    patient: str | None = None,
    table: CaseLabels | None = None,
) -> Case:
    """A case of the files that were found.

    Args:
        name: of the case.
        image: None where there is none.
        mask: None where there is none.
        problem: what is wrong with the case where nothing is wrong with either file.
        patient: None takes what the image's file says, else the case's name.
        table: see ``Case``.
    """
    found = [file.problem for file in (image, mask) if file is not None and file.problem]
    return Case(
        name=name,
        patient=patient or (case_name(image.patient) if image else "") or name,
        image=str(image.path) if image else "",
        mask=str(mask.path) if mask else None,
        table=table,
        problem=found[0] if found else problem,
        image_files=tuple(map(str, image.files)) if image else (),
        mask_files=tuple(map(str, mask.files)) if mask else (),
    )


def warn_of_passed_over(paths: Sequence[Path], root: Path, read: str) -> None:
    """List files that look like scans or tables of the data set and are not used.

    Args:
        paths: the files.
        root: folder to which the names are given.
        read: what is read.
    """
    if paths:
        _log.info(
            "%s: passed over is what looks like scans or tables, %d name(s): %s. Read are %s",
            *(root, len(paths), name_paths(paths, root), read),
        )


def warn_of_left_out(tree: Tree, root: Path) -> None:
    """Name the folders below DATA_DIR that are not looked into."""
    for paths, why in ((tree.outputs, "written by this program"), (tree.closed, "cannot be read")):
        if paths:
            _log.info("%s: folders left out (%s): %s", root, why, name_paths(paths, root))
