import inspect
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from pam_scene import SCENE, BoxBackbone, dice, drawn, scene
from pam_settings import pam_settings
from tiny import SIZE

from weakmedsam.callbacks import PromptAffinityMining
from weakmedsam.errors import ConfigError
from weakmedsam.pam import prompt_masks as answers
from weakmedsam.pam import refiner as refining
from weakmedsam.pam.config import Refinement, dotted
from weakmedsam.pam.refiner import PamBatch, find_levels, mine, refine, score_maps
from weakmedsam.pam.thresholding import threshold_scores

SMALL = pam_settings(walk__map_size=16, affinity__radius=2.0)


def test_a_perfect_activation_stays_and_an_absent_class_is_empty():
    backbone, slices = drawn(1)
    cam = torch.zeros(1, 2, 8, 8)
    cam[0, :, 2:5, 3:6] = 1.0
    unwalked = pam_settings(walk__map_size=16, affinity__radius=2.0, walk__steps=0, threshold__sigma=0.0)
    refined = refine(backbone, slices._replace(cam=cam, label=torch.tensor([[1.0, 0.0]])), unwalked, 4)
    inside = refined.after[0, 0] > 0.5
    assert inside[8:20, 12:24].float().mean() > 0.9
    assert inside.sum() < 1.3 * 144
    for scores in (refined.before, refined.after):
        assert scores[0, 1].eq(0).all()


def test_shapes_and_ranges_are_those_promised():
    refined = refine(*drawn(3), SMALL, 2)
    shapes = [(3, 2, 8, 8), (3, 16, 16), (3, 2, 16, 16), (3, 2, SIZE, SIZE), (3, 2, SIZE, SIZE)]
    for part, shape in zip(refined, shapes, strict=True):
        assert part.shape == shape
        assert part.min() >= 0
        assert part.max() <= 1 + 1e-6
        assert not part.requires_grad


def test_padding_around_the_scan_shows_no_activation_at_any_step():
    backbone, slices = drawn(1)
    slices.cam[..., :2] = 5.0
    refined = refine(backbone, slices._replace(box=torch.tensor([[0, SIZE, 8, SIZE]])), SMALL, 4)
    for maps in (refined.cam, refined.walked, refined.before, refined.after):
        padding = maps.shape[-1] // 4
        assert maps[..., :padding].eq(0).all()
        assert maps[..., padding:].max() > 0.9


def test_chunking_changes_nothing():
    backbone, slices = drawn(5)
    slices = slices._replace(label=torch.tensor([[1.0, 0.0]] * 2 + [[1.0, 1.0]] * 3))
    whole = refine(backbone, slices, SMALL, 5)
    for chunk in (1, 2):
        parts = refine(backbone, slices, SMALL, chunk)
        for a, b in zip(whole, parts, strict=True):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"affinity__kind": "both"},
            "affinity.kind: 'both' is unknown; choose one of per_prompt, with_intensity, summed",
        ),
        ({"prompts__grid": 0}, "prompts.grid is 0"),
        ({"walk__map_size": 1}, "walk.map_size is 1"),
        ({"affinity__radius": 1.0}, "affinity.radius is 1.0"),
        ({"affinity__radius": 65.0}, "affinity.radius is 65.0; it must be in"),
        ({"affinity__intensity_share": 1.1}, "affinity.intensity_share is 1.1; it must be in"),
        ({"affinity__beta": math.nan}, "affinity.beta is nan"),
        ({"affinity__contrast": -1.0}, "affinity.contrast is -1.0"),
        ({"walk__steps": -1}, "walk.steps is -1"),
        ({"threshold__value": 1.0}, "threshold.value is 1.0"),
        ({"threshold__sigma": -0.5}, "threshold.sigma is -0.5"),
        (
            {"prompts__placement": "corner"},
            "prompts.placement: 'corner' is unknown; choose one of grid, content, peaks",
        ),
        ({"walk__extent": "cube"}, "walk.extent: 'cube' is unknown; choose one of slice, volume"),
        ({"vote__when": "twice"}, "vote.when: 'twice' is unknown; choose one of none, alone, before, after"),
        ({"vote__normalise": "area"}, "vote.normalise: 'area' is unknown"),
        (
            {"threshold__competition": "all"},
            "threshold.competition: 'all' is unknown; choose one of none, share",
        ),
        ({"threshold__rule": "mean"}, "threshold.rule: 'mean' is unknown; choose one of fixed, profile"),
        ({"walk__restart": 1.0}, "walk.restart is 1.0"),
        ({"walk__steps": None}, "walk.steps is null, but without restart"),
        ({"prompts__content_share": 1.5}, "prompts.content_share is 1.5"),
        ({"prompts__peaks": 0}, "prompts.peaks is 0"),
        ({"prompts__min_quality": -0.1}, "prompts.min_quality is -0.1"),
        ({"walk__slice_reach": 0}, "walk.slice_reach is 0"),
        ({"vote__power": -1.0}, "vote.power is -1.0"),
        ({"threshold__background_power": 0.0}, "threshold.background_power is 0.0"),
        (
            {"walk__extent": "volume", "prompts__placement": "peaks"},
            "walk.extent: volume compares what a prompt says",
        ),
    ],
)
def test_bad_settings_are_refused_by_their_key(settings, message):
    with pytest.raises(ConfigError, match=rf"model\.pam\.{message}"):
        pam_settings(**settings)


