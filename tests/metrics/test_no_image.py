import math

import pytest
import torch

from weakmedsam.metrics.no_image import RADII, centred_ellipsoids, ellipsoid_dice
from weakmedsam.pam.tables import CaseDice, best_ellipsoids


def test_an_ellipsoid_is_as_long_as_its_labels_and_has_the_volume_of_one():
    label = torch.zeros(40, 2)
    label[10:30, 0] = 1
    drawn = centred_ellipsoids(label, 60, 80, 0.3)
    assert drawn.shape == (40, 2, 60, 80)
    assert drawn[:, 0].any(dim=(1, 2)).tolist() == [10 <= z < 30 for z in range(40)]
    assert not drawn[:, 1].any()
    wanted = 4 / 3 * math.pi * 10 * (0.3 * 60) * (0.3 * 80)
    assert int(drawn.sum()) == pytest.approx(wanted, rel=0.02)
    assert torch.equal(drawn, drawn.flip(0, 2, 3))  # in the middle: 10 slices without the class on either side


def test_slices_without_the_label_stay_empty():
    label = torch.ones(9, 1)
    label[4] = 0
    assert centred_ellipsoids(label, 16, 16, 0.5).flatten(1).any(dim=1).tolist() == [z != 4 for z in range(9)]


def test_dice_is_one_where_the_truth_is_the_ellipsoid_and_undefined_where_there_is_nothing():
    label = torch.zeros(12, 3)
    label[2:9, 0] = 1
    label[4:6, 2] = 1
    truth = centred_ellipsoids(label, 32, 32, RADII[2])[:, 0].long()
    dice = ellipsoid_dice(label, truth)
    assert dice.shape == (3, len(RADII))
    assert dice[0, 2] == 1
    assert (dice[0] <= 1).all()
    assert dice[1].isnan().all()
    assert (dice[2] == 0).all()


def test_the_radius_is_the_best_one_of_each_class():
    cases = [
        CaseDice("a", "x", 0.0, 0.0, (0.1, 0.6)), CaseDice("b", "x", 0.0, 0.0, (0.9, 0.2)),
        CaseDice("a", "y", 0.0, 0.0, (0.1, 0.3)), CaseDice("b", "y", 0.0, 0.0, (math.nan, math.nan)),
    ]  # fmt: skip
    assert best_ellipsoids(cases)[:3] == [0.1, 0.9, 0.3]
    assert math.isnan(best_ellipsoids(cases)[3])
