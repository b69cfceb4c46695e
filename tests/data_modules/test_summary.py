import numpy as np
import pytest

from data_modules.summary import warn_of_undefined
from weakmedsam.errors import DataError


def test_a_class_that_every_validation_slice_has_or_none_is_named(caplog):
    labels = np.array([[1, 0, 1], [1, 1, 0]], np.float32)
    warn_of_undefined(labels[:, 1:], ["b", "c"])
    assert not caplog.text
    warn_of_undefined(labels, ["a", "b", "c"])
    assert "every slice or none has a:" in caplog.text
    with pytest.raises(DataError, match="no AUROC is defined"):
        warn_of_undefined(labels[:, :1], ["a"])
