"""Filling a slice store: in parallel, continued after a kill, each volume read once."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from filelock import FileLock

from data_modules.cases import Case, ScanLabels, SliceRanges
from data_modules.config import OnBadCase
from data_modules.formats.volume import NO_SPACING
from data_modules.store import read_case, stamp, write_case
from data_modules.store_index import Entry, Index, StoreSpec, read_entry, read_index, remove, write_index
from data_modules.tables import name_first
from data_modules.wholeness import find_case_damage
from weakmedsam.errors import LESS_MEMORY, DataError, MemoryShortError
from weakmedsam.system.progress import tracked

SHOWN_CASES = 20
"""How many bad cases one error lists."""

_SAID = {
    "unknown": "%d header(s) state no unit of length, taken as mm: %s",
    NO_SPACING: "%d scan(s) state no size of a voxel, taken as 1 mm (data.spacing tells it): %s",
}
"""Unit of a scan -> what is remarked of such scans."""

_log = logging.getLogger(__name__)


def prepare(
    cases: Sequence[Case],
    spec: StoreSpec,
    store_dir: str | Path,
    workers: int | None = None,
    on_bad_case: OnBadCase = "raise",
) -> Index:
    """Bring a store up to date with its cases; what is there, whole and unchanged is not read again.

    Args:
        cases: all cases of the data set.
        spec: how they are stored.
        store_dir: the folder of stores.
        workers: processes; None takes one per processor, 1 works in this process.
        on_bad_case: "raise": one error names every bad case, after all good ones are stored. "skip":
            bad cases are left out, logged, and listed in ``skipped.csv``.

    Returns:
        The index.

    Raises:
        DataError: bad cases, or none that is good.
        MemoryShortError: a worker process was ended.
    """
    index = fill_store(cases, spec, store_dir, workers, retry=on_bad_case == "raise")
    if index.skipped and (on_bad_case == "raise" or not index.entries):
        raise DataError(_list_problems(index, len(cases), on_bad_case))
    for name, (_, reason) in index.skipped.items():
        _log.warning("left out %s: %s", name, reason)
    return index


def fill_store(
    cases: Sequence[Case], spec: StoreSpec, store_dir: str | Path, workers: int | None = None, retry: bool = False
) -> Index:
    """Bring a store up to date with its cases, whatever is wrong with some of them; see ``prepare``.

    Args:
        cases: all cases of the data set.
        spec: how they are stored.
        store_dir: the folder of stores.
        workers: as of ``prepare``.
        retry: read again what could not be used and has not changed since.

    Returns:
        The index, with what is wrong with the cases left out.

    Raises:
        MemoryShortError: a worker process was ended.
    """
    store = spec.folder(store_dir)
    store.mkdir(parents=True, exist_ok=True)
    with lock_store(store):
        for leftover in store.glob(".part-*"):
            remove(leftover)
        index = _fill(cases, spec, store, workers, retry)
        write_index(store, spec, index)
    return index


def remark_units(entries: Iterable[Entry]) -> list[str]:
    """What is to be said of scans whose files state no unit, or no size of a voxel: a sentence each."""
    found: dict[str, list[str]] = {unit: [] for unit in _SAID}
    for entry in entries:
        found.get(entry.geometry.unit, []).append(entry.name)
    return [_SAID[unit] % (len(names), name_first(sorted(names))) for unit, names in found.items() if names]


def _fill(cases: Sequence[Case], spec: StoreSpec, store: Path, workers: int | None, retry: bool) -> Index:
    before = read_index(store) or Index({}, {})
    entries: dict[str, Entry] = {}
    skipped: dict[str, tuple[tuple[tuple[str, int, int], ...], str]] = {}
    todo: list[Case] = []
    for case in cases:
        try:
            now = () if case.problem else stamp(case, spec.data_dir)
        except DataError as error:
            skipped[case.name] = ((), str(error))
            continue
        if case.problem:
            skipped[case.name] = ((), case.problem)
        elif (entry := _stored(case, now, store)) is not None:
            entries[case.name] = entry
        elif not retry and before.skipped.get(case.name, ((), ""))[0] == now:
            skipped[case.name] = before.skipped[case.name]
        else:
            todo.append(case)
    read: list[Entry] = []
    for case, result in tracked(_run(todo, spec, store, workers), len(todo), "volume"):
        if isinstance(result, Entry):
            entries[case.name] = result
            read.append(result)
        else:
            # What may pass is tried again by the next call, without a change of the file.
            skipped[case.name] = (stamp(case, spec.data_dir) if result.lasting else (), result.reason)
    for remark in remark_units(read):
        _log.warning(remark)
    for case in cases:
        if case.name in entries:
            try:
                # What tables say is small and read anyway: kept out of the case's folder, a corrected table
                # costs no reading of volumes.
                table = table_labels(case, entries[case.name])
                entries[case.name] = replace(entries[case.name], patient=case.patient, table=table)
            except DataError as error:
                del entries[case.name]
                skipped[case.name] = ((), str(error))
    return Index(dict(sorted(entries.items())), dict(sorted(skipped.items())))


def _stored(case: Case, now: tuple[tuple[str, int, int], ...], store: Path) -> Entry | None:
    """What a case's folder says of it; None where it is not there, of other files, or damaged."""
    folder = store / case.name
    if not folder.is_dir():
        return None
    try:
        entry = read_entry(folder)
    except DataError as error:
        _log.warning("%s: the volume is prepared again", str(error).partition(". ")[0])
        return None
    if (entry.sources, entry.has_mask) != (now, case.mask is not None):
        return None
    wrong = find_case_damage(folder, case.name, entry.files)
    if wrong is not None:
        _log.warning("%s %s: the volume is prepared again", *wrong)
        return None
    return entry


