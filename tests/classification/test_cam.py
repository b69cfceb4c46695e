import pytest
import torch

from weakmedsam.classification.cam import (
    POOLINGS,
    Pooling,
    class_activation_map,
    mean_inside,
    mirror_axes,
    pool_evidence,
)
from weakmedsam.geometry import inside_box, inside_cells, min_max, min_max_inside


def test_min_max_spans_zero_to_one_and_keeps_order():
    maps = torch.tensor([[[[-3.0, 1.0], [5.0, 0.0]]]])
    assert torch.allclose(min_max(maps), torch.tensor([[[[0.0, 0.5], [1.0, 0.375]]]]))


def test_constant_map_becomes_zero_not_nan():
    assert min_max(torch.full((1, 1, 3, 3), 7.0)).eq(0).all()


def test_activation_is_the_heads_weights_at_every_cell():
    features = torch.zeros(1, 2, 2, 2)
    features[0, 0] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    features[0, 1] = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    cam = class_activation_map(features, torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]))
    assert cam.shape == (1, 3, 2, 2)
    assert cam[0, 0, 0, 0] == 1
    assert cam[0, 1, 1, 1] == 1
    # No ReLU: the most negative cell is 0, a cell without evidence lies between.
    assert torch.allclose(cam[0, 2], torch.tensor([[0.0, 1 / 3], [1 / 3, 1.0]]))


def test_cells_inside_are_those_whose_centre_is_on_the_scan():
    inside = inside_box(torch.tensor([[2, 6, 0, 8], [0, 8, 3, 4]]), 8, 4)
    assert inside[0, 0, :, 0].tolist() == [False, True, True, False]
    assert inside[0, 0, 1].all()
    assert inside[1, 0, 0].tolist() == [False, True, False, False]


def test_padding_neither_scales_a_map_nor_lights_up():
    maps = torch.tensor([[[[9.0, 1.0], [-9.0, 3.0]]]])
    inside = torch.tensor([[[[False, True], [False, True]]]])
    assert torch.equal(min_max_inside(maps, inside), torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]))


@pytest.mark.parametrize("kind", POOLINGS)
def test_no_evidence_outside_moves_a_logit(kind):
    pooling = Pooling(kind)
    evidence, inside = torch.randn(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    inside[0, :, 2:6], inside[1, :, :, :3] = True, True
    changed = torch.where(inside, evidence, 50.0)
    assert torch.allclose(pool_evidence(evidence, inside, pooling), pool_evidence(changed, inside, pooling))
    changed = torch.where(inside, 50.0, evidence)
    assert not torch.allclose(pool_evidence(evidence, inside, pooling), pool_evidence(changed, inside, pooling))


def test_log_sum_exp_lies_between_mean_and_maximum():
    evidence, inside = torch.randn(4, 2, 6, 6), torch.ones(4, 1, 6, 6, dtype=torch.bool)
    mean, most = evidence.mean((2, 3)), evidence.amax((2, 3))
    soft, sharp = (pool_evidence(evidence, inside, Pooling("log_sum_exp", sharpness=r)) for r in (0.01, 200.0))
    assert torch.allclose(soft, mean, atol=0.02)
    assert torch.allclose(sharp, most, atol=0.03)
    between = pool_evidence(evidence, inside, Pooling("log_sum_exp"))
    assert ((mean < between) & (between < most)).all()


def test_top_k_takes_what_there_is_where_the_scan_is_small():
    evidence, inside = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    inside[..., 0, :2] = True
    assert pool_evidence(evidence, inside, Pooling("top_k", top_share=0.5)).item() == 0.5
    assert pool_evidence(evidence, ~inside, Pooling("top_k", top_share=0.125)).item() == 14.5
    # A slice whose scan is thinner than a cell: all cells count, and nothing is NaN.
    assert pool_evidence(evidence, torch.zeros_like(inside), Pooling("average")).item() == 7.5


def test_cells_inside_a_turned_scan_are_more_than_half_of_it():
    scan = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    scan[..., :3, :] = True
    assert inside_cells(scan, 4)[0, 0, :, 0].tolist() == [True, False, False, False]


def test_views_are_all_ways_to_mirror_and_the_plain_one_comes_first():
    assert mirror_axes(columns=False, rows=False) == [()]
    assert mirror_axes(columns=True, rows=False) == [(), (-1,)]
    assert mirror_axes(columns=True, rows=True) == [(), (-1,), (-2,), (-2, -1)]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_is_that_over_the_scan(kind):
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(3, 5, 8, 8, generator=generator) + 30).to(kind).requires_grad_()
    inside = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    inside[0, :, 2:7, 1:4], inside[1] = True, True  # the third has no cell inside: all count
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mean_inside(features, inside)
    exact = features.detach().double()
    expected = torch.stack([exact[0, :, 2:7, 1:4].mean((1, 2)), *exact[1:].mean((2, 3))])
    assert found.dtype == torch.float32
    assert found.requires_grad
    assert torch.allclose(found.detach().double(), expected, atol=0.1 if kind == torch.bfloat16 else 1e-4)


def test_stripes_make_up_for_bfloat16():
    features = (torch.randn(4, 64, 16, 16, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
    inside = torch.ones(4, 1, 16, 16, dtype=torch.bool)
    exact = features.double().mean((2, 3))
    error = [float((mean_inside(features, inside, stripes) - exact).abs().mean()) for stripes in (1, 16)]
    assert error[1] < 0.5 * error[0]
