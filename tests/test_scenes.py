import numpy as np
from scipy import ndimage

from weakmedsam.pretraining.scenes import SHAPES, SMALLEST_REGION, ask, draw_scenes


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


def test_each_answer_is_connected_and_holds_its_point():
    asked = ask(draw_scenes(8, 2), 3, 2)
    for points, masks in zip(asked.points.numpy(), asked.masks.numpy(), strict=True):
        for (x, y), mask in zip(points, masks, strict=True):
            assert mask[int(y), int(x)] == 1
            assert ndimage.label(mask)[1] == 1
            assert mask.sum() >= SMALLEST_REGION
