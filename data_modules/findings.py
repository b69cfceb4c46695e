"""What a check of a data set finds, and the rules by which scans are compared; loads no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_modules.cases import Case
from data_modules.formats.read import read_place
from data_modules.formats.volume import Reading
from data_modules.store import SliceReader
from data_modules.store_index import Entry, StoreSpec
from data_modules.volumes import Geometry, lay_on_image
from weakmedsam.contracts import SOMEWHERE
from weakmedsam.errors import DataError
from weakmedsam.system.progress import tracked

FEWEST = 5
"""Scans of which the median says what is usual."""

DEVIATIONS = 5.0
"""Standard deviations, as the MAD estimates them, beyond which a scan is far from the others."""

MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution."""

SIZE_RATIO, RANGE_RATIO = 2.0, 10.0
"""Factor to the median within which no scan is far: of sizes in pixels and mm and of means within a window; of ranges
of intensity, which differ between scanners by more."""

RARE_ORIENTATION = 0.1
"""Share of the scans up to which an order of axes is named."""

SMALL_BOX = 0.05
"""Share of the scan within which all that is not constant lies, below which it is named."""

AGREEING = 0.75
"""Share of slices in which label table and mask have to say the same: they differ at the ends of a structure."""


@dataclass(frozen=True)
class Finding:
    """One thing to mend or to look at.

    Attributes:
        kind: what it is about, one or two words.
        case: the case; empty of the whole data set.
        text: what is wrong and the mend, one line.
        must: it has to be mended before training; else it is worth a look.
    """

    kind: str
    case: str
    text: str
    must: bool = False


