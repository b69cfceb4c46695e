"""The exported network, used as another program would: by the file and its side file alone."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import saved_segmenter
import torch
import yaml
from fakes import save_nifti
from made_run import write_run

from weakmedsam.errors import ConfigError
from weakmedsam.inference.export import export, main
from weakmedsam.inference.trained_run import load_run

NETWORK = "monai.networks.nets.BasicUNet"
FEATURES = {"features": [8, 8, 8, 8, 8, 8]}
WINDOW = {"window": [50.0, 100.0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose segmentation network has random weights and sees 32 x 32 pixels."""
    folder = write_run(tmp_path_factory.mktemp("export") / "runs/phantom/default")
    torch.manual_seed(0)
    saved_segmenter.save(
        folder / "segment/checkpoints/best.ckpt", network=NETWORK, classes=["left", "right"], **FEATURES
    )
    path = folder / "segment/config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"] = {
        "class_path": "weakmedsam.segmentation.module.Segmenter",
        "init_args": {"network": NETWORK, "network_args": FEATURES},
    }
    config["data"] = {
        "class_path": "data_modules.folder.Folder",
        "init_args": {
            "data_dir": "elsewhere",
            "image_size": 32,
            "classes": {"left": [1], "right": [2]},
            "slices": WINDOW,
        },
    }
    config["trainer"]["precision"] = "32-true"
    path.write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    path = folder / "out/network.onnx"
    run = load_run(folder, refined=False, device="cpu")
    return run, path, json.loads(export(run, path).read_text())


def test_onnx_gives_what_torch_gives_for_any_number_of_slices(exported):
    run, path, said = exported
    session = onnxruntime.InferenceSession(path)
    for slices in (1, 2, 7):
        image = torch.rand(slices, 1, 32, 32, generator=torch.Generator().manual_seed(slices))
        (found,) = session.run([said["output"]["name"]], {said["input"]["name"]: image.numpy()})
        with torch.no_grad():
            wanted = run.module(image).softmax(1).numpy()
        assert found.shape == (slices, len(said["output"]["classes"]), 32, 32)
        assert np.abs(found - wanted).max() < 1e-4
        assert np.ptp(found) > 0.1  # no constant


def test_the_program_of_torch_gives_the_same(exported):
    run, path, _ = exported
    export(run, path.with_suffix(".pt2"))
    program = torch.export.load(path.with_suffix(".pt2")).module()
    image = torch.rand(5, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(program(image), run.module(image).softmax(1), atol=1e-6)


def resize(values, size):
    """Bilinear, anti-aliased, pixel centres at integer + 0.5: one of many libraries' ways."""
    found = torch.nn.functional.interpolate(
        torch.as_tensor(values)[None].float(), (size, size), mode="bilinear", antialias=True
    )
    return found[0].numpy()


def test_the_side_file_says_enough_to_segment_a_scan(exported, tmp_path):
    run, path, said = exported
    voxels = np.random.default_rng(0).integers(-20, 130, (40, 30, 4)).astype(np.int16)
    affine = np.diag([1.5, -1.5, 3.0, 1.0])  # right, posterior, superior
    save_nifti(tmp_path / "scan.nii.gz", voxels, affine)
    level, width = said["intensity"]["window"]
    assert said["before"][0].startswith("turn the voxels so that their axes lead to superior, posterior, left: axial")
    slices = voxels[::-1].transpose(2, 1, 0)
    scaled = ((slices - (level - width / 2)) / width).clip(0, 1).astype(np.float32)
    side = max(slices.shape[1:])
    top, left = (side - slices.shape[1]) // 2, (side - slices.shape[2]) // 2
    square = np.zeros((len(slices), side, side), np.float32)
    square[:, top : top + slices.shape[1], left : left + slices.shape[2]] = scaled
    image = resize(square, said["input"]["shape"][-1])[:, None]
    (found,) = onnxruntime.InferenceSession(path).run(None, {"image": image})
    native = np.stack([resize(part, side) for part in found])
    ids = native[:, :, top : top + slices.shape[1], left : left + slices.shape[2]].argmax(1)
    ours = run.predict(tmp_path / "scan.nii.gz")
    assert len(np.unique(ours)) > 1
    assert np.mean(ids.transpose(2, 1, 0)[::-1] == ours) > 0.999


def test_the_command_writes_both_files_and_refuses_other_formats(folder, tmp_path, capsys):
    words = ["--runs", str(folder.parents[1]), "--output"]
    main([*words, str(tmp_path / "heart.onnx")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "heart.onnx"), str(tmp_path / "heart.json")]
    assert {path.name for path in tmp_path.iterdir()} == {"heart.onnx", "heart.json"}
    with pytest.raises(SystemExit, match=r"heart\.trt: its ending says the format, one of \.onnx, \.pt2"):
        main([*words, str(tmp_path / "heart.trt")])


def test_a_package_that_is_missing_is_named(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"ONNX needs onnxscript: pip install 'weakmedsam\[export\]'"):
        export(exported[0], tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())
