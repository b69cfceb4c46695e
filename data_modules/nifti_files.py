"""Finding files: the one way in which all data sets, and ``make predict``, look for NIfTI files and tables.

Endings count in any case, names with a leading dot never. Links to folders are followed. A folder that is named as a
NIfTI file and holds a single one is that file, as in copies of data sets on the web. What cannot be decided (two
files of one name) or read (a link to a file that is not there) is a problem of its case. What looks like a scan and
is not read is passed over, and listed.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from data_modules.tables import is_unseen, name_first
from weakmedsam.errors import DataError

NIFTI_ENDINGS = (".nii.gz", ".nii")

OUTPUTS = ("prepare/settings.json", "provenance/predict.yaml", "phantom.json", "check.json")
"""Files by which a folder that this program has written is known: a run, segmentations, a drawn set, a check."""

LONGEST_NAME = 200
"""Bytes of a scan's name without ending: results are named after it, and a file's name has at most 255."""

ANNEX = os.path.join(".git", "annex", "objects")
"""Where git-annex keeps the content of files that are links."""

DEPTH = 3
"""How deep folders named as a file are looked into, and how far below DATA_DIR the data set's own folder may lie."""

_LIKE_A_SCAN = re.compile(
    r"\.nii([^a-z]|$)|\.(nii|nrrd|nhdr|mha|mhd|dcm|ima|hdr|img|mgz|mgh|mnc|png|jpe?g|tiff?)(\.(gz|bz2|xz|zip|zst))?$",
    re.IGNORECASE,
)


class ScanFile(NamedTuple):
    """What has been found under a name.

    Attributes:
        path: the file, or the folder of several; with a problem, the one it concerns.
        problem: why it cannot be used, and the mend.
        twice: whether the problem is that there are several of the name.
        files: of a scan that has several, a DICOM series or numbered pictures.
        patient: who was scanned, as the file says; empty where it says nothing.
        title: modality and description of a DICOM series.
    """

    path: Path
    problem: str | None = None
    twice: bool = False
    files: tuple[Path, ...] = ()
    patient: str = ""
    title: str = ""


class Listing(NamedTuple):
    """What lies directly in a folder.

    Attributes:
        files: name without ending -> what has been found, sorted.
        passed_over: what looks like a scan and is not read, sorted.
    """

    files: dict[str, ScanFile]
    passed_over: list[Path]


class Tree(NamedTuple):
    """A folder and all below it.

    Attributes:
        folders: those to look into.
        outputs: left out, as this program has written them.
        closed: left out, as they cannot be read.
    """

    folders: list[Path]
    outputs: list[Path]
    closed: list[Path]


def is_nifti(name: str) -> bool:
    """Whether a file of this name is looked at: .nii or .nii.gz in any case, no leading dot."""
    return name.lower().endswith(NIFTI_ENDINGS) and not name.startswith(".")


def nifti_stem(name: str) -> str:
    """File name without .nii or .nii.gz, in any case."""
    for ending in NIFTI_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def case_name(text: str) -> str:
    """A name as it is compared: without blanks around it, letters with accents in one encoding.

    In file names from macOS an accent is a character of its own; in tables and on other systems it is not.
    """
    return unicodedata.normalize("NFC", text.strip())


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without names with a leading dot; nothing where there is no such folder.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}). Correct its rights.") from error


def list_nifti(folder: Path) -> Listing:
    """NIfTI files directly in a folder; none where there is no such folder.

    Raises:
        DataError: the folder cannot be read.
    """
    named: dict[str, list[ScanFile]] = {}
    passed_over = []
    for path in entries(folder):
        stem = case_name(nifti_stem(path.name))
        found = look_at(path) if is_nifti(path.name) else None
        if found is not None and stem:
            named.setdefault(_as_text(stem), []).append(found)
        elif _LIKE_A_SCAN.search(path.name) or (any(is_nifti(p.name) for p in _inside(path)) and not _is_output(path)):
            passed_over.append(path)
    return Listing({stem: only_one(named[stem]) for stem in sorted(named)}, passed_over)


