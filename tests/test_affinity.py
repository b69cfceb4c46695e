import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weakmedsam.affinity import border_map, edge_weights, grid_points, half_disc, prompt_maps, random_walk
from weakmedsam.cam import min_max


def dense_walk(cam, maps, radius, beta, contrast, steps, rescale):
    """The walk with the N x N matrix written out, pair by pair."""
    height, width = maps.shape[-2:]
    flat = maps.flatten(2)
    difference = (flat[..., :, None] - flat[..., None, :]).abs().mean(dim=1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], dim=1).double()
    near = torch.cdist(place, place) < radius
    weights = torch.exp(-contrast * difference) ** beta * near
    transition = weights / weights.sum(dim=-1, keepdim=True)
    walked = cam.flatten(2)
    for _ in range(steps):
        walked = torch.einsum("bij,bcj->bci", transition, walked)
        if rescale:
            walked = min_max(walked.unflatten(2, (height, width))).flatten(2)
    return walked.unflatten(2, (height, width))


def drawn(seed, prompts=3, classes=2, height=7, width=9):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, prompts, height, width, generator=generator, dtype=torch.float64)
    cam = torch.rand(2, classes, height, width, generator=generator, dtype=torch.float64)
    return cam, maps


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    radius=st.sampled_from([1.5, 2.0, 3.0, 5.0]),
    beta=st.sampled_from([0.0, 1.0, 4.0]),
    contrast=st.sampled_from([0.5, 1.0, 10.0]),
    steps=st.integers(0, 6),
    rescale=st.booleans(),
    prompts=st.integers(1, 5),
)
def test_stencil_equals_the_dense_matrix(seed, radius, beta, contrast, steps, rescale, prompts):
    cam, maps = drawn(seed, prompts)
    offsets = half_disc(radius)
    walked = random_walk(cam, edge_weights(maps, offsets, beta, contrast), offsets, steps, rescale)
    expected = dense_walk(cam, maps, radius, beta, contrast, steps, rescale)
    assert torch.allclose(walked, expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), value=st.floats(0, 1), steps=st.integers(1, 8), rescale=st.booleans())
def test_a_constant_map_is_a_fixed_point(seed, value, steps, rescale):
    _, maps = drawn(seed)
    offsets = half_disc(3.0)
    cam = torch.full((2, 1, 7, 9), value, dtype=torch.float64)
    walked = random_walk(cam, edge_weights(maps, offsets), offsets, steps, rescale)
    assert torch.allclose(walked, cam, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 8))
def test_values_stay_within_those_of_the_activation(seed, steps):
    cam, maps = drawn(seed)
    offsets = half_disc(5.0)
    walked = random_walk(cam, edge_weights(maps, offsets), offsets, steps, rescale=False)
    assert (walked.amax((-2, -1)) <= cam.amax((-2, -1)) + 1e-9).all()
    assert (walked.amin((-2, -1)) >= cam.amin((-2, -1)) - 1e-9).all()


@pytest.mark.parametrize("axes", [(-1,), (-2,), (-2, -1)])
def test_a_flipped_image_gives_the_flipped_result(axes):
    cam, maps = drawn(3)
    offsets = half_disc(3.0)
    walked = random_walk(cam, edge_weights(maps, offsets), offsets)
    flipped = random_walk(cam.flip(axes), edge_weights(maps.flip(axes), offsets), offsets)
    assert torch.allclose(walked.flip(axes), flipped, atol=1e-9)


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


def test_published_form_sums_the_logits_into_one_map():
    logits = torch.randn(2, 4, 16, 16)
    maps = prompt_maps(logits, 16, "summed")
    assert torch.allclose(maps, logits.sum(1, keepdim=True), atol=1e-5)
    assert prompt_maps(logits, 8, "per_prompt").shape == (2, 4, 8, 8)


def test_border_map_is_one_inside_and_less_at_a_border():
    maps = torch.zeros(1, 1, 16, 16)
    maps[..., 8:] = 1.0
    offsets = half_disc(3.0)
    borders = border_map(edge_weights(maps, offsets), offsets)
    assert borders[0, 8, 2] == pytest.approx(1)
    assert borders[0, 0, 0] == pytest.approx(1)
    assert borders[0, 8, 8] < 0.7
