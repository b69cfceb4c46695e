"""A run's tables, read; what is damaged is an error that names file, line and mend."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weakmedsam.errors import DataError
from weakmedsam.system import json_files as notes
from weakmedsam.system.commands import command
from weakmedsam.system.json_files import read_text

NAN = math.nan
Row = dict[str, str | float]

_TEXT_COLUMNS = ("case", "class")


@dataclass(frozen=True)
class EpochTable:
    """Metrics by epoch, epochs ascending; NaN where a metric was not measured.

    Attributes:
        epochs: (E,) epoch numbers.
        series: metric name -> (E,) values.
    """

    epochs: list[float] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)

    def at(self, metric: str, epoch: float) -> tuple[float, float]:
        """Value of a metric at an epoch, with the epoch; where it has none, at the last before or the first after."""
        found = (NAN, NAN)
        for number, value in zip(self.epochs, self.series.get(metric, ()), strict=False):
            if not math.isnan(value) and (number <= epoch or math.isnan(found[0])):
                found = (value, number)
        return found


REMOVE_RESULT = f"Remove it: `{command('train')}` makes results anew, and the report leaves out what stays away"


def _read_csv(path: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row."""
    try:
        text = read_text(path)
    except DataError as error:
        raise DataError(f"{str(error).removesuffix(f'. {notes.REMOVE_STATE}')}. {REMOVE_RESULT}") from error
    lines = csv.reader(text.splitlines(), strict=True)
    try:
        header = next(lines, [])
        missing = [name for name in required if name not in header]
        if missing:
            raise DataError(
                f"{path}: has no column {', '.join(missing)}; it has {', '.join(header) or 'no header'}. "
                f"{REMOVE_RESULT}"
            )
        for cells in lines:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}, line {lines.line_num}: {len(cells)} cells under {len(header)} columns. {REMOVE_RESULT}"
                )
            if cells:
                yield lines.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: is not valid CSV ({error}). {REMOVE_RESULT}") from error


def read_history(path: Path) -> EpochTable:
    """``history.csv``; empty where there is none.

    Raises:
        DataError: it is damaged; the message names the line.
    """
    if not path.exists():
        return EpochTable()
    rows: dict[float, dict[str, float]] = {}
    for line, cells in _read_csv(path, ("epoch",)):
        row = {name: _number(cell, path, line, name) for name, cell in cells.items()}
        if not math.isfinite(row["epoch"]):
            raise DataError(f"{path}, line {line}: no epoch number. {REMOVE_RESULT}")
        rows[row["epoch"]] = row  # an epoch that was repeated after a stop counts once, the last time
    epochs = sorted(rows)
    names = [name for name in rows[epochs[0]] if name != "epoch"] if epochs else []
    return EpochTable(epochs, {name: [rows[epoch][name] for epoch in epochs] for name in names})


def read_rows(path: Path, numbers: Sequence[str]) -> list[Row]:
    """Rows of a table by case and class; further columns become numbers where every cell is one.

    Args:
        path: of the CSV; no rows where there is none.
        numbers: columns that have to be there and to be numbers.

    Raises:
        DataError: it is damaged; the message names the line.
    """
    if not path.exists():
        return []
    lines = list(_read_csv(path, (*_TEXT_COLUMNS, *numbers)))
    names = list(lines[0][1]) if lines else []
    further = [name for name in names if name not in (*_TEXT_COLUMNS, *numbers)]
    numeric = {*numbers, *(name for name in further if all(_is_number(cells[name]) for _, cells in lines))}
    return [
        {
            name: _number(cell, path, line, name) if name in numeric else cell
            for name, cell in cells.items()
        }
        for line, cells in lines
    ]  # fmt: skip


def _number(cell: str, path: Path, line: int, name: str) -> float:
    if not _is_number(cell):
        raise DataError(f"{path}, line {line}, column {name}: {cell[:40]!r} is not a number. {REMOVE_RESULT}")
    text = cell.strip().lower()
    return {"": NAN, "true": 1.0, "false": 0.0}.get(text, NAN) if text in ("", "true", "false") else float(text)


def _is_number(cell: str) -> bool:
    text = cell.strip().lower()
    try:
        return text in ("", "true", "false") or isinstance(float(text), float)
    except ValueError:
        return False
