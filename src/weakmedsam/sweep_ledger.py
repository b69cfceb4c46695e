"""The runs of a sweep on disk: what was drawn by W&B's sweep library, and how each run ended.

``trials/<number>/trial.json`` holds what was drawn, from the moment it was drawn; ``table.csv`` and
``parallel.png`` in the sweep's folder are written anew after each run.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from weakmedsam.errors import ConfigError, DataError
from weakmedsam.sweep_picture import write_picture, write_trials
from weakmedsam.sweep_run import with_null
from weakmedsam.system.atomic_io import put_away, read_table
from weakmedsam.system.json_files import read_object, write_object

if TYPE_CHECKING:
    from weakmedsam.sweep import Sweep

console = Console(highlight=False)

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


def read_trial(folder: Path) -> Trial | None:
    """A run of a sweep, from its folder.

    Where its ``trial.json`` is damaged, nobody knows what was drawn for it: the folder is put aside, and a run is drawn
    in its place.

    Args:
        folder: named by the run's number.
    """
    path = folder / "trial.json"
    if not path.exists():
        return None
    try:
        trial = Trial(**read_object(path))
        if trial.number == int(folder.name) and isinstance(trial.values, dict):
            return trial
    except (DataError, TypeError):
        pass
    put_away(folder)
    console.print(f"  {path} is damaged: its folder is put aside, and a run is drawn in its place")
    return None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:  # of a damaged table
        return None


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
    given = {
        name for name, drawn in definition["parameters"].items() if "values" in drawn or "value" in drawn
    }
    return {name: _plain(entry["value"], name in given) for name, entry in found.config.items()}


def _plain(value: Any, given: bool) -> Any:
    """A drawn value without numpy; six digits are enough to name a setting that the file does not give itself."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.6g}") if isinstance(value, float) and not given else value


def words_of(values: Values) -> list[str]:
    """``{"a.b": 1}`` -> ``["--a.b=1"]``, as W&B's agent writes ``${args}``; a list is a YAML list either way."""
    return with_null([f"--{name}={value}" for name, value in values.items()])


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
        folders = sorted(path for path in (sweep.folder / "trials").glob("*") if path.name.isdecimal())
        self.trials = [trial for folder in folders if (trial := read_trial(folder)) is not None]

    def folder(self, trial: Trial) -> Path:
        """Where a run lies."""
        return self.sweep.folder / "trials" / f"{trial.number:03d}"

    def next(self) -> Trial | None:
        """Draw a run and write it down; None when a grid is through."""
        taken = {trial.number for trial in self.trials}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
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
        return [value for row in rows if (value := _number(row.get(self.sweep.metric))) is not None]

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

    def pause(self, trial: Trial, seconds: float) -> None:
        """Write down how long a run took that a signal has ended; it stays a running one."""
        trial.seconds = round(trial.seconds + seconds, 1)
        self._save(trial)

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
        write_object(self.folder(trial) / "trial.json", asdict(trial))
