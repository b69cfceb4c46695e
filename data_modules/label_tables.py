"""``labels.csv``: what is present, told slice by slice, by ranges of slices or by scans. Loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from data_modules.case_tables import check_cases
from data_modules.cases import CaseLabels, ScanLabels, SliceRange, SliceRanges
from data_modules.nifti_files import case_name
from data_modules.tables import open_table, read_columns, show
from weakmedsam.errors import DataError

MOST_DIGITS = 9
"""Of a slice's number."""

RANGES = ("case", "from", "to", "class")
"""Columns of a table of ranges."""

SCANS = ("case", "class")
"""Columns of a table of scans."""

NONE = "none"
"""In the column ``class``: these slices, or this scan, have no class."""


def columns_of_kind(columns: Sequence[str]) -> tuple[str, ...]:
    """What kind of label table has these columns: ``RANGES``, ``SCANS``, or ``case`` and ``slice``."""
    if set(RANGES) <= set(columns):
        return RANGES
    if "slice" in columns or not set(SCANS) <= set(columns):
        return ("case", "slice")
    # With one end of a range it is no table of scans: the other end is missing, which the reader of ranges says.
    return RANGES if {"from", "to"} & set(columns) else SCANS


def read_labels(path: Path, class_names: Sequence[str], cases: Collection[str]) -> dict[str, CaseLabels]:
    """Read a label table; its header tells the kind.

    Args:
        path: CSV with the columns case, slice and one per class; or case, from, to and class; or case and class.
        class_names: names of the classes, id 1 first.
        cases: names of the cases that are there.

    Returns:
        Case -> its labels.

    Raises:
        DataError: unreadable, a column is missing, a value is none of its column's, rows contradict each other, or a
            row is of a case that is not there.
    """
    kind = columns_of_kind(read_columns(path))
    if kind == RANGES:
        return {**read_ranges(path, class_names, cases)}
    if kind == SCANS:
        return {**read_scans(path, class_names, cases)}
    return {**read_slices(path, class_names, cases)}


def read_slices(
    path: Path, class_names: Sequence[str], cases: Collection[str]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Read a table with a row a slice: case -> slice -> 0 or 1 per class.

    Raises:
        DataError: as of ``read_labels``.
    """
    table = open_table(path, ("case", "slice", *class_names))
    labels: dict[str, dict[int, tuple[int, ...]]] = {}
    lines: dict[str, int] = {}
    for line, (name, number, *values) in table.rows:
        where, case = f"{path}: line {line}", case_name(name)
        slice_number = _number(where, "slice", number)
        for column, value in zip(class_names, values, strict=True):
            if value not in ("0", "1"):
                raise DataError(f"{where}, column {column}: {show(value)} is no label; 0 and 1 are. Correct it.")
        slices = labels.setdefault(case, {})
        if slice_number in slices:
            raise DataError(f"{where}: case {show(case)} slice {number} has two rows. Keep one.")
        slices[slice_number] = tuple(int(value) for value in values)
        lines.setdefault(case, line)
    check_cases(table, lines, cases)
    return labels


def read_ranges(path: Path, class_names: Sequence[str], cases: Collection[str]) -> dict[str, SliceRanges]:
    """Read a table with a row a range of slices, both ends included: case -> its ranges.

    A class is absent from the slices of a case that none of its rows names; ``none`` says so of all classes.

    Raises:
        DataError: as of ``read_labels``.
    """
    table = open_table(path, RANGES)
    found: dict[str, list[SliceRange]] = {}
    lines: dict[str, int] = {}
    for line, (name, first, last, label) in table.rows:
        where, case = f"{path}: line {line}", case_name(name)
        ends = _number(where, "from", first), _number(where, "to", last)
        if ends[0] > ends[1]:
            raise DataError(f"{where}: the range {first} to {last} ends before it begins. Correct it.")
        number = _class_number(where, label, class_names, "slices")
        for other in found.setdefault(case, []):
            same = number == other.number or None in (number, other.number)
            if same and ends[0] <= other.last and other.first <= ends[1]:
                said = "overlaps" if number == other.number else "contradicts"
                before = other.where.rpartition(": ")[2]
                raise DataError(f"{where}: {first} to {last}, {label}, {said} {before}. Correct one of them.")
        found[case].append(SliceRange(*ends, number, where))
        lines.setdefault(case, line)
    check_cases(table, lines, cases)
    return {case: SliceRanges(tuple(ranges), len(class_names)) for case, ranges in found.items()}


def read_scans(path: Path, class_names: Sequence[str], cases: Collection[str]) -> dict[str, ScanLabels]:
    """Read a table with a row a scan and class: case -> the classes that it shows.

    A scan without any class has a row too, ``none``: a row that was forgotten would teach that nothing is there.

    Raises:
        DataError: as of ``read_labels``.
    """
    table = open_table(path, SCANS)
    found: dict[str, dict[int | None, int]] = {}
    for line, (name, label) in table.rows:
        where, case = f"{path}: line {line}", case_name(name)
        number, rows = _class_number(where, label, class_names, "a scan"), found.setdefault(case, {})
        if number in rows:
            raise DataError(f"{where}: case {show(case)}, {label}, has a row already, line {rows[number]}. Keep one.")
        if rows and None in (number, *rows):
            raise DataError(f"{where}: {label} contradicts line {[*rows.values()][-1]}. Correct one of them.")
        rows[number] = line
    check_cases(table, {case: min(rows.values()) for case, rows in found.items()}, cases)
    numbers = range(len(class_names))
    return {case: ScanLabels(tuple(int(number in rows) for number in numbers)) for case, rows in found.items()}


def _class_number(where: str, label: str, class_names: Sequence[str], of: str) -> int | None:
    """Position of a class among the chosen ones; None: no class."""
    if label not in (*class_names, NONE):
        raise DataError(
            f"{where}, column class: {show(label)} is none of {', '.join(class_names)}; {NONE} is for {of} "
            "without any. Correct it, or data.classes."
        )
    return class_names.index(label) if label != NONE else None


def _number(where: str, column: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS):
        raise DataError(f"{where}, column {column}: {show(text)} is no slice; they are 0, 1, 2, ... Correct it.")
    return int(text)
