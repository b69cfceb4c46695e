"""Plots of a sweep by Optuna: parallel coordinates, importances of the settings, history."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from weakmedsam.sweep.trials import Trials, direction
from weakmedsam.system.atomic_io import write_whole

LEAST = 3
"""Finished trials from which on importances say something."""


def write_plots(folder: Path, trials: Trials) -> None:
    """Write ``parallel.png``, ``history.png`` and, from ``LEAST`` trials on, ``importances.png``.

    Args:
        folder: where they go.
        trials: those with a value are drawn, settings that differ between them.
    """
    done = [
        trial
        for trial in trials.all
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.values
    ]
    if not done:
        return
    names = [name for name in done[0].params if len({str(trial.params[name]) for trial in done}) > 1]
    names = names or list(done[0].params)  # what is the same in all trials tells nothing
    study = optuna.create_study(direction=direction(trials.sweep.definition))
    study.add_trials([_shortened(trial, names) for trial in done])
    from optuna.visualization import matplotlib as draw  # load time: pyplot

    metric = trials.sweep.metric
    _save(folder / "parallel.png", draw.plot_parallel_coordinate, study, metric, 1.9 * len(names) + 3.5)
    _save(folder / "history.png", draw.plot_optimization_history, study, metric, 8.0)
    values = [trial.values for trial in done]
    if len(done) >= LEAST and len(names) > 1 and any(value != values[0] for value in values):
        _save(folder / "importances.png", draw.plot_param_importances, study, metric, 8.0)


def _shortened(trial: FrozenTrial, names: list[str]) -> FrozenTrial:
    """A trial as it is drawn: finished, the varied settings only, without the ``model.`` of their names."""
    short = {name: name.removeprefix("model.") for name in names}
    return create_trial(
        state=TrialState.COMPLETE,
        value=trial.values[0],
        params={short[name]: trial.params[name] for name in names},
        distributions={short[name]: trial.distributions[name] for name in names},
    )


def _save(path: Path, plot: Callable[..., Any], study: optuna.Study, metric: str, width: float) -> None:
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    with warnings.catch_warnings(), pyplot.style.context("default"):
        warnings.simplefilter("ignore")  # plots of matplotlib are experimental in Optuna
        figure = plot(study, target_name=metric).figure
        figure.set_size_inches(width, 4.8)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png", bbox_inches="tight")
        pyplot.close(figure)
    write_whole(path, buffer.getvalue())
