"""DICOM segmentation objects: class ids on the slices of a DICOM series, which they name.

The object belongs to the patient and study of the series, as every DICOM object does: it holds the patient's name.
Class names are free text, so each segment has them as its label, and the codes that 3D Slicer takes where nothing is
chosen: SNOMED CT 85756007, Tissue, as category and as type.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_modules.formats.dicom_files import SEGMENTATION, quiet_pydicom
from data_modules.formats.dicom_slices import Slice, list_slices, position_of
from data_modules.formats.volume import Reading
from weakmedsam import __version__
from weakmedsam.errors import DataError
from weakmedsam.system.atomic_io import SEGMENTATIONS, write_whole

MAKER = "WeakMedSAM"

TISSUE = ("85756007", "SCT", "Tissue")
"""Code, scheme and meaning of every segment's category and type."""

SERIES_OFFSET = 1000
"""Added to the number of the series: a series of its own, behind those of the scanner in a list."""

LONGEST_LABEL = 64
"""Characters of a segment's label (VR LO)."""

MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName"),
)
"""What the standard wants to be there and lets be empty (type 2); scans that were anonymised lack some of them."""


def write_seg(
    path: Path, voxels: NDArray[np.uint8], scan: tuple[str, Sequence[str], Reading], names: Sequence[str], mark: str
) -> None:
    """Write class ids as a binary DICOM segmentation object, atomically: segment k is class id k.

    Frames without a voxel of their class are left out, as is usual.

    Args:
        path: .dcm.
        voxels: (X, Y, Z) class ids along the scan's own axes, as ``read_dicom`` has them.
        scan: what ``read_dicom`` was given: path, files, and what is taken of them.
        names: of the classes, id 1 first.
        mark: for ``read_seg_mark``, up to 64 ASCII characters.

    Raises:
        DataError: it cannot be one; the message says why, in a few words.
        DiskError: the disk is full.
    """
    if not voxels.any():
        raise DataError("nothing was found, and a SEG cannot be empty")
    slices, headers = list_slices(*scan)
    if (columns_rows := slices[0].pixels.shape[1::-1]) != voxels.shape[:2] or len(slices) != voxels.shape[2]:
        raise DataError(f"the series has changed: it has {len(slices)} slices of {columns_rows} now")
    pixels, sources = _of_frames(voxels, slices, headers)
    if slices[0].position is not None and not sources[0].get("FrameOfReferenceUID"):
        raise DataError("its files state no FrameOfReferenceUID")
    with quiet_pydicom():
        try:
            stated = {name: copy.deepcopy(sources[0][name]) for name in MAY_BE_EMPTY if name in sources[0]}
            for source in sources:
                _complete(source, slices)
            made = _make(pixels, sources, names, mark)
            for name, element in stated.items():
                made[name] = element
            stream = io.BytesIO()
            made.save_as(stream)
        except MemoryError:
            raise
        except Exception as error:  # the libraries raise whatever headers beyond the standard lead them to
            raise DataError(str(error).partition("\n")[0][:200] or type(error).__name__) from error
    write_whole(path, stream.getvalue(), SEGMENTATIONS)


def read_seg_mark(path: Path) -> str | None:
    """The mark of an object that ``write_seg`` has written; None of any other file."""
    with quiet_pydicom() as pydicom:
        try:
            tags = ["SOPClassUID", "Manufacturer", "ContentDescription"]
            held = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
        except Exception:  # the library raises whatever a damaged file leads it to
            return None
    ours = held.get("SOPClassUID") == SEGMENTATION and held.get("Manufacturer") == MAKER
    return str(held.get("ContentDescription") or "") if ours else None


def _of_frames(
    voxels: NDArray[np.uint8], slices: Sequence[Slice], headers: dict[Path, Any]
) -> tuple[NDArray[np.uint8], list[Any]]:
    """(frames, rows, columns) in the order of the sources' frames, and the sources.

    Raises:
        DataError: a file of several frames without positions, or with several at each.
    """
    pixels = np.ascontiguousarray(voxels.transpose(2, 1, 0))
    sources = [headers[path] for path in dict.fromkeys(part.path for part in slices)]
    frames = sum(int(source.get("NumberOfFrames") or 1) for source in sources)
    if slices[0].position is None and frames > 1:
        raise DataError("its frames state no position")
    if frames > len(sources) > 1 or frames != len(slices):
        raise DataError("it has several frames at each position, or several files of frames")
    if len(sources) == 1:
        pixels = pixels[np.argsort([part.order for part in slices])]
    return pixels, sources


def _complete(source: Any, slices: Sequence[Slice]) -> None:
    """State in a header, where highdicom looks for it, what the scan's slices say of their place.

    Orientations that differ by rounding become one. What may be empty is emptied: highdicom refuses values beyond the
    standard, a sex of W or a date with points; they are put back as they were.
    """
    from pydicom.dataset import Dataset
    from pydicom.valuerep import format_number_as_ds as short

    def item(**tags: Any) -> list[Any]:
        held = Dataset()
        for name, value in tags.items():
            setattr(held, name, value)
        return [held]

    for name in MAY_BE_EMPTY:
        setattr(source, name, "")
    first = slices[0]
    if first.position is None or first.spacing is None:
        return
    normal = np.cross(*first.directions)
    apart = normal @ (position_of(slices[1]) - position_of(first)) if len(slices) > 1 else min(first.spacing)
    directions = [short(value) for value in first.directions.ravel().tolist()]
    spacing = [short(first.spacing[1]), short(first.spacing[0])]
    thickness = short(float(first.thickness or apart))
    if int(source.get("NumberOfFrames") or 1) == 1:
        (place,) = [part.position for part in slices if part.path == Path(source.filename)]
        assert place is not None
        source.ImagePositionPatient = [short(value) for value in place.tolist()]
        source.ImageOrientationPatient, source.PixelSpacing, source.SliceThickness = directions, spacing, thickness
        source.pop("SpacingBetweenSlices", None)  # highdicom measures it
        return
    shared = source.SharedFunctionalGroupsSequence[0] if source.get("SharedFunctionalGroupsSequence") else Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=directions)
    shared.PixelMeasuresSequence = item(PixelSpacing=spacing, SliceThickness=thickness)
    source.SharedFunctionalGroupsSequence = [shared]


def _make(pixels: NDArray[np.uint8], sources: Sequence[Any], names: Sequence[str], mark: str) -> Any:
    """The object; a series of its own in the study of its sources."""
    import highdicom as hd  # a second, for those alone who have such files
    from pydicom.sr.codedict import codes

    tissue = hd.sr.CodedConcept(*TISSUE)
    network = hd.AlgorithmIdentificationSequence(MAKER, codes.DCM.ArtificialIntelligence, __version__)
    segments = [
        hd.seg.SegmentDescription(number, name.replace("\\", "/")[:LONGEST_LABEL], tissue, tissue, "AUTOMATIC", network)
        for number, name in enumerate(names, start=1)
    ]
    first = sources[0]
    return hd.seg.Segmentation(
        sources,
        pixels,
        "BINARY",
        segments,
        hd.UID(),
        SERIES_OFFSET + abs(int(first.get("SeriesNumber") or 0)) % 2**30,
        hd.UID(),
        1,
        MAKER,
        MAKER,
        __version__,
        mark.rpartition(" ")[2],
        content_description=mark,
        content_label="SEGMENTATION",
        series_description=f"{MAKER} {first.get('SeriesDescription') or ''}".strip()[:LONGEST_LABEL],
        specific_character_set="ISO_IR 192",
    )
