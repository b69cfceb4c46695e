"""What puts a stage out of date, in which words, and what shows them."""

import json
import os
import shutil

import pytest
from run_requests import request_for

from weakmedsam.errors import DataError
from weakmedsam.run import pipeline, status
from weakmedsam.run.clicks import Click, Decision, write_clicks, write_decisions
from weakmedsam.run.pipeline import run
from weakmedsam.run.request import recorded_request
from weakmedsam.run.stage_state import (
    DONE,
    INTERRUPTED,
    NOT_NEEDED,
    NOT_RUN,
    OUT_OF_DATE,
    StageState,
    state_of,
    states_of,
)
from weakmedsam.run.stages import STAGES, chosen_stages
from weakmedsam.system.json_files import read_object
from weakmedsam.system.signals import Relay

STAGE = {stage.name: stage for stage in STAGES}


def state(folder, name, *words, **changes):
    return state_of(STAGE[name], request_for(folder, *words, **changes))[:2]


def test_a_stage_is_not_run_then_done_and_interrupted_without_its_stamp(house, tmp_path):
    assert state(tmp_path, "classify") == (NOT_RUN, ())
    run("classify", request_for(tmp_path))
    assert state(tmp_path, "classify") == (DONE, ())
    (tmp_path / "runs/phantom/x/classify/stage.json").unlink()
    assert state(tmp_path, "classify") == (INTERRUPTED, ())


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (("--model.pam.steps", "16"), {}, "model.pam.steps: 8 -> 16"),
        (("--model.init_args.pam.init_args.steps=16",), {}, "model.pam.steps: 8 -> 16"),
        (("--model.nothing", "1"), {}, "model.nothing: default -> 1"),
        ((), {"backbone": "samus"}, "backbone: pocket -> samus"),
        ((), {"trainer": "gpu"}, "trainer.precision: 32-true -> bf16-mixed"),
        ((), {"data_dir": "/scans"}, "data_dir: None -> /scans"),
    ],
)
def test_a_changed_setting_is_named_with_both_values(house, tmp_path, words, changes, said):
    first = ("--model.pam.steps", "8"), {"trainer": "cpu"}
    run("classify", request_for(tmp_path, *first[0], **first[1]))
    found = state(tmp_path, "classify", *(words or first[0]), **first[1] | changes)
    assert found[0] == OUT_OF_DATE
    assert said in found[1]


def test_an_edited_file_of_the_experiments_is_told_by_its_key(house, tmp_path):
    real = (tmp_path / "experiments").resolve()
    (tmp_path / "experiments").unlink()
    shutil.copytree(real, tmp_path / "experiments")
    run("classify", request_for(tmp_path))
    path = tmp_path / "experiments/classify.yaml"
    text = path.read_text()
    path.write_text("# a comment\n" + text)
    assert state(tmp_path, "classify") == (DONE, ())
    path.write_text(text.replace("max_epochs: ", "max_epochs: 1"))
    (said,) = state(tmp_path, "classify")[1]
    before, after = said.removeprefix("trainer.max_epochs: ").split(" -> ")
    assert after == f"1{before}"


def test_each_input_that_changed_was_added_or_removed_is_named(house, tmp_path):
    scans = tmp_path / "scans"
    for name in ("a.nii.gz", "b.nii.gz"):
        (scans / name).write_bytes(b"scan")
    run("prepare", request_for(tmp_path))
    assert state(tmp_path, "prepare") == (DONE, ())
    (scans / "a.nii.gz").write_bytes(b"another scan")
    (scans / "b.nii.gz").unlink()
    (scans / "c.nii.gz").write_bytes(b"scan")
    assert state(tmp_path, "prepare") == (
        OUT_OF_DATE,
        ("input changed: a.nii.gz", "input removed: b.nii.gz", "input added: c.nii.gz"),
    )


def test_weights_are_told_apart_by_content_and_copied_ones_stay(house, tmp_path):
    weights = tmp_path / "own.pth"
    weights.write_bytes(b"old")
    words = ("--model.backbone.weights", str(weights))
    run("classify", request_for(tmp_path, *words))
    os.utime(weights, ns=(1, 1))
    assert state(tmp_path, "classify", *words) == (DONE, ())
    weights.write_bytes(b"new")
    assert state(tmp_path, "classify", *words) == (OUT_OF_DATE, (f"input changed: {weights}",))
    weights.unlink()
    assert state(tmp_path, "classify", *words) == (OUT_OF_DATE, (f"input removed: {weights}",))


def test_an_upstream_stage_that_was_run_again_and_a_lost_result_are_named(house, tmp_path):
    run("pseudo-labels", request_for(tmp_path))
    folder = tmp_path / "runs/phantom/x"
    run("classify", request_for(tmp_path, "--classify.seed_everything", "5"))
    assert state(tmp_path, "pseudo_labels", "--classify.seed_everything", "5")[1] == (
        "seed_everything: 0 -> 5",
        "upstream stage re-run: classify",
    )
    (folder / "classify/checkpoints/best.ckpt").unlink()
    assert state(tmp_path, "classify", "--classify.seed_everything", "5") == (
        OUT_OF_DATE,
        ("result missing: checkpoints/best.ckpt",),
    )


