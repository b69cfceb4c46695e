import math

import pytest
import torch
from dense_walk import dense_matrix, dense_walk, places
from hypothesis import given, settings
from hypothesis import strategies as st

from weakmedsam.pam.affinity import edge_weights, half_disc, random_walk
from weakmedsam.pam.volume_affinity import half_ball, relative_thickness, volume_weights

SPACE = (5, 6, 4)


def drawn(seed, prompts=3, classes=2, space=SPACE):
    """Activation (1, C, D, h, w), maps (D, P, h, w), trust (D, P)."""
    generator = torch.Generator().manual_seed(seed)
    cam = torch.rand(1, classes, *space, generator=generator, dtype=torch.float64)
    maps = torch.rand(space[0], prompts, *space[1:], generator=generator, dtype=torch.float64)
    trust = (torch.rand(space[0], prompts, generator=generator, dtype=torch.float64) - 0.3).clamp_min(0)
    return cam, maps, trust


def chunked(maps, trust, size):
    starts = range(0, len(maps), size)
    return [(maps[i : i + size], None if trust is None else trust[i : i + size]) for i in starts]


def neighbours(radius, reach, thickness, space=SPACE):
    """(N, N) float: the weight that distance alone gives a pair."""
    at = places(space, thickness)
    number = places(space)[:, 0]
    slices = (number[:, None] - number).abs()
    near = (torch.cdist(at, at) < radius - 1e-12) & (slices <= reach)
    return near * torch.exp(-slices * thickness / radius)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    radius=st.sampled_from([1.5, 2.3, 4.1]),
    reach=st.sampled_from([1, 2]),
    thickness=st.sampled_from([0.23, 1.0, 1.9]),
    beta=st.sampled_from([1.0, 4.0]),
    contrast=st.sampled_from([1.0, 10.0]),
    steps=st.one_of(st.none(), st.integers(0, 5)),
    rescale=st.booleans(),
    restart=st.sampled_from([0.2, 0.6]),
    absent=st.booleans(),
    trusted=st.booleans(),
    size=st.integers(1, 5),
)
def test_stencil_equals_the_dense_matrix_of_the_volume(
    seed, radius, reach, thickness, beta, contrast, steps, rescale, restart, absent, trusted, size
):
    cam, maps, trust = drawn(seed)
    inside = torch.ones_like(cam, dtype=torch.bool)
    inside[..., 0] = False
    if absent:  # the first class is not in slice 2, the second not in slices 0 and 4
        inside[:, 0, 2], inside[:, 1, 0], inside[:, 1, 4] = False, False, False
    offsets = half_ball(radius, reach, thickness)
    chunks = chunked(maps, trust if trusted else None, size)
    weights = volume_weights(chunks, offsets, radius, thickness, beta, contrast)
    walked = random_walk(cam, weights, offsets, steps, rescale, inside, restart, tolerance=1e-9)
    everywhere = trust.T[None, ..., None].expand(-1, -1, -1, 24).flatten(2) if trusted else None
    near = neighbours(radius, reach, thickness)
    matrix = dense_matrix(maps.movedim(0, 1)[None], near, beta, contrast, everywhere)
    expected = dense_walk(cam, matrix, steps, rescale, inside, restart)
    assert torch.allclose(walked, expected, atol=1e-5)
    assert walked[~inside].eq(0).all()


def test_a_volume_of_one_slice_is_walked_as_that_slice():
    cam, maps, _ = drawn(1, space=(1, 9, 8))
    offsets = half_ball(3.0, 1, 0.4)
    volume = random_walk(cam, volume_weights([(maps, None)], offsets, 3.0, 0.4), offsets)
    flat = half_disc(3.0)
    assert torch.equal(volume[:, :, 0], random_walk(cam[:, :, 0], edge_weights(maps, flat), flat))


