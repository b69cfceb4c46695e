"""One way to read a scan of any format."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from data_modules.formats import metaimage, nrrd, pictures
from data_modules.formats.dicom import read_dicom
from data_modules.formats.dicom_files import is_dicom, looks_like_dicom
from data_modules.formats.nifti import read_nifti, read_nifti_place
from data_modules.formats.volume import Place, Reading, Volume, unreadable
from weakmedsam.errors import DataError

READING = Reading()


def read_scan(
    path: str | Path, files: Sequence[str | Path] = (), reading: Reading = READING, labels: bool = False
) -> Volume:
    """Read a scan, once.

    Args:
        path: of its file; of several, of their folder.
        files: the files of a scan that has several: slices of a DICOM series, numbered pictures.
        reading: what is taken of files that leave it open.
        labels: it is a mask.

    Raises:
        DataError: it cannot be read as the format that its name says.
        MemoryShortError: there is too little memory for its voxels.
    """
    path, files = Path(path), files or (path,)
    for file in map(Path, files):
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for
            raise unreadable(file, "it is no file", "scan's")
    first = Path(files[0])
    ending = first.suffix.lower()
    if ending in pictures.ENDINGS:
        return pictures.read_pictures(path, files, reading, labels)
    if looks_like_dicom(first) and (len(files) > 1 or not first.exists() or is_dicom(first)):
        return read_dicom(path, files, reading)
    if len(files) > 1:
        raise DataError(f"{path}: {len(files)} files of this format are no volume. Keep one.")
    if ending in nrrd.ENDINGS:
        return nrrd.read_nrrd(path, reading)
    if ending in metaimage.ENDINGS:
        return metaimage.read_metaimage(path, reading)
    return read_nifti(path, reading.channel)


def read_place(path: str | Path, files: Sequence[str | Path] = (), reading: Reading = READING) -> Place | None:
    """Where a scan lies, by its header alone; no voxel is read.

    Args:
        path: as of ``read_scan``.
        files: as of ``read_scan``.
        reading: as of ``read_scan``.

    Returns:
        None of DICOM and pictures: the headers of a series are compared where its files are found.

    Raises:
        DataError: what ``read_scan`` refuses by the header alone.
    """
    first = Path(files[0] if files else path)
    ending = first.suffix.lower()
    if ending in pictures.ENDINGS or len(files) > 1 or (looks_like_dicom(first) and is_dicom(first)):
        return None
    if ending in nrrd.ENDINGS:
        return nrrd.read_nrrd_place(path, reading)
    if ending in metaimage.ENDINGS:
        return metaimage.read_metaimage_place(path, reading)
    return read_nifti_place(path, reading.channel)