def test_reasons_are_kept_with_what_was_made_a_kill_between_or_not(house, tmp_path, monkeypatch, capsys):
    run("classify", request_for(tmp_path))
    words = ("--model.pam.beta", "2")
    whole = Relay.run
    with monkeypatch.context() as patch:
        patch.setattr(Relay, "run", lambda self, words: whole(self, words) or -9)
        with pytest.raises(SystemExit):
            run("classify", request_for(tmp_path, *words))
    assert "classify is out of date (model.pam.beta: " in capsys.readouterr().out
    run("classify", request_for(tmp_path, *words))
    (said,) = read_object(tmp_path / "runs/phantom/x/classify/stage.json")["reasons"]
    assert said.startswith("model.pam.beta: ")
    assert said.endswith(" -> 2")


def test_what_follows_from_a_stage_that_is_to_be_run_is_not_done(house, tmp_path):
    run("evaluate", request_for(tmp_path))
    (tmp_path / "runs/phantom/x/classify/stage.json").unlink()
    found = states_of(chosen_stages("train", 1), request_for(tmp_path))
    assert found["prepare"] == StageState(DONE)
    assert found["classify"] == StageState(INTERRUPTED)
    assert found["pseudo_labels"] == StageState(OUT_OF_DATE, ("upstream stage interrupted: classify",))
    assert found["segment"].reasons == ("upstream stage out of date: pseudo_labels",)


def test_status_shows_each_stage_under_the_options_of_the_last_command(house, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--dataset", "phantom", "--experiment", "x", "--runs", str(tmp_path / "runs")]
    status.main(words)
    assert capsys.readouterr().out.count("not run") == 8
    options = ("--segment.trainer.max_epochs", "2")
    run("evaluate", request_for(tmp_path, *options, rounds=2, trainer="cpu"))
    asked = request_for(tmp_path, *options, rounds=2, trainer="cpu")
    assert recorded_request(tmp_path / "runs", "phantom", "x") == asked
    capsys.readouterr()
    status.main(words)
    assert capsys.readouterr().out.count(" done ") == 14
    (tmp_path / "scans/new.nii.gz").touch()
    (tmp_path / "runs/phantom/x/test/cases.csv").unlink()
    status.main(words)
    said = capsys.readouterr().out
    assert "input added: new.nii.gz" in said
    assert "result missing: cases.csv" in said
    assert "upstream stage out of date: prepare" in said


def test_status_says_what_there_is_nothing_to_score_of(house, tmp_path):
    pipeline.masked[0] = 0
    run("evaluate", request_for(tmp_path))
    assert state(tmp_path, "test")[0] == NOT_NEEDED


def test_a_damaged_request_is_named(house, tmp_path):
    run("prepare", request_for(tmp_path))
    (tmp_path / "runs/phantom/x/request.json").write_text("{")
    with pytest.raises(SystemExit, match=r"request\.json: is not valid JSON"):
        status.main(["--experiment", "x", "--runs", str(tmp_path / "runs")])
    run("prepare", request_for(tmp_path))
    assert json.loads((tmp_path / "runs/phantom/x/request.json").read_text())["backbone"] == "pocket"


def test_clicks_put_the_segmentation_out_of_date_and_undone_give_its_network_back(house, tmp_path, capsys):
    request = request_for(tmp_path, launcher=("srun", "python"))
    run("segment", request)
    folder = tmp_path / "runs/phantom/x"
    (folder / "segment/first").touch()
    write_clicks(folder, [Click("a", 0, 1, 2, 1, "lesion", "2025-01-31T12:00:00")])
    assert state(tmp_path, "pseudo_labels") == (DONE, ())
    assert state(tmp_path, "segment") == (OUT_OF_DATE, ("clicks or decisions of the review changed",))
    house.clear()
    run("segment", request)
    replay, fit = house
    assert replay == [
        "review",
        "--replay",
        "--dataset",
        "phantom",
        "--experiment",
        "x",
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert fit[fit.index("--data.labels.corrected_dir") + 1] == str(folder / "review/labels")
    assert state(tmp_path, "segment") == (DONE, ())
    house.clear()
    write_clicks(folder, [])
    capsys.readouterr()
    run("segment", request)
    assert house == []
    assert "segment.old1 is of these settings and is taken up again" in capsys.readouterr().out
    assert (folder / "segment/first").exists()


def test_a_later_round_learns_what_is_corrected_too(house, tmp_path):
    folder = tmp_path / "runs/phantom/x"
    write_decisions(folder, [Decision("a", None, "accepted", "2025-01-31T12:00:00")])
    run("segment", request_for(tmp_path, rounds=2))
    assert [words[0] for words in house if words[0] == "review"] == ["review"] * 2
    assert sum("--data.labels.corrected_dir" in words for words in house) == 2


def test_a_damaged_table_of_clicks_stops_before_anything_is_run(house, tmp_path):
    (tmp_path / "runs/phantom/x/review").mkdir(parents=True)
    (tmp_path / "runs/phantom/x/review/clicks.csv").write_text("case,slice\n")
    with pytest.raises(DataError, match=r"clicks\.csv: line 1: lacks the column"):
        state(tmp_path, "segment")
