"""A sweep without an account: trials run here, one per GPU, and continue after a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from optuna.trial import FrozenTrial, TrialState

from weakmedsam.errors import ConfigError
from weakmedsam.run.checkpoints import resume_options
from weakmedsam.sweep.agent import words_of
from weakmedsam.sweep.definition import Sweep
from weakmedsam.sweep.plots import write_plots
from weakmedsam.sweep.trials import Trials, console
from weakmedsam.system.atomic_io import write_whole
from weakmedsam.system.signals import REQUEUE, Relay

LOOK = 1.0
"""Seconds between two looks at running trials."""


class Running(NamedTuple):
    """A trial that is being trained: its number, its process, and since when."""

    number: int
    process: subprocess.Popen[bytes]
    begun: float


def run_local(sweep: Sweep, count: int, jobs: int | None = None) -> None:
    """Run a sweep here until it has ``count`` trials, those of earlier calls and other processes included.

    Args:
        sweep: what is run.
        count: trials in all.
        jobs: trials at once, each on a GPU of its own; None takes one per GPU, or one without.

    Raises:
        ConfigError: the first trials all failed, or log another metric than is named.
        DataError: the journal is damaged.
    """
    trials = Trials(sweep)
    try:
        if sweep.features is not None:
            _score_stored(trials, sweep.features, count)
        else:
            _train(trials, count, jobs or max(1, len(visible_gpus())))
    finally:
        trials.write_table()
        write_plots(trials)
    ranked = trials.ranked()
    running = [str(trial.number) for trial in ranked if trial.state == TrialState.RUNNING]
    if running:
        console.print(f"still run by other processes: trial {', '.join(running)}; if those die, repeat the command")
    if ranked and (value := ranked[0].user_attrs.get("best")) is not None:
        options = " ".join(words_of(trials.values(ranked[0])))
        console.print(f"best: trial {ranked[0].number}, {sweep.metric} {value:.4f}: {options}")
    console.print(f"{sweep.folder}: table.csv, {', '.join(sorted(path.name for path in sweep.folder.glob('*.png')))}")


def _score_stored(trials: Trials, features: Path, count: int) -> None:
    """Trials of PAM, one after another in this process: each takes seconds."""
    from weakmedsam.pam.feature_cache import score_setting  # load time: torch

    metric = trials.sweep.metric
    while (trial := trials.take(count)) is not None:
        begun = time.monotonic()
        changes = {name.removeprefix("model.pam."): value for name, value in trials.values(trial).items()}
        metrics = score_setting(features, changes)
        if metric not in metrics:
            raise ConfigError(f"metric {metric!r} is not scored; there are {', '.join(metrics)}")
        write_whole(trials.folder(trial.number) / "scores.json", json.dumps(metrics, indent=1) + "\n")
        trials.close(trial.number, TrialState.COMPLETE, time.monotonic() - begun, metrics[metric])


def _train(trials: Trials, count: int, jobs: int) -> None:
    """Trials of a training stage, ``jobs`` at once.

    Raises:
        SystemExit: a signal has come and running trials have ended; status ``REQUEUE``.
    """
    gpus = visible_gpus()
    slots: dict[int, Running] = {}
    with Relay().listening() as relay:
        try:
            while True:
                for slot in range(jobs):
                    if slot in slots or relay.asked or (trial := trials.take(count)) is None:
                        continue
                    gpu = gpus[slot] if slot < len(gpus) else None
                    slots[slot] = Running(trial.number, _start(trials, trial, gpu, relay), time.monotonic())
                if not slots:
                    break
                time.sleep(LOOK)
                for slot, running in list(slots.items()):
                    if _look(trials, running, relay.asked):
                        del slots[slot]
        finally:
            for running in slots.values():
                running.process.kill()  # each continues from its last epoch
                running.process.wait()
    if relay.asked:
        console.print("stopped by a signal. The same command continues with the trials that are not finished.")
        raise SystemExit(REQUEUE)


def _look(trials: Trials, running: Running, asked: bool) -> bool:
    """Report a trial's epochs, and end it if it falls behind; returns whether it has ended."""
    number, process, begun = running
    code = process.poll()
    stopped = trials.falls_behind(number) and code is None
    if stopped:
        process.kill()
        process.wait()
    elif code is None:
        return False
    elif code and asked:
        trials.spend(number, time.monotonic() - begun)
        trials.release(number)
        return True
    state = TrialState.PRUNED if stopped else TrialState.FAIL if code else TrialState.COMPLETE
    trials.close(number, state, time.monotonic() - begun)
    if code:
        _stop_if_all_fail(trials, number)
    return True


def _stop_if_all_fail(trials: Trials, number: int) -> None:
    """Go on after a trial that failed, unless all do.

    Raises:
        ConfigError: three trials failed and none finished; the message is the last one's.
    """
    states = [trial.state for trial in trials.all]
    log = trials.folder(number) / "log.txt"
    if states.count(TrialState.FAIL) >= 3 and TrialState.COMPLETE not in states:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1] if lines else "nothing"
        raise ConfigError(
            f"{states.count(TrialState.FAIL)} trials failed and none finished; the last said: {said} ({log})"
        )


def _start(trials: Trials, trial: FrozenTrial, gpu: str | None, relay: Relay) -> subprocess.Popen[bytes]:
    folder, options = trials.folder(trial.number), words_of(trials.values(trial))
    folder.mkdir(parents=True, exist_ok=True)
    words = [*trials.sweep.words, *options, "--trainer.default_root_dir", str(folder)]
    words += resume_options(folder)
    environment = {**os.environ, "WANDB_MODE": os.environ.get("WANDB_MODE", "offline")}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    console.print(f"  trial {trial.number}: {' '.join(options)}")
    # The training holds the trial's lock too: where this process alone is killed, nobody else continues it meanwhile.
    held = [trials.locks[trial.number]]
    with (folder / "log.txt").open("ab") as log:
        return relay.start([sys.executable, "-m", "weakmedsam", *words], environment, log, held)


def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(number) for number, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU ")]
