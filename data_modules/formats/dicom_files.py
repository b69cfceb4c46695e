"""DICOM files: which of them are slices of one scan. Headers are read, no voxels."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from weakmedsam.errors import DataError

ENDINGS = (".dcm", ".dicom", ".ima")

DEFLATED = b"1.2.840.10008.1.2.1.99"
"""Transfer syntax of which even the header is read by inflating the whole file."""

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
"""Class of DICOM segmentation objects."""

READ_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality"),
    *("SeriesDescription", "SeriesNumber", "InstanceNumber", "ImageType", "NumberOfFrames", "Rows"),
    "ImagePositionPatient",
)


class Header(NamedTuple):
    """What a DICOM file says of where it belongs; texts are empty where it says nothing.

    Attributes:
        path: of the file.
        series: its SeriesInstanceUID.
        study: its StudyInstanceUID.
        instance: its SOPInstanceUID.
        patient: PatientID.
        modality: CT, MR, ...
        description: of the series.
        number: of the series.
        order: of the slice in the series, InstanceNumber.
        alone: whether it is a scan by itself: it has several frames, or no position.
        aside: why it is no scan; empty where it is one.
    """

    path: Path
    series: str
    study: str
    instance: str
    patient: str
    modality: str
    description: str
    number: str
    order: int
    alone: bool
    aside: str


class Series(NamedTuple):
    """The files of one scan.

    Attributes:
        files: sorted by path.
        first: header of one of them.
        problem: why they are no scan, and the mend.
    """

    files: tuple[Path, ...]
    first: Header
    problem: str | None = None

    @property
    def title(self) -> str:
        """What ``data.series`` is compared with: modality and description."""
        return f"{self.first.modality} {self.first.description}".strip()


def looks_like_dicom(path: Path) -> bool:
    """Whether a file may be DICOM by its name: a known ending, or none, as of numbers and of UIDs."""
    ending = path.suffix.lower()
    return ending in ENDINGS or (not re.search("[a-z]", ending) and path.name.upper() != "DICOMDIR")


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM.

    Raises:
        DataError: it cannot be read, or has to be inflated whole.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Look at its rights and its disk.") from error
    if start[128:132] != b"DICM":
        return False
    if DEFLATED in start:
        raise DataError(f"{path}: is deflated as a whole, which is not read. Save it without (dcmconv +te).")
    return True


@contextmanager
def quiet_pydicom() -> Iterator[Any]:
    """The library, without its remarks on values that break the standard and do no harm."""
    import pydicom  # a third of a second, for those alone who have such files

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pydicom


def read_header(path: Path) -> Header:
    """What a file says of where it belongs.

    Raises:
        DataError: it is damaged.
    """
    with quiet_pydicom() as pydicom:
        try:
            held = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(READ_TAGS))
            said = {tag: _text(held.get(tag)) for tag in READ_TAGS}
            frames, position = int(held.get("NumberOfFrames") or 1), held.get("ImagePositionPatient")
            order = int(held.get("InstanceNumber") or 0)
        except Exception as error:  # the library raises whatever a damaged file leads it to
            raise damaged(path, error) from error
    aside = ""
    if said["SOPClassUID"] == SEGMENTATION:
        aside = "segmentations"
    elif not said["Rows"] or not said["SeriesInstanceUID"]:
        aside = "no images"
    elif "LOCALIZER" in said["ImageType"].upper():
        aside = "localizers"
    return Header(
        path,
        series=said["SeriesInstanceUID"],
        study=said["StudyInstanceUID"],
        instance=said["SOPInstanceUID"],
        patient=said["PatientID"],
        modality=said["Modality"],
        description=said["SeriesDescription"],
        number=said["SeriesNumber"],
        order=order,
        alone=frames > 1 or not position,
        aside=aside,
    )


def damaged(path: Path, error: Exception) -> DataError:
    """The error of a file that the library cannot read."""
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{path}: cannot be read ({error.strerror}). Look at its rights and its disk.")
    said = str(error).partition("\n")[0][:200] or type(error).__name__
    return DataError(f"{path}: cannot be read ({said}). It is truncated, damaged or no DICOM image: get it again.")


def group_series(headers: Iterable[Header]) -> list[Series]:
    """Scans of some files, wherever they lie: by series; a file that is alone is a scan.

    Copies of a slice, as in a folder that was copied, are a problem of their series.
    """
    groups: dict[tuple[str, str], list[Header]] = {}
    for header in headers:
        groups.setdefault((header.series, header.instance if header.alone else ""), []).append(header)
    found = []
    for group in groups.values():
        group.sort(key=lambda header: str(header.path))
        seen: dict[str, Path] = {}
        problem = None
        for header in group:
            first = seen.setdefault(header.instance, header.path)
            if first != header.path and header.instance and problem is None:
                problem = f"{header.path}: is a copy of the slice {first}. Remove one, or the folder that was copied."
        found.append(Series(tuple(header.path for header in group), group[0], problem))
    return sorted(found, key=lambda series: str(series.files[0]))


def choose_series(found: Sequence[Series], pattern: str | None) -> list[Series]:
    """Those whose modality and description a pattern with ``*`` and ``?`` takes; all where there is none."""
    if pattern is None:
        return list(found)
    return [series for series in found if fnmatchcase(series.title.casefold(), pattern.casefold())]


def name_series(found: Sequence[Series]) -> list[str]:
    """A name for each, of patient and description, as short as tells them apart and safe as a file's name.

    The number of the series, then of the slice, then a count follow where it does not.
    """
    ways = [
        lambda series: (series.first.patient or "scan",),
        lambda series: (series.first.patient or "scan", series.first.description or series.first.number),
        lambda series: (series.first.patient or "scan", series.first.description, series.first.number),
        lambda series: (
            *(series.first.patient or "scan", series.first.description, series.first.number),
            str(series.first.order) if series.first.alone else "",
        ),
    ]
    by_way = [["_".join(filter(None, map(safe_name, way(series)))) for series in found] for way in ways]
    counts = [Counter(name.casefold() for name in names) for names in by_way]
    chosen = []
    for names in zip(*by_way, strict=True):
        single = [name for name, count in zip(names, counts, strict=True) if count[name.casefold()] == 1]
        chosen.append(single[0] if single else names[-1])
    taken: Counter[str] = Counter()
    for place, name in enumerate(chosen):
        taken[name.casefold()] += 1
        if taken[name.casefold()] > 1:
            chosen[place] = f"{name}_{taken[name.casefold()]}"
    return chosen


def safe_name(text: str) -> str:
    """A text as part of a file's name: letters, digits, point, minus and underscore, at most 60 of them."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._-")[:60]


def _text(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())
