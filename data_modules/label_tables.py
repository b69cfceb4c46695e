"""``labels.csv``: what is present in which slices, told slice by slice or by ranges of slices. Loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from data_modules.case_tables import check_cases
from data_modules.cases import SliceLabels, SliceRange, SliceRanges
from data_modules.nifti_files import case_name
from data_modules.tables import open_table, read_columns, show
from weakmedsam.errors import DataError

MOST_DIGITS = 9
"""Of a slice's number."""

RANGES = ("case", "from", "to", "class")
"""Columns of a table of ranges."""

NONE = "none"
"""In the column ``class``: these slices have no class."""


def read_labels(path: Path, class_names: Sequence[str], cases: Collection[str]) -> dict[str, SliceLabels]:
    """Read a label table; its header tells the kind.

    Args:
        path: CSV with the columns case, slice and one per class; or case, from, to and class.
        class_names: names of the classes, id 1 first.
        cases: names of the cases that are there.

    Returns:
        Case -> its labels.

    Raises:
        DataError: unreadable, a column is missing, a value is none of its column's, rows contradict each other, or a
            row is of a case that is not there.
    """
    columns = read_columns(path)
    if set(RANGES) <= set(columns):
        return {**read_ranges(path, class_names, cases)}
    if "slice" not in columns and {"case", "class"} <= set(columns):
        raise DataError(
            f"{path}: says what is present by scan (case,class). Labels of whole scans are not read yet: give ranges "
            f"of slices, {','.join(RANGES)}, or a row a slice, case,slice,{','.join(class_names)}."
        )
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
        if label not in (*class_names, NONE):
            raise DataError(
                f"{where}, column class: {show(label)} is none of {', '.join(class_names)}; {NONE} is for slices "
                "without any. Correct it, or data.classes."
            )
        number = class_names.index(label) if label != NONE else None
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


def _number(where: str, column: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS):
        raise DataError(f"{where}, column {column}: {show(text)} is no slice; they are 0, 1, 2, ... Correct it.")
    return int(text)
