"""Finding scans of all formats, in a folder with any folders below it, or by a pattern of their paths.

Links out of the data's folder are not followed: each is a problem of its case.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from data_modules.formats import metaimage, nrrd, pictures
from data_modules.formats.dicom_files import (
    ENDINGS,
    Header,
    choose_series,
    group_series,
    is_dicom,
    looks_like_dicom,
    name_series,
    read_header,
    safe_name,
)
from data_modules.nifti_files import (
    NIFTI_ENDINGS,
    Listing,
    ScanFile,
    case_name,
    entries,
    find_folder,
    is_dead_link,
    is_folder,
    leaves,
    like_a_scan,
    look_at,
    name_problem,
    only_one,
    walk,
)
from data_modules.tables import name_first
from weakmedsam.errors import ConfigError, DataError

VOLUME_ENDINGS = (*NIFTI_ENDINGS, *nrrd.ENDINGS, *metaimage.ENDINGS)
FILE_ENDINGS = (*VOLUME_ENDINGS, *pictures.ENDINGS)

READ = "NIfTI, DICOM, NRRD, MetaImage, PNG, JPEG and TIFF"


class Found(NamedTuple):
    """A scan below a folder.

    Attributes:
        top: the folder directly in that one by which it can be named; None for a file directly in it.
        name: its name where there are several below ``top``.
        scan: its files.
        named: whether ``name`` is one that can be told from others' of ``top``; else several of ``top`` are left out.
    """

    top: Path | None
    name: str
    scan: ScanFile
    named: bool = True


def is_pattern(place: str) -> bool:
    """Whether a place is a pattern of paths, not a folder."""
    return any(sign in place for sign in "*?")


def head_of(place: str) -> str:
    """The folder with which a place begins, by which the data's own folder is known; empty where it has none."""
    first = (*Path(place).parts, "")[0]
    return "" if is_pattern(first) else first


def scan_stem(name: str) -> str:
    """A scan's file name without its ending, in any case."""
    for ending in (*FILE_ENDINGS, *ENDINGS):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def has_scan_ending(name: str) -> bool:
    """Whether a file's name has the ending of a format that is read; DICOM may have none."""
    return name.lower().endswith((*FILE_ENDINGS, *ENDINGS))


def is_dicom_file(path: Path) -> bool:
    """Whether a file is DICOM, by name and content; not of one that cannot be read."""
    try:
        return looks_like_dicom(path) and is_dicom(path)
    except DataError:
        return False


def is_scan_file(path: Path) -> bool:
    """Whether a file of this name may be a scan or a slice of one."""
    return not path.name.startswith(".") and (path.name.lower().endswith(FILE_ENDINGS) or looks_like_dicom(path))


def list_scans(
    root: Path, place: str, series: str | None = None, aside: Sequence[Path] = (), anywhere: bool = False
) -> Listing:
    """Scans of a place.

    Args:
        root: the data's own folder.
        place: a folder in it, or a pattern of paths in it.
        series: pattern of modality and description of DICOM series; None takes all.
        aside: files and folders to leave out.
        anywhere: links in a folder may lead out of it.

    Returns:
        Name -> files. In a folder: a file's stem, a folder's name where it holds one scan; else patient and
        description of a DICOM series, or the path. By a pattern: what its ``*`` stand for.

    Raises:
        DataError: a folder cannot be read, or no DICOM series fits ``series``.
    """
    if is_pattern(place):
        return _list_pattern(root, place, series)
    folder = folder_of(root, place)
    tops = (Path("/"),) if anywhere else (root, folder)
    return _Folder(folder, tops, entries(folder), aside).listing(series)


def folder_of(root: Path, place: str) -> Path:
    """A folder by its path in another one, in any case."""
    folder = root
    for part in Path(place).parts:
        folder = find_folder(folder, part)
    return folder


