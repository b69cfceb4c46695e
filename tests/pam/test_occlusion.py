import pytest
import torch
from classifiers import module
from hypothesis import given, settings
from hypothesis import strategies as st
from pam_scene import SCENE, BoxBackbone, dice, scene
from pam_settings import pam_settings
from tiny import SIZE

from weakmedsam.classification.cam import Pooling
from weakmedsam.errors import ConfigError
from weakmedsam.pam import occlusion as occlusion
from weakmedsam.pam.occlusion import (
    drops_under_occlusion,
    logit_drops,
    paint_over,
    same_as,
    smallest_discriminative,
    with_discriminative_mask,
)
from weakmedsam.pam.refiner import mine, refine

BOX = torch.tensor([[0, SIZE, 0, SIZE]])
EVERYWHERE = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)


def mask(top, bottom, left, right):
    """(1, 1, SIZE, SIZE)."""
    one = torch.zeros(1, 1, SIZE, SIZE)
    one[..., top:bottom, left:right] = 1
    return one


def grey_and_bright(image, box):
    """A classifier: logit of class 0 is how many grey pixels there are, of class 1 how many bright ones."""
    grey = ((image > 0.4) & (image < 0.6)).flatten(1).sum(1)
    return torch.stack([grey, (image > 0.9).flatten(1).sum(1)], dim=1).float()


def test_a_mask_takes_the_colour_around_it_and_the_rest_of_the_image_stays():
    image = torch.full((1, 1, SIZE, SIZE), 0.2)
    image[..., 10:16, 10:16] = 0.9
    image[..., 28:, :] = 1.0  # too far to be around it
    painted = paint_over(image, mask(10, 16, 10, 16), EVERYWHERE)
    assert torch.allclose(painted[..., 11:15, 11:15], torch.tensor(0.2), atol=0.01)
    assert painted.max(dim=-1).values[..., 10:16].max() < 0.3  # a soft edge leaves a trace of the border
    assert torch.equal(painted[..., 24:, :], image[..., 24:, :])
    assert torch.equal(painted[..., :4], image[..., :4])


def test_padding_gives_no_colour_and_what_covers_the_scan_takes_the_scans_mean():
    image = torch.zeros(1, 1, SIZE, SIZE)
    image[..., 8:24] = torch.linspace(0.4, 0.8, 16)
    inside = torch.zeros_like(EVERYWHERE)
    inside[..., 8:24] = True
    beside = paint_over(image, mask(12, 20, 8, 12), inside)  # touches the padding
    assert beside[0, 0, 12:20, 8:12].min() > 0.39
    whole = paint_over(image, inside.float(), inside)
    assert torch.allclose(whole[..., 11:21], torch.tensor(0.6), atol=0.01)


def test_prompts_with_one_answer_are_one():
    a, b = mask(0, 10, 0, 10), mask(0, 10, 0, 20)
    nearly_a = mask(0, 10, 0, 10)
    nearly_a[..., 0, 0] = 0
    nothing = torch.zeros_like(a)
    masks = torch.cat([b, a, nearly_a, nothing, b * 0.9, nothing], dim=1)
    assert same_as(masks).tolist() == [[0, 1, 1, 3, 0, 3]]
    both = torch.cat([masks, masks.flip(1)])
    assert same_as(both).tolist() == [[0, 1, 1, 3, 0, 3], [0, 1, 0, 3, 3, 1]]


def test_two_faint_masks_are_not_one():
    faint = torch.cat([mask(0, 10, 0, 10), mask(20, 30, 20, 30)], dim=1) * 0.4
    assert same_as(faint).tolist() == [[0, 1]]


def test_being_the_same_is_not_handed_on():
    # Each is like the one before it, the third not like the first.
    masks = torch.cat([mask(0, 20, 0, 20), mask(0, 20, 0, 21), mask(0, 20, 0, 22), mask(0, 20, 0, 23)], dim=1)
    assert same_as(masks, 0.93).tolist() == [[0, 0, 2, 2]]


def test_what_a_mask_takes_is_counted_against_the_most():
    image = torch.zeros(1, 1, SIZE, SIZE)
    image[..., 4:10, 4:10] = 0.5
    image[..., 20:26, 20:28] = 1.0
    masks = torch.cat([mask(4, 10, 4, 7), mask(4, 10, 4, 10), mask(20, 26, 20, 28), mask(14, 18, 14, 18)], dim=1)
    drops = logit_drops(grey_and_bright, image, BOX, masks)
    assert drops.shape == (1, 2, 4)
    assert drops[0, 0, 1] == 1
    assert 0.3 < drops[0, 0, 0] < 0.9
    assert drops[0, 0, 2:].tolist() == [0, 0]
    assert drops[0, 1].tolist() == [0, 0, 1, 0]
    nothing = logit_drops(grey_and_bright, image * 0, BOX, masks)
    assert nothing.eq(0).all()


