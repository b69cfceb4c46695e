"""Where a value lies on the picture of a sweep."""

import pytest

from weakmedsam.sweep_ledger import Trial
from weakmedsam.sweep_picture import place_values, write_picture, write_trials


def test_numbers_lie_on_a_line_and_on_a_logarithmic_one_where_they_span_much():
    places, marks = place_values([0, 1, 2, 3, 4, 5, 10])
    assert places.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 1])
    assert [text for _, text in marks] == ["0", "2.5", "5", "7.5", "10"]
    places, marks = place_values([0.001, 0.01, 0.1, 1.0, 0.002, 0.03, 0.4])
    assert places[:4].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert marks[0] == (0.0, "0.001")


def test_words_and_few_numbers_lie_at_even_distances():
    places, marks = place_values(["pass", "bank", "pass"])
    assert places.tolist() == [0.75, 0.25, 0.75]
    assert [text for _, text in marks] == ["bank", "pass"]
    places, _ = place_values([0, 32, 4, 32])
    assert places.tolist() == pytest.approx([1 / 6, 5 / 6, 0.5, 5 / 6])
    assert place_values([True, False])[0].tolist() == [0.75, 0.25]
    assert place_values([8])[0].tolist() == [0.5]


def test_one_run_and_equal_runs_can_be_drawn(tmp_path):
    trials = [Trial(n, {"a": 1 + n % 2, "b": "x"}, "finished", 0.5) for n in range(3)]
    for some in (trials[:1], trials):
        write_picture(tmp_path / "p.png", some, "val/score")
        assert (tmp_path / "p.png").stat().st_size > 5000


def test_lists_and_nothing_are_drawn_as_words(tmp_path):
    places, marks = place_values([[0.5, 99.5], None, [0.5, 99.5]])
    assert places.tolist() == [0.75, 0.25, 0.75] or places.tolist() == [0.25, 0.75, 0.25]
    assert {text for _, text in marks} == {"None", "[0.5, 99.5]"}
    trials = [Trial(n, {"a": [n, 1], "b": None}, "finished", 0.5) for n in range(2)]
    write_picture(tmp_path / "p.png", trials, "val/score")
    write_trials(tmp_path / "table.csv", trials, "val/score")
    assert '"[1, 1]"' in (tmp_path / "table.csv").read_text()
