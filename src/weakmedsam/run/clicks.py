"""What a person has said of a run's pseudo-labels: tables of clicks and decisions, read strictly, written whole.

They lie in the run's folder, ``review/clicks.csv`` and ``review/decisions.csv``; a table without a row is not there.
No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from data_modules.tables import TableRow, open_table
from weakmedsam.errors import DataError
from weakmedsam.system.atomic_io import write_table

REVIEW = "review"
"""Folder of a review, in the run's."""
LABELS = "labels"
"""Folder of the corrected pseudo-labels, in the review's."""
CLICKS, DECISIONS = "clicks.csv", "decisions.csv"
CLICK_COLUMNS = ("case", "slice", "x", "y", "sign", "class", "time")
DECISION_COLUMNS = ("case", "slice", "decision", "time")

ACCEPTED, REJECTED = "accepted", "rejected"
ALL = "all"
"""In place of a slice's number: the whole case."""


class Click(NamedTuple):
    """One click into a slice.

    Attributes:
        case: whose slice.
        slice: its number in the volume, from 0.
        x: column of the pixel in the working frame.
        y: its row.
        sign: 1: the pixel belongs to the class, -1: it does not.
        class_name: which class.
        time: when, ISO 8601.
    """

    case: str
    slice: int
    x: int
    y: int
    sign: int
    class_name: str
    time: str = ""


class Decision(NamedTuple):
    """What a person has decided on a case, or on one slice.

    Attributes:
        case: which.
        slice: number of the slice; None: all of them.
        decision: ``ACCEPTED``: the labels are right as they are shown, and trusted in training. ``REJECTED``: they are
            left out of it.
        time: when, ISO 8601.
    """

    case: str
    slice: int | None
    decision: str
    time: str = ""


