"""Several runs on one page: ``python -m weakmedsam.report.compare_cli phantom/default phantom/k4``.

Runs whose settings differ in ``seed_everything`` alone are one group, whose figures are shown as mean and
spread. The page is self-contained, as a run's own (``report``); reading is ``run_data``'s. Neither torch
nor Lightning is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from weakmedsam.errors import WeakMedSAMError
from weakmedsam.report.comparison import Contender, group_by_seed, read_contenders
from weakmedsam.report.comparison_page import render_comparison
from weakmedsam.system.atomic_io import write_whole


def page_path(contenders: Sequence[Contender], runs: Path) -> Path:
    """Where the page of these runs lies: in a folder of all comparisons, named by the runs."""
    names = [one.name for one in contenders]
    key = hashlib.sha256("\n".join(names).encode()).hexdigest()[:6]
    words = "-vs-".join(name.replace("/", ".") for name in names)
    return runs / "compare" / f"{words[:80]}-{key}.html"


def write_comparison(names: Sequence[str], runs: Path, output: Path | None = None) -> Path:
    """Write the page, whole or not at all, over an earlier one.

    Args:
        names: see ``read_contenders``.
        runs: folder of all runs.
        output: the page; None takes ``page_path``.

    Returns:
        Where it lies.

    Raises:
        WeakMedSAMError: see ``read_contenders``.
    """
    contenders = read_contenders(names, runs)
    path = output or page_path(contenders, runs)
    write_whole(path, render_comparison(contenders, group_by_seed(contenders)))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and say where it is; returns the exit status."""
    parser = argparse.ArgumentParser(prog="weakmedsam compare", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="RUN", help="<dataset>/<experiment>, two or more")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args(arguments)
    try:
        print(f"comparison: {write_comparison(args.names, args.runs, args.output)}")
    except WeakMedSAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
