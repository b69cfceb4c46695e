"""Grey values beside masks: what weighs how much where pixels are compared."""

import pytest
import torch
from pam_scene import SCENE, BoxBackbone, scene
from pam_settings import pam_settings

from weakmedsam.pam.affinity import CellEvidence, edge_weights, half_disc, with_intensity
from weakmedsam.pam.refiner import refine


@pytest.mark.parametrize(("share", "alone"), [(0.0, "per_prompt"), (1.0, "intensity")])
def test_with_all_the_weight_masks_or_grey_values_stand_alone(share, alone):
    settings = pam_settings(SCENE, affinity__kind="with_intensity", affinity__intensity_share=share)
    for ours, theirs in zip(
        refine(BoxBackbone(), scene(), settings, 4),
        refine(BoxBackbone(), scene(), pam_settings(SCENE, affinity__kind=alone), 4),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_grey_values_have_their_share_of_a_difference_however_prompts_are_trusted(share):
    masks, grey = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    offsets = half_disc(2.0)
    for trust in (None, torch.tensor([[1.0, 0.5, 0.0], [0.2, 0.2, 0.2]])):
        maps, weight = with_intensity(CellEvidence(grey, share, masks, trust))
        found = edge_weights(maps, offsets, 2.0, 3.0, weight[..., None, None])
        known = torch.ones(2, 3) if trust is None else trust
        known = (known / known.sum(dim=1, keepdim=True))[..., None, None]
        for o, (dy, dx) in enumerate(offsets):
            moved = [part.roll((-dy, -dx), (-2, -1)) for part in (masks, grey)]
            of_masks = ((masks - moved[0]).abs() * known).sum(dim=1)
            wanted = (-6.0 * ((1 - share) * of_masks + share * (grey - moved[1]).abs()[:, 0])).exp()
            there = found[:, o] > 0
            assert there.float().mean() > 0.6  # not across the border
            assert torch.allclose(found[:, o][there], wanted[there], atol=1e-6)
