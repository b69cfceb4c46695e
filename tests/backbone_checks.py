"""What the tests of backbones share; every backbone is found by its YAML."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.costs import candidates, class_at
from weakmedsam.backbones import checkpoints
from weakmedsam.backbones.weights import declared

ROOT = Path(__file__).parents[1]
BACKBONES = sorted(path.stem for path in (ROOT / "experiments/backbone").glob("*.yaml"))
CLASSES = {candidates()[name].path: class_at(candidates()[name].path) for name in BACKBONES}
"""Classes of backbones by their dotted names: several YAMLs may share one."""


def tiny_settings(made):
    """Arguments of a small network of a class, with random weights: ``size: tiny`` where it has sizes."""
    small = {"size": "tiny", "weights": "none", "encode_size": 64}
    return {key: small[key] for key in inspect.signature(made).parameters if key in small}


def tiny_words(backbone):
    """A small network for the command line; one that has nothing to download is taken as its YAML makes it."""
    if declared()[backbone] is None:
        return []
    settings = tiny_settings(class_at(candidates()[backbone].path))
    return [str(word) for key, value in settings.items() for word in (f"--model.backbone.{key}", value)]


def tiny(made, **changes):
    """A small network of a class for frames of 64 x 64 pixels."""
    return made(image_size=64, **(tiny_settings(made) | changes))


def relative_error(ours, theirs) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def scramble(model):
    """Give every parameter that starts as a constant (positions, zeros of adapters, norms) some noise."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def recorded_by(function) -> int:
    """Elements that autograd keeps for the backward pass, parameters left out."""
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = function()
    del result
    return kept


def features_and_gradients(model, image):
    """Features, and the gradient of every trained parameter, of a loss that looks at every feature."""
    model.zero_grad(set_to_none=True)
    features = model.features(image)
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    (features * weights).sum().backward()
    return features.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(one, other, tolerance):
    """Features and gradients agree, each relative to its own largest value.

    A gradient that is zero but for rounding (of a key's bias, which no softmax sees) is measured against
    the largest of all.
    """
    assert relative_error(one[0], other[0]) <= tolerance
    largest = max(float(gradient.abs().max()) for gradient in one[1].values())
    for name, gradient in one[1].items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert torch.allclose(gradient, other[1][name], rtol=0, atol=tolerance * scale), name


def stand_ins(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that take no memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


@pytest.fixture
def checkpoint_files(monkeypatch):
    """No cache and no network: records what is asked for; ``files`` is what can be read."""
    asked, files = [], {}

    def find(name):
        asked.append(name)
        return name

    monkeypatch.setattr(checkpoints, "find", find)
    monkeypatch.setattr(checkpoints, "read_weights", lambda path, key: files[str(path)])
    return SimpleNamespace(asked=asked, files=files)