def test_slices_masks_and_pieces_are_asked_each_by_itself_and_the_same_mask_once(monkeypatch):
    torch.manual_seed(0)
    image, masks = torch.rand(3, 1, SIZE, SIZE), torch.rand(3, 5, 8, 8)
    masks[:, 3] = masks[:, 1]
    box = BOX.expand(3, 4)
    asked = []

    def evidence(image, box):
        assert len(image) == len(box)
        asked.append(len(image))
        return torch.stack([image.flatten(1).std(1), image[..., :9].flatten(1).std(1)], dim=1)

    together = logit_drops(evidence, image, box, masks)
    assert sum(asked) == 3 + 3 * 4
    assert torch.equal(together[..., 3], together[..., 1])
    alone = [logit_drops(evidence, image[b : b + 1], box[:1], masks[b : b + 1]) for b in range(3)]
    assert torch.allclose(torch.cat(alone), together, atol=1e-5)
    monkeypatch.setattr(occlusion, "PAINTED_AT_ONCE", 2)
    assert torch.allclose(logit_drops(evidence, image, box, masks), together, atol=1e-5)


def test_the_smallest_of_those_that_tell_enough_is_taken():
    masks = torch.cat([mask(0, 20, 0, 20), mask(0, 10, 0, 10), mask(0, 4, 0, 4)], dim=1)
    drops = torch.tensor([[[1.0, 0.8, 0.3], [0.0, 0.0, 0.0]]])
    for share, chosen in ((0.9, 0), (0.7, 1), (0.2, 2)):
        found = smallest_discriminative(masks, drops, share)
        assert torch.equal(found[0, 0], masks[0, chosen])
        assert found[0, 1].eq(0).all()
    untrusted = smallest_discriminative(masks, drops, 0.7, torch.tensor([[0.6, 0.0, 0.5]]))
    assert torch.equal(untrusted[0, 0], masks[0, 0])
    assert smallest_discriminative(masks, drops, 0.7, torch.zeros(1, 3)).eq(0).all()
    assert torch.equal(smallest_discriminative(masks * 0.5, drops, 0.7)[0, 0], masks[0, 1])


def test_activation_and_mask_stand_side_by_side_or_the_activation_alone():
    maps = torch.cat([mask(0, 10, 0, 10), mask(0, 10, 0, 10)], dim=1)
    discriminative = torch.cat([mask(0, 10, 5, 15), torch.zeros(1, 1, SIZE, SIZE)], dim=1)
    both = with_discriminative_mask(maps, discriminative, 0.25)[0]
    assert both[0, 5, [2, 7, 12]].tolist() == pytest.approx([0.75, 1.0, 0.25])
    assert torch.equal(both[1], maps[0, 1])
    assert torch.equal(with_discriminative_mask(maps, discriminative, 1.0)[0, 0], discriminative[0, 0])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), axis=st.sampled_from([-1, -2]))
def test_a_mirrored_image_loses_the_same(seed, axis):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 1, 24, 24, generator=generator)
    masks = torch.rand(1, 4, 24, 24, generator=generator)
    box = torch.tensor([[0, 24, 0, 24]])

    def evidence(image, box):
        return image.flatten(1).square().mean(1, keepdim=True)

    drops = logit_drops(evidence, image, box, masks)
    assert 0 <= drops.min() <= drops.max() <= 1
    mirrored = logit_drops(evidence, image.flip(axis), box, masks.flip(axis))
    assert torch.allclose(mirrored, drops, atol=1e-4)


# Within PAM

OCCLUDING = {"affinity__kind": "per_prompt", "occlusion__weight": 0.5}


def beside():
    """The scene of two boxes, with activation beside its box: to the left of the first, below the second."""
    slices = scene()
    cam = torch.zeros_like(slices.cam)
    cam[:, 0, 9:15, 2:9] = 1.0
    cam[:, 1, 18:26, 18:26] = 1.0
    return slices._replace(cam=cam)


