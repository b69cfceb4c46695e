"""One page about a run, and the short table at its end: ``python -m weakmedsam.report.cli RUN_DIR``.

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
from rich.table import Table

from weakmedsam.contracts import in_round, split_round
from weakmedsam.errors import WeakMedSAMError
from weakmedsam.report.run_data import LATER, Run, read_run
from weakmedsam.report.run_page import render_run
from weakmedsam.report.summary import DASH, RANDOM, duration, figures, title_of, unconvincing
from weakmedsam.system.atomic_io import write_whole

REPORT = "report.html"

# Per stage: the figures of the short table, and the file that shows more.
_SHORT = {
    "prepare": ((), "prepare/stage.json"),
    "classify": (("auroc", "cam_dice", "pam_dice"), "classify/history.csv"),
    "pseudo_labels": (("quality",), "pseudo_labels/quality.csv"),
    "segment": (("val_dice", "agreement"), "segment/history.csv"),
    "test_maps": (
        ("test_cam_dice", "test_pam_dice", "test_no_image_dice", "again_cam_dice", "again_pam_dice"),
        "test_maps/cam_cases.csv",
    ),
    "test": (("dice", "hd95_mm", "missed"), "test/cases.csv"),
    "refined": (("refined.dice", "refined.hd95_mm", "refined.missed"), "refined/cases.csv"),
    "upper_bound": (("upper_bound",), "upper_bound/test/cases.csv"),
}
_WORDS = {
    "auroc": "AUROC (validation)",
    "cam_dice": "CAM Dice",
    "pam_dice": "PAM Dice",
    "test_cam_dice": "CAM Dice (test)",
    "test_pam_dice": "PAM Dice (test)",
    "test_no_image_dice": "no image (test)",
    "again_cam_dice": "prediction Dice (test)",
    "again_pam_dice": "PAM Dice (test)",
    "upper_bound": "Dice of EXPERT masks (test)",
    "quality": "quality",
    "val_dice": "Dice (validation)",
    "agreement": "agreement with pseudo-labels",
    "dice": "Dice (test)",
    "hd95_mm": "HD95 mm",
    "missed": "missed",
    "refined.dice": "Dice (test)",
    "refined.hd95_mm": "HD95 mm",
    "refined.missed": "missed",
}


def write_report(run_dir: Path) -> Path:
    """Write a run's page, whole or not at all, over the one that is there.

    Args:
        run_dir: ``runs/<dataset>/<experiment>``; a half-finished run gives a page that says what is missing.

    Returns:
        The page, ``run_dir/report.html``.

    Raises:
        DataError: no such folder, or a file of the run is damaged; the message names it.
    """
    run = read_run(run_dir)
    page = run.folder / REPORT
    write_whole(page, render_run(run))
    return page


def summary_table(run_dir: Path, console: Console | None = None) -> None:
    """Print each stage's figures (means of the classes), its time and where to look.

    Args:
        run_dir: ``runs/<dataset>/<experiment>``.
        console: where to print; standard output by default.

    Raises:
        DataError: as ``write_report``.
    """
    console = console or Console()
    run = read_run(run_dir)
    console.print(_table(run))
    for sentence in unconvincing(run):
        console.print(sentence, style="bold", soft_wrap=False)
    page = run.folder / REPORT
    console.print(f"report: {page}" if page.exists() else f"no report yet: make report writes {page}", style="bold")


def _table(run: Run) -> Table:
    table = Table(title=f"{run.dataset} / {run.experiment}", title_justify="left")
    table.add_column("stage")
    table.add_column("figures")
    table.add_column("time", justify="right")
    table.add_column("where to look")
    by_key = {(split_round(figure.stage)[1], figure.key): figure.overall for figure in figures(run)}
    again = [in_round(kind, one.number) for one in run.rounds[1:] for kind in LATER]
    for name in (*list(_SHORT)[:-1], *again, "upper_bound"):
        stage, (kind, number) = run.stages.get(name), split_round(name)
        if stage is None:
            continue
        keys, file = _SHORT[kind][0], _SHORT[kind][1].replace(kind, name, 1)
        found = ", ".join(f"{_WORDS[key]} {by_key[number, key]}" for key in keys if (number, key) in by_key)
        state = "" if stage.state == "done" else stage.state
        text = "; ".join(part for part in (found, state) if part) or DASH
        if name == "classify" and run.random:
            text += f"\n{RANDOM}"
        table.add_row(title_of(name), text, duration(stage.seconds), file if (run.folder / file).exists() else DASH)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print the short table; returns the exit status."""
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
