"""What a person has said of pseudo-labels, as training reads it."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_modules.pseudo_labels import PseudoLabelReader
from weakmedsam.contracts import IGNORE, SliceState
from weakmedsam.errors import DataError

STATES = [SliceState.unchanged, SliceState.changed, SliceState.trusted, SliceState.left_out]


def write(folder, state, original=1, case="a"):
    (folder / "pseudo").mkdir(exist_ok=True)
    (folder / "corrected").mkdir(exist_ok=True)
    shape = (len(state), 4, 4)
    tensors = {
        "label": np.ones(shape, np.uint8),
        "confidence": np.full(shape, 100, np.uint8),
        "quality": np.full((len(state), 1), 0.5, np.float32),
        "histogram": np.zeros((1, 256), np.int64),
    }
    about = {"about": json.dumps({"case": case, "content": 1})}
    save_file(tensors, folder / f"pseudo/{case}.safetensors", about)
    corrected = {"label": np.full(shape, 2, np.uint8), "state": np.array(state, np.uint8)}
    save_file(
        corrected, folder / f"corrected/{case}.safetensors", {"about": json.dumps({"case": case, "original": original})}
    )
    return PseudoLabelReader(folder / "pseudo", folder / "corrected")


def test_each_state_gives_its_own_target(tmp_path):
    reader = write(tmp_path, STATES)
    found = [reader.read("a", number) for number in range(4)]
    assert [int(target.label[0, 0]) for target in found] == [1, 2, 2, IGNORE]
    assert [int(target.confidence[0, 0]) for target in found] == [100, 100, 255, 0]
    assert [target.quality for target in found] == [0.5, 0.5, 1.0, 0.5]
    assert [target.trusted for target in found] == [False, False, True, False]


def test_only_what_nobody_has_looked_at_is_trimmed(tmp_path):
    write(tmp_path, STATES)
    least = {"a": np.array([101], np.uint8)}
    reader = PseudoLabelReader(tmp_path / "pseudo", tmp_path / "corrected", least)
    found = [reader.read("a", number) for number in range(4)]
    assert [int(target.label[0, 0]) for target in found] == [0, 2, 2, IGNORE]
    assert [int(target.confidence[0, 0]) for target in found] == [0, 100, 255, 0]


def test_in_a_later_round_only_what_a_person_looked_at_stays(tmp_path):
    reader = write(tmp_path, STATES, original=7)
    assert [int(reader.read("a", number).label[0, 0]) for number in range(4)] == [1, 1, 2, IGNORE]


def test_a_case_without_a_correction_is_read_as_it_is(tmp_path):
    reader = write(tmp_path, STATES)
    (tmp_path / "corrected/a.safetensors").unlink()
    assert not any(reader.read("a", number).trusted for number in range(4))
    assert reader.read("a", 3).label[0, 0] == 1


def test_a_damaged_correction_is_named(tmp_path):
    class Named:
        name, depth = "a", 4
        frame = type("Frame", (), {"size": 4})

    reader = write(tmp_path, STATES)
    reader.check([Named])
    save_file({"label": np.ones((4, 4, 4), np.uint8)}, tmp_path / "corrected/a.safetensors")
    with pytest.raises(DataError, match=r"corrected/a\.safetensors: is no pseudo-label.*weakmedsam review --replay"):
        PseudoLabelReader(tmp_path / "pseudo", tmp_path / "corrected").check([Named])
