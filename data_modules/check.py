"""Look at a whole data set before it is trained on: headers first, then volumes, then what they say together.

What ``prepare`` refuses is found by the code of ``prepare``: volumes go into the slice store as they are looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_modules.base import SliceDataModule
from data_modules.cases import Case
from data_modules.findings import (
    SMALL_BOX,
    Checked,
    Finding,
    content_share,
    find_duplicates,
    find_header_faults,
    find_poor_content,
    find_unusual,
    one_line,
)
from data_modules.prepare import fill_store, remark_units
from data_modules.resampling import frame_box
from data_modules.slice_datasets import check_positives, slice_labels, tabulate
from data_modules.splits import SPLITS, find_torn_patients, read_split, split_cases
from data_modules.store import SliceReader
from data_modules.store_index import Entry, Index
from data_modules.summary import count_splits, warn_of_false_spacing, warn_of_labels, warn_of_undefined
from weakmedsam.contracts import SOMEWHERE
from weakmedsam.errors import DataError
from weakmedsam.system.progress import tracked

_log = logging.getLogger("data_modules")


def check(data: SliceDataModule, say: Callable[[str], None] = lambda line: None) -> Checked:
    """Look at a data set under a data module's settings; fills its slice store.

    Args:
        data: not prepared, or prepared: then it is quick.
        say: takes what the headers have shown, before volumes are read.

    Raises:
        MemoryShortError: a process that read volumes was ended.
    """
    checked = Checked(data.info.name, data.data_dir, data.store, data.class_names)
    with _remarks() as remarks:
        try:
            data.draw_scans()
            cases = data.find_cases()
            faults = find_header_faults(cases, data.spec)
        except DataError as error:
            return replace(checked, findings=[Finding("data set", "", one_line(error), must=True)])
    say(f"{len(cases)} case(s), {len(faults)} with a fault{''.join(f': {text}' for text in [*faults.values()][:1])}")
    with _remarks():  # they are found again in what is stored
        index = fill_store(cases, data.spec, data.prepare.store_dir, data.prepare.workers)
    refused = data.prepare.on_bad_case == "raise" or not index.entries
    findings = [
        *(Finding("case", name, one_line(reason), refused) for name, (_, reason) in index.skipped.items()),
        *(Finding("files", "", one_line(text)) for text in remarks),
    ]
    checked = replace(checked, total=len(cases), entries=index.entries)
    if index.entries:
        split, faults_of_split = _split(data, cases, index)
        findings += [*faults_of_split, *_find_in_volumes(data, index.entries, split)]
        labels = {name: slice_labels(entry, data.slices.min_pixels) for name, entry in index.entries.items()}
        checked = replace(
            checked,
            split=split,
            counts=count_splits(index.entries, split, data.class_names, data.slices.min_pixels) if split else {},
            positives={name: _count_positives(part) for name, part in labels.items()},
            labelled={name: np.flatnonzero(part.any(axis=1)).tolist() for name, part in labels.items()},
        )
    return replace(checked, findings=sorted(findings, key=lambda finding: not finding.must))


def _count_positives(labels: NDArray[np.float32]) -> list[int]:
    """How many slices of a case show each class; ``SOMEWHERE`` where only the scan is known to."""
    return np.where((labels == SOMEWHERE).any(axis=0), SOMEWHERE, (labels > 0).sum(axis=0)).tolist()


@contextmanager
def _remarks() -> Iterator[list[str]]:
    """What the data modules remark meanwhile, instead of the terminal."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    before, keep = (_log.handlers, _log.level, _log.propagate), Keep()
    _log.handlers, _log.propagate = [keep], False
    _log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        _log.handlers, _log.propagate = before[0], before[2]
        _log.setLevel(before[1])


@contextmanager
def _finding(kind: str, found: list[Finding]) -> Iterator[None]:
    """Turn what would end the training into a finding."""
    try:
        yield
    except DataError as error:
        found.append(Finding(kind, "", one_line(error), must=True))


def _split(data: SliceDataModule, cases: Sequence[Case], index: Index) -> tuple[dict[str, str], list[Finding]]:
    """Case -> split, empty where there is none, and what is wrong with it."""
    settings = data.split_settings
    names = [case.name for case in cases]
    patients = {name: entry.patient for name, entry in index.entries.items()}
    try:
        if settings.file:
            split = read_split(Path(settings.file), names, names if data.prepare.on_bad_case == "raise" else patients)
            if torn := find_torn_patients(split, patients):
                said = [Finding("patient", case, f"{settings.file}: {text}", must=True) for case, text in torn]
                return {case: split[case] for case in patients}, said
        split = split_cases(patients, set(names), settings, data.info.published_split)[0]
    except DataError as error:
        return {}, [Finding("split", "", one_line(error), must=True)]
    return split, []


def _find_in_volumes(data: SliceDataModule, entries: Mapping[str, Entry], split: Mapping[str, str]) -> list[Finding]:
    found = [
        *find_duplicates(entries, split, data.store),
        *(_find_in_splits(data, entries, split) if split else ()),
        *find_unusual(entries),
        *(Finding("unit", "", text) for text in remark_units(entries.values())),
    ]
    with _remarks() as remarks:
        warn_of_false_spacing(entries, data.info)
    found += [Finding("spacing", "", text) for text in remarks]
    reader = SliceReader(data.store)
    for name, entry in tracked(entries.items(), len(entries), "content", kept=False):
        found += find_poor_content(entry, data.class_names, data.slices.min_pixels)
        top, bottom, left, right = frame_box(entry.frame)
        share = content_share(reader.image(name)[:, top:bottom, left:right])
        if share < SMALL_BOX:
            text = f"{name}: is constant outside a box of {share:.1%} of it. Crop it, or see that it was exported whole"
            found.append(Finding("content", name, text))
    return found


def _find_in_splits(data: SliceDataModule, entries: Mapping[str, Entry], split: Mapping[str, str]) -> list[Finding]:
    """What training, validation and test would refuse, or warn of."""
    of = {part: [entry for name, entry in entries.items() if split[name] == part] for part in SPLITS}
    found = []
    for part in ("train", "val"):
        if not of[part]:
            text = f"the {part} split is empty ({len(entries)} cases). Correct data.split.file or data.split.fractions"
            found.append(Finding("split", "", text, must=True))
    if not any(entry.has_mask for entry in of["test"]):
        what = "no test case has an expert mask" if of["test"] else "the test split is empty"
        found.append(Finding("split", "", f"{what}, so nothing will be scored"))
    taken = data.slices.min_pixels, data.labels.only_positive
    with _remarks() as remarks:
        if of["train"]:
            with _finding("class", found):
                check_positives(tabulate(of["train"], *taken), data.class_names, data.info.name)
        if of["val"]:
            with _finding("class", found):
                warn_of_undefined(tabulate(of["val"], taken[0], scored=True).labels, data.class_names)
    found += [Finding("class", "", text) for text in remarks]
    return found + [Finding("labels", "", text) for text in warn_of_labels(of["train"], data.class_names, *taken)]