def test_the_callback_takes_every_group_whole_with_the_same_defaults():
    arguments = inspect.signature(PromptAffinityMining).parameters
    groups = {field.name: getattr(Refinement(), field.name) for field in fields(Refinement)}
    assert {name: arguments[name].default for name in groups} == groups
    assert PromptAffinityMining().settings == Refinement()


def test_every_setting_can_be_changed_by_its_dotted_key():
    changed = {
        "prompts.grid": 6, "prompts.placement": "content", "affinity.kind": "intensity", "walk.steps": None,
        "walk.restart": 0.1, "walk.extent": "volume", "occlusion.weight": 0.5, "vote.when": "after",
        "threshold.rule": "profile", "views.stability": True,
    }  # fmt: skip
    settings = Refinement().changed(changed)
    assert {key: dotted(settings)[key] for key in changed} == changed
    same = {key: value for key, value in dotted(Refinement()).items() if key not in changed}
    assert {key: dotted(settings)[key] for key in same} == same
    with pytest.raises(ConfigError, match=r"walk\.stepps is no setting of PAM; there are .*walk\.steps"):
        settings.changed({"walk.stepps": 3})
    with pytest.raises(
        ConfigError, match=r"radius is 40\.0; it must be above 1 and at most model\.pam\.walk\.map_size, 32"
    ):
        settings.changed({"affinity.radius": 40.0, "walk.map_size": 32})


def test_every_affinity_fills_the_box_and_stops_at_its_border():
    slices = scene()
    truth = slices.embedding[0, 0] == 1
    start = dice(slices.cam[0, 0] > 0.5, truth)
    assert start < 0.6
    for changes in (
        {"affinity__kind": "per_prompt"},
        {"affinity__kind": "with_intensity"},
        {"affinity__kind": "summed_masks"},
        {"affinity__kind": "summed", "affinity__contrast": 1.0},
        {"affinity__kind": "intensity"},
        {"affinity__kind": "per_prompt", "walk__steps": None, "walk__restart": 0.05},
        {"affinity__kind": "per_prompt", "prompts__placement": "content"},
        {"affinity__kind": "per_prompt", "prompts__placement": "peaks"},
        {"affinity__kind": "per_prompt", "prompts__min_quality": 0.5, "prompts__weigh_by_quality": True},
        {"affinity__kind": "intensity", "vote__when": "before"},
        {"affinity__kind": "per_prompt", "vote__when": "after"},
        {"affinity__kind": "none", "vote__when": "alone"},
        {"vote__when": "alone", "vote__normalise": "coverage"},
    ):
        after = refine(BoxBackbone(), slices, pam_settings(SCENE, **changes), 4).after
        assert dice(after[0, 0] > 0.5, truth) > start + 0.2, changes
        assert (after[0, 0] > 0.5)[~truth].float().mean() < 0.02, changes


def test_without_an_affinity_or_a_vote_nothing_is_asked_and_nothing_moves():
    backbone, slices = BoxBackbone(), scene()
    refined = refine(backbone, slices, pam_settings(SCENE, affinity__kind="none"), 4)
    assert torch.equal(refined.after, refined.before)
    refine(backbone, slices, pam_settings(SCENE, affinity__kind="intensity"), 4)
    assert backbone.asked == 0


def test_content_and_peaks_ask_less_than_the_grid():
    asked = {}
    for prompts in ("grid", "content", "peaks"):
        backbone = BoxBackbone()
        refine(backbone, scene(), pam_settings(SCENE, prompts__placement=prompts, prompts__peaks=3), 4)
        asked[prompts] = backbone.asked
    assert asked == {"grid": 64, "content": 15, "peaks": 6}


