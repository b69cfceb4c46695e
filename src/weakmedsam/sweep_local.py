"""A sweep without an account: drawn by W&B's sweep library, run here, continued after a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weakmedsam.errors import ConfigError
from weakmedsam.run.checkpoints import resume_options
from weakmedsam.sweep_ledger import Ledger, Trial, console, words_of
from weakmedsam.system.atomic_io import write_whole
from weakmedsam.system.signals import REQUEUE, Relay

if TYPE_CHECKING:
    from weakmedsam.sweep import Sweep

LOOK = 1.0
"""Seconds between two looks at the running ones."""

Busy = dict[int, tuple[Trial, subprocess.Popen[bytes], float]]
"""Slot -> what runs there, since when."""


def run_local(sweep: Sweep, count: int, jobs: int | None = None, held: Sequence[int] = ()) -> None:
    """Run a sweep here until it has ``count`` runs, those of earlier calls included.

    Args:
        sweep: what is run.
        count: runs in all.
        jobs: runs at once, each on a GPU of its own; None takes one a GPU, or one without.
        held: descriptors that the runs keep open: of the lock of the sweep's folder. Where this process alone is
            killed, the sweep cannot go on before its runs have ended.

    Raises:
        ConfigError: the first runs all failed, or log another metric than is named.
    """
    ledger = Ledger(sweep)
    if sweep.features is not None:
        _score_stored(ledger, sweep.features, count)
    else:
        _train(ledger, count, jobs or max(1, len(visible_gpus())), held)
    ledger.publish()
    done = [trial for trial in ledger.trials if trial.best is not None]
    if done:
        best = max(done, key=lambda trial: ledger.sign * (trial.best or 0.0))
        console.print(
            f"best: run {best.number}, {sweep.metric} {best.best:.4f}: {' '.join(words_of(best.values))}"
        )
    console.print(f"{sweep.folder}/table.csv, parallel.png")


def _score_stored(ledger: Ledger, features: Path, count: int) -> None:
    """Runs of PAM, one after another in this process: each takes seconds."""
    from weakmedsam.pam.feature_cache import score

    metric = ledger.sweep.metric
    waiting = [trial for trial in ledger.trials if trial.state == "running"]  # of a call that was killed
    while waiting or len(ledger.trials) < count:
        trial = waiting.pop(0) if waiting else ledger.next()
        if trial is None:
            return
        begun = time.monotonic()
        changes = {name.removeprefix("model.pam."): value for name, value in trial.values.items()}
        figures = score(features, changes)
        if metric not in figures:
            raise ConfigError(f"metric {metric!r} is not scored; there are {', '.join(figures)}")
        write_whole(ledger.folder(trial) / "scores.json", json.dumps(figures, indent=1) + "\n")
        ledger.close(trial, "finished", time.monotonic() - begun, figures[metric])


def _train(ledger: Ledger, count: int, jobs: int, held: Sequence[int]) -> None:
    """Runs of a training stage, ``jobs`` at once.

    Raises:
        SystemExit: a signal has come and the running ones have ended; status ``REQUEUE``.
    """
    gpus = visible_gpus()
    slots = [gpus[number] if number < len(gpus) else None for number in range(jobs)]
    busy: Busy = {}
    waiting = [trial for trial in ledger.trials if trial.state == "running"]  # of a call that was killed
    drawn_out = False
    with Relay(held).listening() as relay:
        try:
            while True:
                while len(busy) < jobs and not drawn_out and (waiting or len(ledger.trials) < count):
                    if relay.asked:
                        break
                    trial = waiting.pop(0) if waiting else ledger.next()
                    drawn_out = trial is None
                    if trial is not None:
                        slot = next(number for number in range(jobs) if number not in busy)
                        busy[slot] = (trial, _start(ledger, trial, slots[slot], relay), time.monotonic())
                if not busy:
                    break
                time.sleep(LOOK)
                _look(ledger, busy, relay.asked)
        finally:
            for _, process, _ in busy.values():
                process.kill()  # each goes on from its last epoch
    if relay.asked:
        console.print("stopped by a signal. The same command continues with the runs that are not finished.")
        raise SystemExit(REQUEUE)


def _look(ledger: Ledger, busy: Busy, asked: bool) -> None:
    """Take in what has ended, and end what falls behind."""
    losers = ledger.losers()
    for slot, (trial, process, begun) in list(busy.items()):
        code, stopped = process.poll(), False
        if code is None and trial.number in losers:
            process.kill()
            code, stopped = process.wait(), True
        if code is None:
            continue
        del busy[slot]
        if code and asked and not stopped:
            ledger.pause(trial, time.monotonic() - begun)
            continue
        state = "stopped" if stopped else "failed" if code else "finished"
        ledger.close(trial, state, time.monotonic() - begun)
        if code and not stopped:
            _judge(ledger, trial)


def _judge(ledger: Ledger, trial: Trial) -> None:
    """Go on after a run that failed, unless all do.

    Raises:
        ConfigError: three runs failed and none finished; the message is the last one's.
    """
    log = ledger.folder(trial) / "log.txt"
    failed = [other for other in ledger.trials if other.state == "failed"]
    if len(failed) >= 3 and not any(other.state == "finished" for other in ledger.trials):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1] if lines else "nothing"
        raise ConfigError(f"{len(failed)} runs failed and none finished; the last said: {said} ({log})")


def _start(ledger: Ledger, trial: Trial, gpu: str | None, relay: Relay) -> subprocess.Popen[bytes]:
    folder = ledger.folder(trial)
    words = [*ledger.sweep.words, *words_of(trial.values), "--trainer.default_root_dir", str(folder)]
    words += resume_options(folder)
    environment = {**os.environ, "WANDB_MODE": os.environ.get("WANDB_MODE", "offline")}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    console.print(f"  run {trial.number}: {' '.join(words_of(trial.values))}")
    with (folder / "log.txt").open("ab") as log:
        return relay.start([sys.executable, "-m", "weakmedsam", *words], environment, log)


def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(number) for number, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU ")]
