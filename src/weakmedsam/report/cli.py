"""One page about a run, and the table at its end: ``python -m weakmedsam.report.cli RUN_DIR``.

The page is ``RUN_DIR/report.html``: self-contained, readable without a network and without W&B. Reading
the run (``report_run``) is apart from showing it (``report_page``), so that several runs can be shown on
one page from the same data. Neither torch nor Lightning is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from weakmedsam.errors import WeakMedSAMError
from weakmedsam.report.dice_table import dice_table, remarks, table_title
from weakmedsam.report.final_dice import unconvincing
from weakmedsam.report.run_data import read_run
from weakmedsam.system.atomic_io import write_whole
from weakmedsam.system.commands import command

REPORT = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write a run's page, whole or not at all, over the one that is there.

    Args:
        run_dir: ``runs/<dataset>/<experiment>``; a half-finished run gives a page that says what is missing.

    Returns:
        The page, ``run_dir/report.html``.

    Raises:
        DataError: no such folder, or a file of the run is damaged; the message names it.
    """
    from weakmedsam.report.run_page import render_run  # Jinja and Pillow: not for a run that is up to date

    run = read_run(run_dir)
    page = run.folder / REPORT
    write_whole(page, render_run(run))
    return page


def summary_table(run_dir: Path, console: Console | None = None) -> None:
    """Print the test Dice of each class, what else there is to say of the run in a few lines, and where the report is.

    Args:
        run_dir: ``runs/<dataset>/<experiment>``.
        console: where to print; standard output by default.

    Raises:
        DataError: as ``write_report``.
    """
    console = console or Console(highlight=False)
    run = read_run(run_dir)
    table = dice_table(run)
    console.print()
    console.print(table_title(run), style="bold", markup=False)
    if table is not None:
        console.print(table)
    for remark in remarks(run):
        console.print(remark, markup=False)
    for sentence in unconvincing(run):
        console.print(sentence, style="bold", markup=False)
    page = _short_path(run.folder / REPORT)
    said = f"report: {page}" if page.exists() else f"no report yet: {command('report')} writes {page}"
    console.print(said, style="bold", markup=False, soft_wrap=True)  # a path is copied whole


def _short_path(path: Path) -> Path:
    """From the working folder on, where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m weakmedsam.report.cli", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="runs/<dataset>/<experiment>")
    run_dir = parser.parse_args(arguments).run_dir
    try:
        write_report(run_dir)
        summary_table(run_dir)
    except WeakMedSAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
