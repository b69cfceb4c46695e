"""A sweep without an account: drawn by W&B's sweep library, run here, continued after a kill.

``trials/<number>/trial.json`` holds what was drawn, from the moment it was drawn, and how the run ended;
``table.csv`` and ``parallel.png`` in the sweep's folder are written anew after each run.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from weakmedsam.contracts import ConfigError
from weakmedsam.files import read_table, write_whole
from weakmedsam.sweep_picture import write_picture, write_trials
from weakmedsam.sweep_run import last_checkpoint

if TYPE_CHECKING:
    from weakmedsam.sweep import Sweep

console = Console(highlight=False)
LOOK = 1.0
"""Seconds between two looks at the running ones."""

Values = dict[str, Any]


@dataclass
class Trial:
    """One run of a sweep.

    Attributes:
        number: from 0, in the order in which they were drawn.
        values: option -> what was drawn.
        state: running, finished, stopped (by hyperband) or failed.
        best: best value of the metric so far; None without one.
        seconds: how long it took.
    """

    number: int
    values: Values
    state: str = "running"
    best: float | None = None
    seconds: float = 0.0


def library() -> Any:
    """W&B's sweep library, whose import warns of its own use of pydantic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sweeps
    return sweeps


def draw(definition: Values, trials: Sequence[Any], seed: int) -> Values | None:
    """The next setting, by W&B's library; None when a grid is through.

    Args:
        definition: of the sweep.
        trials: earlier runs, as the library's ``SweepRun``.
        seed: the same seed and runs give the same setting.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the library draws from it)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own use of scikit-learn
        found = library().next_run(definition, list(trials))
    if found is None:
        return None
    return {name: _plain(entry["value"]) for name, entry in found.config.items()}


def _plain(value: Any) -> Any:
    """A drawn value without numpy; six digits are enough to name a setting."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.6g}") if isinstance(value, float) else value


def words_of(values: Values) -> list[str]:
    """``{"a.b": 1}`` -> ``["--a.b=1"]``, as W&B's agent writes ``${args}``."""
    return [f"--{name}={value}" for name, value in values.items()]


class Ledger:
    """The runs of a sweep, on disk.

    Args:
        sweep: whose runs.
        seed: of the draws.
    """

    def __init__(self, sweep: Sweep, seed: int = 0) -> None:
        self.sweep = sweep
        self.seed = seed
        self.sign = -1.0 if sweep.definition["metric"].get("goal") == "minimize" else 1.0
        found = sorted((sweep.folder / "trials").glob("*/trial.json"))
        self.trials = [Trial(**json.loads(path.read_text(encoding="utf-8"))) for path in found]

    def folder(self, trial: Trial) -> Path:
        """Where a run lies."""
        return self.sweep.folder / "trials" / f"{trial.number:03d}"

    def next(self) -> Trial | None:
        """Draw a run and write it down; None when a grid is through."""
        number = len(self.trials)
        values = draw(self.sweep.definition, [self.as_run(t) for t in self.trials], self.seed + number)
        if values is None:
            return None
        trial = Trial(number, values)
        self.trials.append(trial)
        self._save(trial)
        return trial

    def history(self, trial: Trial) -> list[float]:
        """The metric by epoch."""
        rows = read_table(self.folder(trial) / "history.csv")
        if rows and trial.state == "finished" and self.sweep.metric not in rows[-1]:
            names = ", ".join(name for name in rows[-1] if "/" in name)
            raise ConfigError(f"the runs of {self.sweep.name} log no {self.sweep.metric}; they log {names}")
        return [float(row[self.sweep.metric]) for row in rows if row.get(self.sweep.metric)]

    def as_run(self, trial: Trial) -> Any:
        """A run as W&B's library takes it."""
        states = {"running": library().RunState.running, "failed": library().RunState.failed}
        metric, scores = self.sweep.metric, self.history(trial)
        finite = [
            value
            for value in (*scores, *([] if trial.best is None else [trial.best]))
            if math.isfinite(value)
        ]
        return library().SweepRun(  # by the aliases: with pydantic 2 the library passes over the fields' own names
            name=str(trial.number),
            state=states.get(trial.state, library().RunState.finished),
            config={name: {"value": value} for name, value in trial.values.items()},
            sampledHistory=[{metric: value} for value in scores],
            summaryMetrics={metric: self.choose(finite)} if finite else {},
        )

    def choose(self, scores: Iterable[float]) -> float:
        """The best of some values."""
        return self.sign * max(self.sign * value for value in scores)

    def close(self, trial: Trial, state: str, seconds: float, score: float | None = None) -> None:
        """Write down how a run ended; then table and picture anew."""
        trial.state, trial.seconds = state, round(trial.seconds + seconds, 1)
        scores = self.history(trial) if score is None else [score]
        finite = [value for value in scores if math.isfinite(value)]
        trial.best = self.choose(finite) if finite else None
        self._save(trial)
        show = "no value" if trial.best is None else f"{trial.best:.4f}"
        console.print(f"  run {trial.number}: {state}, {self.sweep.metric} {show}")
        self.publish()

    def publish(self) -> None:
        """Write ``table.csv`` and ``parallel.png``."""
        write_trials(self.sweep.folder / "table.csv", self.trials, self.sweep.metric)
        done = [trial for trial in self.trials if trial.best is not None]
        if done:
            write_picture(self.sweep.folder / "parallel.png", done, self.sweep.metric, self.sign)

    def losers(self) -> set[int]:
        """Numbers of the running ones that hyperband ends."""
        if "early_terminate" not in self.sweep.definition:
            return set()
        found = library().stop_runs(self.sweep.definition, [self.as_run(trial) for trial in self.trials])
        return {int(run.name) for run in found if run.name is not None}

    def _save(self, trial: Trial) -> None:
        write_whole(self.folder(trial) / "trial.json", json.dumps(asdict(trial), indent=1) + "\n")


