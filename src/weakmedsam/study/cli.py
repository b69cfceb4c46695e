"""Several data sets, variants and seeds, and one page about them: ``weakmedsam study sets --data-dir /scans``.

A study is a file of ``experiments/study``. Its runs are runs like others, ``RUNS/<dataset>/<study>-<set>-<variant>-
<seed>``, each brought up to date by the pipeline; the page is ``RUNS/studies/<study>/study.html``, written whole after
each run. The same command continues after a kill. Neither torch nor Lightning is imported.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from weakmedsam.errors import ConfigError
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.run.overrides import parse_options
from weakmedsam.run.request import Request
from weakmedsam.study.definition import Study, plan_study, read_study
from weakmedsam.study.runner import Starter, run_study
from weakmedsam.system.progress import VERBOSE
from weakmedsam.system.signals import Relay


def main(words: list[str] | None = None, relay_class: Starter = Relay) -> int:
    """Parse the command line and run the study; returns the exit status, 1 where a run failed.

    Raises:
        SystemExit: with a message, where the study itself is wrong; with ``REQUEUE`` after a signal.
    """
    words = sys.argv[1:] if words is None else words
    split = words.index("--") if "--" in words else len(words)
    args = _parser().parse_args(words[:split])
    os.environ[VERBOSE] = "1" if args.verbose else os.environ.get(VERBOSE, "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    with ending_in_a_message("where it was", vars(args)):
        study = read_study(args.study)
        asked = Request(
            "", "", args.backbone, None, args.runs, parse_options(words[split + 1 :]), args.trainer, args.logger,
            tuple(shlex.split(args.launcher)), args.rounds,
        )  # fmt: skip
        plan = plan_study(study, args.name or args.study, args.data_dir, asked)
        failed = run_study(plan, _chosen_seeds(study, args.seeds), relay_class)
        if failed:
            print(f"{len(failed)} of {len(plan.runs)} runs failed; the same command tries them again:", file=sys.stderr)
            for one in failed:
                print(f"  {one.run.name}: {one.failed}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weakmedsam study",
        description="Run a table of data sets, variants and seeds, and write one page about them. "
        "Options behind `--` go to every run.",
    )
    parser.add_argument("study", nargs="?", default="sets", help="experiments/study/<STUDY>.yaml")
    parser.add_argument("--name", default=None, help="of the study's folder and runs; STUDY by default")
    parser.add_argument("--data-dir", type=Path, default=Path("data/scans"), help="holds the folders of the sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="run these of the file's seeds now; all")
    parser.add_argument("--backbone", default="pocket")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--trainer", default=None, help="experiments/trainer/<TRAINER>.yaml")
    parser.add_argument("--logger", default=None, help="experiments/logger/<LOGGER>.yaml")
    parser.add_argument("--rounds", type=int, default=1, help="of pseudo-labels and segmentation network")
    parser.add_argument("--launcher", default="", help="starts a stage's processes, e.g. 'srun python'")
    parser.add_argument("-v", "--verbose", action="store_true", help="show model summaries and notices, too")
    return parser


def _chosen_seeds(study: Study, seeds: list[int] | None) -> tuple[int, ...]:
    unknown = [str(seed) for seed in seeds or () if seed not in study.seeds]
    if unknown:
        known = ", ".join(map(str, study.seeds))
        raise ConfigError(f"--seeds {' '.join(unknown)}: {study.path} has the seeds {known}; add it there")
    return tuple(seeds or study.seeds)


if __name__ == "__main__":
    sys.exit(main())
