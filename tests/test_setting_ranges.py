"""Any value of a setting is taken, or refused in one line that names its key; nothing is allocated for it before."""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TinyBackbone

from data_modules.augmentation import Augmentation
from data_modules.config import Preparation, Slices, Split
from data_modules.folder import Folder
from data_modules.phantom_drawing import PhantomParameters
from weakmedsam.callbacks import PromptAffinityMining, SubClassExploration, Throughput
from weakmedsam.classification.cam import Pooling
from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.errors import ConfigError, check_range
from weakmedsam.pam.config import Prompts, Refinement, Validation, Walk
from weakmedsam.sce.config import Clustering, SubClassTask
from weakmedsam.segmentation.loss import Loss
from weakmedsam.segmentation.module import Segmenter

ROOT = Path(__file__).parent.parent
ODD = [
    0,
    -1,
    1,
    2,
    0.5,
    1e-300,
    1e30,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
    2**31,
    2**63,
    10**9,
    10**30,
]
NUMBERS = st.one_of(st.sampled_from(ODD), st.integers(-(2**70), 2**70), st.floats(), st.floats(-2, 200))
WHOLE = st.one_of(st.sampled_from([None, 0, -1, 1, 3, 2**31, 10**9, 10**30]), st.integers(-(2**70), 2**70))


def folder(**changes):
    return Folder(data_dir="nowhere", **{"classes": {"tumour": [1]}, **changes})


def classifier(**changes):
    return WeakMedSAM(TinyBackbone(), ["a", "b"], **changes)


def segmenter(**changes):
    network = {"network": "monai.networks.nets.BasicUNet", "network_args": {"features": [2] * 6}}
    return Segmenter(class_names=["a"], **network, **changes)


FLOATS = {float, "float", int, "int", "int | None"}
MAKERS = {
    **{
        group.name: (type(getattr(Refinement(), group.name)), numbers)
        for group in fields(Refinement)
        if (numbers := [f.name for f in fields(getattr(Refinement(), group.name)) if f.type in FLOATS])
    },
    "augment": (Augmentation, [f.name for f in fields(Augmentation)]),
    "phantom": (
        PhantomParameters,
        ["contrast", "organs", "pattern", "noise", "bias", "co_occurrence", "distractor_rate"],
    ),
    "segmenter": (segmenter, ["learning_rate", "weight_decay", "warmup", "slices_per_step"]),
    "loss": (Loss, ["background_weight", "dice_weight", "ignore_below", "min_quality"]),
    "classifier": (classifier, ["learning_rate", "weight_decay", "slices_per_step"]),
    "pooling": (Pooling, ["top_share", "sharpness"]),
    "task": (SubClassTask, ["weight"]),
    "local": (LocalEncoder, ["field"]),
    "throughput": (Throughput, ["warn_share", "warn_batches"]),
}  # fmt: skip
WHOLES = {
    "data": (folder, ["image_size", "batch_size", "num_workers"]),
    "slices": (Slices, ["min_pixels"]),
    "split": (Split, ["seed"]),
    "prepare": (Preparation, ["workers"]),
    "sce": (SubClassExploration, ["every_n_epochs", "pictures"]),
    "task": (SubClassTask, ["number", "maximum"]),
    "clustering": (Clustering, ["seed", "restarts", "points_per_centroid"]),
    "mining": (PromptAffinityMining, ["pictures"]),
    "validation": (Validation, ["every_n_epochs", "slices"]),
    "points": (Prompts, ["grid", "peaks"]),
    "steps": (Walk, ["map_size", "slice_reach"]),
    "local": (LocalEncoder, ["image_size", "frame", "cells", "width"]),
    "phantom": (PhantomParameters, ["slices", "size", "modes", "seed"]),
}  # fmt: skip


def refusal(make):
    """What is said against a setting; None where it is taken."""
    try:
        make()
    except ConfigError as error:
        return str(error)
    return None


def see(make, key, value):
    """That it is refused by its key in one line, or a number of a sane size."""
    refused = refusal(lambda: make(**{key: value}))
    if refused is None:
        assert value is None or math.isfinite(value)
    else:
        assert len(refused.splitlines()) == 1
        assert key in refused


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_number_is_taken_or_refused_by_its_key(name, data):
    make, keys = MAKERS[name]
    see(make, data.draw(st.sampled_from(keys)), data.draw(NUMBERS))


@pytest.mark.parametrize("name", WHOLES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_whole_number_is_taken_or_refused_by_its_key(name, data):
    make, keys = WHOLES[name]
    see(make, data.draw(st.sampled_from(keys)), data.draw(WHOLE))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from([(Slices, "window"), (Slices, "percentiles"), (Split, "fractions")]),
    st.lists(NUMBERS.filter(lambda value: value is not None), min_size=3, max_size=3),
)
def test_any_numbers_of_a_pair_are_taken_or_refused_by_their_key(setting, values):
    group, key = setting
    given_ = tuple(values if key == "fractions" else values[:2])
    refused = refusal(lambda: group(**{key: given_}))
    if refused is None:
        assert all(map(math.isfinite, given_))
    else:
        assert len(refused.splitlines()) == 1
        assert key in refused


@pytest.mark.parametrize(
    ("value", "range_", "said"),
    [
        (math.nan, {}, "a is nan; it must be a finite number"),
        (-1, {"low": 0}, "a is -1; it must be 0 or more"),
        (0, {"low": 0, "above": True}, "a is 0; it must be above 0"),
        (3, {"high": 2}, "a is 3; it must be at most 2"),
        (2, {"high": 2, "below": True}, "a is 2; it must be below 2"),
        (9999, {"low": 1, "high": 1000}, "a is 9999; it must be in [1, 1,000]"),
        (1.0, {"low": 0, "high": 1, "above": True, "below": True}, "a is 1.0; it must be in (0, 1)"),
        (math.inf, {"low": 0}, "a is inf; it must be 0 or more"),
    ],
)
def test_the_message_says_what_is_allowed(value, range_, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        check_range("a", value, **range_)
    check_range("a", 1, 0, 2)
    check_range("a", 0, 0)
