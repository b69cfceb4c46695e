"""A study of a tiny phantom with its real stages."""

import json

import pytest
from commands import InThisProcess, as_it_was

from weakmedsam.study import cli

pytestmark = pytest.mark.slow

OPTIONS = {
    "data.num_volumes": 5,
    "data.phantom.slices": 8,
    "data.phantom.size": 64,
    "data.image_size": 64,
    "data.slices.min_pixels": 3,
    "data.num_workers": 0,
    "data.prepare.workers": 1,
    "data.classes": {"lesion": [1], "cyst": [2]},
    "data.split.fractions": [0.6, 0.2, 0.2],
    "model.sce": None,
    "model.pam.prompts.grid": 2,
    "model.pam.walk.map_size": 16,
    "model.pam.occlusion.weight": 0,
    "model.pam.views.activation": "plain",
    "refined.model.pam.occlusion.weight": 0,
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 1,
    "segment.model.network_args": "{features: [8, 8, 8, 8, 8, 8]}",
}


def test_two_seeds_give_a_table_and_are_up_to_date_the_second_time(studio, monkeypatch, capfd):
    studio.write({"seeds": [0, 1], "sets": {"drawn": {"dataset": "phantom", "options": OPTIONS}}})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with as_it_was():
        assert cli.main(["own", "--seeds", "0"], InThisProcess) == 0
        assert cli.main(["own"], InThisProcess) == 0
    said = capfd.readouterr().out
    assert said.count("phantom/own-drawn-default-0: up to date") == 1
    held = json.loads((studio.page / "study.json").read_text())
    assert [run["state"] for run in held["runs"]] == ["done", "done"]
    rows = {row["name"]: row for row in held["rows"]}
    assert rows.keys() == {"lesion", "cyst", "mean"}
    assert all(row["cells"]["refined"]["seeds"] == row["cells"]["no image"]["seeds"] == 2 for row in rows.values())
    assert "data:image/png" in (studio.page / "study.html").read_text()
    with as_it_was():
        assert cli.main(["own"], InThisProcess) == 0
    assert capfd.readouterr().out.count(": up to date") == 2
