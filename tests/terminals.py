"""Commands in a pseudo-terminal, and what a user then sees: lines, as a terminal draws them."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


def run_in_terminal(words: Sequence[str], columns: int, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command whose standard streams are a terminal of so many columns.

    Returns:
        Its exit status and all that it has written, escape codes included.
    """
    held, given = pty.openpty()
    fcntl.ioctl(given, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    plain = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        words, cwd=ROOT, env=plain | {"TERM": "xterm-256color"}, stdin=given, stdout=given, stderr=given,
        start_new_session=True,
    )  # fmt: skip
    os.close(given)
    read = []
    while True:
        try:
            part = os.read(held, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        read.append(part)
    os.close(held)
    return process.wait(), b"".join(read).decode()


def seen(written: str) -> list[str]:
    """The lines that a terminal shows in the end, scrolled-off ones included; what would wrap stays one long line.

    Knows what rich and tqdm write: carriage return, cursor up and down, erase line, colours.
    """
    lines, row, column, at = [""], 0, 0, 0
    while at < len(written):
        code = ESCAPE.match(written, at)
        if code:
            number, kind = code[1], code[2]
            count = int(number) if number.isdigit() else 1
            if kind == "A":
                row = max(row - count, 0)
            elif kind == "B":
                row += count
            elif kind == "K":
                lines[row] = "" if number == "2" else lines[row][:column]
            at = code.end()
            continue
        letter, at = written[at], at + 1
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row, column = row + 1, 0
        else:
            lines[row] = lines[row].ljust(column)[:column] + letter + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


class Terminal:
    """Standard output and error of this process as a pseudo-terminal.

    Args:
        monkeypatch: puts them back.
        columns: of the terminal.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
        self._held, given = pty.openpty()
        fcntl.ioctl(given, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))  # rich asks the process's own descriptors otherwise
        self._file = os.fdopen(given, "w", buffering=1, encoding="utf-8")
        monkeypatch.setattr(sys, "stdout", self._file)
        monkeypatch.setattr(sys, "stderr", self._file)
        self._read: list[bytes] = []
        self._reader = threading.Thread(target=self._drain, daemon=True)  # a terminal holds few bytes unread
        self._reader.start()

    def lines(self) -> list[str]:
        """What it shows in the end; nothing can be written after that."""
        self._file.close()
        self._reader.join(10)
        os.close(self._held)
        return [line for line in seen(b"".join(self._read).decode()) if line]

    def _drain(self) -> None:
        with contextlib.suppress(OSError):  # Linux: the other side is closed
            while part := os.read(self._held, 65536):
                self._read.append(part)
