"""Fingerprints of the files that a stage's result is made of. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_modules.scan_files import is_scan_file
from data_modules.sources import Sources, source_files
from data_modules.tables import LARGEST
from weakmedsam.errors import DataError
from weakmedsam.system.fingerprints import Mark, digest


def mark_inputs(
    settings: Mapping[str, Any],
    prepared: Mapping[str, Any] | None = None,
    known: Mapping[str, Mark] | None = None,
) -> dict[str, Mark]:
    """Path -> mark of the files that a stage's result is made of.

    A file that the settings name (weights, a split) is told apart by its content. A data set's scan is by size and
    time; its tables by all three, since one that is corrected (a 1 to a 2) keeps its size, and its time where a disk
    has coarse ones.

    Args:
        settings: of the stage.
        prepared: of ``prepare``, its summary, which says where the data set's own files lie; None for other stages.
        known: earlier marks; a file of the settings with the same content keeps its mark.
    """
    sources = dict.fromkeys(_sources(prepared) if prepared else [])
    named = [Path(word) for word in _words_in(settings["configs"], settings["options"]) if _is_file(word)]
    return {str(path): _mark_input(path, path in sources, (known or {}).get(str(path)))
            for path in sorted({*named, *sources})}  # fmt: skip


def _mark_input(path: Path, is_source: bool, known: Mark | None) -> Mark:
    try:
        found = path.stat()
        seen = Mark(found.st_size, found.st_mtime_ns, "")
        if is_source:
            is_table = not is_scan_file(path) and found.st_size <= LARGEST
            return seen._replace(digest=digest(path)) if is_table else seen
        if known is not None and known[:2] == seen[:2]:
            return known
        seen = seen._replace(digest=digest(path))
        return known if known is not None and known.digest == seen.digest else seen
    except (OSError, DataError):  # a link to a file that is not there
        return Mark(0, 0, "cannot be read")


def _sources(prepared: Mapping[str, Any]) -> list[Path]:
    try:
        return source_files(Sources(**prepared["sources"])) if "sources" in prepared else []
    except DataError:  # whoever prepares the data will say so
        return []


def _words_in(*values: Any) -> Iterator[str]:
    """Every text among nested values."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from _words_in(*(value.values() if isinstance(value, dict) else value))


def _is_file(word: str) -> bool:
    try:
        return "/" in word and Path(word).is_file()
    except OSError:  # a text too long for a name
        return False
