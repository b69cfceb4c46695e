"""Check a data set before it is trained on: ``weakmedsam check --dataset cardiac``.

It looks with the settings that ``train`` would use, in a process that loads them as ``prepare`` does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from weakmedsam.errors import LESS_MEMORY
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.run.overrides import options_for, parse_options, wanted_settings
from weakmedsam.run.request import CHECK, Request
from weakmedsam.run.stages import STAGES, stage_configs
from weakmedsam.system.progress import VERBOSE
from weakmedsam.system.signals import KILLED


def check_words(request: Request, output: Path) -> list[str]:
    """The command line of the process that looks.

    Args:
        request: what the user asked for.
        output: folder of the page.

    Raises:
        ConfigError: a file of settings that is not there or cannot be read, or an option that concerns no stage.
    """
    prepare = STAGES[0]
    wanted_settings(prepare, request)
    words = ["check", "--output", str(output)]
    for path in stage_configs(prepare, request):
        words += ["--config", str(path)]
    if request.data_dir is not None:
        words += ["--data.data_dir", request.data_dir]
    return [*words, *options_for(prepare, request.options)]


def main(words: list[str] | None = None) -> None:
    """Parse the command line and look; exit status 1 where something must be mended."""
    words = sys.argv[1:] if words is None else words
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="weakmedsam check",
        description="Look at a data set before training: faults, duplicates, splits, outliers; a page with pictures.",
    )
    parser.add_argument("--dataset", default="phantom", help="of experiments/data/<DATASET>.yaml")
    parser.add_argument("--data-dir", default=None, help="folder of the scans; default: the YAML's")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, help=f"folder of the page; default: RUNS/DATASET/{CHECK}")
    args = parser.parse_args(words[:split])
    os.environ.setdefault(VERBOSE, "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    with ending_in_a_message("where it was", vars(args)):
        options = parse_options(words[split + 1 :])
        request = Request(args.dataset, CHECK, "pocket", args.data_dir, args.runs, options)
        looked = check_words(request, args.output or request.folder)
        done = subprocess.run([sys.executable, "-m", "weakmedsam", *looked], check=False)
    if done.returncode in KILLED:
        sys.exit(f"\nweakmedsam: the process that looks was killed: {LESS_MEMORY}")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
