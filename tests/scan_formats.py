"""Scans written in other formats than NIfTI, small, by the libraries that users have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
CT, ENHANCED_MR, SECONDARY = (f"1.2.840.10008.5.1.4.1.1.{part}" for part in ("2", "4.1", "7"))


def slice_of(pixels, **tags) -> Dataset:
    """A DICOM data set of (rows, columns) or (frames, rows, columns) whole numbers; None leaves a tag out."""
    pixels = np.asarray(pixels)
    held = Dataset()
    held.SOPClassUID, held.Modality = CT, "CT"
    held.SOPInstanceUID = pydicom.uid.generate_uid()
    held.PatientID, held.SeriesDescription, held.SeriesNumber = "P1", "thorax", 1
    held.SeriesInstanceUID, held.StudyInstanceUID = "1.2.3.4", "1.2.3"
    held.Rows, held.Columns = pixels.shape[-2:]
    held.SamplesPerPixel, held.PhotometricInterpretation = 1, "MONOCHROME2"
    held.BitsAllocated = held.BitsStored = 8 * pixels.dtype.itemsize
    held.HighBit = held.BitsStored - 1
    held.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        held.NumberOfFrames = len(pixels)
    for name, value in tags.items():
        setattr(held, name, value)
        if value is None:
            delattr(held, name)
    held.PixelData = pixels.tobytes()
    return held


def save(held: Dataset, path: Path, syntax=ExplicitVRLittleEndian) -> Path:
    """Write a DICOM file; big-endian pixels are the caller's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held.file_meta = FileMetaDataset()
    held.file_meta.TransferSyntaxUID = syntax
    held.file_meta.MediaStorageSOPClassUID = held.SOPClassUID
    held.file_meta.MediaStorageSOPInstanceUID = held.SOPInstanceUID
    held.save_as(path, enforce_file_format=True, little_endian=syntax != ExplicitVRBigEndian, implicit_vr=False)
    return path


def place_of(affine, number: int) -> dict[str, list[float]]:
    """Position, orientation and spacing tags of slice ``number`` of (columns, rows, slices) with a RAS affine."""
    lps = LPS @ affine
    sizes = np.linalg.norm(lps[:3, :2], axis=0)
    return {
        "ImagePositionPatient": [_short(x) for x in lps[:3, 3] + number * lps[:3, 2]],
        "ImageOrientationPatient": [_short(x) for x in (lps[:3, :2] / sizes).T.ravel()],
        "PixelSpacing": [_short(sizes[1]), _short(sizes[0])],
    }


def save_dicom(folder: Path, voxels, affine, shuffled: int = 0, **tags) -> list[Path]:
    """A series, a file a slice, in ``folder``; named in another order than the slices lie in."""
    order = np.random.default_rng(shuffled).permutation(voxels.shape[2])
    series = {"SeriesInstanceUID": tags.get("SeriesInstanceUID", pydicom.uid.generate_uid())}
    paths = []
    for name, number in enumerate(order):
        said = place_of(affine, number) | {"InstanceNumber": int(number) + 1} | tags | series
        paths.append(save(slice_of(np.ascontiguousarray(voxels[:, :, number].T), **said), folder / f"IM{name:04d}.dcm"))
    return [paths[int(np.flatnonzero(order == number)[0])] for number in range(len(order))]


def save_enhanced(path: Path, voxels, affine, slopes=None, **tags) -> Path:
    """One multi-frame file with functional groups; slopes are of the frames."""
    frames = []
    shared = Dataset()
    for number in range(voxels.shape[2]):
        place = place_of(affine, number)
        frame = Dataset()
        frame.PlanePositionSequence = [_item(ImagePositionPatient=place["ImagePositionPatient"])]
        if slopes is not None:
            said = {"RescaleSlope": slopes[number], "RescaleIntercept": -1, "RescaleType": "US"}
            frame.PixelValueTransformationSequence = [_item(**said)]
        frames.append(frame)
        shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=place["ImageOrientationPatient"])]
        shared.PixelMeasuresSequence = [_item(PixelSpacing=place["PixelSpacing"], SliceThickness=2)]
    said = {"SOPClassUID": ENHANCED_MR, "Modality": "MR"} | tags
    held = slice_of(np.ascontiguousarray(voxels.transpose(2, 1, 0)), **said)
    held.SeriesInstanceUID = pydicom.uid.generate_uid()
    held.PerFrameFunctionalGroupsSequence = frames
    held.SharedFunctionalGroupsSequence = [shared]
    return save(held, path)


def seg_on(path: Path, shape, affine) -> np.ndarray:
    """Class ids of a DICOM SEG on voxels with a RAS affine, by what each frame says of its place; by pydicom alone."""
    held = pydicom.dcmread(path)
    shared = held.SharedFunctionalGroupsSequence[0]
    across, down = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    apart = [float(size) for size in shared.PixelMeasuresSequence[0].PixelSpacing]
    ids, into = np.zeros(shape, np.uint8), np.linalg.inv(LPS @ affine)
    pixels = held.pixel_array.reshape((-1, held.Rows, held.Columns))
    for frame, groups in zip(pixels, held.PerFrameFunctionalGroupsSequence, strict=True):
        origin = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        of_frame = groups if "SegmentIdentificationSequence" in groups else shared
        number = of_frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        rows, columns = np.nonzero(frame)
        places = origin + np.outer(columns, across) * apart[1] + np.outer(rows, down) * apart[0]
        there = (np.column_stack([places, np.ones(len(places))]) @ into.T)[:, :3]
        assert np.abs(there - np.rint(there)).max(initial=0) < 0.01
        index = tuple(np.rint(there).astype(int).T)
        assert not ids[index].any()
        ids[index] = number
    return ids


def write_by_itk(code: str, *words: object) -> None:
    """Run code with SimpleITK as ``sitk`` in a process of its own: it clashes with faiss-gpu in one."""
    code = f"import sys\nimport numpy as np\nimport SimpleITK as sitk\n{code}"
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)


def same_places(first, second) -> bool:
    """Whether two volumes hold the same values at the same places, in whatever order they store them."""
    indices = np.stack([*np.indices(second.voxels.shape).reshape(3, -1), np.ones(second.voxels.size)])
    there = (np.linalg.inv(first.affine) @ second.affine @ indices)[:3]
    nearest = np.rint(there).astype(int)
    if np.abs(there - nearest).max() > 0.01 or first.voxels.size != second.voxels.size:
        return False
    if (nearest < 0).any() or (first.voxels.shape <= nearest.T).any():
        return False
    return bool(np.array_equal(first.voxels[tuple(nearest)], second.voxels.ravel()))


def _item(**tags) -> Dataset:
    held = Dataset()
    for name, value in tags.items():
        setattr(held, name, value)
    return held


def _short(number: float) -> str:
    """At most 16 characters, as DICOM writes numbers."""
    return f"{number:.10f}"[:16]
