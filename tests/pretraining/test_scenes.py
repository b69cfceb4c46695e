import numpy as np
import torch
from scipy import ndimage

from weakmedsam.pretraining.scenes import (
    SHAPES,
    SMALLEST_REGION,
    VISIBLE,
    choose_intensities,
    draw_prompts,
    draw_scenes,
    turn_scenes,
)


def test_scenes_are_images_with_regions_and_follow_their_seed():
    scenes, again = draw_scenes(4, 5), draw_scenes(4, 5)
    assert scenes.image.shape == (4, 1, 128, 128)
    assert scenes.image.min() >= 0
    assert scenes.image.max() <= 1
    assert scenes.image.flatten(1).std(dim=1).min() > 0.01
    assert scenes.region.max() <= SHAPES
    assert (scenes.image == again.image).all()
    assert not (scenes.image == draw_scenes(4, 6).image).all()


def test_parts_lie_within_their_organ():
    scenes = draw_scenes(16, 1)
    for region, parent in zip(scenes.region.numpy(), scenes.parent.numpy(), strict=True):
        for part in np.unique(region):
            if parent[part]:
                grown = ndimage.binary_dilation(region == part)
                # Around a part is its organ, a later part of it, or a lesion on top; never bare body alone.
                assert parent[part] in parent[np.unique(region[grown])]


def test_regions_side_by_side_differ_visibly():
    region = draw_scenes(32, 9).region
    value = choose_intensities(torch.Generator().manual_seed(0), region)
    steps = torch.cat(
        [
            (value.gather(1, a.flatten(1)) - value.gather(1, b.flatten(1)))[(a != b).flatten(1)]
            for a, b in ((region[:, 1:], region[:, :-1]), (region[:, :, 1:], region[:, :, :-1]))
        ]
    ).abs()
    # Where many regions meet, no intensity may be far from all of theirs.
    assert (steps >= VISIBLE).float().mean() > 0.97
    assert steps.min() > 0.02


def test_each_answer_is_connected_and_holds_its_point():
    asked = draw_prompts(draw_scenes(8, 2), 3, 2)
    for points, masks in zip(asked.points.numpy(), asked.masks.numpy(), strict=True):
        for (x, y), mask in zip(points, masks, strict=True):
            assert mask[int(y), int(x)] == 1
            assert ndimage.label(mask)[1] == 1
            assert mask.sum() >= SMALLEST_REGION


def test_the_eight_ways_to_turn_are_all_different_and_move_image_and_regions_together():
    scenes = draw_scenes(1, 3)
    turned = [turn_scenes(scenes, way) for way in range(8)]
    assert (turned[0].image == scenes.image).all()
    for way, one in enumerate(turned):
        assert not any((one.image == other.image).all() for other in turned[:way])
        for region in scenes.region.unique():
            before, after = (
                scenes.image[0, 0][scenes.region[0] == region],
                one.image[0, 0][one.region[0] == region],
            )
            assert np.allclose(np.sort(before), np.sort(after))


def test_each_connected_piece_has_a_number_of_its_own():
    scenes = draw_scenes(4, 4)
    asked = draw_prompts(scenes, 1, 0)
    for region, pieces in zip(scenes.region.numpy(), asked.pieces.numpy(), strict=True):
        assert pieces.min() == 1
        for number in np.unique(pieces):
            here = pieces == number
            assert len(np.unique(region[here])) == 1
            assert ndimage.label(here)[1] == 1
            # It is whole: nothing of the same region touches it.
            assert (pieces[(region == region[here][0]) & ndimage.binary_dilation(here)] == number).all()
