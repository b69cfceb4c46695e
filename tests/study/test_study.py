"""A table of data sets, variants and seeds: what is run, continued and noted, and what the table says."""

import csv
import json
import re
import signal
from copy import deepcopy

import pytest
from report_pages import section

from tests.study.conftest import STUDY
from weakmedsam.run.request import Request
from weakmedsam.run.status import main as status
from weakmedsam.study import cli
from weakmedsam.study.definition import plan_study, read_study
from weakmedsam.system.file_lock import alone
from weakmedsam.system.signals import REQUEUE

TRAIN = ["prepare", "classify", "pseudo_labels", "segment", "test_maps", "test", "threshold", "refined"]
BOUND = ["prepare", "upper_bound", "upper_bound"]


def table(studio):
    """``study.md``: (variant, class) -> heading -> cell."""
    lines = [line for line in (studio.page / "study.md").read_text().splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found = [dict(zip(head, row, strict=True)) for row in rows]
    return {(row["variant"], row["class"]): row for row in found}


def test_every_run_is_made_once_and_named_by_set_variant_and_seed(studio, capsys):
    assert studio.run() == 0
    assert studio.calls == 2 * [*BOUND, *TRAIN[1:]] + 2 * TRAIN  # both targets share what is prepared
    runs = sorted(path.parent.name for path in (studio.folder / "runs/folder").glob("*/report.html"))
    assert runs == ["own-heart-default-0", "own-heart-default-1", "own-heart-no_sce-0", "own-heart-no_sce-1"]
    capsys.readouterr()
    status(["--dataset", "folder", "--experiment", "own-heart-no_sce-1"])
    assert capsys.readouterr().out.count(" done ") == 8
    assert studio.run() == 0
    assert studio.calls == []
    said = capsys.readouterr().out
    assert said.count(": up to date") == 4
    assert "heart, rv: refined 0.710 (0.020), 88 % of the upper bound" in said


def test_the_table_has_mean_spread_share_and_paired_differences(finished):
    rows = table(finished)
    assert list(rows) == [
        *(("default", name) for name in ("rv", "lv", "mean")),
        *(("no_sce", name) for name in ("rv", "lv", "mean")),
        *(("no_sce \N{MINUS SIGN} default", name) for name in ("rv", "lv", "mean")),
    ]
    assert rows["default", "rv"] == {
        "set": "heart", "variant": "default", "class": "rv", "no image": "0.210 (0.020)", "CAM": "0.310 (0.020)",
        "PAM": "0.510 (0.020)", "network": "0.610 (0.020)", "refined": "0.710 (0.020)",
        "upper bound": "0.810 (0.020)", "% of upper bound": "88", "seeds": "2",
    }  # fmt: skip
    assert rows["default", "mean"]["refined"] == "0.660 (0.020)"
    assert rows["no_sce", "rv"]["refined"] == "0.635 (0.070)"
    assert rows["no_sce", "rv"]["upper bound"] == "\N{EN DASH}"
    assert rows["no_sce", "rv"]["% of upper bound"] == "78"  # of the first variant's
    paired = rows["no_sce \N{MINUS SIGN} default", "lv"]
    assert (paired["refined"], paired["seeds"], paired["% of upper bound"]) == ("-0.075 (0.050)", "2", "\N{EN DASH}")


def test_every_number_is_in_csv_and_json_as_the_runs_have_it(finished):
    with (finished.page / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 6 + 2 * 3 * 5  # seeds, classes with their mean, methods
    (one,) = (
        row for row in rows
        if (row["variant"], row["seed"], row["class"], row["method"]) == ("no_sce", "1", "lv", "CAM")
    )  # fmt: skip
    assert one["run"] == "folder/own-heart-no_sce-1"
    assert float(one["dice"]) == pytest.approx(0.3 - 0.1 + 0.02 - 0.05)
    held = json.loads((finished.page / "study.json").read_text())
    assert [run["state"] for run in held["runs"]] == ["done"] * 4
    assert len(held["values"]) == len(rows)
    assert held["rows"][0]["cells"]["refined"] == {
        "mean": pytest.approx(0.71), "width": pytest.approx(0.02), "seeds": 2,
    }  # fmt: skip


def test_the_page_shows_answer_table_and_three_pictures_of_each_set(finished):
    page = (finished.page / "study.html").read_text(encoding="utf-8")
    assert "://" not in page
    assert "4 of 4 runs done" in section(page, "headline")
    assert '<strong>0.710 <span class="spread">(0.020)</span></strong>' in section(page, "headline")
    shown = section(page, "set-heart")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", shown)
    assert captions == ["best: c, Dice 0.75", "median: b, Dice 0.65", "worst: a, Dice 0.55"]
    assert shown.count('src="data:image/png') == 3
    assert "test case of <code>folder/own-heart-default-0</code>" in shown


def test_a_run_that_fails_is_noted_and_the_others_go_on(studio, capsys):
    studio.relay.statuses = {("segment", "0"): 1, ("upper_bound", "1"): 3}
    assert studio.run() == 1
    said = capsys.readouterr().err
    assert said.startswith("3 of 4 runs failed")
    assert "folder/own-heart-no_sce-0: train: exit status 1" in said
    rows = table(studio)
    assert rows["default", "rv"]["refined"] == "0.720"  # of seed 1 alone
    assert rows["default", "lv"]["upper bound"] == "0.700"  # of seed 0 alone, so that there is no share
    assert (rows["default", "lv"]["% of upper bound"], rows["default", "lv"]["seeds"]) == ("\N{EN DASH}", "1")
    assert rows["no_sce \N{MINUS SIGN} default", "rv"]["seeds"] == "1"
    held = json.loads((studio.page / "study.json").read_text())
    assert held["runs"][0]["state"] == "failed (train: exit status 1)"
    assert held["runs"][1]["state"] == "failed (upper-bound: exit status 3)"
    page = (studio.page / "study.html").read_text(encoding="utf-8")
    assert "own-heart-no_sce-0</code> failed (train: exit status 1): segment interrupted" in page
    studio.relay.statuses = {}
    assert studio.calls
    assert studio.run() == 0
    assert "classify" not in studio.calls
    assert table(studio)["default", "rv"]["refined"] == "0.710 (0.020)"


def test_a_run_with_a_damaged_file_is_noted_and_the_others_go_on(studio, capsys):
    studio.write(STUDY | {"variants": {"default": {}}, "upper_bound": False})
    assert studio.run("--seeds", "0") == 0
    (studio.folder / "runs/folder/own-heart-default-0/classify/history.csv").write_text("epoch,a\n1\n")
    assert studio.run() == 1
    assert "history.csv, line 2: 1 cells under 2 columns" in capsys.readouterr().err
    assert table(studio)["default", "rv"]["refined"] == "0.720"  # of seed 1 alone


def test_a_signal_ends_the_study_and_the_same_command_continues(studio, monkeypatch):
    own = studio.relay.run

    def interrupted(self, words):
        done = own(self, words)
        if studio.relay.calls.count("classify") == 2:
            signal.raise_signal(signal.SIGTERM)
        return done

    monkeypatch.setattr(studio.relay, "run", interrupted)
    with pytest.raises(SystemExit) as left:
        studio.run()
    assert left.value.code == REQUEUE
    assert studio.calls == [*BOUND, *TRAIN[1:], *BOUND, "classify"]
    assert table(studio)["default", "rv"]["seeds"] == "1"
    monkeypatch.setattr(studio.relay, "run", own)
    assert studio.run() == 0
    assert studio.calls == [*TRAIN[2:], *TRAIN, *TRAIN]


def test_results_of_other_settings_do_not_count(studio):
    studio.run("--seeds", "0")
    assert table(studio)["default", "rv"]["seeds"] == "1"
    changed = deepcopy(STUDY)
    changed["sets"]["heart"]["options"]["trainer.max_epochs"] = 2
    studio.write(changed)
    studio.run("--seeds", "1")
    held = json.loads((studio.page / "study.json").read_text())
    assert [run["state"] for run in held["runs"]] == [
        "upper_bound out of date", "done", "classify out of date", "done",
    ]  # fmt: skip
    assert {row["seed"] for row in held["values"]} == {1}


def test_options_of_set_variant_and_command_line_reach_the_run_in_this_order(studio):
    variant = {"data.image_size": 96, "classify.config": "experiments/published.yaml"}
    studio.write(STUDY | {"variants": {"own": variant}})
    asked = Request("", "", "pocket", None, studio.folder / "runs", [("trainer.max_epochs", ["1"])])
    plan = plan_study(read_study("own"), "other", studio.folder / "scans", asked)
    assert plan.runs[1].name == "folder/other-heart-own-1"
    assert plan.runs[1].request.options == [
        ("data.classes", ['{"rv": [1], "lv": [3]}']), ("data.image_size", ["96"]),
        ("classify.config", ["experiments/published.yaml"]), ("trainer.max_epochs", ["1"]), ("seed_everything", ["1"]),
    ]  # fmt: skip
    assert plan.runs[1].request.data_dir == str(studio.folder / "scans/heart")


def test_a_set_whose_folder_is_missing_is_named_and_left_out(studio, capsys):
    sets = STUDY["sets"] | {"brain": {"dataset": "folder", "data_dir": "brain"}}
    studio.write(STUDY | {"sets": sets, "seeds": [0], "variants": {"default": {}}})
    assert studio.run() == 0
    assert "brain is left out: scans/brain is not there" in capsys.readouterr().out
    assert "brain is left out" in (studio.page / "study.html").read_text()
    assert "- brain is left out" in (studio.page / "study.md").read_text()
    with pytest.raises(SystemExit, match=r"own\.yaml: no set has a folder \(heart is left out.*Set DATA_DIR"):
        studio.run("--data-dir", "nowhere")


def bad(**changes):
    return STUDY | changes


def with_set(**changes):
    return STUDY | {"sets": {"heart": STUDY["sets"]["heart"] | changes}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bad(seed=[1]), "seed is unknown; there are: seeds, upper_bound, sets, variants"),
        (with_set(datset="x"), "sets.heart.datset is unknown; there are: dataset, data_dir, options"),
        ({"seeds": [0]}, "sets is None; it must have at least one name"),
        (bad(sets={}), "sets is {}; it must have at least one name"),
        (bad(sets={"a-b": {"dataset": "folder"}}), "sets.a-b: a name has letters, digits and '_' only"),
        (bad(sets={"a": None}), "sets.a holds no settings"),
        (with_set(dataset="no"), "data/no.yaml does not exist; there are: abdomen"),
        (with_set(dataset=None), "sets.heart.dataset is None"),
        (with_set(data_dir=3), "sets.heart.data_dir is 3"),
        (with_set(options=["--data.image_size", "64"]), "sets.heart.options is ['--data.image_size', '64']; "),
        (with_set(options={"datas.image_size": 3}), "sets.heart.options: --datas.image_size concerns no stage"),
        (bad(variants={"x": {"seed_everything": 3}}), "variants.x.seed_everything is set by the study"),
        (bad(variants={}), "variants is {}"),
        (bad(seeds=[0, 0]), "seeds is [0, 0]; it must be a list of different whole numbers"),
        (bad(seeds=3), "seeds is 3; it must be"),
        (bad(upper_bound="yes"), "upper_bound is 'yes'; it must be true or false"),
        ("sets:\n  a: {dataset: folder}\n  a: {dataset: folder}\n", "line 3, column 3: is not valid YAML (the key 'a'"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_error_that_names_file_and_key(studio, content, said):
    studio.write(content)
    with pytest.raises(SystemExit) as left:
        studio.run()
    assert "weakmedsam: ConfigError: experiments/study/own.yaml" in str(left.value)
    assert said in str(left.value)
    assert studio.calls == []
    assert not (studio.folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "7"], "--seeds 7: experiments/study/own.yaml has the seeds 0, 1; add it there"),
        (["--name", "a/b"], "NAME=a/b: a study's name has"),
        (["--", "--seed_everything", "3"], "--seed_everything is set by the study"),
        (["--rounds", "0"], "there is at least one round"),
    ],
)
def test_a_bad_command_line_is_one_error(studio, words, said):
    with pytest.raises(SystemExit, match=re.escape(said)):
        studio.run(*words)


