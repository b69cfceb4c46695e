"""Where images and masks lie in a folder that nobody has described: guesses, each with its reason. Loads no torch."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_modules.folder_files import TABLES, Layout
from data_modules.formats import pictures
from data_modules.nifti_files import ScanFile, case_name, entries, find_table, leaves, walk
from data_modules.scan_files import FILE_ENDINGS, READ, VOLUME_ENDINGS, is_dicom_file, list_scans, scan_stem
from data_modules.tables import name_first, open_table
from weakmedsam.errors import DataError

IMAGE_WORDS = (
    "image",
    "images",
    "imagestr",
    "img",
    "imgs",
    "scans",
    "volumes",
    "dicom",
    "dicoms",
    "data",
    "ct",
    "mr",
    "mri",
)
MASK_WORDS = (
    *("mask", "masks", "label", "labels", "labelstr", "seg", "segs", "segmentation", "segmentations", "gt", "roi"),
    *("groundtruth", "annotation", "annotations", "manual", "truth", "labelmap", "contour"),
)
WORDS = (*IMAGE_WORDS, *MASK_WORDS)
UNUSED_WORDS = ("imagests", "labelsts")
"""Folders of cases that a challenge keeps to itself."""


MOST_KINDS = 8
"""How many modalities of a case there may be in one folder."""


class Guess(NamedTuple):
    """A setting.

    Attributes:
        value: of it.
        reason: why it is taken.
    """

    value: Any
    reason: str


class Place(NamedTuple):
    """Where files that look alike lie.

    Attributes:
        place: folder or pattern.
        number: how many files there are.
        is_mask: whether they look like masks.
    """

    place: str
    number: int
    is_mask: bool


def guess_layout(folder: Path) -> tuple[Layout, dict[str, Guess]]:
    """Where images and masks lie.

    Args:
        folder: with scans somewhere below it.

    Returns:
        The layout, and its keys with their reasons.

    Raises:
        DataError: there is no scan of a known format.
    """
    root = _unpacked(folder)
    files = _files(root)
    volumes = [path for path in files if path.name.lower().endswith(VOLUME_ENDINGS)]
    flat = [path for path in files if path.name.lower().endswith(pictures.ENDINGS)]
    dicom = [path for path in files if is_dicom_file(path)]
    if not (volumes or flat or dicom):
        raise DataError(f"{folder}: no scan is there that can be read. Read are {READ}. Give the folder they lie in.")
    names = _names_in_tables(root)
    places = find_places(root, volumes, names)
    named = [place for place in places if not place.is_mask and _word(place.place, IMAGE_WORDS)]
    if dicom and not named:
        images = _guess_folder(root, dicom, "DICOM files")
    elif volumes:
        images = _guess_images(named or places, f"; also there: {len(dicom)} DICOM files" if dicom else "")
    else:
        images = _guess_folder(root, flat, "pictures")
    dicom = [] if named else dicom
    series = Guess(None, "of DICOM only: pattern of modality and description")
    if dicom:
        series = _guess_series([*list_scans(root, images.value).files.values()])
    if flat and (dicom or not volumes):
        places += find_places(root, flat, names)
    masks = _guess_masks(root, images.value, series.value, places)
    layout = Layout(str(root.resolve()), images.value, masks.value, series.value)
    return layout, {"images": images, "masks": masks, "series": series}


def _names_in_tables(root: Path) -> set[str]:
    """Cases that ``labels.csv`` or ``patients.csv`` names; faults of these are told by whoever reads them."""
    found: set[str] = set()
    for name in TABLES:
        with contextlib.suppress(DataError):
            table = find_table([root], name)
            found |= {case_name(row.cells[0]) for row in open_table(table, ("case",)).rows} if table else set()
    return found


def _files(root: Path) -> list[Path]:
    """All files but those of cases that a challenge keeps to itself."""
    tree = walk(root, lambda path: path.name.lower() not in UNUSED_WORDS and not leaves(path, [root]))
    return [path for place in tree.folders for path in entries(place) if path.is_file()]


def _unpacked(folder: Path) -> Path:
    """The folder itself, or the only one in it, as archives unpack."""
    root = folder
    while len(inside := entries(root)) == 1 and inside[0].is_dir() and not leaves(inside[0], [root]):
        if _word(inside[0].name, IMAGE_WORDS[:-1]) or not any(path.is_dir() for path in entries(inside[0])):
            break
        root = inside[0]
    return root


def _word(text: str, words: Sequence[str]) -> bool:
    """Whether one of the words is in a name, as a word of its own."""
    return any(part in words for part in re.split(r"[^a-z]+", text.lower()))


def _guess_folder(root: Path, files: Iterable[Path], what: str) -> Guess:
    """The folder directly in the root that holds files of a kind, masks apart."""
    tops = Counter(path.relative_to(root).parts[0] for path in files if len(path.relative_to(root).parts) > 1)
    named = [top for top in tops if top.lower() in IMAGE_WORDS]
    if len(named) == 1:
        return Guess(named[0], f"the folder {named[0]} holds {tops[named[0]]} {what}")
    return Guess(".", f"{what} lie in the folder itself or in any folders below it")


def _guess_masks(root: Path, images: str, series: str | None, places: Sequence[Place]) -> Guess:
    """The place of masks whose names are those of images."""
    tops = [top.name for top in entries(root) if top.is_dir() and _word(top.name, MASK_WORDS) and top.name != images]
    tried = dict.fromkeys([*tops, *(place.place for place in places if place.is_mask and place.place != images)])
    end = re.search(r"\*([^*/.]+)\.", images)
    if end:  # case_ct, case_ct_label
        tried |= dict.fromkeys([place.replace("*", f"*{end[1]}") for place in tried if place.count("*") == 1])
    if not tried:
        return Guess("masks", "no masks were found: put them there, named as the case, if there are any")
    found = list_scans(root, images, series, [root / top for top in tops]).files
    shared = {place: len(set(found) & set(list_scans(root, place).files)) for place in tried}
    best = max(tried, key=lambda place: shared[place])
    others = [place for place in tried if place != best and shared[place]]
    more = f"; also there: {name_first(others)}" if others else ""
    return Guess(best, f"named as masks; {shared[best]} have the name of an image{more}")


def find_places(root: Path, files: Sequence[Path], names: Collection[str] = ()) -> list[Place]:
    """Places of files that look alike, the largest first: a folder, or a pattern with ``*`` for the case.

    Args:
        root: the data's own folder.
        files: scans of one file.
        names: of cases, as tables have them.
    """
    known = _Names(root, files, names)
    found = Counter(_simple(known.place_of(path)) for path in files)
    return [Place(place, count, _is_mask(place)) for place, count in found.most_common()]


class _Names:
    """How often names are there, by which a file's case and its role are told apart."""

    def __init__(self, root: Path, files: Sequence[Path], names: Collection[str]) -> None:
        self.root = root
        self.stems = Counter(scan_stem(path.name) for path in files)
        self.siblings = Counter(path.parent for path in files)
        self.suffixes = Counter((path.parent, _suffix(scan_stem(path.name))) for path in files)
        of_masks = {scan_stem(path.name) for path in files if _word(path.parent.name, MASK_WORDS)}
        others = {scan_stem(path.name) for path in files if not _word(path.parent.name, MASK_WORDS)}
        self.cases = {*names, *(of_masks & others)}
        self.levels: dict[tuple[str, int], set[str]] = {}  # (stem, depth) -> names of folders
        for path in files:
            for n, name in enumerate(path.relative_to(root).parts[:-1]):
                self.levels.setdefault((scan_stem(path.name), n), set()).add(name)

    def place_of(self, path: Path) -> str:
        """A pattern of the files that look like this one."""
        stem, folders = scan_stem(path.name), path.relative_to(self.root).parts[:-1]
        ending, suffix = path.name[len(stem) :], _suffix(stem)
        owner = next((name for name in reversed(folders) if name in stem), None)
        own_folder = bool(folders) and not _word(path.parent.name, WORDS)
        few = max(len(self.siblings) - 1, 6)
        if owner is not None:  # sub-01/anat/sub-01_T1w
            parts = ["*" if name == owner else name for name in folders]
            return _after_star([*parts, stem.replace(owner, "*") + ending])
        if own_folder and self.stems[stem] > 1 and self.siblings[path.parent] <= few:
            # case01/anat/t1: the deepest folder that differs is the case
            differ = [n for n in range(len(folders)) if len(self.levels[stem, n]) > 1]
            star = max(differ, default=len(folders) - 1)
            return _after_star(["*" if n == star else name for n, name in enumerate((*folders, path.name))])
        if own_folder and self.siblings[path.parent] == 1:  # case01/IMG7
            return "/".join([*(folders[:1] if _word(folders[0], WORDS) else []), f"*{ending}"])
        if suffix and stem not in self.cases and self._has_role(path.parent, suffix):
            return "/".join([*folders, f"*{suffix}{ending}"])
        return "/".join([*folders, f"*{ending}"])

    def _has_role(self, parent: Path, suffix: str) -> bool:
        """Whether a suffix tells what a file is, not which: few suffixes, each of many files."""
        if re.fullmatch("_000[0-9]", suffix) and self.suffixes[parent, "_0000"]:  # nnU-Net's channels
            return True
        kinds = sum(1 for place, _ in self.suffixes if place == parent)
        few = kinds <= min(MOST_KINDS, max(1, self.siblings[parent] // 2))
        return few and self.suffixes[parent, suffix] > 1 and (kinds > 1 or _word(suffix, MASK_WORDS))


def _suffix(stem: str) -> str:
    """What follows the case in a stem: _t1, -label, _0000."""
    said = re.search(r"[_-][A-Za-z0-9]+$", stem)
    return said[0] if said else ""


def _after_star(parts: Sequence[str]) -> str:
    """A pattern without the folders above the case: what differs there is no part of its name."""
    first = parts.index("*") if "*" in parts else len(parts) - 1
    return "/".join([*(["**"] if first else []), *parts[first:]])


def _simple(place: str) -> str:
    """A folder, where a pattern takes all of it."""
    folder, _, name = place.rpartition("/")
    return (folder or ".") if re.fullmatch(r"\*(\.[a-z.]+)", name, re.IGNORECASE) and "*" not in folder else place


def _is_mask(place: str) -> bool:
    return any(_word(part, MASK_WORDS) for part in place.split("/"))


def _guess_images(places: Sequence[Place], beside: str) -> Guess:
    """The images among places of volumes; ``beside`` says what else is there."""
    images = [place for place in places if not place.is_mask] or list(places)
    best = max(images, key=lambda place: (place.number, place.place.endswith("_0000.nii.gz")))
    others = [place.place for place in images if place.place != best.place]
    said = f"; also there, of another modality or kind: {name_first(others)}; each can be taken instead"
    return Guess(best.place, f"{best.number} volume(s)" + (said if others else "") + beside)


def _guess_series(found: Sequence[ScanFile]) -> Guess:
    """Which DICOM series: the description that most patients have, where a patient has several."""
    series = [scan for scan in found if scan.title]
    per_patient = Counter(scan.patient for scan in series)
    titles = Counter(scan.title for scan in {(scan.patient, scan.title): scan for scan in series}.values())
    kinds = Counter(scan.title.partition(" ")[0] for scan in series)
    if len(titles) > 1 and len(kinds) > 1 and max(per_patient.values()) <= 1:
        (kind, count), *others = kinds.most_common()
        return Guess(
            f"{kind}*", f"{count} patients have this modality; also there: {name_first([k for k, _ in others])}"
        )
    if len(titles) <= 1 or max(per_patient.values(), default=0) <= 1:
        return Guess(None, "all series are taken: a patient has one, or all are alike")
    depth = Counter({title: sum(len(scan.files) for scan in series if scan.title == title) for title in titles})
    title = max(titles, key=lambda name: (titles[name], depth[name], name))
    more = name_first(sorted(f"{name} ({titles[name]} patient(s))" for name in titles if name != title))
    return Guess(_as_pattern(title), f"{titles[title]} of {len(per_patient)} patients have it; also there: {more}")


def _as_pattern(title: str) -> str:
    return re.sub(r"[\[\]*?]", "?", case_name(title))


def count_formats(paths: Iterable[Path]) -> str:
    """How many files there are of each format, for people."""
    found: Counter[str] = Counter()
    for path in paths:
        ending = next((e for e in FILE_ENDINGS if path.name.lower().endswith(e)), "DICOM")
        found[ending.lstrip(".")] += 1
    return ", ".join(f"{count} {name}" for name, count in found.most_common())
