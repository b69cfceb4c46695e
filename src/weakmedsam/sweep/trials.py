"""Trials of a sweep: sampled by Optuna, kept in an Optuna journal that processes and machines share.

``journal.log`` in the sweep's folder holds each trial from the moment it is sampled; ``trials/<number>/`` is its own
folder, ``locks/<number>`` is locked as long as somebody runs it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

from weakmedsam.errors import ConfigError, DataError
from weakmedsam.sweep.definition import Sweep, grid_values, kind_of
from weakmedsam.system.atomic_io import put_away, read_table, write_table
from weakmedsam.system.file_lock import alone

console = Console(highlight=False)
optuna.logging.set_verbosity(optuna.logging.WARNING)

STARTUP = 5
"""Random trials before TPE models the finished ones."""

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


def distribution_of(drawn: Mapping[str, Any]) -> BaseDistribution:
    """W&B's distribution of a parameter as Optuna's."""
    kind = kind_of(drawn)
    if kind in ("constant", "categorical"):
        return CategoricalDistribution([encoded(value) for value in grid_values(drawn) or []])
    low, high, step = drawn["min"], drawn["max"], drawn.get("q")
    if step is not None:
        values = grid_values(drawn) or [low, high]
        low, high = values[0], values[-1]
    if kind in ("int_uniform", "q_uniform") and {type(low), type(high), type(step or 1)} == {int}:
        return IntDistribution(low, high, step=step or 1)
    if kind == "log_uniform":  # W&B gives the exponents
        low, high = math.exp(low), math.exp(high)
    return FloatDistribution(low, high, log="log" in kind, step=step)


def encoded(value: Any) -> Any:
    """A choice as Optuna keeps it: a list, a mapping, or a boolean, which Python takes for 0 or 1, as JSON."""
    plain = value is None or (isinstance(value, int | float | str) and not isinstance(value, bool))
    return value if plain else json.dumps(value)


def _rounded(value: Any, space: BaseDistribution) -> Any:
    """A continuous value to six digits, enough to name a setting."""
    if isinstance(space, FloatDistribution) and space.step is None:
        return min(max(float(f"{value:.6g}"), space.low), space.high)
    return value


def decoded(definition: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Option -> value, in the definition's order, of what Optuna keeps."""
    found = {}
    for name, drawn in definition["parameters"].items():
        choices = {encoded(value): value for value in drawn.get("values", [drawn.get("value")])}
        found[name] = choices.get(params[name], params[name])
    return found


def sample(definition: Mapping[str, Any], past: Sequence[FrozenTrial] = (), seed: int | None = None) -> Any:
    """Sample the next setting; None when a grid is exhausted.

    The number of the trial and the definition's seed decide it for random and grid; Bayesian sampling also depends on
    what has finished.

    Args:
        definition: of the sweep.
        past: earlier trials.
        seed: in place of the definition's.

    Returns:
        Option -> value.
    """
    seed = definition.get("seed", 0) if seed is None else seed
    own = int(np.random.SeedSequence((seed, len(past))).generate_state(1)[0])
    parameters = definition["parameters"]
    space = {name: distribution_of(drawn) for name, drawn in parameters.items()}
    sampler: BaseSampler
    if definition["method"] == "grid":
        grid = {name: [encoded(v) for v in grid_values(drawn) or []] for name, drawn in parameters.items()}
        if len(past) >= math.prod(len(values) for values in grid.values()):
            return None
        sampler = GridSampler(grid, seed)
    elif definition["method"] == "random":
        sampler = RandomSampler(own)
    else:
        sampler = TPESampler(n_startup_trials=STARTUP, seed=own)
    # A study in memory: the journal takes the whole trial in one line then, or none where the process is killed.
    study = optuna.create_study(sampler=sampler, direction=direction(definition))
    study.add_trials(past)
    params = study.ask(space).params
    return decoded(definition, {name: _rounded(value, space[name]) for name, value in params.items()})


def direction(definition: Mapping[str, Any]) -> Literal["minimize", "maximize"]:
    """Of the metric; W&B minimises unless another goal is given."""
    return "maximize" if definition["metric"].get("goal") == "maximize" else "minimize"


