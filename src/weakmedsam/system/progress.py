"""One line about work that takes a while: a bar in a terminal, at most a line an epoch or a minute in a file.

rich is imported when a bar is drawn: processes that prepare volumes import this file, and draw none.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

VERBOSE = "WEAKMEDSAM_VERBOSE"
"""Variable: 1 where model summaries and notices are wanted (``-v``), 0 in the other stages of a run."""
REDRAWN = 0.1
"""Seconds between two drawings of a bar, at least."""
NARROW = 64
"""Columns of a terminal below which the metric is left out."""
_Item = TypeVar("_Item")


def is_verbose() -> bool:
    """Whether model summaries, the libraries' notices and the like are wanted."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


def is_stage_of_run() -> bool:
    """Whether a run's command has started this process, and wants no more than a bar of it."""
    return os.environ.get(VERBOSE) == "0"


def clock_text(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressLine:
    """A bar with a share, the time left and one short note. Where standard output is no terminal nothing is drawn.

    Args:
        label: what is counted, with where it is: "volume 3/30".
        total: units of the whole work; 0 where that is not known yet.
        kept: the line stays when the work is done; otherwise it makes room for the next one.

    Attributes:
        total: units of the whole work.
        done: units that are done.
        note: what stands behind the bar.
    """

    def __init__(self, label: str, total: float, kept: bool = True) -> None:
        self.label, self.done, self.note = label, 0.0, ""
        self.total, self._kept = total, kept
        self._begun, self._before, self._drawn = time.monotonic(), 0.0, 0.0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressLine:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(whole=kind is None)

    def open(self) -> None:
        """Draw it for the first time."""
        if not sys.stdout.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
        from rich.table import Column

        console = Console(highlight=False)
        narrow = console.width < NARROW
        bar = min(max(console.width - (38 if narrow else 60), 2), 40)
        columns: list[ProgressColumn] = [
            TextColumn("  {task.description:<15}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=bar),
            TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]:>12}", markup=False, table_column=Column(no_wrap=True)),
        ]
        if not narrow:
            columns.append(TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)))
        self._progress = Progress(*columns, console=console, auto_refresh=False, transient=not self._kept)
        self._task = self._progress.add_task(self.label, total=self.total or 1, left="", note="")
        self._progress.start()
        console.show_cursor(True)  # rich hides it, and a process that is killed would leave it so
        self._draw()

    def begin(self, total: float, done: float = 0.0) -> None:
        """Start the clock of the time left: what was done before this call took its time elsewhere.

        Args:
            total: units of the whole work.
            done: of them, by an earlier call of the command.
        """
        self.total, self.done, self._before, self._begun = total, done, done, time.monotonic()
        self._draw()

    def advance(self, label: str, units: float = 1.0) -> None:
        """Count units that are done, and say where the work is."""
        self.done, self.label = self.done + units, label
        now = time.monotonic()
        if now - self._drawn >= REDRAWN or self.done >= self.total:
            self._draw()

    def show(self, note: str) -> None:
        """Put a metric behind the bar."""
        self.note = note
        self._draw()

    def time_left(self) -> str:
        """Text of the time that the rest takes at the mean pace so far; empty where nothing is known of it."""
        made, rest = self.done - self._before, self.total - self.done
        if made <= 0 or rest <= 0:
            return ""
        return f"{clock_text((time.monotonic() - self._begun) / made * rest)} left"

    def close(self, whole: bool = True) -> None:
        """Draw it for the last time; may be called again.

        Args:
            whole: the work has come to its end: the bar is full, and says how long it took.
        """
        if self._progress is None:
            return
        took = ""
        if whole and self.total:
            self.done, took = self.total, f"took {clock_text(time.monotonic() - self._begun)}"
        self._draw(took or None)
        self._progress.stop()
        self._progress = None

    def _draw(self, left: str | None = None) -> None:
        if self._progress is None or self._task is None:
            return
        self._drawn = time.monotonic()
        self._progress.update(
            self._task, total=self.total or 1, completed=self.done, description=self.label,
            left=self.time_left() if left is None else left, note=self.note,
        )  # fmt: skip
        self._progress.refresh()


def tracked(items: Iterable[_Item], total: int, unit: str, kept: bool = True) -> Iterator[_Item]:
    """The items, with a bar about them: no bar where there are none.

    Args:
        items: what is worked on, one after the other.
        total: how many.
        unit: what one is: "volume".
        kept: as of ``ProgressLine``.
    """
    if not total:
        yield from items
        return
    with ProgressLine(f"{unit} 0/{total}", total, kept) as line:
        line.begin(total)
        for number, item in enumerate(items, start=1):
            yield item
            line.advance(f"{unit} {number}/{total}")
