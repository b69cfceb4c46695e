import inspect
import math
from dataclasses import asdict

import pytest
import torch
from tiny import SIZE, TinyBackbone

from weakmedsam.callbacks import PromptAffinityMining
from weakmedsam.contracts import ConfigError
from weakmedsam.refine import Refinement, Slices, refine

SMALL = Refinement(map_size=16, radius=2.0)


def drawn(slices):
    """Backbone and some slices of two classes, all present and without padding."""
    torch.manual_seed(0)
    box = torch.tensor([0, SIZE, 0, SIZE]).expand(slices, 4)
    backbone, cam, embedding = TinyBackbone(), torch.rand(slices, 2, 8, 8), torch.randn(slices, 16, 8, 8)
    return backbone, Slices(torch.rand(slices, 1, SIZE, SIZE), cam, embedding, torch.ones(slices, 2), box)


def test_a_perfect_activation_stays_and_an_absent_class_is_empty():
    backbone, slices = drawn(1)
    cam = torch.zeros(1, 2, 8, 8)
    cam[0, :, 2:5, 3:6] = 1.0
    unwalked = Refinement(map_size=16, radius=2.0, steps=0, sigma=0.0)
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
        ({"affinity": "both"}, "affinity: 'both' is unknown; choose one of per_prompt, summed"),
        ({"grid": 0}, "grid is 0"),
        ({"map_size": 1}, "map_size is 1"),
        ({"radius": 1.0}, "radius is 1.0"),
        ({"radius": 65.0}, "radius is 65.0; it must be above 1 and at most map_size"),
        ({"beta": math.nan}, "beta is nan"),
        ({"contrast": -1.0}, "contrast is -1.0"),
        ({"steps": -1}, "steps is -1"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"sigma": -0.5}, "sigma is -0.5"),
    ],
)
def test_bad_settings_are_refused_by_their_key(settings, message):
    with pytest.raises(ConfigError, match=rf"model\.pam\.{message}"):
        Refinement(**settings)


def test_the_callback_has_the_same_settings_and_defaults():
    arguments = inspect.signature(PromptAffinityMining).parameters
    defaults = {name: argument.default for name, argument in arguments.items() if name != "pictures"}
    assert defaults == asdict(Refinement())
    changed = Refinement(
        9, "summed", 3.0, 2.0, 1.0, None, 32, 0.4, 2.0, False, 0.2, "content", 0.3, 5, 0.4, True, "volume", 2,
        "before", 3.0, "coverage", "share", 2.0, "otsu", True,
    )  # fmt: skip
    assert all(value != asdict(Refinement())[name] for name, value in asdict(changed).items())
    assert PromptAffinityMining(**asdict(changed)).settings == changed
