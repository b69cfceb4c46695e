"""Clicks replayed on a pseudo-label."""

import numpy as np
import pytest

from weakmedsam.contracts import SliceState
from weakmedsam.errors import DataError
from weakmedsam.review.correction import REACH, apply_click, correct, find_fault, slice_states
from weakmedsam.run.clicks import ACCEPTED, REJECTED, Click, Decision, Reviewed

NAMES = ["lesion", "cyst"]
PRESENT = np.ones((12, 2), bool)
EMPTY = np.zeros((12, 16, 16), np.uint8)


def square(z, x, y):
    """Every prompt answers with the same square, and a spot far off."""
    logits = np.full((16, 16), -1.0, np.float32)
    logits[4:8, 4:8] = logits[13:15, 13:15] = 1
    return logits


def click(z=5, x=5, y=6, sign=1, name="lesion"):
    return Click("a", z, x, y, sign, name, "2025-01-31T12:00:00")


def area(changes, z=5):
    return [np.count_nonzero(changes[z] == value) for value in (1, 2)]


def test_an_including_click_adds_the_part_of_the_mask_that_holds_it():
    changes = apply_click(EMPTY, click(), NAMES, PRESENT, square)
    assert area(changes) == [16, 0]
    assert not changes[5][13:, 13:].any()
    assert not EMPTY.any()


def test_a_click_holds_for_its_own_pixel_whatever_the_prompt_answers():
    changes = apply_click(EMPTY, click(x=0, y=12), NAMES, PRESENT, square)
    assert changes[5][12, 0] == 1
    assert area(changes) == [4, 0]  # the pixel and three neighbours: it lies at the border


def test_an_excluding_click_takes_its_own_class_away_only():
    label = EMPTY.copy()
    label[5, 4:8, 4:8] = 1
    label[5, 4:8, 6:8] = 2
    assert area(apply_click(label, click(x=4, sign=-1), NAMES, PRESENT, square)) == [0, 8]


def test_the_last_class_wins():
    label = EMPTY.copy()
    label[5, 4:8, 4:8] = 1
    assert area(apply_click(label, click(name="cyst"), NAMES, PRESENT, square)) == [0, 16]


def test_a_click_goes_on_while_the_class_may_be_there_and_is_as_wrong():
    assert sorted(apply_click(EMPTY, click(), NAMES, PRESENT, square)) == list(range(5 - REACH, 5 + REACH + 1))
    present, label = PRESENT.copy(), EMPTY.copy()
    present[7, 0] = False
    label[3, 6, 5] = 1  # right already
    assert sorted(apply_click(label, click(), NAMES, present, square)) == [4, 5, 6]


def test_a_click_stops_where_the_masks_are_no_longer_alike():
    def other(z, x, y):
        return square(z, x, y) if z < 7 else np.ones((16, 16), np.float32)

    assert max(apply_click(EMPTY, click(), NAMES, PRESENT, other)) == 6


def test_replaying_changes_nothing_without_a_click_and_gives_the_same_again():
    label = np.random.default_rng(0).integers(0, 3, EMPTY.shape, np.uint8)
    kept = label.copy()
    nothing = correct(label, Reviewed((), ()), NAMES, PRESENT, square)
    np.testing.assert_array_equal(nothing.label, kept)
    assert not nothing.state.any()
    reviewed = Reviewed((click(), click(sign=-1, x=7), click(z=2, name="cyst")), ())
    first, again = (correct(label, reviewed, NAMES, PRESENT, square) for _ in range(2))
    np.testing.assert_array_equal(first.label, again.label)
    np.testing.assert_array_equal(label, kept)
    assert (first.label != kept).any()


def test_a_class_that_the_slice_is_labelled_without_is_refused_in_words():
    present = PRESENT.copy()
    present[5] = [False, True]
    present[6] = False
    assert find_fault(click(name="cyst"), present, NAMES) is None
    assert find_fault(click(), present, NAMES).startswith("slice 5 is labelled without lesion (it has cyst only)")
    assert "(it has no class)" in find_fault(click(z=6), present, NAMES)
    with pytest.raises(DataError, match=r"clicks\.csv: the click into a at 2025.*or remove its row"):
        correct(EMPTY, Reviewed((click(),), ()), NAMES, present, square)


def test_a_decision_on_a_slice_wins_over_one_on_its_case():
    decisions = (Decision("a", 2, REJECTED), Decision("a", None, ACCEPTED))
    state = slice_states(4, Reviewed((), decisions), {1})
    assert state.tolist() == [SliceState.trusted] * 2 + [SliceState.left_out, SliceState.trusted]
    state = slice_states(4, Reviewed((click(z=0),), ()), {0, 1})
    assert state.tolist() == [SliceState.trusted, SliceState.changed, SliceState.unchanged, SliceState.unchanged]
