"""What is read of a checkpoint, and what fits."""

import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from weakmedsam.backbones.checkpoints import check_fit, read_weights
from weakmedsam.errors import CheckpointError


def tensors():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def same(found):
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors().items())


@pytest.mark.parametrize("form", ["flat", "model", "state_dict", "module", "old", "safetensors"])
def test_every_form_of_weights_is_read(tmp_path, form):
    path, own = tmp_path / "w.bin", tensors()
    if form == "safetensors":
        save_file(own, path)
    elif form == "module":
        torch.save({"state_dict": {f"module.{k}": v for k, v in own.items()}, "epoch": 3}, path)
    elif form == "old":
        torch.save(own, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(own if form == "flat" else {form: own, "epoch": 3}, path)
    same(read_weights(path))


def test_a_common_prefix_only(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["module.a", "b"]


class Payload:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["new", "old", "raw", "raw 0", "in model"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, form):
    path, trap = tmp_path / "w.pth", tmp_path / "sprung"
    content = {"a": torch.ones(2), "b": Payload(str(trap))}
    if form.startswith("raw"):
        path.write_bytes(pickle.dumps({"b": Payload(str(trap))}, protocol=0 if "0" in form else None))
    elif form == "in model":
        torch.save({"model": content}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "new")
    # The trap works: plain unpickling would spring it.
    if form == "raw":
        pickle.loads(path.read_bytes())
        trap.rmdir()
    said = "not a checkpoint" if form == "raw 0" else r"refused: it contains code or objects \(\w+\.mkdir\), and only"
    with pytest.raises(CheckpointError, match=said) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript.*")
def test_a_program_is_refused(tmp_path):
    path = tmp_path / "net.jit"
    torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)).save(path)
    with pytest.raises(CheckpointError, match=r"refused: it contains code or objects \(a TorchScript program"):
        read_weights(path)


@pytest.mark.parametrize("form", ["new", "old", "safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_file_is_named(tmp_path, form, share):
    path, own = tmp_path / "w.pth", {"a": torch.rand(1000)}
    if form == "safetensors":
        save_file(own, path)
    else:
        torch.save(own, path, _use_new_zipfile_serialization=form == "new")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} is damaged or not a checkpoint"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no weights but a dict"),
        ([1, 2], "holds no weights but a list"),
        ({"a": torch.ones(1), "epoch": 3}, "not a flat dictionary of tensors: 'epoch' is a int"),
        ({"model": {"net": {"a": torch.ones(1)}}}, "'net' is a dict"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=said):
        read_weights(tmp_path / "w.pth")


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "w.pth").write_text("<html>please log in</html>")
    with pytest.raises(CheckpointError, match=r"w\.pth is not a checkpoint"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"w\.pth is not a checkpoint"):
        read_weights(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        read_weights(tmp_path / "nowhere.pth")


def test_what_fits_passes_whatever_its_order_and_precision():
    own = tensors()
    check_fit(own, {key: value.half() for key, value in reversed(own.items())}, "file.pth", "net")


def test_what_does_not_fit_is_one_message_with_both_names_and_shapes():
    own = {f"k{n}": torch.ones(2, n) for n in range(6)}
    given = {"k0": torch.ones(2, 0), "k1": torch.ones(3, 1), "k2": torch.ones(2, 9), "new": torch.ones(5)}
    with pytest.raises(CheckpointError) as caught:
        check_fit(own, given, "file.pth", "net")
    said = str(caught.value)
    assert (
        "file.pth holds another network, this backbone is net: of 6 tensors 3 are missing and 2 have another shape"
        in said
    )
    assert "1 of the checkpoint's 4 are unknown" in said
    assert said.splitlines()[1:] == [
        "  k1: net (2, 1), checkpoint (3, 1)",
        "  k2: net (2, 2), checkpoint (2, 9)",
        "  k3: net (2, 3), checkpoint not there",
        "  k4: net (2, 4), checkpoint not there",
    ]