@pytest.mark.parametrize("walk", ["slice", "volume"])
def test_an_activation_beside_its_target_is_brought_onto_it(walk):
    slices = beside()
    drops = drops_under_occlusion(grey_and_bright)
    plain, moved = (
        mine(BoxBackbone(), slices, pam_settings(SCENE, **{**OCCLUDING, "occlusion__weight": e, "walk__extent": walk}),
             4, thickness=1.0, drops=drops).walked
        for e in (0.0, 0.5)
    )  # fmt: skip
    for c in (0, 1):
        truth = slices.embedding[0, 0] == c + 1
        assert dice(plain[0, c] > 0.5, truth) < 0.5
        assert dice(moved[0, c] > 0.5, truth) > 0.8


@pytest.mark.parametrize("affinity", ["intensity", "none", "summed_masks", "with_intensity"])
def test_masks_are_asked_for_whatever_pixels_are_compared_by(affinity):
    slices = beside()
    settings_ = pam_settings(SCENE, **{"affinity__kind": affinity, "occlusion__weight": 0.9})
    after = refine(BoxBackbone(), slices, settings_, 4, drops_under_occlusion(grey_and_bright)).after
    assert dice(after[0, 0] > 0.5, slices.embedding[0, 0] == 1) > 0.8


@pytest.mark.parametrize("vote", ["alone", "before", "after"])
def test_a_vote_goes_by_what_occlusion_found(vote):
    slices = beside()
    voted = {**OCCLUDING, "vote__when": vote, "vote__power": 8.0}
    after = refine(BoxBackbone(), slices, pam_settings(SCENE, **voted), 4, drops_under_occlusion(grey_and_bright)).after
    assert dice(after[0, 0] > 0.5, slices.embedding[0, 0] == 1) > 0.8


def test_a_mask_that_is_not_trusted_is_not_taken():
    """The first kind of box answers with a low quality: only the second class can be moved."""
    slices = beside()
    backbone = BoxBackbone(torch.tensor([0.9, 0.2, 0.9]))
    chosen = pam_settings(SCENE, **{**OCCLUDING, "prompts__min_quality": 0.5, "walk__steps": 0})
    walked = mine(backbone, slices, chosen, 4, drops=drops_under_occlusion(grey_and_bright)).walked
    assert dice(walked[0, 0] > 0.4, slices.embedding[0, 0] == 1) < 0.2
    assert dice(walked[0, 1] > 0.4, slices.embedding[0, 0] == 2) > 0.5


def test_rounding_tells_nothing():
    image = torch.rand(1, 1, SIZE, SIZE)

    def evidence(image, box):
        return 5.0 + 1e-5 * image.flatten(1).mean(1, keepdim=True)

    assert logit_drops(evidence, image, BOX, torch.rand(1, 4, 8, 8)).eq(0).all()


def test_images_are_painted_in_the_images_own_precision():
    image = torch.rand(1, 1, SIZE, SIZE).bfloat16()

    def evidence(image, box):
        assert image.dtype == torch.bfloat16
        return image.flatten(1).mean(1, keepdim=True)

    assert logit_drops(evidence, image, BOX, torch.rand(1, 4, 8, 8)).isfinite().all()


def test_chunks_change_nothing():
    slices = scene(5)
    slices = slices._replace(image=slices.image * torch.linspace(0.9, 1, 5).view(5, 1, 1, 1))
    for walk in ("slice", "volume"):
        chosen = pam_settings(SCENE, **{**OCCLUDING, "walk__extent": walk})
        whole, parts = (
            mine(
                BoxBackbone(),
                slices,
                chosen,
                chunk,
                thickness=1.0,
                drops=drops_under_occlusion(grey_and_bright),
            )
            for chunk in (5, 2)
        )
        assert torch.allclose(whole.walked, parts.walked, atol=1e-4)


@pytest.mark.parametrize("pooling", ["average", "top_k", "log_sum_exp"])
def test_evidence_is_the_forward_passes_logits_some_slices_at_a_time(pooling):
    model = module(pooling=Pooling(pooling)).eval()
    model.slices_per_step = 2
    image, box = torch.rand(5, 1, SIZE, SIZE), BOX.expand(5, 4)
    with torch.no_grad():
        assert torch.allclose(model.evidence(image, box), model(image, box).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"occlusion__weight": 1.5}, r"occlusion\.weight is 1.5; it must be in \[0, 1\]"),
        ({"occlusion__weight": -0.1}, "occlusion.weight is -0.1"),
        ({"occlusion__share": 0.0}, r"occlusion\.share is 0.0; it must be in \(0, 1\]"),
        ({"occlusion__share": 1.2}, "occlusion.share is 1.2"),
    ],
)
def test_bad_settings_are_refused_by_their_key(changes, message):
    with pytest.raises(ConfigError, match=rf"model\.pam\.{message}"):
        pam_settings(**changes)
