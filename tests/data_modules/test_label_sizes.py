"""Unsure pseudo-labels that are too large are trimmed; sure ones and small ones are not."""

import numpy as np
import pytest

from data_modules.label_sizes import LEVELS, LabelSize, least_confidences, trim_label


def size(*pixels_at, slices=10):
    """One class: (pixels, confidence) pairs."""
    histogram = np.zeros((1, LEVELS), np.int64)
    for pixels, level in pixels_at:
        histogram[0, level] += pixels
    return LabelSize(histogram, np.array([slices]))


SURE = {f"sure{n}": size((1000, 150), (20, 30)) for n in range(4)}


def pixels_left(sizes, case):
    return int(sizes[case].histogram[0, least_confidences(sizes)[case][0] :].sum())


def test_an_unsure_label_that_is_larger_than_the_others_comes_nearer_to_them():
    sizes = {**SURE, "spilt": size((600, 90), (8000, 20), (1400, 5))}
    assert pixels_left(sizes, "spilt") == 8600  # levels are coarse: the least that is not below what is wanted
    finer = {**SURE, "spilt": size((600, 90), *((100, level) for level in range(94, 0, -1)))}
    left = pixels_left(finer, "spilt")
    sure, unsure = 150_600 / 1020, np.average(np.arange(LEVELS), weights=finer["spilt"].histogram[0])
    typical = np.average(np.log([102] * 4 + [1000]), weights=[sure] * 4 + [unsure])
    trust = (unsure / sure) ** 3
    wanted = 10 * np.exp(trust * np.log(1000) + (1 - trust) * typical)
    assert wanted <= left < wanted + 100


@pytest.mark.parametrize("other", [size((300, 20)), size((1020, 20)), size((9000, 200))])
def test_small_typical_and_sure_ones_stay(other):
    sizes = {**SURE, "other": other}
    assert all((least == 0).all() for least in least_confidences(sizes).values())


def test_slices_count_not_volumes():
    sizes = {**SURE, "long": size((10_000, 60), slices=100)}
    assert least_confidences(sizes)["long"][0] == 0


def test_classes_that_are_absent_or_have_no_pixel_are_left_alone():
    nothing = LabelSize(np.zeros((1, LEVELS), np.int64), np.array([3]))
    absent = LabelSize(np.zeros((1, LEVELS), np.int64), np.array([0]))
    unsure = size((50, 0))
    for sizes in ({}, {"a": nothing}, {"a": absent}, {"a": unsure}, {**SURE, "a": nothing, "b": absent}):
        assert all((least == 0).all() for least in least_confidences(sizes).values())


def test_trimmed_pixels_are_background_of_which_nothing_is_known():
    label = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    confidence = np.array([[5, 50, 49], [10, 200, 255]], np.uint8)
    found, sure = trim_label(label, confidence, np.array([50, 0], np.uint8))
    assert found.tolist() == [[0, 1, 0], [2, 2, 0]]
    assert sure.tolist() == [[5, 50, 0], [10, 200, 255]]