def pruner_of(definition: Mapping[str, Any]) -> BasePruner:
    """W&B's Hyperband, which is one bracket of successive halving.

    Trials are compared after ``min_iter * eta ** k`` epochs, or after ``max_iter / eta ** k`` with k from s to 1; the
    best 1/eta of those that came as far go on.
    """
    early = definition.get("early_terminate")
    if early is None:
        return NopPruner()
    eta = early.get("eta", 3)
    first = early.get("min_iter") or max(early["max_iter"] // eta ** early["s"], 1)
    return SuccessiveHalvingPruner(min_resource=first, reduction_factor=eta)


class Trials:
    """A sweep's trials in its folder.

    Args:
        sweep: whose trials; its folder is made where it is missing.

    Raises:
        DataError: the journal is damaged.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.locks: dict[int, int] = {}
        self._held: dict[int, ExitStack] = {}
        self._pruner = pruner_of(sweep.definition)
        self._last = sweep.definition.get("early_terminate", {}).get("max_iter", math.inf)
        path = sweep.folder / "journal.log"
        try:
            with alone(sweep.folder, wait=True):
                _mend(path)
                self._storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
                goal = direction(sweep.definition)
                self.study = optuna.create_study(
                    storage=self._storage, study_name="sweep", direction=goal, load_if_exists=True
                )
        except (ValueError, KeyError, TypeError, AssertionError, IsADirectoryError) as error:
            raise DataError(
                f"{path} is damaged ({error}): remove it, and the same command samples the trials again"
            ) from error

    @property
    def all(self) -> list[FrozenTrial]:
        """Every trial of every process, by number."""
        return self.study.get_trials(deepcopy=False)

    def folder(self, number: int) -> Path:
        """Where a trial lies."""
        return self.sweep.folder / "trials" / f"{number:03d}"

    def values(self, trial: FrozenTrial) -> dict[str, Any]:
        """Option -> value."""
        return decoded(self.sweep.definition, trial.params)

    def take(self, count: int) -> FrozenTrial | None:
        """Lock a trial whose process has died, or else a new one; None when there are ``count``, or no more."""
        with alone(self.sweep.folder, wait=True):
            past = self.all
            for trial in past:
                if trial.state == TrialState.RUNNING and self._lock(trial.number):
                    return trial
            values = sample(self.sweep.definition, past) if len(past) < count else None
            if values is None:
                return None
            space = {name: distribution_of(d) for name, d in self.sweep.definition["parameters"].items()}
            params = {name: encoded(value) for name, value in values.items()}
            self._lock(len(past))
            put_away(self.folder(len(past)))  # of a journal that was removed
            self.study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=space))
            return self.all[len(past)]

    def _lock(self, number: int) -> bool:
        """Whether nobody else runs a trial; then it is locked."""
        with ExitStack() as stack, suppress(ConfigError):
            if number not in self.locks:
                self.locks[number] = stack.enter_context(alone(self.sweep.folder / "locks" / f"{number:03d}"))
                self._held[number] = stack.pop_all()
                return True
        return False

    def release(self, number: int) -> None:
        """Give up a trial's lock."""
        del self.locks[number]
        self._held.pop(number).close()

    def history(self, number: int) -> list[float]:
        """The metric by epoch; what is damaged or not finite is left out."""
        found = []
        for row in read_table(self.folder(number) / "history.csv"):
            with suppress(TypeError, ValueError):
                found.append(float(row.get(self.sweep.metric, "nan")))
        return [value for value in found if math.isfinite(value)]

    def best_of(self, scores: Sequence[float]) -> float:
        """The best of some values."""
        return max(scores) if direction(self.sweep.definition) == "maximize" else min(scores)

    def falls_behind(self, number: int) -> bool:
        """Report epochs that are new, the best value so far of each, and say whether Hyperband ends the trial."""
        identity, scores = self._identity(number), self.history(number)
        known = self._storage.get_trial(identity).last_step or 0
        for epoch in range(known + 1, len(scores) + 1):
            self._storage.set_trial_intermediate_value(identity, epoch, self.best_of(scores[:epoch]))
            if epoch < self._last and self._pruner.prune(self.study, self._storage.get_trial(identity)):
                return True
        return False

    def spend(self, number: int, seconds: float) -> None:
        """Add to the time that a trial has taken."""
        before = self.all[number].user_attrs.get("seconds", 0.0)
        self._storage.set_trial_user_attr(self._identity(number), "seconds", round(before + seconds, 1))

    def close(self, number: int, state: TrialState, seconds: float, score: float | None = None) -> None:
        """Write down how a trial ended, unlock it, and write ``table.csv`` anew.

        Raises:
            ConfigError: it has finished without logging the metric; names what is logged.
        """
        rows = read_table(self.folder(number) / "history.csv")
        if rows and state == TrialState.COMPLETE and self.sweep.metric not in rows[-1]:
            names = ", ".join(name for name in rows[-1] if "/" in name)
            raise ConfigError(f"the trials of {self.sweep.name} log no {self.sweep.metric}; they log {names}")
        scores = self.history(number) if score is None else [score] * math.isfinite(score)
        best = self.best_of(scores) if scores else None
        if best is None and state == TrialState.COMPLETE:
            state = TrialState.FAIL
        self.spend(number, seconds)
        if best is not None:
            self._storage.set_trial_user_attr(self._identity(number), "best", best)
        values = None if state == TrialState.FAIL or best is None else [best]
        self._storage.set_trial_state_values(self._identity(number), state, values)
        self.release(number)
        shown = "no value" if best is None else f"{best:.4f}"
        console.print(f"  trial {number}: {STATES[state]}, {self.sweep.metric} {shown}")
        self.write_table()

    def ranked(self) -> list[FrozenTrial]:
        """All trials, the best first; failed and running ones last."""
        sign = -1.0 if direction(self.sweep.definition) == "maximize" else 1.0
        order = list(STATES)
        trials = sorted(self.all, key=lambda t: sign * t.user_attrs.get("best", sign * math.inf))
        return sorted(trials, key=lambda t: order.index(t.state) if t.state not in order[:2] else 0)

    def write_table(self) -> None:
        """Write ``table.csv``, a row a trial, the best first."""
        columns = ("trial", "state", self.sweep.metric, *self.sweep.definition["parameters"], "seconds")
        with alone(self.sweep.folder, wait=True):  # or an older table might take a newer one's place
            rows = [
                {
                    "trial": trial.number,
                    "state": STATES[trial.state],
                    self.sweep.metric: f"{trial.user_attrs['best']:.6g}" if "best" in trial.user_attrs else "",
                    **self.values(trial),
                    "seconds": trial.user_attrs.get("seconds", 0.0),
                }
                for trial in self.ranked()
            ]
            write_table(self.sweep.folder / "table.csv", columns, rows)

    def _identity(self, number: int) -> int:
        study = self._storage.get_study_id_from_name("sweep")
        return self._storage.get_trial_id_from_study_id_trial_number(study, number)


def _mend(path: Path) -> None:
    """Cut off a last line that a kill or a full disk has left incomplete: nothing could be appended to it."""
    if not path.exists():
        return
    lock = JournalFileOpenLock(str(path))  # another process may be appending
    lock.acquire()
    try:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()
