"""The way back to the scan's own slices, in torch."""

import numpy as np
import pytest
import torch

from data_modules.resampling import values_from_frame
from weakmedsam.contracts import Frame
from weakmedsam.geometry import to_native


@pytest.mark.parametrize("frame", [Frame(37, 50, 50, 64), Frame(51, 30, 51, 32), Frame(20, 20, 20, 16)])
def test_to_native_is_the_map_of_the_data_modules(frame):
    values = torch.rand(2, 3, frame.size, frame.size)
    native = to_native(values, frame)
    assert native.shape == (2, 3, frame.height, frame.width)
    np.testing.assert_allclose(native, values_from_frame(values.numpy(), frame), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(37, 50), (50, 37), (36, 51), (9, 9)])
def test_to_native_undoes_centred_padding(height, width):
    scan, side = torch.rand(height, width), max(height, width)
    square = torch.zeros(1, 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[0, 0, top : top + height, left : left + width] = scan
    torch.testing.assert_close(to_native(square, Frame(height, width, side, side))[0, 0], scan)


def test_to_native_passes_gradients_on():
    values = torch.rand(1, 2, 8, 8, requires_grad=True)
    to_native(values, Frame(5, 9, 9, 8)).sum().backward()
    assert values.grad.abs().sum() > 0