class _Folder:
    """What lies in a folder, gathered by kind."""

    def __init__(self, folder: Path, tops: Sequence[Path], inside: Sequence[Path], aside: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.passed_over: list[Path] = []
        self._tops = tops
        self._direct: list[Path] = []
        self._below: list[tuple[Path, Path]] = []  # (folder directly in this one, file)
        left_out = {os.path.realpath(path) for path in aside}
        inside = [path for path in inside if os.path.realpath(path) not in left_out]
        seen = {os.path.realpath(path) for path in inside if not is_folder(path) or not self._stays(path)} | left_out
        for path in sorted(inside, key=lambda path: path.is_symlink()):  # a link may lead round
            if not is_folder(path) or not self._stays(path):
                self._direct.append(path)
                continue
            places = walk(path, lambda place: self._stays(place) and os.path.realpath(place) not in left_out).folders
            for file in [file for place in places for file in entries(place)]:
                real = os.path.realpath(file)
                if real not in seen and (not is_folder(file) or not self._stays(file)):
                    seen.add(real)
                    self._below.append((path, file))

    def listing(self, pattern: str | None) -> Listing:
        """All scans by their names; see ``list_scans``."""
        series = [*self.series(pattern)]
        of_dicom = {unit.top for unit in series if unit.top}
        found = []
        for unit in self.files():  # pictures and volumes beside DICOM are previews and masks
            if unit.top in of_dicom:
                self.passed_over.append(unit.scan.path)
            else:
                found.append(unit)
        found += series
        per_top = Counter(unit.top for unit in found)
        named: dict[str, list[ScanFile]] = {}
        for unit in found:
            alone = unit.top is not None and per_top[unit.top] == 1
            if unit.named or alone:
                name = case_name(unit.top.name) if unit.top and alone else unit.name
                problem = unit.scan.problem or name_problem(unit.top or unit.scan.path, name)
                named.setdefault(name, []).append(unit.scan._replace(problem=problem))
            else:
                self.passed_over.append(unit.scan.path)
        return Listing({name: only_one(named[name]) for name in sorted(named)}, sorted(self.passed_over))

    def _stays(self, path: Path) -> bool:
        return not path.is_symlink() or not leaves(path, self._tops)

    def _checked(self, path: Path) -> ScanFile | None:
        return look_at(path) if self._stays(path) else ScanFile(path, say_leaving(path, self.folder))

    def files(self) -> Iterator[Found]:
        """Scans of one file, and numbered pictures in a folder of their own."""
        for path in self._direct:
            name = path.name.lower()
            found = self._checked(path) if name.endswith(FILE_ENDINGS) else None
            if found is not None and scan_stem(path.name):
                yield Found(None, case_name(scan_stem(path.name)), found)
            elif like_a_scan(path.name) and not looks_like_dicom(path):
                self.passed_over.append(path)
        stacks: dict[tuple[Path, Path], list[Path]] = {}
        for top, path in self._below:
            if path.name.lower().endswith(pictures.ENDINGS):
                stacks.setdefault((top, path.parent), []).append(path)
            elif path.name.lower().endswith(VOLUME_ENDINGS):
                found = self._checked(path)
                if found is not None:
                    yield Found(top, "", found, named=False)
        for (top, parent), pages in stacks.items():
            first = next((file for page in pages if (file := self._checked(page)) and file.problem), ScanFile(parent))
            name = "_".join(map(safe_name, parent.relative_to(self.folder).parts))
            yield Found(top, name, first._replace(files=tuple(pages)))

    def series(self, pattern: str | None) -> Iterator[Found]:
        """Scans of DICOM files."""
        headers: list[Header] = []
        tops: dict[Path, Path | None] = {}
        for top, path in [*((None, path) for path in self._direct), *self._below]:
            if not self._stays(path) and is_folder(path):
                yield Found(None, case_name(path.name), ScanFile(path, say_leaving(path, self.folder)))
            if not looks_like_dicom(path) or is_folder(path):
                continue
            tops[path] = top
            try:
                header = self._header(path)
            except DataError as error:
                yield Found(top, case_name(scan_stem(path.name)), ScanFile(path, str(error)))
                continue
            if header is not None and header.aside:
                self.passed_over.append(path)
            elif header is not None:
                headers.append(header)
        found = group_series(headers)
        chosen = choose_series(found, pattern)
        if found and not chosen:
            there = name_first(sorted({scan.title for scan in found}))
            raise DataError(
                f"{self.folder}: no DICOM series fits {pattern!r} (data.series; of a prediction --series). There are: "
                f"{there}."
            )
        for scan, name in zip(chosen, name_series(chosen), strict=True):
            above = {tops[file] for file in scan.files}
            top = above.pop() if len(above) == 1 else None
            place = scan.files[0] if len(scan.files) == 1 else scan.files[0].parent
            who = scan.first.patient or scan.first.study
            yield Found(top, name, ScanFile(place, scan.problem, files=scan.files, patient=who, title=scan.title))

    def _header(self, path: Path) -> Header | None:
        if not self._stays(path):
            raise DataError(say_leaving(path, self.folder))
        if is_dead_link(path):
            found = look_at(path)
            raise DataError(found.problem if found and found.problem else f"{path}: is not there.")
        state = path.stat()
        return _cached_header(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2**17)
def _cached_header(path: Path, size: int, time: int) -> Header | None:
    """What a DICOM file says; None for a file that is none and does not claim to be."""
    if is_dicom(path):
        return read_header(path)
    if path.suffix.lower() in ENDINGS:
        raise DataError(
            f"{path}: cannot be read (it does not begin as a DICOM file). It is truncated, damaged or no DICOM image: "
            "get it again."
        )
    return None


# Patterns


def _list_pattern(root: Path, pattern: str, series: str | None) -> Listing:
    named: dict[str, list[ScanFile]] = {}
    for path, name in _matches(root, pattern):
        if leaves(path, [root]):
            found: ScanFile | None = ScanFile(path, say_leaving(path, root))
        else:
            found = _only_scan(path, root, series) if is_folder(path) else look_at(path)
        if found is not None:
            found = found._replace(problem=found.problem or name_problem(path, name))
        named.setdefault(name, []).extend([found] if found else [])
    return Listing({name: only_one(named[name]) for name in sorted(named) if named[name]}, [])


def _only_scan(folder: Path, root: Path, series: str | None) -> ScanFile:
    """The one scan of a folder that a pattern fits."""
    try:
        inside = [*_Folder(folder.parent, [root], [folder]).listing(series).files.values()]
    except DataError as error:
        return ScanFile(folder, str(error))
    if len(inside) == 1:
        return inside[0]
    return ScanFile(folder, f"{folder}: holds {len(inside)} scans. Keep one, or name it by data.images or data.masks.")


def say_leaving(path: Path, top: Path) -> str:
    """What is wrong with a link out of a folder."""
    return f"{path}: is a link out of {top}. Copy there what it leads to, or remove it."


def _matches(root: Path, pattern: str) -> Iterator[tuple[Path, str]]:
    """Paths that a pattern fits, and what its ``*`` stand for; folders are left out where files fit."""
    if "*" not in pattern.replace("**", ""):
        raise ConfigError(f"data.images, data.masks: {pattern!r} needs a * that names the case.")
    wanted = _compile(pattern)
    for folder in walk(root, lambda path: not leaves(path, [root])).folders:
        for path in entries(folder):
            said = wanted.fullmatch(os.path.relpath(path, root).replace(os.path.sep, "/"))
            if said is None or not (is_folder(path) or has_scan_ending(path.name)):
                continue
            if not is_folder(path) and path.suffix.lower() in ENDINGS:
                raise DataError(
                    f"{path}: a DICOM series is found by its folder, not file by file: name folders in {pattern!r}."
                )
            words = dict.fromkeys(scan_stem(word) for word in said.groups() if word)
            if name := case_name("_".join(words).strip("_-. ")):
                yield path, name


def _compile(pattern: str) -> re.Pattern[str]:
    """``*`` is any text within a name, and counts; ``?`` a character; ``**/`` any folders, and does not count."""
    parts = re.split(r"(\*\*/|\*|\?)", pattern.removesuffix("/"))
    signs = {"**/": "(?:[^/]+/)*", "*": "([^/]*)", "?": "[^/]"}
    return re.compile("".join(signs.get(part, re.escape(part)) for part in parts), re.IGNORECASE)


def files_below(root: Path, place: str) -> list[Path]:
    """All files that the scans of a place may be made of, without a look into them."""
    paths = [path for path, _ in _matches(root, place)] if is_pattern(place) else [folder_of(root, place)]
    found = [path for path in paths if not is_folder(path) and is_pattern(place)]
    for top in paths:
        if is_folder(top):
            inside = [path for folder in walk(top).folders for path in entries(folder)]
            found += [path for path in inside if is_scan_file(path) and not is_folder(path)]
    return found