def test_an_unknown_study_lists_those_that_there_are(studio):
    with pytest.raises(SystemExit, match=r"study/mine\.yaml does not exist; there are: own"):
        cli.main(["mine"])


def test_two_processes_do_not_run_one_study(studio):
    with alone(studio.page), pytest.raises(SystemExit, match="runs/studies/own is being worked on by process"):
        studio.run()


def test_a_run_that_another_process_works_on_is_noted(studio, capsys):
    with alone(studio.folder / "runs/folder/own-heart-default-0"):
        assert studio.run("--seeds", "0") == 1
    assert "own-heart-default-0 is being worked on" in capsys.readouterr().err
    assert table(studio)["no_sce", "rv"]["seeds"] == "1"


def test_a_stage_keeps_the_study_while_it_runs(studio, monkeypatch):
    held = []
    own = studio.relay.__init__

    def init(self, locks=()):
        held.append(len(locks))
        own(self, locks)

    monkeypatch.setattr(studio.relay, "__init__", init)
    studio.run("--seeds", "0")
    assert held == [1, 2, 2, 2]  # the study's; a run's beside it


def test_the_shipped_study_is_planned(tmp_path):
    study = read_study("sets")
    for one in study.sets:
        (tmp_path / (one.data_dir or ".")).mkdir(exist_ok=True)
    asked = Request("", "", "pocket", None, tmp_path / "runs", [])
    plan = plan_study(study, "sets", tmp_path, asked)
    assert len(plan.runs) == len(study.sets) * len(study.variants) * len(study.seeds)
    assert not plan.left_out
    assert len({run.name for run in plan.runs}) == len(plan.runs)
