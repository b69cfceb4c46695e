"""Clicks that a mask sets."""

import numpy as np

from weakmedsam.review.simulation import next_click

NAMES = ["lesion", "cyst"]


def scene():
    reference = np.zeros((3, 20, 20), np.uint8)
    reference[1, 2:9, 3:10] = 1
    reference[2, 10:13, 10:13] = 2
    return reference, np.ones((3, 2), bool)


def test_the_middle_of_the_largest_error_is_clicked():
    reference, present = scene()
    label = np.zeros_like(reference)
    assert next_click(label, reference, present, NAMES)[1:6] == (1, 6, 5, 1, "lesion")
    label[1] = reference[1]
    assert next_click(label, reference, present, NAMES)[1:6] == (2, 11, 11, 1, "cyst")
    label[0, 15:20, 0:5] = 2
    assert next_click(label, reference, present, NAMES)[1:6] == (0, 2, 17, -1, "cyst")


def test_another_class_in_its_place_asks_for_the_right_one():
    reference, present = scene()
    label = np.where(reference == 1, 2, reference).astype(np.uint8)
    assert next_click(label, reference, present, NAMES)[1:6] == (1, 6, 5, 1, "lesion")


def test_nothing_is_added_that_a_slice_is_labelled_without():
    reference, present = scene()
    present[1, 0] = False
    label = np.zeros_like(reference)
    label[2] = reference[2]
    assert next_click(label, reference, present, NAMES) is None
    assert next_click(reference, reference, present, NAMES) is None
