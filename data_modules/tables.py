"""Tables that a user supplies: one strict reader of CSV.

What spreadsheets write is read: UTF-8 with or without byte-order mark, UTF-16 with one, Windows-1252; separated by
comma, semicolon or tab, which the header line decides; any line ends; blanks around cells; empty lines. Whatever
could be meant in two ways is refused in one line that names file, line and column.
"""

from __future__ import annotations

import codecs
import csv
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from weakmedsam.errors import DataError

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}

LARGEST = 32 * 2**20
"""Bytes; the labels of a thousand volumes of a thousand slices have 20 MB."""

LONGEST_CELL = 500
"""Characters of a cell that is read; a file's name has at most 255."""

SHOWN_NAMES = 10
"""How many names one message lists."""

_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
_SAID = re.compile(r"sep=([,;\t]) *(?:\r\n?|\n)", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_JOINERS = "\u200c\u200d"  # part of how some languages are written


class TableRow(NamedTuple):
    """One row of a table.

    Attributes:
        line: where it begins in the file, from 1.
        cells: of the columns that were asked for, in that order; none is empty.
    """

    line: int
    cells: tuple[str, ...]


class Table(NamedTuple):
    """A table whose header has been read.

    Attributes:
        path: of the file.
        rows: read one by one, so that a fault further down is raised on the way.
        guess: what a message about unknown names adds where the encoding was guessed; empty otherwise.
    """

    path: Path
    rows: Iterator[TableRow]
    guess: str


def open_table(path: Path, columns: Sequence[str]) -> Table:
    """Open a table; further columns are allowed and left alone.

    Args:
        path: of the CSV.
        columns: names of the columns to read.

    Raises:
        DataError: it cannot be read, or not in one way only: encoding, separator, quotes, columns, number of
            cells, empty cells.
    """
    text, guess = _decode(path)
    if found := _CONTROL.search(text):
        line = _line_at(text, found.start())
        raise DataError(
            f"{path}: line {line} holds the control character U+{ord(found[0]):04X}, so it is no table as text. "
            "Save it again as CSV UTF-8."
        )
    header = _read_header(path, text, columns)
    return Table(path, _checked(path, header, columns), guess)


def read_columns(path: Path) -> list[str]:
    """Names of a table's columns, which tell what kind of table it is.

    Raises:
        DataError: it cannot be read.
    """
    found = _possible_headers(path, _decode(path)[0])
    return max((header.names for header in found), key=len)


def is_unseen(character: str) -> bool:
    """Whether a character cannot be seen or ends a line, and is no part of how a language is written."""
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character not in _JOINERS


def show(name: str) -> str:
    """A name as a message shows it: in quotes, invisible characters spelt out, shortened."""
    return repr(name) if len(name) <= 60 else f"{name[:60]!r}..."


def name_first(words: Sequence[str]) -> str:
    """The first of some words, for a message, and how many more there are."""
    return ", ".join(words[:SHOWN_NAMES]) + (
        f" and {len(words) - SHOWN_NAMES} more" if len(words) > SHOWN_NAMES else ""
    )


def _decode(path: Path) -> tuple[str, str]:
    """A table's text, and the remark on a guessed encoding."""
    try:
        if not path.is_file():
            fault = "is no file that can be read as a table" if path.exists() else "there is no such file"
            raise DataError(f"{path}: {fault}. Correct the name.")
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path}: has more than {LARGEST // 2**20} MB; that is no table of cases. Correct it.")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Correct the name or its rights.") from error
    mend = "Save the table as CSV UTF-8."
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16"), ""
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: begins as UTF-16 and goes on otherwise ({error.reason}). {mend}") from error
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        place = error.start + (len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0)
        line = _line_at(content[:place].decode("latin-1"), place)
        fault = f"{path}: line {line} holds the byte 0x{content[place]:02X}, which is not UTF-8"
    if not content.decode("utf-8", "ignore").isascii():
        raise DataError(f"{fault}, though other lines are. {mend}")
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError as error:
        raise DataError(f"{fault}, nor can the table be Windows-1252. {mend}") from error
    return (
        text,
        " The table is not UTF-8 and was read as Windows-1252: if names look wrong, save it as CSV UTF-8.",
    )


class _Header(NamedTuple):
    line: int
    names: list[str]
    separator: str
    rows: Iterator[tuple[int, list[str]]]


def _read_header(path: Path, text: str, columns: Sequence[str]) -> _Header:
    """The header, by the one separator with which it has the columns."""
    found = _possible_headers(path, text)
    fitting = [header for header in found if set(columns) <= set(header.names)]
    if len(fitting) != 1 and len(found) > 1:
        ways = "; ".join(f"by {SEPARATORS[h.separator]} {_columns(h.names)}" for h in found)
        raise DataError(
            f"{path}: line {found[0].line}: it is not clear what separates the columns {[*columns]}: {ways}. Use one "
            "separator, and quotes around cells that hold it."
        )
    header = fitting[0] if fitting else found[0]
    where = f"{path}: line {header.line}"
    if missing := [name for name in columns if name not in header.names]:
        raise DataError(
            f"{where}: lacks the column(s) {missing}; separated by {SEPARATORS[header.separator]} it has "
            f"{_columns(header.names)}. Correct the header."
        )
    if twice := [name for name in header.names if name and header.names.count(name) > 1]:
        raise DataError(f"{where}: the column {show(twice[0])} stands twice in the header. Keep one.")
    return header


def _possible_headers(path: Path, text: str) -> list[_Header]:
    """The first row by each separator that parts it."""
    found, faults = [], []
    said = _SAID.match(text)  # Excel's own line on the separator
    for separator in said[1] if said else SEPARATORS:
        rows = _rows(path, text, separator)
        try:
            for _ in range(2 if said else 1):
                line, names = next(rows, (0, []))
        except DataError as fault:
            faults.append(fault)
            continue
        if len(names) > 1:
            found.append(_Header(line, names, separator, rows))
    if not found and faults:
        raise faults[0]
    if not found:
        raise DataError(
            f"{path}: line 1 is no header. One is needed, with the columns separated by comma, semicolon or tab."
            if text.strip()
            else f"{path}: is empty. Fill it in, or remove it."
        )
    return found


def _checked(path: Path, header: _Header, columns: Sequence[str]) -> Iterator[TableRow]:
    """The cells that are read, of rows that fit the header."""
    places = [header.names.index(name) for name in columns]
    empty = True
    for line, cells in header.rows:
        empty = False
        if len(cells) != len(header.names):
            raise DataError(
                f"{path}: line {line} has {len(cells)} cell(s), the header {len(header.names)}, separated by "
                f"{SEPARATORS[header.separator]}. Correct the line; a cell that holds the separator needs quotes."
            )
        kept = tuple([cells[place] for place in places])
        if not (all(kept) and len(whole := "".join(kept)) <= LONGEST_CELL and whole.isprintable()):
            for name, cell in zip(columns, kept, strict=True):
                _check_cell(f"{path}: line {line}, column {name}", cell)
        yield TableRow(line, kept)
    if empty:
        raise DataError(f"{path}: has a header and no row. Fill it in, or remove it.")


def _check_cell(where: str, cell: str) -> None:
    if not cell:
        raise DataError(f"{where}: is empty. Fill it in, or remove the row.")
    if len(cell) > LONGEST_CELL:
        raise DataError(f"{where}: has {len(cell):,} characters ({show(cell)}). Correct it.")
    for character in "" if cell.isprintable() else cell:
        if is_unseen(character):
            raise DataError(
                f"{where}: {show(cell)} holds U+{ord(character):04X}, which cannot be seen or ends a line. Type it "
                "anew."
            )


def _rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, stripped cells) of all rows that are not blank."""
    reader = csv.reader((m[0] for m in _LINE.finditer(text)), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}: line {line}: {_fault(error, separator)}") from error
        if cells is None:
            return
        cells = [_bare(cell) for cell in cells]
        if any(cells):
            yield line, cells


def _bare(cell: str) -> str:
    """A cell without the blanks around it, and without quotes that csv leaves as they come after a blank."""
    bare = cell.strip()
    if bare[:1] == '"' != cell[:1] and len(bare) > 1 and bare[-1] == '"':
        return bare[1:-1].replace('""', '"').strip()
    return bare


def _fault(error: csv.Error, separator: str) -> str:
    said = str(error)
    if "unexpected end" in said:
        return 'a quote (") is opened and never closed. Close it, or double a quote that is part of a name.'
    if "field limit" in said:
        return f"a cell has more than {csv.field_size_limit():,} characters. Is a quote missing? Correct it."
    if "expected after" in said:
        return (
            f"text follows a closing quote; separated by {SEPARATORS[separator]}, a cell in quotes ends with them. "
            "Double a quote that is part of a name."
        )
    return f"cannot be read ({said}). Correct it."


def _columns(names: Sequence[str]) -> str:
    return f"[{name_first([show(name) for name in names])}]"


def _line_at(text: str, place: int) -> int:
    """Number of the line, from 1, that a place in a text is in."""
    return 1 + len(re.findall(r"\r\n?|\n", text[:place]))
