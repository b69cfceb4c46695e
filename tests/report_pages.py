"""Reading report pages as text."""

import io
import re
from pathlib import Path

from rich.console import Console

from weakmedsam.report.cli import summary_table, write_report


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    found = re.search(rf'<(section|header) id="{name}">.*?</\1>', page, re.DOTALL)
    assert found, f"no section {name}"
    return found.group()


def printed(run: Path) -> str:
    console = Console(file=io.StringIO(), width=120)
    summary_table(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def table_rows(text: str) -> dict[str, dict[str, str]]:
    """The table at a run's end: row -> heading -> figure."""
    lines = [line for line in text.splitlines() if re.match("[┃│]", line)]
    head, *rows = (re.split(r" *[┃│] *", line.strip("┃│ ")) for line in lines)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