class Reviewed(NamedTuple):
    """Both tables, in the order in which rows were written.

    Attributes:
        clicks: of all cases.
        decisions: of all cases; at most one of a case and slice.
    """

    clicks: tuple[Click, ...]
    decisions: tuple[Decision, ...]

    def of_case(self, case: str) -> Reviewed:
        """Rows of one case."""
        return Reviewed(
            tuple(click for click in self.clicks if click.case == case),
            tuple(decision for decision in self.decisions if decision.case == case),
        )

    def cases(self) -> list[str]:
        """Names of the cases that have rows, sorted."""
        return sorted({click.case for click in self.clicks} | {decision.case for decision in self.decisions})

    def digest(self) -> str | None:
        """Short hash of what counts, times left out; None where there is nothing."""
        if not (self.clicks or self.decisions):
            return None
        rows = [[click[:-1] for click in self.clicks], sorted(str(decision[:-1]) for decision in self.decisions)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


class Extent(NamedTuple):
    """What a case's rows may say.

    Attributes:
        slices: how many the volume has.
        size: side of the working frame, pixels.
    """

    slices: int
    size: int


def read_reviewed(
    run: Path, cases: Mapping[str, Extent] | None = None, class_names: Sequence[str] | None = None
) -> Reviewed:
    """The tables of a run's review, empty where there are none.

    Args:
        run: its folder.
        cases: those that can be reviewed; None: rows are not held against them.
        class_names: the classes; None: likewise.

    Raises:
        DataError: a table is damaged, or a row is of a case, slice, pixel or class that there is not; names file, line
            and column.
    """
    folder = run / REVIEW
    clicks = [_click(folder / CLICKS, row) for row in _rows(folder / CLICKS, CLICK_COLUMNS)]
    decisions = [_decision(folder / DECISIONS, row) for row in _rows(folder / DECISIONS, DECISION_COLUMNS)]
    for line, click in clicks:
        _check_place(f"{folder / CLICKS}: line {line}", click, cases)
        if class_names is not None and click.class_name not in class_names:
            raise DataError(
                f"{folder / CLICKS}: line {line}, column class: {click.class_name!r} is none of the run's classes "
                f"({', '.join(class_names)}). {_MEND}"
            )
    seen: set[tuple[str, int | None]] = set()
    for line, decision in decisions:
        _check_place(f"{folder / DECISIONS}: line {line}", decision, cases)
        if decision[:2] in seen:
            raise DataError(f"{folder / DECISIONS}: line {line}: decides a second time on its slice. {_MEND}")
        seen.add(decision[:2])
    return Reviewed(tuple(click for _, click in clicks), tuple(decision for _, decision in decisions))


def write_clicks(run: Path, clicks: Sequence[Click]) -> None:
    """Write ``clicks.csv``, whole or not at all; without a click it goes."""
    rows = [dict(zip(CLICK_COLUMNS, click, strict=True)) for click in clicks]
    _write(run / REVIEW / CLICKS, CLICK_COLUMNS, rows)


def write_decisions(run: Path, decisions: Sequence[Decision]) -> None:
    """Write ``decisions.csv``, whole or not at all; without a decision it goes."""
    cells = [(d.case, ALL if d.slice is None else d.slice, d.decision, d.time) for d in decisions]
    rows = [dict(zip(DECISION_COLUMNS, row, strict=True)) for row in cells]
    _write(run / REVIEW / DECISIONS, DECISION_COLUMNS, rows)


def is_reviewed(run: Path) -> bool:
    """Whether a run has a table of clicks or decisions; they may be damaged."""
    return any((run / REVIEW / name).exists() for name in (CLICKS, DECISIONS))


_MEND = "Correct the row or remove it; earlier rows stay as they are."


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    if rows:
        write_table(path, columns, rows)
    else:
        path.unlink(missing_ok=True)


def _rows(path: Path, columns: Sequence[str]) -> Sequence[TableRow]:
    return list(open_table(path, columns).rows) if path.exists() else []


def _click(path: Path, row: TableRow) -> tuple[int, Click]:
    case, number, x, y, sign, class_name, time = row.cells
    where = f"{path}: line {row.line}"
    if sign not in ("1", "-1"):
        raise DataError(f"{where}, column sign: {sign!r} is neither 1 (belongs to the class) nor -1. {_MEND}")
    z, column, row_ = (_whole(where, *cell) for cell in (("slice", number), ("x", x), ("y", y)))
    return row.line, Click(case, z, column, row_, int(sign), class_name, _time(where, time))


def _decision(path: Path, row: TableRow) -> tuple[int, Decision]:
    case, number, decision, time = row.cells
    where = f"{path}: line {row.line}"
    if decision not in (ACCEPTED, REJECTED):
        raise DataError(f"{where}, column decision: {decision!r} is neither {ACCEPTED} nor {REJECTED}. {_MEND}")
    chosen = None if number == ALL else _whole(where, "slice", number)
    return row.line, Decision(case, chosen, decision, _time(where, time))


def _whole(where: str, column: str, cell: str) -> int:
    if not (cell.isascii() and cell.isdecimal() and len(cell) < 10):
        raise DataError(f"{where}, column {column}: {cell[:40]!r} is no whole number from 0 on. {_MEND}")
    return int(cell)


def _time(where: str, cell: str) -> str:
    try:
        datetime.fromisoformat(cell)
    except ValueError as error:
        raise DataError(f"{where}, column time: {cell[:40]!r} is no time like 2025-01-31T12:00:00. {_MEND}") from error
    return cell


def _check_place(where: str, row: Click | Decision, cases: Mapping[str, Extent] | None) -> None:
    if cases is None:
        return
    extent = cases.get(row.case)
    if extent is None:
        raise DataError(f"{where}, column case: {row.case[:40]!r} has no pseudo-label in this run. {_MEND}")
    if row.slice is not None and row.slice >= extent.slices:
        raise DataError(
            f"{where}, column slice: {row.slice}, but {row.case} has the slices 0 to {extent.slices - 1}. {_MEND}"
        )
    if isinstance(row, Click) and max(row.x, row.y) >= extent.size:
        raise DataError(f"{where}: pixel ({row.x}, {row.y}) lies outside the frame of {extent.size} pixels. {_MEND}")
