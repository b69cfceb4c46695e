"""The report of a run with a second round of pseudo-labels and network."""

import json
import shutil
from pathlib import Path

import pytest
from drawn_run import draw_run, write_csv, write_stage
from report_pages import page_of, printed, section, table_rows

from weakmedsam.report.comparison import group_by_seed, read_contenders
from weakmedsam.report.run_data import read_run

DICE = 0.8765


def stamp(run: Path, stage: str, made: int, after: dict[str, int]) -> None:
    path = run / stage / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made": made}))
    (run / stage / "settings.json").write_text(json.dumps({"after": after}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = draw_run(tmp_path / "phantom" / "k4")
    for kind in ("pseudo_labels", "segment", "test", "refined"):
        shutil.copytree(run / kind, run / f"{kind}_2")
        write_stage(run, f"{kind}_2", 33.0)
    write_stage(run, "test_maps_2", 7.0)
    stamp(run, "classify", 1, {})
    stamp(run, "segment", 5, {})
    stamp(run, "pseudo_labels_2", 6, {"classify": 1, "segment": 5})
    stamp(run, "segment_2", 7, {"pseudo_labels_2": 6})
    stamp(run, "test_maps_2", 8, {"classify": 1, "segment": 5})
    stamp(run, "test_2", 9, {"segment_2": 7})
    stamp(run, "refined_2", 9, {"classify": 1, "segment_2": 7})
    write_csv(run / "refined_2/cases.csv", [{"case": "a", "class": "liver", "dice": 0.9123, "jaccard": 0.8}])
    write_csv(
        run / "test_maps_2/cam_cases.csv",
        [{"case": "a", "class": "liver", "cam_dice": 0.4321, "pam_dice": 0.5432}],
    )
    write_csv(run / "test_2/cases.csv", [{"case": "a", "class": "liver", "dice": DICE, "jaccard": 0.5}])
    return run


def test_the_last_round_is_the_runs_and_the_first_stands_beside_it(run: Path) -> None:
    page = page_of(run)
    figures, test = section(page, "figures"), section(page, "test")
    for title in ("pseudo-labels, round 2", "segment, round 2", "test, round 2"):
        assert title in figures
    assert figures.index(">test<") < figures.index("test, round 2")
    assert "Test cases, network, round 2" in test
    assert "0.876" in test or "0.877" in test
    assert "case_00" not in test
    assert section(page, "curves").count("<h4>Dice, validation<") == 2
    text = printed(run)
    assert "test case, round 2\n" in text
    shown = table_rows(text)["mean"]
    assert shown["network"] in ("0.876", "0.877")
    assert shown["PAM"] == "0.543"
    assert "Refined prediction (PAM) Dice" in figures
    assert "0.543" in figures
    assert "0.432" in figures


def test_the_last_rounds_predictions_are_shown_refined_while_they_are_of_its_network(run: Path) -> None:
    page = page_of(run)
    assert "Test cases, refined by PAM, round 2" in section(page, "refined")
    assert "0.912" in section(page, "refined")
    assert table_rows(printed(run))["mean"]["refined"] == "0.912"
    stamp(run, "segment_2", 11, {"pseudo_labels_2": 6})
    page = page_of(run)
    assert "0.912" not in page
    assert "test, refined, round 2 (out of date)" in section(page, "headline")


def test_a_round_of_an_earlier_network_is_not_shown(run: Path) -> None:
    stamp(run, "segment", 8, {})
    assert "round 2" not in page_of(run)
    assert read_run(run).last.number == 1


def test_what_was_made_of_earlier_labels_is_out_of_date_and_not_shown(run: Path) -> None:
    stamp(run, "pseudo_labels_2", 10, {"classify": 1, "segment": 5})
    headline = section(page_of(run), "headline")
    assert "segment, round 2 (out of date)" in headline
    assert "test, round 2 (out of date)" not in headline  # of the network that is there
    found = read_run(run)
    assert not found.histories["segment_2"].epochs
    assert found.stages["pseudo_labels_2"].state == "done"


@pytest.mark.parametrize("done", ["pseudo_labels_2", "segment_2"])
def test_until_a_round_is_scored_the_one_before_is_the_runs(run: Path, done: str) -> None:
    for stage in ("segment_2", "test_maps_2", "test_2")[done == "segment_2" :]:
        shutil.rmtree(run / stage)
    page = page_of(run)
    assert "test, round 2 (not run)" in section(page, "headline")
    assert "make train DATASET=phantom EXPERIMENT=k4 ROUNDS=2" in section(page, "headline")
    assert "case_00" in section(page, "test")
    assert "round 2" not in section(page, "test")
    draw_run(run.parent / "other")
    found, _ = read_contenders(["phantom/k4", "phantom/other"], run.parent.parent)
    assert found.settings["ROUNDS"] == "1"
    assert found.figures["dice"].overall != pytest.approx(DICE)


def test_without_a_scored_round_the_last_trained_one_is_the_runs(run: Path) -> None:
    for stage in ("test", "test_2"):
        shutil.rmtree(run / stage)
    assert read_run(run).last.number == 2
    assert "make evaluate DATASET=phantom EXPERIMENT=k4 ROUNDS=2" in section(page_of(run), "test")


def test_runs_are_compared_by_their_last_rounds(run: Path) -> None:
    draw_run(run.parent / "once")
    twice, first = read_contenders(["phantom/k4", "phantom/once"], run.parent.parent)
    assert twice.figures["dice"].overall == pytest.approx(DICE)
    assert first.figures["dice"].overall != pytest.approx(DICE)
    assert (twice.settings["ROUNDS"], first.settings["ROUNDS"]) == ("2", "1")


def test_runs_whose_later_rounds_are_set_otherwise_are_no_seeds_of_one_setting(run: Path) -> None:
    pam = {
        "class_path": "x.Y",
        "init_args": {"pam": {"init_args": {"walk": {"steps": 8}, "start": {"checkpoint": "a/best.ckpt"}}}},
    }
    (run / "pseudo_labels_2/config.yaml").write_text(json.dumps({"model": pam}))
    other = Path(shutil.copytree(run, run.parent / "other"))
    pair = ["phantom/k4", "phantom/other"]
    pam["init_args"]["pam"]["init_args"] |= {"start": {"checkpoint": "b/best.ckpt"}}
    (other / "pseudo_labels_2/config.yaml").write_text(json.dumps({"model": pam}))
    assert len(group_by_seed(read_contenders(pair, run.parent.parent))) == 1
    pam["init_args"]["pam"]["init_args"] |= {"walk": {"steps": 4}}
    (other / "pseudo_labels_2/config.yaml").write_text(json.dumps({"model": pam}))
    assert len(group_by_seed(read_contenders(pair, run.parent.parent))) == 2
    shutil.copy(run / "pseudo_labels_2/config.yaml", other / "pseudo_labels_2/config.yaml")
    (other / "segment_2/config.yaml").write_text("model: {learning_rate: 0.1}\n")
    apart = read_contenders(pair, run.parent.parent)
    assert len(group_by_seed(apart)) == 2
    assert apart[1].settings["segment_2.model.learning_rate"] == "0.1"
    assert "segment_2.model.learning_rate" not in apart[0].settings
    shutil.copy(run / "segment_2/config.yaml", other / "segment_2/config.yaml")
    (other / "refined_2/config.yaml").write_text(json.dumps({"model": pam}))
    assert len(group_by_seed(read_contenders(pair, run.parent.parent))) == 2
