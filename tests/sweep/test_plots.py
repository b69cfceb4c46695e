"""Plots of sweeps that are awkward to draw."""

import pytest

from weakmedsam.sweep.definition import PROGRAMS, Sweep
from weakmedsam.sweep.plots import write_plots
from weakmedsam.sweep.trials import Trials, TrialState
from weakmedsam.system.atomic_io import read_table


@pytest.mark.parametrize("count", [0, 1, 8])
@pytest.mark.parametrize("value", [0.5, None])
def test_few_and_equal_trials_lists_and_nothing_are_drawn(tmp_path, count, value):
    parameters = {
        "model.a": {"values": [[0.5, 99.5], None, [1, 2]]},
        "model.b": {"values": [None]},
        "model.c": {"min": 1, "max": 9},
    }
    metric = {"name": "val/score", "goal": "maximize"}
    definition = {"method": "random", "metric": metric, "program": "segment", "parameters": parameters}
    trials = Trials(Sweep("own", definition, PROGRAMS["segment"], tmp_path, ["fit"]))
    for number in range(count):
        trials.take(count)
        trials.close(number, TrialState.COMPLETE, 1.0, number / 10 if value is None else value)
    write_plots(trials)
    found = {path.name for path in tmp_path.glob("*.png") if path.stat().st_size > 5000}
    wanted = {"parallel.png", "history.png"} if count else set()
    assert found == (wanted | {"importances.png"} if count == 8 and value is None else wanted)
    trials.write_table()
    rows = read_table(tmp_path / "table.csv")
    assert len(rows) == count
    assert {row["model.a"] for row in rows} <= {"[0.5, 99.5]", "", "[1, 2]"}