def like_a_scan(name: str) -> bool:
    """Whether a file of this name looks like a scan, of a format that is read or of another."""
    return _LIKE_A_SCAN.search(name) is not None


def look_at(path: Path, deep: int = 0) -> ScanFile | None:
    """What lies under the name of a NIfTI file; None for a folder that holds none."""
    if problem := name_problem(path, nifti_stem(path.name)):
        return ScanFile(path, problem)
    if is_dead_link(path):
        return ScanFile(path, _say_dead_link(path))
    if os.path.isfile(path):
        return ScanFile(path)
    if not os.path.isdir(path):
        return ScanFile(path, f"{path}: is not a file that can be read. Correct it, or remove it.")
    inside = [p for p in _inside(path) if is_nifti(p.name)]
    if len(inside) == 1 and deep < DEPTH:
        return look_at(inside[0], deep + 1)
    if inside:
        return ScanFile(path, f"{path}: is a folder with several files, {name_paths(inside, path)}. Keep one.")
    return None


def name_problem(path: Path, stem: str) -> str | None:
    """Why nothing can be named after a file or folder.

    Args:
        path: of it.
        stem: its name without ending.
    """
    if (name := _as_text(str(path))) != str(path):
        return f"{name}: the name is not UTF-8, or holds what cannot be seen. Rename it."
    if (length := len(os.fsencode(stem))) > LONGEST_NAME:
        return f"{path}: its name is too long ({length} bytes; {LONGEST_NAME} are possible). Rename it."
    if stem.lower().endswith((".csv", ".json")):
        return f"{path}: a scan cannot be named as a table or a note ({stem}). Rename it."
    return None


def only_one(found: list[ScanFile]) -> ScanFile:
    """The file of a name, or the problem that there are several."""
    if len(found) == 1:
        return found[0]
    *others, last = (file.path for file in found)
    said = f"{last}: {' and '.join(map(str, others))} has the same name. Keep one, or rename one."
    return ScanFile(found[0].path, said, twice=True)


def walk(root: Path, follow: Callable[[Path], bool] = lambda path: True) -> Tree:
    """A folder and all below it: links are followed, and each folder is there once.

    Hidden folders are left out, and those named as a NIfTI file, which count as files.

    Args:
        root: the folder.
        follow: whether a folder below it is looked into.
    """
    tree = Tree([], [], [])
    seen = set()
    inside: list[Path] = [root]
    links: list[Path] = []
    while inside or links:  # links last, so that a folder keeps the path by which it lies in the tree
        folder = inside.pop(0) if inside else links.pop(0)
        place = os.path.realpath(folder)
        if place in seen:
            continue
        seen.add(place)
        if folder != root and _is_output(folder):
            tree.outputs.append(folder)
        elif not os.access(folder, os.R_OK | os.X_OK):
            tree.closed.append(folder)
        else:
            tree.folders.append(folder)
            for path in entries(folder):
                if is_folder(path) and follow(path):
                    (links if os.path.islink(path) else inside).append(path)
    return tree


def find_folder(root: Path, name: str) -> Path:
    """The folder of this name, in any case, directly in another one; where there is none, its path.

    Raises:
        DataError: there are two.
    """
    return _only([path for path in _named(root, name) if os.path.isdir(path)]) or root / name


def find_table(folders: Iterable[Path], name: str) -> Path | None:
    """What has this name, in any case, in one of some folders; None where nothing has.

    Raises:
        DataError: there are two, or a link to a file that is not there.
    """
    found = _only([path for folder in dict.fromkeys(folders) for path in _named(folder, name)])
    if found is not None and is_dead_link(found):
        raise DataError(_say_dead_link(found))
    return found


