"""Cases put together: summary, tables, and the means that are logged."""

import csv
import io
import json
import math

import pytest
import torch

from weakmedsam.metrics.case_summary import (
    CaseScores,
    format_cases,
    gather_scores,
    score_case,
    summarise,
    take_means,
    write_tables,
)
from weakmedsam.metrics.overlap_surface import slice_metrics, volume_metrics

NAMES = ["liver", "cyst"]


def score(case, prediction, truth):
    return score_case(case, prediction, truth, (1.0, 1.0, 1.0), NAMES)


def some_scores():
    """Liver found, then missed; cyst nowhere."""
    organ, nothing = torch.zeros(2, 3, 4, 12, dtype=torch.uint8)
    organ[:2, :2, :2] = 1
    return score("1", organ, organ) + score("2", nothing, organ)


def test_a_case_is_scored_by_both_protocols_class_by_class():
    truth, prediction = torch.randint(0, 3, (2, 3, 6, 7), generator=torch.Generator().manual_seed(0))
    spacing = (3.0, 1.0, 2.0)
    volumes = volume_metrics(prediction, truth, spacing, 2)
    slices = slice_metrics(prediction, truth, spacing, 2)
    want = [CaseScores("a", name, volumes[i], slices[i]) for i, name in enumerate(NAMES)]
    assert score_case("a", prediction, truth, spacing, NAMES) == want


def test_summary_counts_misses_and_leaves_out_what_is_undefined():
    shape = (3, 4, 12)
    organ, nothing = torch.zeros(2, *shape, dtype=torch.uint8)
    organ[:2, :2, :2] = 1
    scores = score("1", organ, organ) + score("2", nothing, organ) + score("3", nothing, nothing)
    summary = summarise(scores, ["liver", "cyst"])
    liver, cyst = summary["classes"]["liver"], summary["classes"]["cyst"]
    assert summary["cases"] == 3
    assert liver["volume"]["dice"] == {"mean": 0.5, "std": pytest.approx(0.5**0.5), "median": 0.5, "n": 2}
    assert liver["volume"]["hd95_mm"]["mean"] == 6.5
    assert liver["volume"]["hd95_mm_found"] == {"mean": 0.0, "std": None, "median": 0.0, "n": 1}
    assert (liver["present"], liver["missed"], liver["false_alarms"]) == (2, 1, 0)
    assert liver["slice_wise"]["dice"] == {"mean": 0.5, "n": 4}
    assert liver["published"]["dice"] == {"mean": pytest.approx(7 / 9), "n": 9}
    assert cyst["volume"]["dice"] == {"mean": None, "std": None, "median": None, "n": 0}
    assert cyst["slice_wise"]["assd_mm"] == {"mean": None, "n": 0}
    assert summary["mean"]["volume"]["dice"] == 0.5  # the class that nobody has is left out


def test_row_has_a_column_for_every_figure():
    row = score("1", *torch.zeros(2, 3, 4, 4, dtype=torch.uint8))[0].row()
    assert list(row)[:4] == ["case", "class", "dice", "jaccard"]
    assert {"assd_mm", "hd95_mm", "missed", "false_alarm", "slice_dice", "published_dice", "true_ml"} <= set(row)


def test_gathering_sorts_by_case_then_class_and_keeps_one_of_each():
    scores = some_scores()
    gathered = gather_scores([*scores[::-1], *scores], NAMES)
    assert [(s.case, s.class_name) for s in gathered] == [
        ("1", "liver"), ("1", "cyst"), ("2", "liver"), ("2", "cyst"),
    ]  # fmt: skip
    assert all(any(one is score for score in scores) for one in gathered)


def test_logged_means_are_those_of_the_summary_and_nan_without_a_number():
    means = take_means(summarise(some_scores(), NAMES))
    metrics = ("dice", "jaccard", "assd_mm", "hd95_mm")
    assert set(means) == {f"{m}{end}" for m in metrics for end in ("", "_liver", "_cyst")}
    assert means["dice"] == means["dice_liver"] == 0.5
    assert means["hd95_mm_liver"] == 6.5  # 0 and the diagonal, 13
    assert math.isnan(means["assd_mm_cyst"])


def test_a_figure_that_does_not_exist_is_an_empty_cell():
    rows = list(csv.DictReader(io.StringIO(format_cases(some_scores()).decode())))
    assert [(row["case"], row["class"]) for row in rows][:2] == [("1", "liver"), ("1", "cyst")]
    assert (rows[0]["dice"], rows[1]["dice"], rows[2]["dice"]) == ("1.0", "", "0.0")
    assert (rows[2]["missed"], rows[2]["slice_assd_mm"]) == ("True", "")
    assert not any(value == "nan" for row in rows for value in row.values())


def test_tables_are_written_and_the_summary_is_strict_json(tmp_path):
    scores = some_scores()
    summary = summarise(scores, NAMES)
    write_tables(tmp_path / "new", scores, summary)
    assert (tmp_path / "new" / "cases.csv").read_bytes() == format_cases(scores)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "new" / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse) == summary