def test_masks_of_low_predicted_quality_count_nowhere():
    slices = scene()
    bad = BoxBackbone(torch.tensor([0.9, 0.9, 0.2]))  # of ground, first and second box
    for affinity in ("per_prompt", "summed_masks", "summed"):
        settings = pam_settings(
            SCENE,
            affinity__kind=affinity,
            affinity__contrast=1.0,
            prompts__placement="peaks",
            prompts__min_quality=0.5,
        )
        one = mine(bad, slices._replace(label=torch.tensor([[0.0, 1.0]])), settings, 4)
        # Prompts of the second class all fall into the second box: none is left, so nothing moves.
        assert torch.equal(one.walked[0, 1], one.start[0, 1])
    voted = mine(bad, slices, pam_settings(SCENE, vote__when="alone", prompts__min_quality=0.5), 4).walked
    assert voted[0, 1][slices.embedding[0, 0] == 2].max() < 1e-3
    weighed = mine(bad, slices, pam_settings(SCENE, vote__when="alone", prompts__weigh_by_quality=True), 4).walked
    assert weighed[0, 1][slices.embedding[0, 0] == 2].min() > 0.9


def test_a_fine_grid_is_decoded_in_pieces_of_bounded_size(monkeypatch):
    monkeypatch.setattr(answers, "DECODED_AT_ONCE", 24)
    settings = pam_settings(SCENE, prompts__grid=12, affinity__kind="summed", affinity__contrast=1.0)
    pieces, whole = BoxBackbone(), BoxBackbone()
    some = mine(pieces, scene(2), settings, 2).walked
    assert pieces.largest <= 24
    monkeypatch.setattr(answers, "DECODED_AT_ONCE", 10**6)
    assert torch.allclose(some, mine(whole, scene(2), settings, 2).walked, atol=1e-4)
    assert pieces.asked == whole.asked == 288
    monkeypatch.setattr(refining, "MASKS", 150)
    single = BoxBackbone()
    mine(single, scene(2), settings, 2)
    assert single.largest == 144


def test_classes_that_overlap_share_a_pixel_with_the_background():
    slices = scene()
    slices.cam[0, 1] = 0.6 * slices.cam[0, 0]
    settings = pam_settings(SCENE, walk__steps=0, threshold__competition="share")
    both = refine(BoxBackbone(), slices, settings, 4).before[0]
    inside = slices.cam[0, 0] == 1
    # min-max brings each map to 1: of two full scores and no background, each has a half.
    assert torch.allclose(both[:, inside], torch.tensor(0.5))
    alone = slices._replace(label=torch.tensor([[1.0, 0.0]]))
    single = refine(BoxBackbone(), alone, settings, 4).before[0]
    plain = refine(BoxBackbone(), alone, pam_settings(settings, threshold__competition="none"), 4).before[0]
    assert torch.allclose(single, plain, atol=1e-6)


def test_only_slices_with_the_class_have_thresholds_of_their_own():
    slices = scene(5)
    slices.label[:, 0] = torch.tensor([1.0, 1, 1, 1, 0])
    slices.label[:, 1] = 0
    settings = pam_settings(SCENE, walk__steps=0, threshold__rule="profile")
    mined = mine(BoxBackbone(), slices, settings, 4)
    levels = find_levels(mined, slices, settings, torch.arange(1, 6), 7)
    assert levels[:4, 0].isfinite().all()
    assert levels[4, 0].isnan()
    assert levels[:, 1].isnan().all()
    assert find_levels(mined, slices, SCENE, torch.arange(1, 6), 7) is None


