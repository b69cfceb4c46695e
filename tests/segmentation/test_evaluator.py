"""Segmentations of test cases, scored and drawn."""

import csv

import pytest
import torch

from weakmedsam.contracts import Frame
from weakmedsam.segmentation import evaluator as evaluation
from weakmedsam.segmentation.evaluator import Evaluation

CLASSES = ["lesion", "cyst"]


def volume(case, truth):
    """Three slices of 8 x 8 pixels, in true half precision as far as the image goes."""
    return {
        "image": torch.rand(3, 1, 8, 8).bfloat16(),
        "mask": truth,
        "case": case,
        "frame": Frame(8, 8, 8, 8),
        "spacing": (2.0, 1.0, 1.0),
    }


def box(value):
    mask = torch.zeros(3, 8, 8, dtype=torch.uint8)
    mask[1, 2:6, 2:6] = value
    return mask


@pytest.fixture
def titles(monkeypatch):
    found = []
    monkeypatch.setattr(evaluation, "draw_contours", lambda *parts: found.append(parts[-1]) or b"png")
    return found


def test_each_case_has_a_picture_and_a_row_for_each_class(titles, tmp_path):
    both = Evaluation(CLASSES, tmp_path)
    half = box(1)
    half[1, 4:6] = 0
    both.add(volume("a", box(1)), half)
    both.add(volume("b", box(2)), box(2))
    both.add(volume("c", box(0)), box(0))
    means = both.finish(writes=True)
    # A class that is in neither has no Dice, and none is shown.
    assert titles == [
        "a, slice 1\nDice lesion 0.67",
        "b, slice 1\nDice cyst 1.00",
        f"c, slice {titles[2].split()[2]}\nDice -",
    ]
    assert sorted(path.stem for path in (tmp_path / "pictures").iterdir()) == ["a", "b", "c"]
    rows = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert [(row["case"], row["class"]) for row in rows] == [(c, n) for c in "abc" for n in CLASSES]
    assert means["dice_lesion"] == pytest.approx(2 / 3)
    assert means["dice"] == pytest.approx((2 / 3 + 1) / 2)


def test_only_one_rank_writes(titles, tmp_path):
    other = Evaluation(CLASSES, tmp_path)
    other.add(volume("a", box(1)), box(1))
    assert other.finish(writes=False)["dice"] == 1
    assert not (tmp_path / "cases.csv").exists()
