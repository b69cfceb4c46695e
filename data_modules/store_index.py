"""What is known of a slice store: the settings that made it, and an entry per case."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_modules.cases import Intensity
from data_modules.formats.read import READING
from data_modules.formats.volume import Reading
from data_modules.volumes import Geometry
from data_modules.wholeness import ENTRY, INDEX, Files
from weakmedsam.contracts import Frame
from weakmedsam.errors import DataError
from weakmedsam.system.atomic_io import SEGMENTATIONS, STORE, explaining_full_disk
from weakmedsam.system.json_files import read_object, seal

SCAN_SLICES = ".slices"
"""Beside the segmentations of unlabelled scans: the store in which their slices lie until all are segmented."""

STORE_FORMAT = 2
"""Raise it when the files' content or meaning changes: old stores are then left alone."""

MISSHAPEN = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What JSON of another shape than was written raises."""


@dataclass(frozen=True)
class StoreSpec:
    """Everything that changes what is in a store.

    Attributes:
        data_set: its name.
        data_dir: resolved folder of the volumes.
        variant: what else tells the volumes apart, e.g. the modality.
        image_size: side of the working frame, pixels.
        plane: which slices are taken.
        intensity: how values become [0, 1].
        classes: class name -> mask values, in order.
        values: further mask values that are known and become background.
        reading: what is taken of files that leave it open.
    """

    data_set: str
    data_dir: str
    variant: str
    image_size: int
    plane: str
    intensity: Intensity
    classes: Mapping[str, tuple[int, ...]]
    values: tuple[int, ...]
    reading: Reading = READING

    def to_json(self) -> dict[str, Any]:
        """The settings as they stand in the index; class order is kept as it decides the ids."""
        settings = {**asdict(self), "classes": [[name, list(v)] for name, v in self.classes.items()]}
        settings["reading"] = self.reading.stated
        if not self.reading.stated:  # a store of before there was a choice is still the same
            del settings["reading"]
        return json.loads(json.dumps({"format": STORE_FORMAT, **settings}))

    @property
    def key(self) -> str:
        """Eight hexadecimal digits of the settings' hash."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:8]

    def folder(self, store_dir: str | Path) -> Path:
        """The store's folder."""
        return Path(store_dir) / f"{self.data_set}-{self.key}"


@dataclass(frozen=True)
class Entry:
    """What the index says of a case.

    Attributes:
        name: the case.
        patient: who was scanned.
        sources: (path relative to the data folder, bytes, modification time in ns) of what was read.
        geometry: of the scan.
        frame: how the working frame lies on the scan's own slices.
        low: value of the file that became 0.
        high: value of the file that became 65535 (1.0).
        window_rule: how low and high were found.
        mean: of the scaled intensity in [0, 1] over the scan's own voxels.
        deviation: standard deviation of the same.
        counts: (D, C) pixels of each class on the scan's own slices; None without a mask.
        table: (D, C) labels given by a table, 0 or 1, or ``SOMEWHERE`` of a table of scans; None without one.
        files: (name, bytes, CRC-32) of its arrays in the store; of a case that is not stored, none.
    """

    name: str
    patient: str
    sources: tuple[tuple[str, int, int], ...]
    geometry: Geometry
    frame: Frame
    low: float
    high: float
    window_rule: str
    mean: float
    deviation: float
    counts: tuple[tuple[int, ...], ...] | None = None
    table: tuple[tuple[int, ...], ...] | None = None
    files: Files = ()

    @property
    def depth(self) -> int:
        """Number of slices."""
        return self.geometry.shape[self.geometry.slice_axis[0]]

    @property
    def has_mask(self) -> bool:
        """Whether there is an expert mask."""
        return self.counts is not None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "frame": list(self.frame)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Entry:
        """The inverse of ``to_json``."""
        geometry = values["geometry"]
        shape = geometry["shape"]
        rest = {name: value for name, value in values.items() if name not in ("geometry", "frame")}
        for marks in ("sources", "files"):
            rest[marks] = tuple((str(s[0]), int(s[1]), int(s[2])) for s in values[marks])
        for rows in ("counts", "table"):
            if values[rows] is not None:
                rest[rows] = tuple(tuple(row) for row in values[rows])
        affine = tuple(tuple(row) for row in geometry["affine"])
        place = Geometry(
            (shape[0], shape[1], shape[2]), affine, geometry["plane"], geometry["unit"], geometry["header"]
        )
        return Entry(**rest, geometry=place, frame=Frame(*values["frame"]))


@dataclass(frozen=True)
class Index:
    """The index of a store.

    Attributes:
        entries: case name -> entry, sorted by name.
        skipped: case name -> (sources, reason), of the cases left out.
    """

    entries: Mapping[str, Entry]
    skipped: Mapping[str, tuple[tuple[tuple[str, int, int], ...], str]]


def read_index(store: Path) -> Index | None:
    """The index of a store, None if there is none yet, or a damaged one: ``prepare`` then makes it anew."""
    try:
        values = read_object(store / INDEX)
        entries = {entry["name"]: Entry.from_json(entry) for entry in values["cases"]}
        skipped = {
            name: (tuple((str(s[0]), int(s[1]), int(s[2])) for s in sources), reason)
            for name, (sources, reason) in values["skipped"].items()
        }
    except (DataError, *MISSHAPEN):
        return None
    return Index(entries, skipped)


def read_entry(folder: Path) -> Entry:
    """What a case's folder says of it.

    Raises:
        DataError: its ``entry.json`` is gone or damaged.
    """
    path = folder / ENTRY
    try:
        return Entry.from_json(read_object(path))
    except MISSHAPEN as error:
        raise DataError(f"{path}: {'is damaged' if path.exists() else 'is gone'}") from error


def write_index(store: Path, spec: StoreSpec, index: Index) -> None:
    """Write ``index.json`` and ``skipped.csv``, each atomically; unchanged files are left alone."""
    cases = [entry.to_json() for entry in index.entries.values()]
    skipped = {name: [list(sources), reason] for name, (sources, reason) in index.skipped.items()}
    text = json.dumps(seal({"settings": spec.to_json(), "skipped": skipped, "cases": cases})) + "\n"
    write_text(store / INDEX, text)
    write_rows(store / "skipped.csv", ("case", "reason"), [(n, r) for n, (_, r) in index.skipped.items()])


def write_rows(path: Path, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Write a CSV file atomically, only if it changes."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, stream.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, only if it changes; a folder in its place goes."""
    content = text.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with explaining_full_disk(path, part, movable_of(path.parent)):
            part.write_bytes(content)
            if path.is_dir():
                remove(path)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or folder of a store, which holds nothing that cannot be made again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def movable_of(store: Path) -> str:
    """What can be put elsewhere where a store's disk is full: that of unlabelled scans is beside the masks."""
    return SEGMENTATIONS if SCAN_SLICES in store.parts else STORE