def volume(thick=0.3, **changes):
    """Five slices with the boxes; only the middle one is activated in the first box. Present: all."""
    slices = scene(5)
    ground = torch.zeros_like(slices.cam[:1, 0])
    slices.cam[[0, 1, 3, 4], 0] = 0.3 * torch.rand(4, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    slices.cam[[0, 1, 3, 4], 0, 0, 0] = ground[:, 0, 0] + 0.31
    settings = pam_settings(SCENE, walk__extent="volume", affinity__radius=2.5, **changes)
    return mine(BoxBackbone(), slices, settings, 2, torch.arange(5), thick), slices, settings


def test_a_volume_is_walked_as_one_and_tells_apart_what_a_slice_cannot():
    mined, slices, settings = volume(walk__steps=6)
    single = mine(BoxBackbone(), slices, pam_settings(settings, walk__extent="slice"), 2)
    truth = slices.embedding[:, 0] == 1
    contrast = []
    for maps in (single.walked, mined.walked):
        side = maps[1, 0]
        contrast.append(float(side[truth[1]].mean() - side[~truth[1]].mean()))
    assert contrast[1] > contrast[0] + 0.2
    assert mined.walked.shape == single.walked.shape
    assert torch.allclose(mined.affinity, single.affinity, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"affinity__kind": "intensity"},
        {"vote__when": "before"},
        {"vote__when": "after"},
        {"prompts__placement": "content"},
    ],
)
def test_in_a_volume_chunks_change_nothing_and_far_slices_are_walked_by_themselves(changes):
    mined, slices, settings = volume(**changes)
    whole = mine(BoxBackbone(), slices, settings, 5, torch.arange(5), 0.3)
    for a, b in zip(mined, whole, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    apart = mine(BoxBackbone(), slices, settings, 2, torch.arange(5), 100.0).walked
    single = mine(BoxBackbone(), slices, pam_settings(settings, walk__extent="slice"), 2).walked
    assert torch.allclose(apart, single, atol=1e-5)
    gaps = mine(BoxBackbone(), slices, settings, 2, torch.tensor([0, 2, 4, 6, 8]), 0.3).walked
    assert torch.allclose(gaps, single, atol=1e-5)
    assert not torch.allclose(mined.walked, single, atol=1e-2)


def test_a_slice_without_the_class_takes_no_part_in_its_walk():
    _, slices, settings = volume()
    slices.label[2, 0] = 0
    gone = mine(BoxBackbone(), slices, settings, 2, torch.arange(5), 0.3)
    assert gone.walked[2, 0].eq(0).all()
    assert gone.walked[2, 1].max() > 0.9
    # What is activated there reaches no other slice.
    other = slices._replace(cam=slices.cam.clone())
    other.cam[2, 0] = torch.rand(SIZE, SIZE)
    again = mine(BoxBackbone(), other, settings, 2, torch.arange(5), 0.3)
    assert torch.equal(again.walked, gone.walked)
    scores = score_maps(gone, slices, settings, None).after
    assert scores[2, 0].eq(0).all()


def test_confidence_is_that_of_the_own_threshold():
    slices = scene()
    settings = pam_settings(SCENE, walk__steps=0)
    mined = mine(BoxBackbone(), slices, settings, 4)
    levels = torch.full_like(slices.label, 0.3)
    raw = score_maps(mined, slices, settings, None).after[:, :1]
    own = score_maps(mined, slices, settings, levels).after[:, :1]
    label, confidence = threshold_scores(own, settings.threshold.value)
    expected = threshold_scores(raw, 0.3)
    assert torch.equal(label, expected[0])
    assert torch.allclose(confidence, expected[1], atol=1e-5)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"vote__when": "before", "threshold__competition": "share"}, {"prompts__placement": "content"}],
)
def test_a_mirrored_slice_is_refined_to_the_mirror_image(axis, changes):
    slices = scene()
    slices.cam.copy_(F.avg_pool2d(torch.rand(1, 2, SIZE + 2, SIZE + 2), 3, 1))
    settings = pam_settings(SCENE, **changes)
    after = refine(BoxBackbone(), slices, settings, 4).after
    turned = PamBatch(slices.image.flip(axis), slices.cam.flip(axis), slices.embedding.flip(axis), *slices[3:])
    mirrored = refine(BoxBackbone(), turned, settings, 4).after
    assert torch.allclose(mirrored.flip(axis), after, atol=1e-4)


def test_with_intensity_sees_borders_that_only_one_of_the_two_sees():
    slices = scene()
    truth = slices.embedding[0, 0] == 1
    # Half by masks, half by grey values: twice the contrast of each alone, both borders stand.
    settings = pam_settings(SCENE, affinity__kind="with_intensity", affinity__contrast=20.0)
    dark = slices._replace(image=torch.zeros_like(slices.image))
    blind = slices._replace(embedding=torch.zeros_like(slices.embedding))
    for case in (dark, blind):
        after = refine(BoxBackbone(), case, settings, 4).after[0, 0]
        assert dice(after > 0.5, truth) > 0.75
        assert (after > 0.5)[~truth].float().mean() < 0.02
    # A grey value weighs as much as all masks together, however many there are.
    for grid in (4, 8):
        walked = mine(BoxBackbone(), slices, pam_settings(settings, prompts__grid=grid), 4).affinity
        assert torch.allclose(walked, mine(BoxBackbone(), slices, settings, 4).affinity, atol=0.05)
