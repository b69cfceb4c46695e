"""Your own data: a folder of NIfTI volumes, with masks, or a label table, or both."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_modules.base import SliceDataModule
from data_modules.case_tables import check_cases, check_spelling, read_pairs
from data_modules.cases import Case, DatasetInfo, Intensity, case_of, require_cases, warn_of_passed_over
from data_modules.nifti_files import (
    Listing,
    case_name,
    entries,
    find_folder,
    find_root,
    find_table,
    folders_between,
    list_nifti,
)
from data_modules.sources import Sources
from data_modules.tables import open_table, show
from weakmedsam.errors import DataError

_log = logging.getLogger(__name__)

MOST_DIGITS = 9
"""Of a slice's number."""

_LIKE_A_TABLE = re.compile(r"(labels?|patients?)([^a-z].*)?\.(csv|tsv|txt|xlsx?|xlsm|ods|numbers)$", re.IGNORECASE)

SOURCES = Sources("", ("images", "masks"), tables=("labels.csv", "patients.csv"))


class Folder(SliceDataModule):
    """Your own volumes. Arguments beside those of ``SliceDataModule``.

    Args:
        data_dir: the folder, laid out as ``Folder.info.layout``.
        classes: class name -> mask values; the names are also the columns of ``labels.csv``. Needed.
        background_values: further mask values that may occur and count as background; any other value
            is an error.
    """

    info = DatasetInfo(
        name="folder",
        classes={},  # the user names them
        default=(),
        values=(),
        intensity=Intensity(percentiles=(0.5, 99.5)),
        layout=(
            "  images/<case>.nii.gz     (or .nii)\n"
            "  masks/<case>.nii.gz      optional where labels.csv has the case\n"
            "  labels.csv               optional: case,slice,<class>,... with 0 or 1 per slice\n"
            "  patients.csv             optional: case,patient, a row for every case, where a patient has several"
        ),
        home="your own scans; DICOM is converted to NIfTI by dcm2niix",
        example=("images/scan{number}.nii.gz", "masks/scan{number}.nii.gz"),
    )

    def __init__(
        self,
        data_dir: str,
        classes: dict[str, list[int]],
        background_values: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir, classes=classes, **kwargs)
        self.background_values = tuple(background_values)

    def find_cases(self) -> list[Case]:
        """The cases of the folder, or of the one folder below it that has ``images``.

        ``slice`` in ``labels.csv`` counts from 0 along the file's own third axis, as stored. The table is
        the image-level label where there is one; masks are then for validation and test only.

        Raises:
            DataError: no cases, or a table that cannot be read or does not fit the cases.
        """
        top = Path(self.data_dir)
        root = find_root(top, "images")
        places = [find_folder(root, name) for name in SOURCES.folders]
        images, masks = (list_nifti(place) for place in places)
        read_in = dict.fromkeys(folders_between(top, root))
        tables = [
            path
            for folder in dict.fromkeys([*read_in, *places])
            for path in entries(folder)
            if not (folder in read_in and path.name.lower() in SOURCES.tables)
        ]
        passed_over = [
            *(*images.passed_over, *masks.passed_over),
            *(path for path in tables if _LIKE_A_TABLE.match(path.name)),
        ]
        read = ".nii and .nii.gz directly in images/ and masks/, and beside these labels.csv and patients.csv"
        warn_of_passed_over(passed_over, root, read)
        if not images.files:
            return require_cases([], self.info, places[0] if places[0].is_dir() else root)
        if top != root:
            _log.warning("%s has no images/: those of %s are taken", top, root)
        names = sorted({*images.files, *masks.files})
        labels, patients = (find_table(folders_between(top, root), name) for name in SOURCES.tables)
        table = read_labels(labels, self.class_names, names) if labels else {}
        patient = read_patients(patients, names) if patients else {}
        return require_cases(_make_cases(images, masks, table, patient, root), self.info, root)

    def sources(self) -> Sources:
        """The two folders and the two tables."""
        return SOURCES._replace(root=self.data_dir)

    def other_values(self) -> tuple[int, ...]:
        """Values named as background."""
        return self.background_values


def _make_cases(
    images: Listing,
    masks: Listing,
    table: Mapping[str, Mapping[int, tuple[int, ...]]],
    patient: Mapping[str, str],
    root: Path,
) -> list[Case]:
    cases = []
    for name in {**images.files, **masks.files}:
        image, mask = images.files.get(name), masks.files.get(name)
        problem = None
        if image is None and mask is not None:
            problem = (
                f"{mask.path}: has no image {root / 'images' / name}.nii.gz. Add it, or remove the mask; if it is of "
                "another image, give it that one's name."
            )
        elif image is not None and mask is None and name not in table:
            problem = f"{image.path}: has neither a mask in masks/ nor rows in labels.csv. Add one, or remove it."
        cases.append(case_of(name, image, mask, problem, patient.get(name), table.get(name)))
    return cases


def read_labels(
    path: Path, class_names: Sequence[str], cases: Collection[str]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Read a label table.

    Args:
        path: CSV with the columns case, slice and one per class.
        class_names: the columns to read.
        cases: names of the cases that are there.

    Returns:
        Case -> slice -> 0 or 1 per class.

    Raises:
        DataError: unreadable, a column is missing, a value is not 0 or 1, a slice has two rows, or a row is of a case
            that is not there.
    """
    table = open_table(path, ("case", "slice", *class_names))
    labels: dict[str, dict[int, tuple[int, ...]]] = {}
    lines: dict[str, int] = {}
    for line, (name, number, *values) in table.rows:
        where, case = f"{path}: line {line}", case_name(name)
        if not (number.isascii() and number.isdigit() and len(number) <= MOST_DIGITS):
            raise DataError(f"{where}, column slice: {show(number)} is no slice; they are 0, 1, 2, ... Correct it.")
        for column, value in zip(class_names, values, strict=True):
            if value not in ("0", "1"):
                raise DataError(f"{where}, column {column}: {show(value)} is no label; 0 and 1 are. Correct it.")
        slices = labels.setdefault(case, {})
        if int(number) in slices:
            raise DataError(f"{where}: case {show(case)} slice {number} has two rows. Keep one.")
        slices[int(number)] = tuple(int(value) for value in values)
        lines.setdefault(case, line)
    check_cases(table, lines, cases)
    return labels


def read_patients(path: Path, cases: Collection[str]) -> dict[str, str]:
    """Read a CSV with the columns case and patient: case -> patient.

    Raises:
        DataError: unreadable, a column is missing, rows and cases do not belong together one to one, or two patients
            differ in leading zeros or in upper and lower case alone.
    """
    table, rows = read_pairs(path, "patient")
    check_cases(table, {case: line for case, (line, _) in rows.items()}, cases, needed=cases)
    check_spelling(path, "patient", rows.values())
    return {case: case_name(patient) for case, (_, patient) in rows.items()}
