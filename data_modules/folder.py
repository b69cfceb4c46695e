"""Your own data: a folder of NIfTI volumes, with masks, or a label table, or both."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from data_modules.base import SliceDataModule, Supervision
from data_modules.cases import Case, DataSet, Intensity, list_nifti, require_cases
from data_modules.prepare import OnBadCase
from data_modules.transforms import Augmentation
from data_modules.volumes import Plane
from weakmedsam.contracts import DataError

FACTS = DataSet(
    name="folder",
    classes={},  # the user names them
    default=(),
    values=(),
    intensity=Intensity(percentiles=(0.5, 99.5)),
    layout=(
        "  images/<case>.nii.gz     (or .nii)\n"
        "  masks/<case>.nii.gz      optional where labels.csv has the case\n"
        "  labels.csv               optional: case,slice,<class>,... with 0 or 1 per slice\n"
        "  patients.csv             optional: case,patient where a patient has several cases"
    ),
    home="your own scans",
)


def find_cases(root: Path, class_names: Sequence[str]) -> list[Case]:
    """The cases of a folder.

    ``slice`` in ``labels.csv`` counts from 0 along the file's own third axis, as stored. The table is
    the image-level label where there is one; masks are then for validation and test only.

    Args:
        root: the folder.
        class_names: columns of ``labels.csv`` to read, in order.

    Raises:
        DataError: no cases, or a table that cannot be read.
    """
    images, masks = list_nifti(root / "images"), list_nifti(root / "masks")
    table = read_table(root / "labels.csv", class_names) if (root / "labels.csv").exists() else {}
    patients = read_patients(root / "patients.csv") if (root / "patients.csv").exists() else {}
    cases = []
    for name in sorted({*images, *masks, *table}):
        image, mask = images.get(name), masks.get(name)
        problem = None
        if image is None:
            named = mask or f"{root / 'labels.csv'}: case {name}"
            problem = f"{named}: has no image {root / 'images' / name}.nii.gz. Add the image or remove it."
        elif mask is None and name not in table:
            problem = f"{image}: has neither a mask in masks/ nor rows in labels.csv. Add one, or remove it."
        cases.append(
            Case(
                name=name,
                patient=patients.get(name, name),
                image=str(image or ""),
                mask=str(mask) if mask else None,
                table=table.get(name),
                problem=problem,
            )
        )
    return require_cases(cases if images else [], FACTS, root)


def read_table(path: Path, class_names: Sequence[str]) -> dict[str, dict[int, tuple[int, ...]]]:
    """Read a label table.

    Args:
        path: CSV with the columns case, slice and one per class.
        class_names: the columns to read.

    Returns:
        Case -> slice -> 0 or 1 per class.

    Raises:
        DataError: unreadable, a column is missing, a value is not 0 or 1, or a slice has two rows.
    """
    table: dict[str, dict[int, tuple[int, ...]]] = {}
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in ("case", "slice", *class_names) if name not in (reader.fieldnames or [])]
        if missing:
            raise DataError(
                f"{path}: lacks the column(s) {missing}; it has {reader.fieldnames}. Correct classes or it."
            )
        for row in reader:
            labels = [(row[name] or "").strip() for name in class_names]
            number = (row["slice"] or "").strip()
            if not number.isdigit() or any(label not in ("0", "1") for label in labels):
                raise DataError(
                    f"{path}: line {reader.line_num}: slice must be 0, 1, 2, ... and labels 0 or 1."
                )
            slices = table.setdefault(row["case"], {})
            if int(number) in slices:
                raise DataError(
                    f"{path}: line {reader.line_num}: case {row['case']} slice {number} has two rows."
                )
            slices[int(number)] = tuple(int(label) for label in labels)
    return table


def read_patients(path: Path) -> dict[str, str]:
    """Read a CSV with the columns case and patient.

    Raises:
        DataError: a column is missing.
    """
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    if any(not row.get("case") or not row.get("patient") for row in rows):
        raise DataError(f"{path}: needs the columns case and patient, filled in every row.")
    return {row["case"]: row["patient"] for row in rows}


class Folder(SliceDataModule):
    """Your own volumes. Arguments beside those of ``SliceDataModule``.

    Args:
        data_dir: the folder, laid out as ``FACTS.layout``.
        classes: class name -> mask values; the names are also the columns of ``labels.csv``. Needed.
        background_values: further mask values that may occur and count as background; any other value
            is an error.
    """

    facts = FACTS

    def __init__(
        self,
        data_dir: str,
        classes: dict[str, list[int]],
        background_values: tuple[int, ...] = (),
        store_dir: str = "data",
        image_size: int = 256,
        plane: Plane = "axial",
        min_pixels: int = 10,
        window: tuple[float, float] | None = None,
        percentiles: tuple[float, float] | None = None,
        split_file: str | None = None,
        split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        on_bad_case: OnBadCase = "raise",
        supervision: Supervision = "image",
        pseudo_labels_dir: str | None = None,
        only_positive: bool = False,
        augment: Augmentation | None = None,
        batch_size: int = 24,
        num_workers: int = 2,
        prepare_workers: int | None = None,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            store_dir=store_dir,
            image_size=image_size,
            plane=plane,
            classes=classes,
            min_pixels=min_pixels,
            window=window,
            percentiles=percentiles,
            split_file=split_file,
            split_fractions=split_fractions,
            seed=seed,
            on_bad_case=on_bad_case,
            supervision=supervision,
            pseudo_labels_dir=pseudo_labels_dir,
            only_positive=only_positive,
            augment=augment,
            batch_size=batch_size,
            num_workers=num_workers,
            prepare_workers=prepare_workers,
        )
        self.background_values = tuple(background_values)

    def find_cases(self) -> list[Case]:
        """The cases of the folder; see the module's ``find_cases``."""
        return find_cases(Path(self.data_dir), self.class_names)

    def other_values(self) -> tuple[int, ...]:
        """Values named as background."""
        return self.background_values
