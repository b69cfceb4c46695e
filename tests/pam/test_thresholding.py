import pytest
import torch

from weakmedsam.pam.thresholding import (
    agreement,
    centre_scores,
    compete,
    gated_scores,
    mean_confidence,
    profile_levels,
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


def test_quality_is_the_mean_confidence_of_the_classs_own_pixels():
    ids, confidence = torch.zeros(3, 2, 2), torch.full((3, 2, 2), 0.9)
    ids[0, 0], confidence[0, 0] = 1, torch.tensor([0.2, 0.4])
    ids[1, 0, 0], confidence[1, 0, 0] = 2, 0.7
    found = mean_confidence(ids, confidence, torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert torch.allclose(found[0, 0], torch.tensor(0.3))
    assert torch.allclose(found[1], torch.tensor([0.0, 0.7]))  # none of the first class
    assert found[0, 1].isnan()
    assert found[2].isnan().all()


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


def test_centred_scores_have_their_own_threshold_at_the_common_one():
    scores = torch.tensor([0.0, 0.1, 0.2, 0.6, 1.0]).view(1, 1, 1, 5).repeat(1, 2, 1, 1)
    centred = centre_scores(scores, torch.tensor([[0.2, torch.nan]]), 0.5)
    assert torch.allclose(centred[0, 0, 0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert torch.allclose(centred[0, 1], scores[0, 1])


# The profile of areas


def cones(tops, size=33):
    """Slices whose score falls from 1 in the middle to 0 at the radius given, in pixels."""
    at = torch.arange(size) - size // 2
    distance = (at[:, None] ** 2 + at**2).sqrt()
    return torch.stack([(1 - distance / top).clamp(0, 1) for top in tops])


def areas_of(scores, positions=None, threshold=0.5, inside=None):
    inside = torch.ones_like(scores, dtype=torch.bool) if inside is None else inside
    positions = torch.arange(1, len(scores) + 1) if positions is None else positions
    levels = profile_levels(scores, positions, 99, inside, threshold)
    return ((scores > levels[:, None, None]) & inside).flatten(1).sum(1).tolist()


def test_ends_cut_as_wide_as_the_middle_become_smaller_and_the_volume_stays():
    # Every slice scaled to a maximum of 1, as the walk leaves them: areas are all alike.
    scores = cones([16.0] * 7)
    scores += 1e-4 * torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    before = (scores > 0.5).flatten(1).sum(1)
    after = areas_of(scores)
    assert after == after[::-1]
    assert after[0] < after[1] < after[2] < after[3]
    assert sum(after) == pytest.approx(int(before.sum()), abs=4)
    section = torch.tensor([1 - (2 * (i + 0.5) / 7 - 1) ** 2 for i in range(7)])
    wanted = before.double() * section.sqrt()
    assert torch.tensor(after).double().allclose(wanted * before.sum() / wanted.sum(), atol=1)


def test_an_ellipsoid_keeps_its_areas():
    radii = [12 * (1 - (2 * (i + 0.5) / 9 - 1) ** 2) ** 0.5 for i in range(9)]
    scores = torch.stack([cones([2 * radius])[0] for radius in radii])
    before = (scores > 0.5).flatten(1).sum(1).tolist()
    assert areas_of(scores) == pytest.approx(before, abs=8)


def test_a_gap_begins_another_run_and_one_or_two_slices_stay_as_they_are():
    scores = cones([16.0, 16.0, 10.0]) + 1e-4 * torch.rand(3, 33, 33, generator=torch.Generator().manual_seed(0))
    before = (scores > 0.5).flatten(1).sum(1).tolist()
    assert areas_of(scores, torch.tensor([3, 4, 9])) == pytest.approx(before, abs=1)
    assert areas_of(scores, torch.tensor([3, 4, 5])) != pytest.approx(before, abs=1)


def test_a_slice_with_the_class_is_never_empty_and_padding_takes_no_part():
    scores = cones([16.0, 16.0, 16.0, 16.0, 16.0, 0.6, 0.6])
    inside = torch.ones_like(scores, dtype=torch.bool)
    inside[:, :, :16] = False
    assert min(areas_of(scores, inside=inside)) >= 1
    assert profile_levels(scores * 0.4, torch.arange(1, 8), 9, inside, 0.5).isnan().all()


def test_of_a_class_in_all_slices_no_end_is_known():
    scores = cones([16.0] * 7)
    inside = torch.ones_like(scores, dtype=torch.bool)
    assert profile_levels(scores, torch.arange(7), 7, inside, 0.5).isnan().all()
    assert profile_levels(scores, torch.arange(7), 8, inside, 0.5).isfinite().all()
