"""The files that a data set is made of, found again without torch: a change of them is noticed, of no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from data_modules.nifti_files import find_folder, find_root, find_table, folders_between, list_nifti, walk
from data_modules.scan_files import files_below, head_of


class Sources(NamedTuple):
    """Where a data set looks for its files; plain values, kept in the summary of what is prepared.

    Attributes:
        root: DATA_DIR.
        folders: names of the folders of NIfTI files, images first, in the data set's own folder; none: the root and
            all folders below it.
        usual: name of the data set's own folder, as of ``find_root``.
        pattern: regular expression of the names, without ending, that count.
        tables: names of the tables.
        files: paths of further files.
        places: folders, or patterns of paths, in the data set's own folder, in which scans of any format lie at any
            depth; images first.
    """

    root: str
    folders: tuple[str, ...] = ()
    usual: str = ""
    pattern: str = ""
    tables: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    places: tuple[str, ...] = ()


def source_files(sources: Sources) -> list[Path]:
    """The files of a data set, with links to files that are not there.

    Raises:
        DataError: it is not clear which they are, or a folder cannot be read.
    """
    top = Path(sources.root)
    if sources.places:
        head = head_of(sources.places[0])
        root, folders = (find_root(top, head) if head else top), []
    elif sources.folders:
        root = find_root(top, sources.folders[0], sources.usual)
        folders = [find_folder(root, name) for name in sources.folders]
    else:
        root, folders = top, walk(top).folders
    found = [
        file.path
        for folder in folders
        for name, file in list_nifti(folder).files.items()
        if re.match(sources.pattern, name, re.IGNORECASE)
    ]
    found += [path for place in sources.places for path in files_below(root, place)]
    tables = [find_table(folders_between(top, root), name) for name in sources.tables]
    return [*dict.fromkeys(found), *(table for table in tables if table), *map(Path, sources.files)]
