"""What a stage's result is made of beside its settings: files, told apart by names, sizes and times.

A data set's tables are told apart by their content, too: one that is corrected (a 1 to a 2) keeps its size, and its
time where a disk has coarse ones or a program restores it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_modules.nifti_files import is_nifti
from data_modules.sources import Sources, source_files
from data_modules.tables import LARGEST
from weakmedsam.errors import DataError


def digest_inputs(settings: Mapping[str, Any], prepared: Mapping[str, Any] | None = None) -> str:
    """A digest of the files that a stage's result is made of.

    Args:
        settings: of the stage; files that they name (weights, a split) count.
        prepared: for ``prepare``, its summary (``store``, ``sources``): the data set's own files and whether the
            store is there count then; None for other stages and before the first time.
    """
    files = [Path(word) for word in _words_in(settings["configs"], settings["options"]) if _is_file(word)]
    digest = hashlib.sha256()
    if prepared is not None:
        digest.update(str(Path(prepared["store"], "index.json").exists()).encode())
        files += _sources(prepared)
    for path in sorted(set(files)):
        try:
            found = path.stat()
            digest.update(f"{path} {found.st_size} {found.st_mtime_ns}".encode("utf-8", "surrogateescape"))
            if prepared is not None and not is_nifti(path.name) and found.st_size <= LARGEST:
                digest.update(path.read_bytes())
        except OSError:  # a link to a file that is not there
            digest.update(f"{path} cannot be read".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _sources(prepared: Mapping[str, Any]) -> list[Path]:
    if "sources" not in prepared:  # of an earlier version
        return []
    try:
        return source_files(Sources(**prepared["sources"]))
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
