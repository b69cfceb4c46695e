"""Unlabelled scans: files of which nothing is known, and their segmentations in the scans' own space.

Without torch, so that a command that finds all of them segmented says so at once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_modules.cases import Case
from data_modules.formats.dicom_files import safe_name
from data_modules.formats.dicom_seg import read_seg_mark, write_seg
from data_modules.formats.nifti import read_description, write_labels
from data_modules.nifti_files import (
    case_name,
    describe_folder,
    is_dead_link,
    is_nifti,
    look_at,
    nifti_stem,
)
from data_modules.scan_files import READ, is_dicom_file, is_scan_file, list_scans, scan_stem
from data_modules.store import stamp
from data_modules.store_index import Entry, StoreSpec
from data_modules.volumes import Geometry, read_volume
from weakmedsam.errors import DataError
from weakmedsam.system.atomic_io import SEGMENTATIONS, write_whole

SourceStamps: TypeAlias = tuple[tuple[str, int, int], ...]

MARK = "weakmedsam"
"""How the description in the header of a segmentation begins; its hash follows."""

WITH_SEG = " SEG"
"""How the description ends where a DICOM SEG lies beside the segmentation: one is the result with the other."""

_log = logging.getLogger(__name__)


class Measure(NamedTuple):
    """How much of a class there is in a segmentation.

    Attributes:
        case: the scan.
        class_name: the class.
        voxels: how many.
        ml: their volume, millilitres.
        slices: how many slices have any, of the plane in which the network looks.
    """

    case: str
    class_name: str
    voxels: int
    ml: float
    slices: int


def find_scans(path: Path, series: str | None = None) -> list[Case]:
    """The scans in a folder, of any format and with any folders below it, or a single file, sorted by name.

    Links are followed.

    Args:
        path: of the folder or file.
        series: pattern of modality and description, which chooses among DICOM series of several kinds; where all are of
            one kind they are taken. None takes all.

    Raises:
        DataError: none, or two of one name; or no series fits.
    """
    if path.is_dir() and not is_nifti(path.name):
        files = {**list_scans(path, ".", anywhere=True).files}
        if len({file.title for file in files.values() if file.title}) > 1:
            files = {**list_scans(path, ".", series, anywhere=True).files}
    elif is_scan_file(path) and (path.exists() or is_dead_link(path)):
        found = look_at(path)
        files = {case_name(scan_stem(path.name)): found} if found else {}
    else:
        raise DataError(
            f"{path}: there is no such folder, nor a file of that name that is read ({READ}). Correct SCANS."
        )
    if not files:
        raise DataError(
            f"{path}: holds no scan that is read ({READ}; {describe_folder(path)}). Give the folder of the scans."
        )
    if twice := [str(file.problem) for file in files.values() if file.twice]:
        raise DataError("\n".join(twice))
    return [
        Case(name, name, str(file.path), problem=file.problem, image_files=tuple(map(str, file.files)))
        for name, file in files.items()
    ]


def segmentation_path(folder: Path, case: str) -> Path:
    """Where a scan's segmentation goes."""
    return folder / f"{case}.nii.gz"


def seg_path(folder: Path, case: str) -> Path:
    """Where the DICOM SEG of a DICOM series goes."""
    return folder / f"{case}.dcm"


def is_dicom_case(case: Case) -> bool:
    """Whether a scan is a DICOM series, or a DICOM file."""
    return is_dicom_file(Path((case.image_files or (case.image,))[0]))


def scores_path(folder: Path, case: str, number: int, class_name: str) -> Path:
    """Where the scores of a class go; two names may be one as part of a file's name, hence the class's id."""
    return folder / "scores" / f"{case}_{number}_{safe_name(class_name)}.nii.gz"


def mark_of(sources: SourceStamps, made_by: str) -> str:
    """What the header of a segmentation says: a short hash of the scan's file and of what segments it.

    Args:
        sources: (path, bytes, modification time in ns) of the scan's file; of the path its last part counts.
        made_by: names network and settings.
    """
    files = [(Path(name).name, size, time) for name, size, time in sources]
    return f"{MARK} {hashlib.sha256(repr((made_by, files)).encode()).hexdigest()[:16]}"


