import math

import pytest
import torch
from dense_walk import dense_matrix, dense_walk, places
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weakmedsam.pam.affinity import (
    AFFINITIES,
    CellEvidence,
    border_map,
    edge_weights,
    grid_points,
    half_disc,
    onto_map,
    random_walk,
    summed_masks,
)


def drawn(seed, prompts=3, classes=2, height=7, width=9):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, prompts, height, width, generator=generator, dtype=torch.float64)
    cam = torch.rand(2, classes, height, width, generator=generator, dtype=torch.float64)
    return cam, maps


def parts(seed, cam, kind):
    """No inside, one for all classes, or one of each class; some prompts without trust."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (2, 1 if kind == "box" else cam.shape[1], *cam.shape[2:])
    return None if kind == "all" else torch.rand(shape, generator=generator) > 0.3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    radius=st.sampled_from([1.5, 2.0, 3.0, 5.0]),
    beta=st.sampled_from([0.0, 1.0, 4.0]),
    contrast=st.sampled_from([0.5, 1.0, 10.0]),
    steps=st.integers(0, 6),
    rescale=st.booleans(),
    prompts=st.integers(1, 5),
    kind=st.sampled_from(["all", "box", "classes"]),
    restart=st.sampled_from([0.0, 0.1, 0.7]),
    trusted=st.booleans(),
)
def test_stencil_equals_the_dense_matrix(seed, radius, beta, contrast, steps, rescale, prompts, kind, restart, trusted):
    cam, maps = drawn(seed, prompts)
    inside = parts(seed, cam, kind)
    trust = None
    if trusted:
        trust = torch.rand(2, prompts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        trust = (trust - 0.3).clamp_min(0)  # some prompts, and now and then all, count nowhere
    offsets = half_disc(radius)
    weights = edge_weights(maps, offsets, beta, contrast, None if trust is None else trust[..., None, None])
    walked = random_walk(cam, weights, offsets, steps, rescale, inside, restart)
    near = torch.cdist(places((7, 9)), places((7, 9))) < radius
    everywhere = None if trust is None else trust[..., None].expand(-1, -1, 63)
    matrix = dense_matrix(maps, near, beta, contrast, everywhere)
    expected = dense_walk(cam, matrix, steps, rescale, inside, restart)
    assert torch.allclose(walked, expected, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    restart=st.sampled_from([0.1, 0.3, 0.9]),
    rescale=st.booleans(),
    kind=st.sampled_from(["all", "box", "classes"]),
)
def test_the_steady_state_solves_the_linear_system(seed, restart, rescale, kind):
    cam, maps = drawn(seed)
    inside = parts(seed, cam, kind)
    offsets = half_disc(3.0)
    walked = random_walk(cam, edge_weights(maps, offsets), offsets, None, rescale, inside, restart, 1e-9)
    near = torch.cdist(places((7, 9)), places((7, 9))) < 3.0
    expected = dense_walk(cam, dense_matrix(maps, near, 4.0, 10.0), None, rescale, inside, restart)
    assert torch.allclose(walked, expected, atol=1e-5)


def test_the_steady_state_ends_at_the_tolerance_or_the_cap():
    cam, maps = drawn(5)
    offsets = half_disc(3.0)
    weights = edge_weights(maps, offsets, contrast=0.1)
    exact = random_walk(cam, weights, offsets, None, False, restart=0.2, tolerance=1e-12)
    rough = random_walk(cam, weights, offsets, None, False, restart=0.2, tolerance=1e-3)
    assert 0 < (rough - exact).abs().max() <= 1e-3 * 0.8 / 0.2
    capped = random_walk(cam, weights, offsets, None, False, restart=0.2, max_steps=3)
    assert torch.equal(capped, random_walk(cam, weights, offsets, 3, False, restart=0.2))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    value=st.floats(0, 1),
    steps=st.one_of(st.none(), st.integers(1, 8)),
    rescale=st.booleans(),
    restart=st.sampled_from([0.0, 0.4]),
)
def test_a_constant_map_is_a_fixed_point(seed, value, steps, rescale, restart):
    _, maps = drawn(seed)
    offsets = half_disc(3.0)
    cam = torch.full((2, 1, 7, 9), value, dtype=torch.float64)
    walked = random_walk(cam, edge_weights(maps, offsets), offsets, steps, rescale, restart=restart)
    assert torch.allclose(walked, cam, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    steps=st.one_of(st.none(), st.integers(1, 8)),
    restart=st.sampled_from([0.1, 0.4]),
)
@example(seed=0, steps=8, restart=0.0)
def test_values_stay_within_those_of_the_activation(seed, steps, restart):
    cam, maps = drawn(seed)
    offsets = half_disc(5.0)
    walked = random_walk(cam, edge_weights(maps, offsets), offsets, steps, rescale=False, restart=restart)
    assert (walked.amax((-2, -1)) <= cam.amax((-2, -1)) + 1e-9).all()
    assert (walked.amin((-2, -1)) >= cam.amin((-2, -1)) - 1e-9).all()


@pytest.mark.parametrize("axes", [(-1,), (-2,), (-2, -1)])
@pytest.mark.parametrize(("steps", "restart"), [(4, 0.0), (4, 0.3), (None, 0.3)])
def test_a_flipped_image_gives_the_flipped_result(axes, steps, restart):
    cam, maps = drawn(3)
    inside = parts(3, cam, "classes")
    offsets = half_disc(3.0)
    weights, mirrored = edge_weights(maps, offsets), edge_weights(maps.flip(axes), offsets)
    walked = random_walk(cam, weights, offsets, steps, True, inside, restart)
    flipped = random_walk(cam.flip(axes), mirrored, offsets, steps, True, inside.flip(axes), restart)
    assert torch.allclose(walked.flip(axes), flipped, atol=1e-9)
    assert not torch.allclose(walked, cam, atol=1e-2)


def test_a_prompt_without_trust_counts_nowhere_and_without_any_there_is_no_affinity():
    _, maps = drawn(1, prompts=3)
    offsets = half_disc(2.0)
    trust = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    weights = edge_weights(maps, offsets, trust=trust[..., None, None])
    assert torch.allclose(weights[:1], edge_weights(maps[:1, [0, 2]], offsets))
    assert weights[1].eq(0).all()


def test_activation_stops_where_a_mask_ends():
    maps = torch.zeros(1, 1, 16, 16)
    maps[..., 8:] = 1.0
    cam = torch.zeros(1, 1, 16, 16)
    cam[..., 4:8, 2:6] = 1.0
    offsets = half_disc(5.0)
    walked = random_walk(cam, edge_weights(maps, offsets), offsets, steps=20)
    assert walked[..., 8:].max() < 1e-3
    assert walked[..., :8].mean() > 0.5


def test_half_disc_holds_one_of_each_pair_closer_than_the_radius():
    offsets = half_disc(5.0)
    # 69 cells lie closer than 5 to a cell; without itself, half of them.
    assert len(offsets) == 34
    assert not {(-dy, -dx) for dy, dx in offsets} & set(offsets)
    assert (3, 4) not in offsets
    assert all((dy, dx) in offsets for dy, dx in [(0, 4), (4, 0), (2, -4), (4, -2)])


@pytest.mark.parametrize(("side", "size"), [(4, 256), (4, 128), (5, 100)])
def test_the_grid_is_symmetric_and_covers_the_frame(side, size):
    points = grid_points(side, size)
    assert points.shape == (side * side, 2)
    assert torch.allclose(points.sort(dim=0).values, (size - points).sort(dim=0).values)
    assert points.min() == pytest.approx(size / side / 2)
    # (x, y): x runs fastest.
    assert points[1, 0] > points[0, 0]
    assert points[1, 1] == points[0, 1]


def evidence(seed=0, trust=None, masks=None):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(2, 5, 8, 8, generator=generator)
    masks = logits.sigmoid() if masks is None else masks
    grey = torch.rand(2, 1, 8, 8, generator=generator)
    return CellEvidence(grey, 0.4, masks, trust, logits.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("name", AFFINITIES)
@pytest.mark.parametrize("trust", [None, torch.tensor([[1.0, 0.5, 0.0, 1.0, 0.2], [0.0] * 5])])
def test_every_affinity_gives_maps_and_their_weights(name, trust):
    given = evidence(trust=trust)
    maps, weight = AFFINITIES[name].maps(given)
    assert maps.shape[0] == 2
    assert maps.shape[2:] == (8, 8)
    assert weight is None or (weight.shape == maps.shape[:2] and (weight >= 0).all())
    edges = edge_weights(maps, half_disc(2.0), trust=None if weight is None else weight[..., None, None])
    assert ((edges >= 0) & (edges <= 1)).all()
    assert torch.equal(maps, AFFINITIES[name].maps(given)[0])  # pure: nothing is kept or changed


@pytest.mark.parametrize("name", [name for name, kind in AFFINITIES.items() if kind.prompted])
def test_every_prompted_affinity_forgets_the_order_of_the_prompts(name):
    order = torch.tensor([3, 0, 4, 1, 2])
    trust = torch.tensor([[1.0, 0.5, 0.0, 1.0, 0.2]]).expand(2, 5)
    one = evidence(trust=trust)
    other = one._replace(masks=one.masks[:, order], trust=trust[:, order])
    edges = []
    for some in (one, other):
        maps, weight = AFFINITIES[name].maps(some)
        edges.append(edge_weights(maps, half_disc(2.0), trust=None if weight is None else weight[..., None, None]))
    assert torch.allclose(*edges, atol=1e-6)


def test_summed_masks_are_bounded_where_summed_logits_are_not():
    # One of sixteen masks ends between two cells: e^(-4/16) at the published exponent and contrast, where
    # the sum of logits of -10 and 10 gives e^-80.
    one = torch.full((1, 16, 8, 8), -10.0)
    one[:, 0, :, 4:] = 10.0
    given = CellEvidence(torch.zeros(1, 1, 8, 8), 0.5, one.sigmoid(), None, one.sum(dim=1, keepdim=True))
    maps, weight = summed_masks(given)
    assert torch.allclose(maps, one.sigmoid().mean(1, keepdim=True), atol=1e-6)
    assert weight is None
    edges = {
        name: edge_weights(AFFINITIES[name].maps(given)[0], half_disc(2.0), contrast=1.0)[0, 0, 0, 3].item()
        for name in ("summed_masks", "summed")
    }
    assert edges["summed_masks"] == pytest.approx(math.exp(-0.25), rel=1e-3)
    assert edges["summed"] < 1e-30


def test_maps_are_averages_of_what_they_are_made_of():
    values = torch.rand(1, 2, 8, 8)
    assert torch.allclose(onto_map(values, 4)[0, 1, 0, 0], values[0, 1, :2, :2].mean())
    assert torch.equal(onto_map(values, 8), values)


def test_border_map_is_one_inside_and_less_at_a_border():
    maps = torch.zeros(1, 1, 16, 16)
    maps[..., 8:] = 1.0
    offsets = half_disc(3.0)
    borders = border_map(edge_weights(maps, offsets), offsets)
    assert borders[0, 8, 2] == pytest.approx(1)
    assert borders[0, 0, 0] == pytest.approx(1)
    assert borders[0, 8, 8] < 0.7
    inside = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    inside[..., :3] = False
    padded = border_map(edge_weights(maps, offsets), offsets, inside)
    assert padded[..., :3].eq(0).all()
    assert padded[0, 8, 5] == pytest.approx(1)
    assert padded[0, 8, 3] < 0.7