@dataclass(frozen=True)
class Checked:
    """What was looked at, and what was found; plain values.

    Attributes:
        data_set: its name.
        data_dir: folder of the scans.
        store: the slice store that was filled; pictures are drawn from it.
        classes: their names, id 1 first.
        total: cases that are there, those that cannot be used included.
        entries: case -> what the index says of it, of those that can be used.
        split: case -> "train", "val" or "test"; empty where there is no valid one.
        counts: as of ``summary.count_splits``; empty likewise.
        positives: case -> how many of its slices show each class; ``SOMEWHERE`` where only the scan is known to.
        labelled: case -> which of its slices show a class, in the order of the store.
        findings: all of them, what must be mended first.
    """

    data_set: str
    data_dir: str
    store: Path
    classes: list[str]
    total: int = 0
    entries: Mapping[str, Entry] = field(default_factory=dict)
    split: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    positives: Mapping[str, list[int]] = field(default_factory=dict)
    labelled: Mapping[str, list[int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing has to be mended."""
        return not any(finding.must for finding in self.findings)


def find_header_faults(cases: Sequence[Case], spec: StoreSpec) -> dict[str, str]:
    """Case -> what is wrong with it, by the headers of image and mask alone: no voxel is read.

    Headers of DICOM series have been compared when they were found, those of pictures say nothing.
    """
    found = {case.name: _header_fault(case, spec) for case in tracked(cases, len(cases), "header", kept=False)}
    return {name: fault for name, fault in found.items() if fault}


def _header_fault(case: Case, spec: StoreSpec) -> str | None:
    if case.problem is not None:
        return case.problem
    try:
        image = _geometry(case.image, case.image_files, spec.plane, spec.reading)
        if image is None or case.mask is None:
            return None
        mask = _geometry(case.mask, case.mask_files, spec.plane, Reading(spacing=spec.reading.spacing))
        if mask is not None:
            lay_on_image(case.mask, mask.to_slices(np.broadcast_to(0, mask.shape)), mask, case.image, image)
    except DataError as error:
        return str(error)
    return None


def _geometry(path: str, files: Sequence[str], plane: str, reading: Reading) -> Geometry | None:
    place = read_place(path, files, reading)
    if place is None:
        return None
    return Geometry(place.shape, tuple(tuple(map(float, row)) for row in place.affine), plane, place.unit)


def find_duplicates(entries: Mapping[str, Entry], split: Mapping[str, str], store: Path) -> list[Finding]:
    """Cases whose images are the same, pixel for pixel, as the network sees them.

    Size and checksum of the stored slices tell which may be; those are compared. Neither header nor compression nor
    scaling of the file matters.

    Args:
        entries: case -> what the index says of it.
        split: case -> split; empty where there is none.
        store: where the slices lie.
    """
    alike: dict[tuple[int, int], list[str]] = {}
    for name, entry in entries.items():
        for file, size, checksum in entry.files:
            if file == "image.npy":
                alike.setdefault((size, checksum), []).append(name)
    reader, found = SliceReader(store), []
    for names in alike.values():
        kept: list[str] = []
        for name in names:
            first = next((one for one in kept if np.array_equal(reader.image(one), reader.image(name))), None)
            if first is None:
                kept.append(name)
            else:
                found.append(_duplicate(first, name, split))
    return found


def _duplicate(first: str, second: str, split: Mapping[str, str]) -> Finding:
    if split and split[first] != split[second]:
        text = (
            f"{second} ({split[second]}) and {first} ({split[first]}) are one image in two splits, as the network sees "
            "them. Remove one, or give both one patient (patients.csv) or one split"
        )
        return Finding("duplicate", second, text, must=True)
    return Finding("duplicate", second, f"{second} and {first} are one image, as the network sees them. Remove one")


def find_unusual(entries: Mapping[str, Entry]) -> list[Finding]:
    """Scans whose spacing, size, range of intensities or order of axes is far from the others'."""
    if len(entries) < FEWEST:
        return []
    window = all(entry.window_rule.startswith("level") for entry in entries.values())
    rules: list[tuple[str, str, Callable[[Entry], float], float]] = [
        ("spacing", "its slices are {} mm apart", lambda entry: entry.geometry.spacing[0], SIZE_RATIO),
        (
            "spacing",
            "its pixels have {} mm",
            lambda entry: math.sqrt(math.prod(entry.geometry.spacing[1:])),
            SIZE_RATIO,
        ),
        ("size", "it has {} slices", lambda entry: entry.depth, SIZE_RATIO),
        (
            "size",
            "its slices have {} pixels a side",
            lambda entry: math.sqrt(entry.frame.height * entry.frame.width),
            SIZE_RATIO,
        ),
    ]
    if window:
        rules.append(("intensity", "its mean within the window is {}", lambda entry: entry.mean, SIZE_RATIO))
    else:
        rules.append(("intensity", "its values span {}", lambda entry: entry.high - entry.low, RANGE_RATIO))
    found = []
    for kind, said, measure, ratio in rules:
        values = {name: measure(entry) for name, entry in entries.items()}
        usual = f"{float(np.median(list(values.values()))):.4g}"
        for name in far_from_others(values, ratio):
            text = f"{name}: {said.format(f'{values[name]:.4g}')}, the median of all scans is {usual}"
            found.append(Finding(kind, name, f"{text}. Look at its header and picture"))
    return found + _rare_orientations(entries)


def far_from_others(values: Mapping[str, float], ratio: float) -> list[str]:
    """Names whose value is far from the median.

    By more than the factor ``ratio``, and by more than ``DEVIATIONS`` standard deviations of the logarithms, which the
    median absolute deviation estimates: a few outliers do not move either.

    Args:
        values: name -> value above 0.
        ratio: above 1.
    """
    logs = np.log(np.maximum(list(values.values()), 1e-30))
    apart = np.abs(logs - np.median(logs))
    bar = max(math.log(ratio), DEVIATIONS * MAD_TO_DEVIATION * float(np.median(apart)))
    return [name for name, distance in zip(values, apart, strict=True) if distance > bar]


def orientation_of(entry: Entry) -> str:
    """The order of a file's axes, as viewers show it: "LPS"."""
    return "".join(nib.orientations.aff2axcodes(np.asarray(entry.geometry.affine)))


def _rare_orientations(entries: Mapping[str, Entry]) -> list[Finding]:
    codes = {name: orientation_of(entry) for name, entry in entries.items()}
    (usual, _), *others = Counter(codes.values()).most_common()
    rare = {code for code, count in others if count <= RARE_ORIENTATION * len(codes)}
    return [
        Finding("orientation", name, f"{name}: its axes are {code}, of most scans {usual}. See that it is upright")
        for name, code in codes.items()
        if code in rare
    ]


def find_poor_content(entry: Entry, classes: Sequence[str], min_pixels: int) -> list[Finding]:
    """What a case's labels say too little of, or of each other: an empty mask, a table that says otherwise.

    Args:
        entry: the case.
        classes: their names, id 1 first.
        min_pixels: of a class, from which on it counts as present.
    """
    found, name = [], entry.name
    if entry.counts is not None and not np.any(entry.counts):
        found.append(Finding("empty mask", name, f"{name}: its mask has no class. Right, if the scan shows none"))
    if entry.counts is None or entry.table is None or not len(entry.counts):
        return found
    seen, said = np.asarray(entry.counts) >= min_pixels, np.asarray(entry.table)
    for number, label in enumerate(classes):
        if SOMEWHERE in said:  # a table of scans
            if seen[:, number].any() != said[:, number].any():
                text = f"{name}: labels.csv and mask differ on whether the scan shows {label}. Look at both"
                found.append(Finding("table", name, text))
            continue
        same, turned = (float((seen[:, number] == part).mean()) for part in (said[:, number], said[::-1, number]))
        if same < AGREEING:
            mend = (
                "Counted from the other end they agree: turn its rows round" if turned >= AGREEING else "Look at both"
            )
            text = f"{name}: labels.csv and mask differ on {label} in {1 - same:.0%} of its slices. {mend}"
            found.append(Finding("table", name, text))
    return found


def content_share(voxels: NDArray[np.uint16]) -> float:
    """Share of a volume that the box around all that differs from its first corner takes.

    Args:
        voxels: (D, H, W), as stored, without the padding of the frame.
    """
    other = voxels != voxels[0, 0, 0]
    share = 1.0
    for axis in range(3):
        places = np.flatnonzero(other.any(axis=tuple(n for n in range(3) if n != axis)))
        share *= (places[-1] - places[0] + 1) / voxels.shape[axis] if len(places) else 0.0
    return share


def one_line(error: DataError | str) -> str:
    """An error's text as one line."""
    return " ".join(str(error).split())
