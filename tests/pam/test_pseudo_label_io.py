import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from weakmedsam.errors import DataError
from weakmedsam.pam.pseudo_label_io import Origin, read_origin, read_quality, write_pseudo_label
from weakmedsam.pam.thresholding import (
    PseudoLabel,
    agreement,
    centre_scores,
    compete,
    gated_scores,
    otsu_threshold,
    smooth,
    threshold_scores,
)


def test_an_absent_class_has_an_empty_map_however_its_activation_is_scaled():
    maps = torch.ones(1, 2, 8, 8)
    scores = gated_scores(maps, torch.tensor([[1.0, 0.0]]), 32)
    assert scores[0, 0].min() > 0.99
    assert scores[0, 1].eq(0).all()
    assert threshold_scores(scores)[0].eq(1).all()


def test_the_higher_of_two_classes_wins_and_the_margin_is_the_confidence():
    scores = torch.tensor([0.9, 0.6, 0.4, 0.0]).view(1, 1, 1, 4).repeat(1, 2, 1, 1)
    scores[:, 1] = torch.tensor([0.8, 0.7, 0.2, 0.0])
    label, confidence = threshold_scores(scores, 0.5)
    assert label.flatten().tolist() == [1, 2, 0, 0]
    assert torch.allclose(confidence.flatten(), torch.tensor([0.2, 0.2, 0.2, 1.0]), atol=1e-6)


def test_a_slice_without_classes_is_background_for_sure():
    label, confidence = threshold_scores(gated_scores(torch.rand(1, 2, 8, 8), torch.zeros(1, 2), 16))
    assert label.eq(0).all()
    assert confidence.eq(1).all()


def test_smoothing_keeps_constants_and_the_sum_of_a_point():
    assert torch.allclose(smooth(torch.full((1, 2, 9, 9), 0.3), 1.5), torch.tensor(0.3))
    point = torch.zeros(1, 1, 21, 21)
    point[..., 10, 10] = 1
    blurred = smooth(point, 1.5)
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert blurred.argmax() == 10 * 21 + 10
    assert torch.equal(smooth(point, 0.0), point)


def test_agreement_is_dice_per_class_and_nan_where_absent():
    before, after = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    before[0, 0], after[0, 0, :2] = 1, 1
    quality = agreement(before, after, torch.tensor([[1.0, 0.0]]))
    assert quality[0, 0] == pytest.approx(2 * 2 / 6)
    assert quality[0, 1].isnan()


def test_competition_shares_a_pixel_between_two_classes_and_the_background():
    scores = torch.tensor([[0.8, 0.0, 1.0, 0.3], [0.4, 0.0, 1.0, 0.0]]).view(1, 2, 1, 4)
    shares = compete(scores, power=1.0)[0, :, 0]
    # Background 0.2 beside 0.8 and 0.4; all background; none; the single class keeps its score.
    expected = torch.tensor([[0.8 / 1.4, 0.0, 0.5, 0.3], [0.4 / 1.4, 0.0, 0.5, 0.0]])
    assert torch.allclose(shares, expected)
    less = compete(scores, power=4.0)[0, :, 0]
    assert less[0, 0] == pytest.approx(0.8 / (1.2 + 0.2**4))
    assert less[0, 3] == pytest.approx(0.3 / (0.3 + 0.7**4))


def test_otsu_parts_two_modes_and_equals_the_search_over_all_thresholds():
    generator = torch.Generator().manual_seed(0)
    low, high = (
        0.2 + 0.05 * torch.randn(3000, generator=generator),
        0.7 + 0.1 * torch.randn(1000, generator=generator),
    )
    values = torch.cat([low, high]).clamp(0, 1)
    found = otsu_threshold(values)

    def within(level):
        below, above = values[values <= level], values[values > level]
        return len(below) * below.var(correction=0) + len(above) * above.var(correction=0)

    levels = torch.arange(60, 200) / 256
    assert within(found) <= 1.001 * min(within(level) for level in levels)
    assert 0.3 < found < 0.6


def test_otsu_stands_half_way_between_two_values_and_knows_when_there_is_one_only():
    assert otsu_threshold(torch.tensor([0.25, 0.25, 0.75])) == pytest.approx(0.5, abs=1 / 256)
    assert np.isnan(otsu_threshold(torch.full((9,), 0.4)))
    assert np.isnan(otsu_threshold(torch.zeros(0)))


def test_centred_scores_have_their_own_threshold_at_the_common_one():
    scores = torch.tensor([0.0, 0.1, 0.2, 0.6, 1.0]).view(1, 1, 1, 5).repeat(1, 2, 1, 1)
    centred = centre_scores(scores, torch.tensor([[0.2, torch.nan]]), 0.5)
    assert torch.allclose(centred[0, 0, 0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert torch.allclose(centred[0, 1], scores[0, 1])


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