def test_activation_reaches_the_next_slices_but_not_through_an_absent_one():
    cam = torch.zeros(1, 1, 4, 8, 8)
    cam[:, :, 0, 2:5, 2:5] = 1.0
    maps = torch.zeros(4, 1, 8, 8)
    maps[:, :, 2:5, 2:5] = 1.0
    offsets = half_ball(3.0, 1, 0.5)
    weights = volume_weights([(maps, None)], offsets, 3.0, 0.5)
    everywhere = torch.ones_like(cam, dtype=torch.bool)
    walked = random_walk(cam, weights, offsets, 6, rescale=False, inside=everywhere)[0, 0]
    assert walked[1, 3, 3] > 0.1
    assert walked[1, 3, 3] > walked[2, 3, 3] > walked[3, 3, 3] > 1e-3
    assert walked[1, 6, 6] < 1e-6  # no prompt covers both
    everywhere[:, :, 1] = False
    parted = random_walk(cam, weights, offsets, 6, rescale=False, inside=everywhere)[0, 0]
    assert parted[1:].eq(0).all()
    assert parted[0, 3, 3] > walked[0, 3, 3]


@pytest.mark.parametrize("axis", [-3, -2, -1])
def test_a_flipped_volume_gives_the_flipped_result(axis):
    cam, maps, _ = drawn(2)
    offsets = half_ball(2.5, 1, 0.7)
    turned = maps.movedim(0, 1)[None].flip(axis)[0].movedim(1, 0)
    walked = random_walk(cam, volume_weights([(maps, None)], offsets, 2.5, 0.7), offsets)
    flipped = random_walk(cam.flip(axis), volume_weights([(turned, None)], offsets, 2.5, 0.7), offsets)
    assert torch.allclose(walked.flip(axis), flipped, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6), value=st.floats(0, 1))
def test_constants_stay_and_values_keep_their_range(seed, steps, value):
    cam, maps, _ = drawn(seed)
    offsets = half_ball(2.5, 1, 0.7)
    weights = volume_weights([(maps, None)], offsets, 2.5, 0.7)
    level = torch.full_like(cam, value)
    assert torch.allclose(random_walk(level, weights, offsets, steps), level, atol=1e-9)
    walked = random_walk(cam, weights, offsets, steps, rescale=False)
    assert walked.min() >= cam.min() - 1e-9
    assert walked.max() <= cam.max() + 1e-9


def test_half_ball_counts_in_millimetres():
    flat = half_disc(5.0)
    assert half_ball(5.0, 1, 6.0) == [(0, *offset) for offset in flat]  # slices are too far apart
    whole = half_ball(5.0, 1, 0.0)
    assert len(whole) == len(flat) + 2 * len(flat) + 1
    assert (1, 4, 0) in half_ball(5.0, 1, 2.9)
    assert (1, 4, 0) not in half_ball(5.0, 1, 3.1)
    assert (2, 0, 0) in half_ball(5.0, 2, 2.4)
    assert (2, 0, 0) not in half_ball(5.0, 2, 2.6)


def test_thickness_is_the_slice_distance_in_cells():
    # 320 pixels of 1.25 mm on 64 cells: 6.25 mm a cell.
    assert relative_thickness((1.37, 1.25, 1.25), 320, 64) == pytest.approx(1.37 / 6.25)
    assert relative_thickness((5.0, 1.0, 4.0), 64, 32) == pytest.approx(5.0 / 4.0)


def test_edges_between_slices_fade_with_their_distance():
    maps = torch.zeros(2, 1, 3, 3)
    offsets = half_ball(2.0, 1, 0.8)
    weights = volume_weights([(maps, None)], offsets, 2.0, 0.8)
    up = offsets.index((1, 0, 0))
    assert weights[0, up, 0, 1, 1] == pytest.approx(math.exp(-0.4))
    assert weights[0, up, 1].eq(0).all()  # there is no slice after the last
    assert weights[0, offsets.index((0, 0, 1)), 1, 1, 1] == 1
