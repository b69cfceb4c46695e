import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weakmedsam.pam.mask_voting import vote, vote_weights


def boxes():
    """Activation on a box; one mask on it, one twice as large, one elsewhere, one empty."""
    cam = torch.zeros(1, 1, 16, 16)
    cam[..., 4:8, 4:8] = 1.0
    masks = torch.zeros(1, 4, 16, 16)
    masks[0, 0, 4:8, 4:8] = 1.0
    masks[0, 1, 4:8, 4:12] = 1.0
    masks[0, 2, 10:14, 10:14] = 1.0
    return cam, masks


def test_a_mask_weighs_by_the_mean_activation_in_it_to_the_power():
    cam, masks = boxes()
    assert torch.allclose(vote_weights(cam, masks, 4.0), torch.tensor([[[1.0, 0.5**4, 0.0, 0.0]]]))
    assert torch.allclose(vote_weights(cam, masks, 1.0), torch.tensor([[[1.0, 0.5, 0.0, 0.0]]]))


def test_the_score_is_the_weighted_sum_of_masks_over_its_maximum():
    cam, masks = boxes()
    score = vote(cam, masks, power=1.0)[0, 0]
    assert score[5, 5] == pytest.approx(1)
    assert score[5, 10] == pytest.approx(0.5 / 1.5)
    assert score[12, 12] == 0
    assert score[0, 0] == 0


def test_coverage_takes_the_advantage_of_what_many_masks_cover():
    cam, masks = boxes()
    many = masks[:, :1].repeat(1, 5, 1, 1)
    other = torch.zeros_like(masks[:, :1])
    other[..., 4:8, 8:12] = 1.0
    both = torch.cat([many, other], dim=1)
    cam[..., 4:8, 8:12] = 0.9
    plain = vote(cam, both, power=1.0)[0, 0, 5, 10]
    covered = vote(cam, both, power=1.0, normalise="coverage", eps=1e-6)[0, 0, 5, 10]
    assert plain == pytest.approx(0.9 / 5)
    assert covered == pytest.approx(0.9, abs=1e-4)


def test_a_mask_without_trust_has_no_vote():
    cam, masks = boxes()
    trust = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    for normalise in ("none", "coverage"):
        got = vote(cam, masks, normalise=normalise, trust=trust)
        assert torch.allclose(got, vote(cam, masks[:, 1:], normalise=normalise), atol=1e-6)


def test_each_class_and_slice_has_a_vote_of_its_own():
    cam, masks = boxes()
    two = torch.cat([cam, cam.flip(-1, -2)], dim=1)
    both = torch.cat([masks, masks.flip(-1, -2)], dim=1)
    score = vote(torch.cat([two, two.flip(1)]), torch.cat([both, both]))
    assert torch.allclose(score[0, 1], score[0, 0].flip(-1, -2), atol=1e-6)
    assert torch.equal(score[1], score[0].flip(0))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    power=st.sampled_from([0.0, 1.0, 4.0]),
    normalise=st.sampled_from(["none", "coverage"]),
    axis=st.sampled_from([-1, -2]),
)
def test_range_maximum_and_flips(seed, power, normalise, axis):
    generator = torch.Generator().manual_seed(seed)
    cam = torch.rand(2, 2, 6, 5, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 3, 6, 5, generator=generator, dtype=torch.float64)
    score = vote(cam, masks, power, normalise)
    assert score.min() >= 0
    assert torch.allclose(score.amax((-2, -1)), torch.ones(2, 2, dtype=torch.float64))
    flipped = vote(cam.flip(axis), masks.flip(axis), power, normalise)
    assert torch.allclose(flipped.flip(axis), score, atol=1e-12)


def test_nothing_to_vote_with_gives_nothing():
    assert vote(torch.rand(1, 2, 4, 4), torch.zeros(1, 3, 4, 4)).eq(0).all()
