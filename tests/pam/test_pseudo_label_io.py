import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from weakmedsam.errors import DataError
from weakmedsam.pam.pseudo_label_io import Origin, read_origin, read_quality, write_pseudo_label
from weakmedsam.pam.thresholding import PseudoLabel


def test_file_round_trip(tmp_path):
    labels = PseudoLabel(
        torch.tensor([[[0, 2]]], dtype=torch.uint8),
        torch.tensor([[[1.0, 0.5]]]),
        torch.tensor([[torch.nan, 0.75]]),
        torch.tensor([[torch.nan, 0.5]]),
    )
    path = tmp_path / "case.safetensors"
    write_pseudo_label(path, labels, Origin("a", {"affinity__beta": 4.0}, "of"))
    tensors = load_file(path)
    assert tensors["label"].tolist() == [[[0, 2]]]
    assert tensors["confidence"].tolist() == [[[255, 128]]]
    assert read_origin(path) == Origin("a", {"affinity__beta": 4.0}, "of")
    assert np.array_equal(read_quality(path), [[np.nan, 0.75]], equal_nan=True)
    assert np.array_equal(read_quality(path, "stability"), [[np.nan, 0.5]], equal_nan=True)
    assert [p.name for p in tmp_path.iterdir()] == ["case.safetensors"]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "case.safetensors"
    path.write_text(json.dumps({"not": "tensors"}))
    with pytest.raises(DataError, match=r"case\.safetensors"):
        read_origin(path)
    with pytest.raises(DataError, match=r"case\.safetensors"):
        read_quality(path)
