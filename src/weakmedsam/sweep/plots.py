"""Plots of a sweep by Optuna: parallel coordinates, history, importances of the settings."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import optuna
from matplotlib import pyplot
from optuna.trial import TrialState, create_trial
from optuna.visualization import matplotlib as plots

from weakmedsam.sweep.trials import Trials, console, direction
from weakmedsam.system.atomic_io import write_whole

MIN_TRIALS = 8
"""Trials from which on importances say something."""


def write_plots(trials: Trials) -> None:
    """Write ``parallel.png``, ``history.png`` and, from ``MIN_TRIALS`` trials on, ``importances.png``.

    Finished and stopped trials are drawn, by the settings that differ between them.
    """
    done = [trial for trial in trials.all if trial.state != TrialState.RUNNING and trial.values]
    if not done:
        return
    names = [name for name in done[0].params if len({str(trial.params[name]) for trial in done}) > 1]
    names = names or list(done[0].params)  # what is the same in all trials tells nothing
    study = optuna.create_study(direction=direction(trials.sweep.definition))
    for trial in done:
        params = {name.removeprefix("model."): trial.params[name] for name in names}
        space = {name.removeprefix("model."): trial.distributions[name] for name in names}
        study.add_trial(create_trial(value=trial.values[0], params=params, distributions=space))
    drawn: dict[str, Callable[..., Any]] = {
        "parallel": plots.plot_parallel_coordinate,
        "history": plots.plot_optimization_history,
    }
    if len(done) >= MIN_TRIALS and len(names) > 1 and any(trial.values != done[0].values for trial in done):
        drawn["importances"] = plots.plot_param_importances
    matplotlib.use("Agg")
    for name, plot in drawn.items():
        with warnings.catch_warnings(), pyplot.style.context("default"):
            warnings.simplefilter("ignore")  # plots of matplotlib are experimental in Optuna
            try:
                axes = plot(study, target_name=trials.sweep.metric)
            except (RuntimeError, ValueError) as error:  # no reason to end trials that run
                console.print(f"  {name}.png is not drawn: {error}")
                continue
            for lines in axes.collections:  # in Optuna's blues the worst trials cannot be seen
                lines.set_cmap("viridis" if study.direction.name == "MAXIMIZE" else "viridis_r")
            axes.figure.set_size_inches(1.9 * len(names) + 3.5 if name == "parallel" else 8.0, 4.8)
            buffer = io.BytesIO()
            axes.figure.savefig(buffer, dpi=110, format="png", bbox_inches="tight")
            pyplot.close(axes.figure)
        write_whole(trials.sweep.folder / f"{name}.png", buffer.getvalue())