def run_local(sweep: Sweep, count: int, jobs: int | None = None) -> None:
    """Run a sweep here until it has ``count`` runs, those of earlier calls included.

    Args:
        sweep: what is run.
        count: runs in all.
        jobs: runs at once, each on a GPU of its own; None takes one a GPU, or one without.

    Raises:
        ConfigError: the first runs all failed, or log another metric than is named.
    """
    ledger = Ledger(sweep)
    if sweep.features is not None:
        _score_stored(ledger, sweep.features, count)
    else:
        _train(ledger, count, jobs or max(1, len(visible_gpus())))
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
    from weakmedsam.sweep_features import score

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


def _train(ledger: Ledger, count: int, jobs: int) -> None:
    """Runs of a training stage, ``jobs`` at once."""
    gpus = visible_gpus()
    slots = [gpus[number] if number < len(gpus) else None for number in range(jobs)]
    busy: dict[int, tuple[Trial, subprocess.Popen[bytes], float]] = {}
    waiting = [trial for trial in ledger.trials if trial.state == "running"]  # of a call that was killed
    drawn_out = False
    try:
        while True:
            while len(busy) < jobs and not drawn_out and (waiting or len(ledger.trials) < count):
                trial = waiting.pop(0) if waiting else ledger.next()
                drawn_out = trial is None
                if trial is not None:
                    slot = next(number for number in range(jobs) if number not in busy)
                    busy[slot] = (trial, _start(ledger, trial, slots[slot]), time.monotonic())
            if not busy:
                return
            time.sleep(LOOK)
            _look(ledger, busy)
    finally:
        for _, process, _ in busy.values():
            process.terminate()


def _look(ledger: Ledger, busy: dict[int, tuple[Trial, subprocess.Popen[bytes], float]]) -> None:
    """Take in what has ended, and end what falls behind."""
    losers = ledger.losers()
    for slot, (trial, process, begun) in list(busy.items()):
        code, stopped = process.poll(), False
        if code is None and trial.number in losers:
            process.terminate()
            code, stopped = process.wait(), True
        if code is None:
            continue
        del busy[slot]
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


def _start(ledger: Ledger, trial: Trial, gpu: str | None) -> subprocess.Popen[bytes]:
    folder = ledger.folder(trial)
    words = [*ledger.sweep.words, *words_of(trial.values), "--trainer.default_root_dir", str(folder)]
    words += last_checkpoint(folder)
    environment = {**os.environ, "WANDB_MODE": os.environ.get("WANDB_MODE", "offline")}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    console.print(f"  run {trial.number}: {' '.join(words_of(trial.values))}")
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "weakmedsam", *words],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(number) for number, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU ")]
