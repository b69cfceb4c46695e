"""Sweeps over settings: ``python -m weakmedsam.sweep.cli sce --dataset abdomen [--local]``.

A sweep is a file of ``experiments/sweeps`` in W&B's format. With an account it is registered there and an agent is
started; with ``--local`` Optuna samples from the same file and trials run here. Either way earlier stages are brought
up to date first, and each trial has a folder of its own under ``runs/<dataset>/sweeps/<name>/``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from weakmedsam.errors import ConfigError
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.run.overrides import parse_options
from weakmedsam.run.pipeline import run
from weakmedsam.run.request import Request
from weakmedsam.sweep.agent import words_of
from weakmedsam.sweep.definition import Sweep, claim, fit_to_store, plan
from weakmedsam.system.commands import command
from weakmedsam.system.file_lock import alone


def check_parameters(sweep: Sweep) -> None:
    """See that the command line takes what is drawn, before anything is trained.

    Raises:
        ConfigError: it refuses a parameter or a value; the message is its own.
    """
    if sweep.features is not None:
        return
    from weakmedsam.sweep.trials import sample  # load time: Optuna

    words = [*sweep.words, *words_of(sample(sweep.definition) or {}), "--print_config"]
    done = subprocess.run([sys.executable, "-m", "weakmedsam", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("weakmedsam: ")]
        raise ConfigError(f"{sweep.name}: {said[0].removeprefix('weakmedsam: ') if said else done.stderr[-500:]}")


def register(sweep: Sweep, count: int) -> None:
    """Hand the sweep to W&B's server and start an agent here.

    Raises:
        ConfigError: no account.
    """
    import wandb  # load time, as the next one

    from weakmedsam.loggers import use_wandb_offline_unless_asked

    use_wandb_offline_unless_asked()
    if os.environ.get("WANDB_MODE") == "offline":
        here = command("sweep", sweep=sweep.name, local=True)
        raise ConfigError(f"nobody is logged in to W&B: `wandb login`, or run the sweep here: {here}")
    definition = {key: value for key, value in sweep.definition.items() if key != "seed"}  # W&B knows no such key
    number = wandb.sweep(definition, project="weakmedsam")
    subprocess.run(
        [sys.executable, "-m", "wandb", "agent", "--project", "weakmedsam", "--count", str(count), number],
        check=True,
    )


def start(sweep: Sweep, request: Request, count: int, local: bool, jobs: int | None) -> None:
    """Bring up to date what the sweep builds on, then run it.

    Raises:
        WeakMedSAMError: a setting or file that is wrong.
    """
    check_parameters(sweep)
    with alone(sweep.folder / "locks/prepare", wait=True):  # calls of this sweep take turns
        run(sweep.program.target, request)
        sweep = fit_to_store(sweep)
        claim(sweep)
    if local:
        from weakmedsam.sweep.local_runner import run_local  # load time: Optuna

        run_local(sweep, count, jobs)
    else:
        register(sweep, count)


def main(words: list[str] | None = None) -> None:
    """Parse the command line and run the sweep."""
    words = sys.argv[1:] if words is None else words
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="weakmedsam sweep", description="Sweep over settings.")
    parser.add_argument("sweep", help="experiments/sweeps/<SWEEP>.yaml")
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--experiment", default="default", help="the run whose earlier stages it builds on")
    parser.add_argument("--backbone", default="pocket")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--trainer", default=None)
    parser.add_argument("--name", default=None, help="of the sweep's folder; SWEEP by default")
    parser.add_argument(
        "--count",
        type=int,
        default=20,
        help="trials in all, of every call and process",
    )
    parser.add_argument("--local", action="store_true", help="run here, without an account")
    parser.add_argument("--jobs", type=int, default=None, help="trials at once; one a GPU by default")
    args = parser.parse_args(words[:split])
    with ending_in_a_message("where it was", vars(args)):
        options = parse_options(words[split + 1 :])
        request = Request(args.dataset, args.experiment, args.backbone, args.data_dir, args.runs, options, args.trainer)
        start(plan(args.sweep, request, args.name), request, args.count, args.local, args.jobs)


if __name__ == "__main__":
    main()