def find_unsegmented(cases: Sequence[Case], folder: Path, made_by: str) -> list[Case]:
    """The scans that have no segmentation yet, or one of another network, of other settings, or of an earlier file.

    Raises:
        DataError: a file in the place of a segmentation is not one of this program's, or is damaged: it is not
            written over.
    """
    return [case for case in cases if not _is_segmented(case, folder, made_by)]


def _is_segmented(case: Case, folder: Path, made_by: str) -> bool:
    path, seg = segmentation_path(folder, case.name), seg_path(folder, case.name)
    held = read_seg_mark(seg) if seg.exists() and is_dicom_case(case) else ""
    if held is None:
        raise _not_ours(seg)
    if not path.exists():
        return False
    try:
        said = read_description(path)
    except DataError:
        said = ""
    if not said.startswith(MARK):
        raise _not_ours(path)
    try:
        mark = mark_of(stamp(case, str(Path(case.image).parent)), made_by)
    except DataError:  # the scan is gone: whoever reads it will say so
        return False
    return said == mark or (said == mark + WITH_SEG and held == mark)


def _not_ours(path: Path) -> DataError:
    return DataError(
        f"{path}: is damaged, or not a segmentation of this program, and would be written over. Remove it, or "
        "name another OUT."
    )


def write_seg_beside(
    folder: Path, case: Case, ids: NDArray[np.uint8], read: tuple[Entry, StoreSpec], names: Sequence[str], mark: str
) -> bool:
    """Write the DICOM SEG of a scan that is a DICOM series; one line says why where it cannot be one.

    An earlier one goes then: it is of another network, or of other settings.

    Args:
        folder: of the segmentations.
        case: the scan.
        ids: (D, H0, W0) class ids on its own slices.
        read: the scan as it was read, and how.
        names: of the classes, id 1 first.
        mark: of ``mark_of``.

    Returns:
        Whether it is there.

    Raises:
        DiskError: the disk is full.
    """
    (entry, spec), path = read, seg_path(folder, case.name)
    try:
        if stamp(case, spec.data_dir) != entry.sources:
            raise DataError("the scan has changed meanwhile")
        scan = (case.image, case.image_files or (case.image,), spec.reading)
        write_seg(path, entry.geometry.from_slices(ids), scan, names, mark)
    except DataError as error:
        path.unlink(missing_ok=True)
        _log.warning("%s: no DICOM SEG, NIfTI alone: %s", case.name, error)
        return False
    return True


def write_segmentation(path: Path, ids: NDArray[np.uint8], geometry: Geometry, mark: str) -> None:
    """Write class ids in the scan's own space, atomically; the same ids give the same bytes.

    Args:
        path: .nii.gz.
        ids: (D, H0, W0) class ids on the scan's own slices.
        geometry: of the scan.
        mark: of ``mark_of``.

    Raises:
        DataError: the ids are not of this scan's shape.
        DiskError: the disk is full.
    """
    voxels = geometry.from_slices(ids)
    if voxels.shape != geometry.shape:
        raise DataError(f"A result of {voxels.shape} voxels is not of this scan, which has {geometry.shape}.")
    write_whole(path, write_labels(voxels, bytes.fromhex(geometry.header), mark), SEGMENTATIONS)


def write_scores(path: Path, scores: NDArray[np.float32], geometry: Geometry) -> None:
    """Write a class's scores in the scan's own space, atomically.

    Args:
        path: .nii.gz.
        scores: (D, H0, W0) in [0, 1] on the scan's own slices.
        geometry: of the scan.

    Raises:
        DiskError: the disk is full.
    """
    voxels = geometry.from_slices(scores.astype(np.float32, copy=False))
    write_whole(path, write_labels(voxels, bytes.fromhex(geometry.header), MARK), SEGMENTATIONS)


def measure(path: Path, class_names: Sequence[str], plane: str) -> list[Measure]:
    """Volumes of the classes in a segmentation, as its own header has the voxel's size; one a class.

    Args:
        path: the segmentation.
        class_names: names of the classes, id 1 first.
        plane: in which slices are counted.

    Raises:
        DataError: it cannot be read.
    """
    try:
        ids, geometry = read_volume(path, plane)
    except DataError as error:
        raise DataError(f"{error} Or remove it, and the same command makes it anew.") from error
    counts = np.stack([np.bincount(part.ravel(), minlength=256) for part in ids])
    voxel = abs(float(np.linalg.det(np.asarray(geometry.affine)[:3, :3]))) / 1000
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
