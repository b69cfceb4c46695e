"""The threshold of refined predictions, chosen on volumes whose best one is known."""

import json

import pytest
import torch
from classifiers import module
from pam_settings import pam_settings

from weakmedsam.classification.module import Activation
from weakmedsam.contracts import Frame
from weakmedsam.pam.threshold_choice import ThresholdChoice, write_threshold

SIZE, CELLS = 32, 16
SETTINGS = pam_settings(affinity__kind="none", walk__map_size=CELLS, threshold__sigma=0.0, walk__rescale=False)
THRESHOLDS = (0.3, 0.5, 0.6, 0.7)


def volume(case="a", level=0.55):
    """Three slices of 24 x 32 pixels whose start falls from the left to the right; the target is where it is higher."""
    cam = torch.zeros(3, 2, CELLS, CELLS)
    cam[:, 0] = torch.linspace(1, 0, CELLS)
    start = torch.linspace(1, 0, CELLS).repeat_interleave(2).expand(3, SIZE, SIZE)
    truth = (start > level).long()
    batch = {
        "image": torch.zeros(3, 1, SIZE, SIZE),
        "case": case,
        "frame": Frame(24, SIZE, SIZE, SIZE),
        "spacing": (2.0, 1.0, 1.0),
        "box": torch.tensor([4, 28, 0, SIZE]),
        "mask": truth[:, 4:28],
    }
    return batch, Activation(torch.zeros(3, 2), cam, torch.zeros(3, 16, 8, 8))


def choose(*volumes, default=0.4):
    choice = ThresholdChoice(THRESHOLDS)
    for batch, activation in volumes:
        choice.add(module(pam=True), activation, batch, SETTINGS)
    return choice.choose(default)


@pytest.mark.parametrize(("level", "best"), [(0.32, 0.3), (0.52, 0.5), (0.69, 0.7)])
def test_the_threshold_at_which_targets_are_met_is_chosen(level, best):
    found = choose(volume(level=level))
    assert found["threshold"] == best
    assert found["dice"][f"{best:g}"] == max(found["dice"].values()) > 0.95
    assert found["cases"] == 1


def test_volumes_count_alike_whatever_their_size():
    small = volume("b", 0.52)
    small[0].update(image=small[0]["image"][:1], mask=small[0]["mask"][:1])
    one = Activation(*(part[:1] for part in small[1]))
    by_volume = choose(volume("a", 0.69), (small[0], one))["dice"]["0.5"]
    alone = [choose(volume("a", 0.69))["dice"]["0.5"], choose((small[0], one))["dice"]["0.5"]]
    assert by_volume == pytest.approx(sum(alone) / 2)


def test_a_target_in_slices_without_a_prediction_is_missed():
    batch, activation = volume(level=0.52)
    activation.cam[0] = 0
    assert choose((batch, activation))["dice"]["0.5"] == pytest.approx(0.8, abs=0.03)  # 2 of 3 slices


def test_of_equal_ones_the_nearest_to_the_default_is_taken():
    batch, activation = volume()
    batch["mask"][:] = 1
    activation.cam[:, 0] = 1  # every threshold cuts alike
    for default, nearest in ((0.3, 0.3), (0.45, 0.5), (0.9, 0.7)):
        assert choose((batch, activation), default=default)["threshold"] == nearest


def test_without_any_target_or_prediction_the_default_stays(tmp_path):
    batch, activation = volume()
    batch["mask"].zero_()
    activation.cam.zero_()
    found = choose((batch, activation), default=0.4)
    assert found["threshold"] == 0.4
    write_threshold(tmp_path, found)
    assert json.loads((tmp_path / "threshold.json").read_text())["threshold"] == 0.4