def find_root(folder: Path, name: str, usual: str = "") -> Path:
    """The data set's own folder: DATA_DIR, or one below it, as archives are unpacked into a folder of their own.

    Args:
        folder: DATA_DIR.
        name: of a folder that the data set's own one holds.
        usual: name of the data set's own folder, where it has one; other folders below are then not its own.

    Returns:
        Its path; DATA_DIR where there is none.

    Raises:
        DataError: several could be meant.
    """
    level = [folder]
    for _ in range(DEPTH):
        found = [
            path
            for path in level
            if (path == folder or path.name.lower() == (usual or path.name).lower())
            and os.path.isdir(find_folder(path, name))
        ]
        if len(found) > 1:
            raise DataError(
                f"{folder}: {name} is in several folders: {name_paths(found, folder)}. Give one of them as DATA_DIR."
            )
        if found:
            return found[0]
        if not usual and len(level) > 1:  # an archive's folder lies alone in another: not in one of several
            break
        level = [path for above in level for path in _inside(above) if os.path.isdir(path) and not _is_output(path)]
    return folder


def folders_between(top: Path, root: Path) -> list[Path]:
    """The folders from DATA_DIR down to the data set's own, both included."""
    return [top, *(path for path in reversed(root.parents) if path.is_relative_to(top)), root]


def describe_folder(folder: Path) -> str:
    """What there is where something else was expected."""
    if is_dead_link(folder):
        return f"it is a link to a folder that is not there, {folder.readlink()}"
    if not os.path.isdir(folder):
        return "it is a file" if os.path.exists(folder) else "there is no such folder"
    found = entries(folder)
    dead = [path for path in found if is_dead_link(path)]
    links = f"; of these are links to what is not there: {name_paths(dead, folder)}" if dead else ""
    return f"there is: {name_paths(found, folder)}{links}" if found else "it is empty"


def name_paths(paths: Sequence[Path], root: Path) -> str:
    """The first names, for a message; those of folders end in a slash."""
    return name_first([_as_text(os.path.relpath(path, root)) + ("/" if os.path.isdir(path) else "") for path in paths])


def is_folder(path: Path) -> bool:
    """Whether it is a folder, and not one that counts as the NIfTI file in it."""
    return os.path.isdir(path) and not is_nifti(path.name)


def leaves(path: Path, tops: Iterable[Path]) -> bool:
    """Whether it is a link, or lies below one, that leads out of these folders.

    Links of git-annex and DataLad lead to the store of their repository, which may be above the folder.
    """
    real = os.path.realpath(path)
    places = [os.path.realpath(top) for top in tops]
    return ANNEX not in real and all(os.path.commonpath([real, place]) != place for place in places)


def is_dead_link(path: Path) -> bool:
    """Whether it is a link to what is not there, as in a git-annex or DataLad copy before files are fetched."""
    return os.path.islink(path) and not os.path.exists(path)


def _say_dead_link(path: Path) -> str:
    target = _as_text(str(path.readlink()))
    return (
        f"{path}: is a link to a file that is not there ({target}). Fetch it (git annex get, datalad get), or remove "
        "the link."
    )


def _named(folder: Path, name: str) -> list[Path]:
    return [path for path in _inside(folder) if path.name.lower() == name.lower()]


def _only(found: list[Path]) -> Path | None:
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1]}: only one of them can count. Keep one.")
    return found[0] if found else None


def _inside(folder: Path) -> list[Path]:
    """As ``entries``; nothing where it cannot be read."""
    return entries(folder) if os.access(folder, os.R_OK | os.X_OK) else []


def _is_output(folder: Path) -> bool:
    return any(os.path.exists(folder / mark) for mark in OUTPUTS)


def _as_text(name: str) -> str:
    """A name that can be written as UTF-8 in one line: what cannot be, or cannot be seen, is spelt out."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(ascii(c)[1:-1] if is_unseen(c) else c for c in text)
