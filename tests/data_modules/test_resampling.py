import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.resampling import (
    frame_box,
    labels_from_frame,
    labels_to_frame,
    make_frame,
    resize_matrix,
    values_from_frame,
    values_to_frame,
)

sides = st.integers(1, 60)


@settings(max_examples=40, deadline=None)
@given(source=sides, target=sides)
def test_rows_of_the_resizing_sum_to_one(source, target):
    np.testing.assert_allclose(resize_matrix(source, target).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("target", [13, 40, 57])
def test_resizing_is_torchs_antialiased_bilinear(target):
    values = np.random.default_rng(0).random((40, 40), dtype=np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=(target, target), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(values_to_frame(values, make_frame(40, 40, target)), wanted[0, 0], atol=1e-4)


def test_the_slice_lies_in_the_middle_and_padding_is_zero():
    framed = values_to_frame(np.ones((2, 4, 8), np.float32), make_frame(4, 8, 8))
    assert framed.shape == (2, 8, 8)
    np.testing.assert_array_equal(framed[0, :, 0], [0, 0, 1, 1, 1, 1, 0, 0])


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), factor=st.integers(1, 4))
def test_labels_come_back_when_the_frame_is_a_multiple(height, width, factor):
    labels = np.random.default_rng(height).integers(0, 5, (2, height, width)).astype(np.uint8)
    frame = make_frame(height, width, factor * max(height, width))
    framed = labels_to_frame(labels, frame)
    assert framed.dtype == np.uint8
    np.testing.assert_array_equal(labels_from_frame(framed, frame), labels)


def test_labels_lie_where_values_lie():
    values = np.zeros((30, 50), np.float32)
    values[8:20, 11:33] = 1
    frame = make_frame(30, 50, 128)
    labels = labels_to_frame(values.astype(np.uint8), frame)
    assert ((values_to_frame(values, frame) > 0.5) != labels).mean() < 0.002


def test_values_come_back_to_where_they_were():
    frame = make_frame(31, 50, 128)
    ramp = np.add.outer(np.arange(31), np.arange(50)).astype(np.float32)
    back = values_from_frame(values_to_frame(ramp, frame), frame)
    np.testing.assert_allclose(back[3:-3, 3:-3], ramp[3:-3, 3:-3], atol=0.05)


@pytest.mark.parametrize(("height", "width", "size"), [(20, 31, 16), (31, 20, 64), (24, 24, 24)])
def test_the_box_is_where_a_slice_of_ones_lands(height, width, size):
    frame = make_frame(height, width, size)
    ones = labels_to_frame(np.ones((1, height, width), np.uint8), frame)[0]
    top, bottom, left, right = frame_box(frame)
    assert ones[top:bottom, left:right].all()
    assert ones.sum() == (bottom - top) * (right - left)
