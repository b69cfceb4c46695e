"""Pseudo-labels and scores of a volume; the activation is the image itself, so that all is known."""

import pytest
import torch
import torch.nn.functional as F
from classifiers import module
from pam_settings import pam_settings

from weakmedsam.classification.module import Activation
from weakmedsam.contracts import Frame
from weakmedsam.pam.volumes import label_volume, refine_volume, score_volume, segment_volume

SIZE = 32
SETTINGS = pam_settings(
    affinity__kind="intensity",
    walk__map_size=16,
    affinity__radius=2.0,
    threshold__sigma=0.0,
    views__stability=True,
)


def volume():
    """Four slices of 24 x 32 pixels in their frame; a bright box off the middle in all but the first."""
    image = torch.full((4, 1, SIZE, SIZE), 0.1)
    image[1:, :, 8:16, 4:14] = 0.9
    mask = torch.zeros(4, SIZE, SIZE, dtype=torch.int64)
    mask[1:, 8:16, 4:14] = 1
    label = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    return {
        "image": image,
        "label": label,
        "case": "a",
        "index": 0,
        "frame": Frame(24, SIZE, SIZE, SIZE),
        "spacing": (2.0, 1.0, 1.0),
        "box": torch.tensor([4, 28, 0, SIZE]),
        "mask": mask[:, 4:28],
    }


def look(batch, leaning=0.0):
    """A classifier that sees brightness, and what lies on the left less by ``leaning``."""
    cam = F.adaptive_avg_pool2d(batch["image"], 16).expand(-1, 2, -1, -1)
    cam = cam * (1 - leaning * torch.linspace(1, 0, 16))
    return Activation(torch.zeros(len(cam), 2), cam, torch.zeros(len(cam), 16, 8, 8))


def test_a_network_that_knows_no_sides_gives_stable_labels():
    batch, model = volume(), module(pam=True)
    labels, row = label_volume(model, look(batch), batch, SETTINGS, look)
    assert labels.stability[1:, 0].eq(1).all()
    assert labels.stability.isnan().sum() == 5
    for z in range(1, len(labels.label)):
        own = labels.confidence[z][labels.label[z] == 1]
        assert labels.quality[z, 0] == pytest.approx(float(own.mean()), abs=1e-5)
    assert (labels.label[1:, 8:16, 4:14] == 1).all()
    assert labels.label[0].eq(0).all()
    assert row.title == "a slice 1\nlesion"
    assert (row.unrefined == 1).sum() > 50
    assert row.start == "class activation"
    model.start = lambda image: image
    assert label_volume(model, look(batch), batch, SETTINGS, look)[1].start == "prediction"


def test_a_network_that_knows_sides_does_not():
    batch, model = volume(), module(pam=True)
    batch["image"][1:, :, 8:16, 18:28] = 0.8

    def leaning(part):
        return look(part, 0.9)

    labels, _ = label_volume(model, leaning(batch), batch, SETTINGS, leaning)
    assert labels.stability[1:, 0].max() < 0.9
    plain, _ = label_volume(model, leaning(batch), batch, pam_settings(SETTINGS, views__stability=False), leaning)
    assert torch.allclose(labels.quality[1:, 0], plain.quality[1:, 0] * labels.stability[1:, 0])


def test_slices_of_both_kinds_are_scored_on_the_scans_own_grid():
    batch, model = volume(), module(pam=True)
    found = score_volume(model, look(batch), batch, SETTINGS)
    assert [case.class_name for case in found] == ["lesion", "cyst"]
    assert found[0].cam_dice > 0.95
    assert found[0].pam_dice > 0.9
    batch["mask"][0, 2:12, 4:14] = 1  # in a slice without a label: missed
    assert score_volume(model, look(batch), batch, SETTINGS)[0].pam_dice < found[0].pam_dice - 0.1


