"""Whether a slice store is what was written: sizes at every look, content where something was written to since.

Light to import: the pipeline looks at each store before it says that a run is up to date.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from weakmedsam.errors import DataError
from weakmedsam.system.json_files import read_object

INDEX = "index.json"
ENTRY = "entry.json"

Files: TypeAlias = tuple[tuple[str, int, int], ...]
"""(name, bytes, CRC-32) of the arrays of a case."""

_CHUNK = 2**20


def mark_files(folder: Path, names: Sequence[str]) -> Files:
    """Of files that have just been written."""
    return tuple((name, (folder / name).stat().st_size, checksum(folder / name)) for name in names)


def checksum(path: Path) -> int:
    """CRC-32 of a file's content."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def find_wrong_size(folder: Path, files: Files) -> tuple[str, str] | None:
    """(file, what is wrong) of the first array of a case that is lost or of another size; None where all are there."""
    for name, size, _ in files:
        path = folder / name
        if not path.is_file():
            return str(path), "is a folder" if path.is_dir() else "is gone"
        if (found := path.stat().st_size) != size:
            return str(path), f"is damaged ({found:,} bytes, {size:,} were written)"
    return None


def find_case_damage(folder: Path, name: str, files: Files) -> tuple[str, str] | None:
    """(file, what is wrong) of the first file of a case that is not what was written; None where all are.

    Content is compared where an array has been written to after, or with, the case's ``entry.json``, which is written
    last: a damage that leaves the time as it was (of the disk itself) shows in the size only.

    Args:
        folder: of the case.
        name: of the case.
        files: its arrays.
    """
    try:
        return _find_damage(folder, name, files)
    except OSError as error:
        return str(error.filename or folder), f"cannot be read ({error})"


def _find_damage(folder: Path, name: str, files: Files) -> tuple[str, str] | None:
    wrong = find_wrong_size(folder, files)
    if wrong is not None:
        return wrong
    entry = folder / ENTRY
    try:
        said = read_object(entry)
    except DataError:
        return str(entry), "is damaged"
    if (said.get("name"), said.get("files")) != (name, [list(file) for file in files]):
        return str(entry), "is of another case" if said else "is gone"
    written = entry.stat().st_mtime_ns
    later = [(folder / array, known) for array, _, known in files]
    later = [(path, known) for path, known in later if path.stat().st_mtime_ns >= written]
    for path, known in later:
        if checksum(path) != known:
            return str(path), "is damaged (its content is not what was written)"
    if later:  # as after a copy without times: read once, not at every look
        with contextlib.suppress(OSError):
            os.utime(entry)
    return None


def find_broken_files(store: Path) -> dict[str, str]:
    """Files of a store that are lost or damaged -> in which way, for a message; one a case at most."""
    index = store / INDEX
    try:
        cases = read_object(index).get("cases")
    except DataError:
        return {str(index): "is damaged"}
    if not isinstance(cases, list):
        return {str(index): "is gone"}
    broken: dict[str, str] = {}
    for case in cases:
        if not _is_entry(case):
            return {str(index): "is damaged"}
        wrong = find_case_damage(store / case["name"], case["name"], case["files"])
        broken |= {} if wrong is None else {wrong[0]: wrong[1]}
    return broken


def _is_entry(case: object) -> bool:
    return isinstance(case, Mapping) and isinstance(case.get("name"), str) and isinstance(case.get("files"), list)
