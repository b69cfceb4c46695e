"""What a sweep leaves behind: a table of its runs, and a picture of parallel coordinates."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weakmedsam.system.atomic_io import write_table, write_whole

if TYPE_CHECKING:
    from weakmedsam.sweep_ledger import Trial

LOG_RANGE = 20.0
"""A parameter whose largest value is so many times its smallest is drawn on a logarithmic axis."""


def write_trials(path: Path, trials: Sequence[Trial], metric: str) -> None:
    """Write ``table.csv``: a row a run, in the order of their numbers."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.values))
    rows = [
        {
            "run": trial.number,
            "state": trial.state,
            metric: "" if trial.best is None else f"{trial.best:.6g}",
            **trial.values,
            "seconds": trial.seconds,
        }
        for trial in trials
    ]
    write_table(path, ("run", "state", metric, *names, "seconds"), rows)


def shown(value: Any) -> Any:
    """A value as it is told apart and shown: numbers and words as they are, a list or nothing as its text."""
    return value if isinstance(value, int | float | str) else str(value)


def place_values(values: Sequence[Any]) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """Where values lie on an axis from 0 to 1, and the axis's marks.

    Numbers lie on a line, on a logarithmic one where they span much; words, and few numbers that come
    again and again, at even distances.

    Args:
        values: N values of one parameter.

    Returns:
        (N,) places, and (place, text) of each mark.
    """
    values = [shown(value) for value in values]
    kinds = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    chosen = len(kinds) == 1 or (len(kinds) <= 6 and len(kinds) < len(values))
    if chosen or any(isinstance(value, str | bool) for value in kinds):
        at = {value: (number + 0.5) / len(kinds) for number, value in enumerate(kinds)}
        return np.array([at[value] for value in values]), [(at[value], f"{value}") for value in kinds]
    numbers = np.array([float(value) for value in values])
    low, high = float(numbers.min()), float(numbers.max())
    marks = np.linspace(low, high, 5)
    if low > 0 and high / low > LOG_RANGE:
        marks = np.geomspace(low, high, 5)
        numbers, scale = np.log(numbers), np.log(marks)
    else:
        scale = marks
    span = scale[-1] - scale[0]
    places = (numbers - scale[0]) / span
    return places, [((s - scale[0]) / span, f"{mark:.3g}") for s, mark in zip(scale, marks, strict=True)]


def write_picture(path: Path, trials: Sequence[Trial], metric: str, sign: float = 1.0) -> None:
    """Draw each run as a line over its settings to its metric; the best runs are drawn last.

    Args:
        path: of the PNG.
        trials: N runs that have a value.
        metric: what the last axis shows.
        sign: 1 where more is better, -1 where less is.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for trial in trials for name in trial.values))
    varied = [name for name in names if len({shown(trial.values[name]) for trial in trials}) > 1]
    names = varied or names  # what is the same in all runs tells nothing
    columns: list[list[Any]] = [[trial.values[name] for trial in trials] for name in names]
    best = [float(trial.best if trial.best is not None else math.nan) for trial in trials]
    axes = [place_values(column) for column in columns] + [_metric_axis(best)]
    figure = Figure(figsize=(2.1 * len(axes) + 0.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    good = np.array([sign * value for value in best])
    share = (good - good.min()) / max(np.ptp(good), 1e-12)
    jitter = np.linspace(-0.012, 0.012, len(trials))  # runs of one setting lie beside each other
    for n in np.argsort(good):
        heights = [places[n] + (jitter[n] if k < len(names) else 0.0) for k, (places, _) in enumerate(axes)]
        leader = n == int(np.argmax(good))
        plot.plot(heights, color=colormaps["viridis"](0.95 * share[n]), lw=3.0 if leader else 1.3, alpha=0.9)
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for k, (_, marks) in enumerate(axes):
        plot.axvline(k, color="0.35", lw=0.8, zorder=0)
        for place, text in marks:
            plot.text(k - 0.03, place, text, ha="right", va="center", fontsize=8, color="0.25", bbox=paper)
    labels = [name.removeprefix("model.").replace(".", ".\n", 1) for name in names]
    plot.set_xticks(range(len(axes)), [*labels, metric], fontsize=9)
    plot.set_xlim(-0.45, len(axes) - 0.7)
    plot.set_ylim(-0.04, 1.04)
    plot.yaxis.set_visible(False)
    for spine in plot.spines.values():
        spine.set_visible(False)
    plot.set_title(
        f"{len(trials)} run{'s' * (len(trials) > 1)}; thick: the best, {metric} {sign * good.max():.4g}",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    write_whole(path, buffer.getvalue())


def _metric_axis(values: Sequence[float]) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """The metric's axis is a line however few runs there are."""
    low, high = min(values), max(values)
    span = high - low or 1.0
    places = np.array([(value - low) / span for value in values])
    return places, [(share, f"{low + share * span:.4g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
