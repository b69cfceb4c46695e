import math

import pytest
import torch

from weakmedsam.metrics.activation_place import SIDE, ActivationPlaces


def spots(places, side=SIDE, label=None):
    """A cell of activation a slice, of one class, and what goes with it."""
    cam = torch.zeros(len(places), 1, side, side)
    for number, (row, column) in enumerate(places):
        cam[number, 0, row, column] = 1
    label = torch.ones(len(places), 1) if label is None else label
    return cam, torch.ones(len(places), 1, side, side, dtype=torch.bool), label


def figures(*batch, names=("a",)):
    metric = ActivationPlaces(list(names))
    metric.update(*batch)
    return {name: float(value) for name, value in metric.compute().items()}


def test_one_place_in_all_slices_has_no_divergence():
    found = figures(*spots([(3, 4)] * 5))
    assert found["cam_divergence/a"] == found["cam_divergence"] == 0
    assert found["cam_area/a"] == pytest.approx(1 / SIDE**2)


def test_a_place_of_its_own_in_each_slice_has_divergence_one():
    assert figures(*spots([(n, 2 * n) for n in range(5)]))["cam_divergence/a"] == pytest.approx(1)


def test_the_divergence_is_that_worked_out_by_hand():
    """Two slices of two cells each, one of which they share: entropies log 2, of the mean 1.5 log 2."""
    cam, inside, label = spots([(0, 0), (0, 0)])
    cam[0, 0, 1, 1] = cam[1, 0, 2, 2] = 0.5
    assert figures(cam, inside, label)["cam_divergence/a"] == pytest.approx(1 - 1 / 1.5, abs=1e-6)


def test_a_broad_activation_everywhere_the_same_has_none_though_it_moves_a_little():
    cam = torch.zeros(4, 1, SIDE, SIDE)
    for number in range(4):
        cam[number, 0, number : number + 11] = 1
    found = figures(cam, torch.ones(4, 1, SIDE, SIDE, dtype=torch.bool), torch.ones(4, 1))
    assert found["cam_divergence/a"] < 0.05
    assert found["cam_area/a"] == pytest.approx(11 / 16)


def test_slices_without_the_class_and_without_activation_do_not_count():
    cam, inside, label = spots([(1, 1), (1, 1), (9, 9), (5, 5)], label=torch.tensor([[1.0], [1], [0], [1]]))
    cam[3] = 0
    found = figures(cam, inside, label)
    assert found["cam_divergence/a"] == 0
    assert found["cam_area/a"] == pytest.approx(1 / SIDE**2)


def test_a_class_in_no_slice_is_nan_and_not_in_the_mean():
    cam, inside, label = spots([(0, 0), (5, 5)])
    two = torch.cat([cam, cam], dim=1), inside, torch.cat([label, 0 * label], dim=1)
    found = figures(*two, names=("a", "b"))
    assert math.isnan(found["cam_divergence/b"])
    assert math.isnan(found["cam_area/b"])
    assert found["cam_divergence"] == found["cam_divergence/a"] == pytest.approx(1)


def test_the_area_is_a_share_of_the_scan_and_maps_may_have_any_size():
    cam, inside, label = spots([(0, 0), (0, 0)], side=64)
    cam[:, :, :16, :16] = 1
    inside[..., 32:] = False
    found = figures(cam, inside, label)
    assert found["cam_area/a"] == pytest.approx(256 / 2048)
    assert found["cam_divergence/a"] == pytest.approx(0, abs=1e-6)


def test_batches_and_ranks_add_up_and_what_is_reset_is_forgotten():
    generator = torch.Generator().manual_seed(0)
    cam, inside = torch.rand(9, 2, 8, 8, generator=generator), torch.ones(9, 1, 8, 8, dtype=torch.bool)
    label = (torch.rand(9, 2, generator=generator) < 0.6).float()
    whole = figures(cam, inside, label, names=("a", "b"))
    parts = [ActivationPlaces(["a", "b"]) for _ in range(2)]
    for metric, some in zip(parts, (slice(0, 4), slice(4, 9)), strict=True):
        metric.update(cam[some], inside[some], label[some])
    for name, reduction in parts[0]._reductions.items():  # what torchmetrics does with the states of all ranks
        setattr(parts[0], name, reduction(torch.stack([getattr(metric, name) for metric in parts])))
    assert {name: float(value) for name, value in parts[0].compute().items()} == pytest.approx(whole, abs=1e-6)
    parts[1].reset()
    parts[1].update(cam, inside, label)
    assert float(parts[1].compute()["cam_area"]) == pytest.approx(whole["cam_area"])
