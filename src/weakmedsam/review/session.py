"""A review of a run: its cases, what has been clicked and decided, and the labels that follow from it.

The tables are the truth: each change is written there first, whole, and then as the corrected pseudo-label of its case.
After a kill the next session, or ``replay``, makes the labels from the tables.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from data_modules.base import SliceDataModule
from data_modules.slice_datasets import slice_labels
from data_modules.store import SliceReader
from data_modules.store_index import Entry
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.contracts import in_round
from weakmedsam.errors import ConfigError, DataError, WeakMedSAMError
from weakmedsam.inference.trained_run import instantiate
from weakmedsam.review.correction import Changes, Corrected, apply_click, find_fault, replay, slice_states
from weakmedsam.review.label_files import Original, Source, read_original, read_source, unsure_slices, write_corrected
from weakmedsam.review.networks import Networks
from weakmedsam.run.clicks import (
    LABELS,
    REVIEW,
    Click,
    Decision,
    Extent,
    Reviewed,
    read_reviewed,
    write_clicks,
    write_decisions,
)
from weakmedsam.run.stage_state import is_current, result_name
from weakmedsam.run.trained_network import CONFIGURED, Network, class_names, last_round, network_settings
from weakmedsam.system.commands import command
from weakmedsam.system.progress import tracked

KEPT_VOLUMES = 8
"""Cases whose labels are kept in memory."""


class RefusedError(WeakMedSAMError):
    """What was asked in the page cannot be done; the message says why."""


class Case(NamedTuple):
    """A case that can be reviewed.

    Attributes:
        entry: what the store says of it.
        present: (D, C) which classes slices have, or may have where only their scan is labelled.
        unsure: (D,) of ``unsure_slices``.
        mean_unsure: of its slices that have a class; 0 without one.
    """

    entry: Entry
    present: NDArray[np.bool_]
    unsure: NDArray[np.float32]
    mean_unsure: float

    @property
    def rows(self) -> list[int]:
        """Slices with a class, the least sure first."""
        rows = np.flatnonzero(self.present.any(axis=1))
        return rows[np.argsort(-np.nan_to_num(self.unsure[rows]), kind="stable")].tolist()


class Volume(NamedTuple):
    """Labels of a case in memory.

    Attributes:
        original: as PAM has made them.
        label: (D, S, S), as they are now; written to in place.
        undo: for each click of this session, the slices before it.
        changed: slices that clicks have changed, by click.
    """

    original: Original
    label: NDArray[np.uint8]
    undo: list[Changes]
    changed: list[set[int]]


class Session:
    """A run under review.

    Args:
        run: its folder.
        rank: look at all pseudo-labels, to order the cases by how unsure they are; needed for the page only.

    Attributes:
        run: folder of the run.
        class_names: id 1 first.
        plane: of the slices: axial, coronal or sagittal.
        cases: name -> case, the least sure first.
        networks: of the run.
        reader: of the slice store.
        reviewed: all clicks and decisions.

    Raises:
        ConfigError: the run has no pseudo-labels, or they are out of date.
        DataError: the slice store is gone, or a table of the review is damaged.
    """

    def __init__(self, run: Path, rank: bool = True) -> None:
        self.run = run
        data, module = _open_run(run)
        self.class_names = module.class_names
        self.reader = SliceReader(data.store)
        self.plane = data.slices.plane
        self._data = data
        self.networks = Networks(module, run / "classify/checkpoints/best.ckpt", _segmenter(run), self.reader)
        self.cases = self._find_cases(rank)
        self.reviewed = self._read()
        self._volumes: OrderedDict[str, Volume] = OrderedDict()
        self._lock = threading.RLock()

    def volume(self, name: str) -> Volume:
        """The labels of a case, its clicks replayed.

        Raises:
            DataError: its pseudo-label is damaged or of other slices, or a click is not possible.
        """
        with self._lock:
            if name not in self._volumes:
                self._volumes[name] = self._replayed(name)
                if len(self._volumes) > KEPT_VOLUMES:
                    self._volumes.popitem(last=False)
            self._volumes.move_to_end(name)
            return self._volumes[name]

    def click(self, name: str, click: Click) -> Changes:
        """Take a click, keep it, and say what it changes.

        Raises:
            RefusedError: its slice is labelled without its class.
        """
        with self._lock:
            case, volume = self.cases[name], self.volume(name)
            fault = find_fault(click, case.present, self.class_names)
            if fault:
                raise RefusedError(fault)
            answer = partial(self.networks.answer, case.entry)
            changes = apply_click(volume.label, click, self.class_names, case.present, answer)
            now = datetime.now().astimezone().isoformat(timespec="milliseconds")
            self._keep_clicks([*self.reviewed.clicks, click._replace(case=name, time=now)])
            _take(volume, changes)
            self._write(name)
            return changes

    def undo(self, name: str) -> Changes:
        """Take a case's last click back, and say what that changes.

        Raises:
            RefusedError: there is none.
        """
        with self._lock:
            own, volume = self.reviewed.of_case(name).clicks, self.volume(name)
            if not own:
                raise RefusedError("there is no click to undo")
            place = len(self.reviewed.clicks) - 1 - self.reviewed.clicks[::-1].index(own[-1])
            self._keep_clicks([click for i, click in enumerate(self.reviewed.clicks) if i != place])
            volume.changed.pop()
            changes = volume.undo.pop()
            for z, ids in changes.items():
                volume.label[z] = ids
            self._write(name)
            return changes

    def decide(self, name: str, number: int | None, decision: str | None) -> None:
        """Accept or reject a case or a slice, or take that back (None)."""
        with self._lock:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            kept = [held for held in self.reviewed.decisions if held[:2] != (name, number)]
            new = [] if decision is None else [Decision(name, number, decision, now)]
            write_decisions(self.run, [*kept, *new])
            self.reviewed = self.reviewed._replace(decisions=(*kept, *new))
            self._write(name)

    def states(self, name: str) -> list[int]:
        """``SliceState`` of each slice of a case."""
        with self._lock:
            changed = set[int]().union(*self.volume(name).changed)
            return slice_states(self.cases[name].entry.depth, self.reviewed.of_case(name), changed).tolist()

    def replay(self) -> int:
        """Write the corrected pseudo-labels that are not of the tables as they are; returns how many were written."""
        folder, written = self.run / REVIEW / LABELS, 0
        names = self.reviewed.cases()
        for path in folder.glob("*.safetensors"):
            if path.stem not in names:
                path.unlink()
        for name in tracked(names, len(names), "case", kept=False):
            original = read_original(self._original_path(name))
            if read_source(folder / f"{name}.safetensors") != self._source(name, original):
                self._write(name)
                written += 1
        return written

    # Details

    def _find_cases(self, rank: bool) -> dict[str, Case]:
        found = []
        paths = sorted((self.run / "pseudo_labels").glob("*.safetensors"))
        for path in tracked(paths, len(paths), "case", kept=False):
            entry = self._data.entries.get(path.stem)
            if entry is None:
                continue
            labels = slice_labels(entry, self._data.slices.min_pixels)
            present = labels != 0  # or may be: SOMEWHERE
            unsure = unsure_slices(path) if rank else np.zeros(len(labels), np.float32)
            mean = float(np.nanmean(unsure)) if not np.isnan(unsure).all() else 0.0
            found.append(Case(entry, present, unsure, mean))
        if not found:
            raise ConfigError(f"{self.run / 'pseudo_labels'}: holds no pseudo-label of a case of this data set")
        return {case.entry.name: case for case in sorted(found, key=lambda case: -case.mean_unsure)}

    def _read(self) -> Reviewed:
        extents = {name: Extent(case.entry.depth, case.entry.frame.size) for name, case in self.cases.items()}
        return read_reviewed(self.run, extents, self.class_names)

    def _replayed(self, name: str) -> Volume:
        original = read_original(self._original_path(name))
        if original.volume != self._data.digest_volume(name):
            raise DataError(
                f"{self._original_path(name)}: is of other slices or labels than the store's: {command('train')}"
            )
        case = self.cases[name]
        volume = Volume(original, original.label.copy(), [], [])
        clicks, answer = self.reviewed.of_case(name).clicks, partial(self.networks.answer, case.entry)
        for changes in replay(original.label, clicks, self.class_names, case.present, answer):
            _take(volume, changes)
        return volume

    def _keep_clicks(self, clicks: list[Click]) -> None:
        write_clicks(self.run, clicks)
        self.reviewed = self.reviewed._replace(clicks=tuple(clicks))

    def _write(self, name: str) -> None:
        """The corrected pseudo-label of a case, or none where nothing is said of it."""
        path = self.run / REVIEW / LABELS / f"{name}.safetensors"
        if self.reviewed.of_case(name).digest() is None:
            path.unlink(missing_ok=True)
            return
        volume = self.volume(name)
        corrected = Corrected(volume.label, np.array(self.states(name), np.uint8))
        write_corrected(path, corrected, self._source(name, volume.original))

    def _source(self, name: str, original: Original) -> Source:
        reviewed = self.reviewed.of_case(name).digest()
        return Source(name, original.content, reviewed, result_name(self.run / "classify"))

    def _original_path(self, name: str) -> Path:
        return self.run / "pseudo_labels" / f"{name}.safetensors"


def _take(volume: Volume, changes: Changes) -> None:
    volume.undo.append({z: volume.label[z].copy() for z in changes})
    volume.changed.append(set(changes))
    for z, ids in changes.items():
        volume.label[z] = ids


def _open_run(run: Path) -> tuple[SliceDataModule, WeakMedSAM]:
    """Data, set up, and the classification network without its weights."""
    if result_name(run / "pseudo_labels") is None:
        raise ConfigError(
            f"{run} has no pseudo-labels to review: name data set and experiment of a run, or make them first "
            f"({command('pseudo-labels')})"
        )
    if not is_current(run, "pseudo_labels"):
        raise ConfigError(f"{run / 'pseudo_labels'} is out of date: make them again first ({command('pseudo-labels')})")
    config = network_settings(run / "classify/config.yaml", *CONFIGURED)
    names = class_names(run, Network(config, Path(), [], ""))
    module, data = instantiate(config, names)
    data.setup("predict")
    return data, cast(WeakMedSAM, module)


def _segmenter(run: Path) -> Path | None:
    """Checkpoint of the run's last segmentation network."""
    if result_name(run / "segment") is None:
        return None
    return run / in_round("segment", last_round(run)) / "checkpoints/best.ckpt"