def table_labels(case: Case, entry: Entry) -> tuple[tuple[int, ...], ...] | None:
    """A case's labels from its table, in the order of the stored slices.

    The table counts slices along the file's own third axis; the store may count the other way.

    Returns:
        (D, C) of 0 and 1, or ``SOMEWHERE``; None if the case has no table.

    Raises:
        DataError: the table does not fit the volume.
    """
    if case.table is None:
        return None
    if isinstance(case.table, ScanLabels):  # of slices it says nothing: any plane will do
        return tuple(case.table.by_slice(entry.depth).values())
    axis, backwards = entry.geometry.slice_axis
    if axis != 2:
        raise DataError(
            f"{case.image}: labels.csv counts slices along the file's third axis, but its "
            f"{entry.geometry.plane} slices lie along axis {axis + 1}. Choose another plane, or "
            "store the file with that axis last."
        )
    table = case.table.by_slice(entry.depth) if isinstance(case.table, SliceRanges) else case.table
    missing = sorted(set(range(entry.depth)) - set(table))
    extra = sorted(set(table) - set(range(entry.depth)))
    if missing or extra:
        faults = [
            said.format(name_first([str(number) for number in numbers]))
            for said, numbers in (("no row for {}", missing), ("rows for {}, which are not there", extra))
            if numbers
        ]
        raise DataError(
            f"{case.image}: has slices 0 to {entry.depth - 1}; labels.csv has {' and '.join(faults)}. "
            "Give every slice one row, counted from 0."
        )
    numbers = range(entry.depth - 1, -1, -1) if backwards else range(entry.depth)
    return tuple(tuple(table[number]) for number in numbers)


def _run(
    todo: Sequence[Case], spec: StoreSpec, store: Path, workers: int | None
) -> Iterator[tuple[Case, Entry | Refusal]]:
    count = min(workers or os.cpu_count() or 1, len(todo))
    if count <= 1:
        for case in todo:
            yield case, prepare_case(case, spec, store)
        return
    # Spawned, not forked: a fork would inherit whatever the caller has loaded, locks included.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            with _bare_workers():
                waiting = {pool.submit(prepare_case, case, spec, store): case for case in todo}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool as error:
            raise MemoryShortError(f"a process that prepares volumes was ended: {LESS_MEMORY}") from error
        finally:  # after Ctrl-C nothing more is begun
            pool.shutdown(wait=False, cancel_futures=True)


class Refusal(NamedTuple):
    """Why a case cannot be used.

    Attributes:
        reason: names the file and the mend.
        lasting: whether it stays so as long as the file stays as it is.
    """

    reason: str
    lasting: bool = True


def prepare_case(case: Case, spec: StoreSpec, store: Path) -> Entry | Refusal:
    """Read and store one case: its entry, or what is wrong with it. Runs in a worker process."""
    try:
        return write_case(read_case(case, spec), store)
    except DataError as error:
        system = isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
        return Refusal(str(error), lasting=not system)
    except MemoryShortError as error:
        return Refusal(str(error), lasting=False)
    except MemoryError:
        return Refusal(f"{case.image}: there is too little memory to prepare it: {LESS_MEMORY}.", lasting=False)


def _end_with_parent() -> None:
    """Let a worker end when its parent is killed: it would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _bare_workers() -> Iterator[None]:
    """Processes spawned meanwhile compute with one thread, leave Ctrl-C to the caller, and do not run its main script.

    They share the processors. And they need nothing of the script, which multiprocessing would import
    in each of them: torch and Lightning with it (half a minute), or, if it is not guarded, all it does.
    """
    resource_tracker.ensure_running()  # it would unblock the signal as it starts
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if os.name == "posix" else None
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if masked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def lock_store(store: Path) -> Iterator[None]:
    """Only one process writes into a store; the lock goes with the process, even when killed.

    ``prepare`` removes what killed processes have left half-written: whoever else writes there has to hold it too.
    """
    path = store / ".lock"
    if path.is_dir() or path.is_symlink():
        remove(path)
    with FileLock(path):
        yield


def _list_problems(index: Index, total: int, on_bad_case: OnBadCase) -> str:
    lines = [f"  {reason}" for _, reason in index.skipped.values()]
    if len(lines) > SHOWN_CASES:
        lines = [*lines[:SHOWN_CASES], f"  ... and {len(lines) - SHOWN_CASES} more"]
    mend = (
        "Mend them, or leave them out with data.prepare.on_bad_case: skip."
        if on_bad_case == "raise"
        else "No case is left."
    )
    return f"{len(index.skipped)} of {total} cases cannot be used:\n" + "\n".join(lines) + f"\n{mend}"
