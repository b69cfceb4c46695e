"""Tables of cases: whether their rows are those of the cases that are there, and what has happened where not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from data_modules.nifti_files import case_name, nifti_stem
from data_modules.tables import Table, name_first, open_table, show
from weakmedsam.errors import DataError


def read_pairs(path: Path, column: str) -> tuple[Table, dict[str, tuple[int, str]]]:
    """Read a table with one row a case: the columns ``case`` and another one.

    Returns:
        The table, and case -> (line, cell).

    Raises:
        DataError: see ``open_table``; or a case has two rows.
    """
    table = open_table(path, ("case", column))
    found: dict[str, tuple[int, str]] = {}
    for line, (name, value) in table.rows:
        case = case_name(name)
        if case in found:
            before, other = found[case]
            raise DataError(
                f"{path}: line {line}, column case: {show(case)} has a row already, line {before}: its {column} is "
                f"{show(other)} there, {show(value)} here. Keep one."
            )
        found[case] = line, value
    return table, found


def check_cases(table: Table, lines: Mapping[str, int], cases: Collection[str], needed: Collection[str] = ()) -> None:
    """See that every row of a table is of a case that is there, and that cases have a row.

    Args:
        table: named in errors.
        lines: case, as the table names it -> its line.
        cases: names of the cases that are there.
        needed: those of them that must have a row.

    Raises:
        DataError: rows that name no case, or cases without a row; all of them in one message.
    """
    known = set(cases)
    unknown = [name for name in lines if name not in known]
    without = sorted(case for case in needed if case not in lines)
    faults = []
    if unknown:
        listed = name_first([f"{show(name)} (line {lines[name]})" for name in unknown])
        faults.append(f"{len(unknown)} case(s) of its rows are not there: {listed}")
    if without:
        faults.append(f"{len(without)} case(s) have no row: {name_first([show(case) for case in without])}")
    if faults:
        mend = _hint(unknown, cases) or "Correct the names, remove the rows, or add those that are missing."
        raise DataError(f"{table.path}: {'; '.join(faults)}. {mend}{table.guess if unknown else ''}")


def check_spelling(path: Path, column: str, cells: Iterable[tuple[int, str]]) -> None:
    """See that no two values of a column are one value in two spellings: 01 and 1, P7 and p7.

    Args:
        path: of the table.
        column: its name.
        cells: (line, value) of the column.

    Raises:
        DataError: two are; names both lines.
    """
    seen: dict[str, tuple[int, str]] = {}
    for line, value in cells:
        before, other = seen.setdefault(_without_zeros(case_name(value)).casefold(), (line, value))
        if case_name(other) != case_name(value):
            raise DataError(
                f"{path}: line {line}, column {column}: {show(value)} is {show(other)} in line {before}. Spell one "
                f"{column} one way; two of them need names that differ in more than zeros and upper case."
            )


def _hint(unknown: Sequence[str], cases: Collection[str]) -> str:
    """What has probably happened to names that are almost those of cases; empty where nothing shows it."""
    ways = (
        (
            _without_zeros,
            "Leading zeros are missing ({0} for {1}), as spreadsheets drop them: format the column as text and write "
            "the names again.",
        ),
        (_plain_name, "The name of a case has no folder and no ending: {1}, not {0}."),
        (str.casefold, "Upper and lower case count: {1}, not {0}."),
    )
    for way, said in ways:
        there = {way(case): case for case in cases}
        for name in unknown:
            if (case := there.get(way(name))) is not None:
                return said.format(show(name), show(case))
    if any(re.fullmatch(r"[0-9][.,]?[0-9]*E\+?[0-9]+", name, re.IGNORECASE) for name in unknown):
        return "A spreadsheet has shortened long numbers: format the column as text and write the names again."
    return ""


def _without_zeros(name: str) -> str:
    """A name as it is where numbers were taken for numbers: 1 or 1.0 for 001."""
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", re.sub(r"\.0+$", "", name))


def _plain_name(name: str) -> str:
    return nifti_stem(re.split(r"[/\\]", name)[-1]).strip()