@pytest.mark.parametrize("walk", ["slice", "volume"])
def test_a_volume_comes_in_pieces(walk):
    batch, model = volume(), module(pam=True)
    model.slices_per_step = 2
    settings = pam_settings(affinity__kind="intensity", walk__map_size=16, affinity__radius=2.0, walk__extent=walk)
    rows = torch.tensor([1, 2, 3])
    seen = Activation(*(part[rows] for part in look(batch)))
    pieces = list(refine_volume(model, seen, batch, settings))
    assert [piece.tolist() for piece, _ in pieces] == [[1, 2], [3]]
    assert all(refined.after.shape == (len(piece), 2, SIZE, SIZE) for piece, refined in pieces)


def test_a_volume_without_any_class_is_background_for_sure():
    batch, model = volume(), module(pam=True)
    batch["label"].zero_()
    labels, row = label_volume(model, look(batch), batch, SETTINGS, look)
    assert row is None
    assert labels.label.eq(0).all()
    assert labels.confidence.eq(1).all()
    assert labels.quality.isnan().all()
    assert labels.stability.isnan().all()


PLAIN = pam_settings(affinity__kind="none", walk__map_size=16, threshold__sigma=0.0, walk__rescale=False)


def faint(height, cells=16):
    """A box of that height in all four slices, as a network would say it."""
    cam = torch.zeros(4, 2, cells, cells)
    cam[:, 0, 4:8, 2:7] = height
    return Activation(torch.zeros(4, 2), cam, torch.zeros(4, 16, 8, 8))


@pytest.mark.parametrize(("rescale", "height"), [(False, 0.3), (True, 1.0)])
def test_what_is_not_scaled_keeps_its_height(rescale, height):
    batch, model = volume(), module(pam=True)
    seen = faint(0.3).rows(batch["label"].any(dim=1).nonzero().flatten())
    scores = [part.after for _, part in refine_volume(model, seen, batch, pam_settings(PLAIN, walk__rescale=rescale))]
    assert torch.cat(scores).amax((1, 2, 3)).allclose(torch.tensor(height))


def test_a_slice_of_which_the_start_is_not_sure_stays_empty_beside_one_of_which_it_is():
    batch, model = volume(), module(pam=True)
    seen, settings = (
        faint(0.9),
        pam_settings(
            PLAIN,
            affinity__kind="intensity",
            walk__extent="volume",
            affinity__radius=2.0,
            walk__steps=8,
            threshold__value=0.4,
        ),
    )
    seen.cam[1] *= 0.5  # above the threshold; the label says that the class is there
    ids = segment_volume(model, seen, batch, settings)
    assert ids.shape == (4, 24, SIZE)
    assert ids[1].eq(0).all()
    assert (ids[2:, 4:12, 4:14] == 1).float().mean() > 0.9
    assert segment_volume(model, faint(0.0), batch, settings).eq(0).all()


def test_what_the_classifier_rules_out_stays_empty():
    batch, model = volume(), module(pam=True)
    settings = pam_settings(PLAIN, threshold__value=0.4)
    seen = faint(0.9)
    seen.logits[1, 0] = -8.0  # the region is a sixth of the frame
    assert segment_volume(model, seen, batch, settings).flatten(1).any(1).all()  # nothing has been validated
    model.operating_points[0] = 0.5
    ids = segment_volume(model, seen, batch, settings)
    assert ids.flatten(1).any(1).tolist() == [True, False, True, True]
    model.operating_points[0] = 1e-4
    assert segment_volume(model, seen, batch, settings)[1].any()


def test_padding_does_not_say_what_is_present():
    batch, model = volume(), module(pam=True)
    seen = faint(0.45)
    seen.cam[:, :, 0, 0] = 0.9  # four pixels above the scan
    assert segment_volume(model, seen, batch, pam_settings(PLAIN, threshold__value=0.4)).eq(0).all()
    seen.cam[2] *= 2
    ids = segment_volume(model, seen, batch, pam_settings(PLAIN, threshold__value=0.4))
    assert ids.flatten(1).any(1).tolist() == [False, False, True, False]
