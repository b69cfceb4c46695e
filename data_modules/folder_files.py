"""The cases of a folder of one's own, without torch: what ``Folder`` trains on and ``weakmedsam init`` describes."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_modules.case_tables import check_cases, check_spelling, read_pairs
from data_modules.cases import Case, CaseLabels, DatasetInfo, Intensity, case_of, require_cases, warn_of_passed_over
from data_modules.label_tables import read_labels
from data_modules.nifti_files import Listing, case_name, entries, find_root, find_table, folders_between
from data_modules.scan_files import READ, folder_of, head_of, is_pattern, list_scans
from data_modules.sources import Sources
from weakmedsam.errors import ConfigError

_log = logging.getLogger(__name__)

_LIKE_A_TABLE = re.compile(r"(labels?|patients?)([^a-z].*)?\.(csv|tsv|txt|xlsx?|xlsm|ods|numbers)$", re.IGNORECASE)

TABLES = ("labels.csv", "patients.csv")

INFO = DatasetInfo(
    name="folder",
    classes={},  # the user names them
    default=(),
    values=(),
    intensity=Intensity(percentiles=(0.5, 99.5)),
    layout=(
        "  images/<case>.nii.gz     or of another format, or a folder <case>/ of DICOM or numbered pictures\n"
        "  masks/<case>.nii.gz      likewise; optional where labels.csv has the case\n"
        "  labels.csv               optional: case,slice,<class>,... with 0 or 1 per slice, or case,from,to,class,\n"
        "                           or case,class of whole scans\n"
        "  patients.csv             optional: case,patient, a row for every case, where a patient has several"
    ),
    home="your own scans; of another layout: weakmedsam init FOLDER",
    example=("images/scan{number}.nii.gz", "masks/scan{number}.nii.gz"),
)


@dataclass(frozen=True)
class Layout:
    """Where the scans of a folder lie.

    Attributes:
        data_dir: the folder.
        images: folder in it, or pattern of paths.
        masks: likewise.
        series: pattern of modality and description of DICOM series; None takes all.
    """

    data_dir: str
    images: str = "images"
    masks: str = "masks"
    series: str | None = None

    def __post_init__(self) -> None:
        for key, place in (("images", self.images), ("masks", self.masks)):
            if Path(place).is_absolute() or ".." in Path(place).parts:
                raise ConfigError(f"data.{key}: {place} is not below data_dir. Give a folder or a pattern within it.")

    @property
    def sources(self) -> Sources:
        """The files that the cases are made of."""
        return Sources(self.data_dir, tables=TABLES, places=(self.images, self.masks))


def find_folder_cases(layout: Layout, class_names: Sequence[str]) -> list[Case]:
    """The cases of a folder, or of the one folder below it that has its images.

    Slices of the tables are counted from 0 along the file's own third axis, as stored. The table is
    the image-level label where there is one; masks are then for validation and test only.

    Args:
        layout: where scans lie.
        class_names: names of the classes, id 1 first.

    Raises:
        DataError: no cases, or a table that cannot be read or does not fit the cases.
    """
    top = Path(layout.data_dir)
    root, images, masks = list_layout(layout)
    read_in = dict.fromkeys(folders_between(top, root))
    folders = [folder_of(root, place) for place in (layout.images, layout.masks) if not is_pattern(place)]
    tables = [
        path
        for folder in dict.fromkeys([*read_in, *folders])
        for path in entries(folder)
        if not (folder in read_in and path.name.lower() in TABLES)
    ]
    passed_over = [
        *(*images.passed_over, *masks.passed_over),
        *(path for path in tables if _LIKE_A_TABLE.match(path.name)),
    ]
    read = f"{READ} in {layout.images} and {layout.masks}, and beside these {' and '.join(TABLES)}"
    warn_of_passed_over(passed_over, root, read)
    if not images.files:
        return require_cases([], INFO, folders[0] if folders and folders[0].is_dir() else root)
    if top != root:
        _log.warning("%s has no %s/: those of %s are taken", top, head_of(layout.images), root)
    names = sorted({*images.files, *masks.files})
    labels, patients = (find_table(folders_between(top, root), name) for name in TABLES)
    table = read_labels(labels, class_names, names) if labels else {}
    patient = read_patients(patients, names) if patients else {}
    return require_cases(_make_cases(images, masks, table, patient, root / layout.images), INFO, root)


def list_layout(layout: Layout) -> tuple[Path, Listing, Listing]:
    """The data's own folder, and what lies in it: images, masks."""
    top, head = Path(layout.data_dir), head_of(layout.images)
    root = find_root(top, head) if head else top
    masks = list_scans(root, layout.masks)
    folders = [] if is_pattern(layout.masks) else [folder_of(root, layout.masks)]
    aside = [path for mask in masks.files.values() for path in mask.files or (mask.path,)]
    return root, list_scans(root, layout.images, layout.series, [*folders, *aside]), masks


def _make_cases(
    images: Listing,
    masks: Listing,
    table: Mapping[str, CaseLabels],
    patient: Mapping[str, str],
    place: Path,
) -> list[Case]:
    cases = []
    for name in {**images.files, **masks.files}:
        image, mask = images.files.get(name), masks.files.get(name)
        problem = None
        if image is None and mask is not None:
            wanted = place if is_pattern(str(place)) else place / f"{name}.nii.gz"
            problem = (
                f"{mask.path}: has no image {wanted}. Add it, or remove the mask; if it is of another image, give it "
                "that one's name."
            )
        elif image is not None and mask is None and name not in table:
            problem = f"{image.path}: has neither a mask in masks/ nor rows in labels.csv. Add one, or remove it."
        cases.append(case_of(name, image, mask, problem, patient.get(name), table.get(name)))
    return cases


def read_patients(path: Path, cases: Sequence[str]) -> dict[str, str]:
    """Read a CSV with the columns case and patient: case -> patient.

    Raises:
        DataError: unreadable, a column is missing, rows and cases do not belong together one to one, or two patients
            differ in leading zeros or in upper and lower case alone.
    """
    table, rows = read_pairs(path, "patient")
    check_cases(table, {case: line for case, (line, _) in rows.items()}, cases, needed=cases)
    check_spelling(path, "patient", rows.values())
    return {case: case_name(patient) for case, (_, patient) in rows.items()}
