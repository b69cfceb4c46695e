"""New scans: NIfTI files of which nothing is known, and their segmentations in the scans' own space.

Without torch, so that a command that finds all of them segmented says so at once.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_modules.cases import NIFTI_ENDINGS, Case, nifti_stem
from data_modules.store import stamp
from data_modules.volumes import Geometry, read_volume, to_scan
from weakmedsam.contracts import DataError
from weakmedsam.files import write_whole

MARK = "weakmedsam"
"""How the description in the header of a segmentation begins; its hash follows."""


class Measure(NamedTuple):
    """How much of a class there is in a segmentation.

    Attributes:
        case: the scan.
        class_name: the class.
        voxels: how many.
        ml: their volume, millilitres.
        slices: how many slices along the file's third axis have any.
    """

    case: str
    class_name: str
    voxels: int
    ml: float
    slices: int


def find_scans(path: Path) -> list[Case]:
    """The NIfTI files directly in a folder, or a single one, sorted by name.

    Raises:
        DataError: none, or two of one name.
    """
    if path.is_file() and path.name.endswith(NIFTI_ENDINGS):
        files = [path]
    elif path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.name.endswith(NIFTI_ENDINGS) and not p.name.startswith(".")
        )
    else:
        raise DataError(
            f"{path}: there is no such folder, nor a .nii or .nii.gz file of that name. Correct SCANS."
        )
    if not files:
        raise DataError(
            f"{path}: holds no .nii or .nii.gz file. Give the folder that the scans lie in directly, one file a scan."
        )
    cases: dict[str, Case] = {}
    for file in files:
        name = nifti_stem(file.name)
        if name in cases:
            raise DataError(f"{file}: {cases[name].image} has the same name. Rename or remove one of them.")
        cases[name] = Case(name, name, str(file))
    return list(cases.values())


def segmentation_path(folder: Path, case: str) -> Path:
    """Where a scan's segmentation goes."""
    return folder / f"{case}.nii.gz"


def mark_of(case: Case, made_by: str) -> str:
    """What the header of a segmentation says: a short hash of the scan's file and of what segments it.

    Args:
        case: the scan.
        made_by: names network and settings.

    Raises:
        DataError: the scan is gone.
    """
    sources = [
        (Path(name).name, size, time) for name, size, time in stamp(case, str(Path(case.image).parent))
    ]
    return f"{MARK} {hashlib.sha256(repr((made_by, sources)).encode()).hexdigest()[:16]}"


def find_unsegmented(cases: Sequence[Case], folder: Path, made_by: str) -> list[Case]:
    """The scans that have no segmentation yet, or one of another network, of other settings, or of an earlier file."""
    return [case for case in cases if _said(segmentation_path(folder, case.name)) != mark_of(case, made_by)]


def _said(path: Path) -> str | None:
    """The mark of a segmentation; None where there is none that can be read."""
    try:
        header: Any = nib.load(path).header if path.is_file() else None
    except (OSError, EOFError, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError):
        return None
    return None if header is None else bytes(header["descrip"].item()).decode("ascii", "replace")


def write_segmentation(path: Path, ids: NDArray[np.uint8], geometry: Geometry, mark: str) -> None:
    """Write class ids in the scan's own space, whole or not at all; the same ids give the same bytes.

    Args:
        path: .nii.gz.
        ids: (D, H0, W0) class ids on the scan's own slices.
        geometry: of the scan.
        mark: of ``mark_of``.

    Raises:
        DataError: the ids are not of this scan's shape.
        DiskError: the disk is full.
    """
    image = to_scan(ids, geometry)
    image.header["descrip"] = mark
    write_whole(path, gzip.compress(image.to_bytes(), mtime=0))


def measure(path: Path, class_names: Sequence[str]) -> list[Measure]:
    """Volumes of the classes in a segmentation, as its own header has the voxel's size; one a class.

    Args:
        path: the segmentation.
        class_names: names of the classes, id 1 first.

    Raises:
        DataError: it cannot be read.
    """
    ids, geometry = read_volume(path)
    counts = np.stack([np.bincount(part.ravel(), minlength=256) for part in ids])
    voxel = float(np.prod(geometry.spacing)) / 1000
    return [
        Measure(
            nifti_stem(path.name),
            name,
            int(counts[:, number].sum()),
            float(counts[:, number].sum()) * voxel,
            int(np.count_nonzero(counts[:, number])),
        )
        for number, name in enumerate(class_names, start=1)
    ]
