"""Every backbone's YAML through the same command line: one training step, pseudo-labels, scores."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from weakmedsam import cli
from weakmedsam.backbones.efficient_sam import EfficientSAM
from weakmedsam.backbones.pocket import Pocket
from weakmedsam.backbones.sam import SAM
from weakmedsam.backbones.samus import SAMUS
from weakmedsam.classification.module import WeakMedSAM

ROOT = Path(__file__).parents[2]
BACKBONES = sorted(path.stem for path in (ROOT / "experiments/backbone").glob("*.yaml"))


def tiny(backbone):
    """A small network of the same kind, with random weights; pocket is small and ships its weights."""
    if backbone == "pocket":
        return []
    words = ["--model.backbone.size", "tiny", "--model.backbone.weights", "none"]
    return words if backbone == "samus" else [*words, "--model.backbone.encode_size", "64"]


def words(backbone, scans, folder):
    names = [f"experiments/{name}.yaml" for name in ("classify", "data/phantom", f"backbone/{backbone}")]
    options = {
        "--data.data_dir": scans / "scans",
        "--data.store_dir": scans / "store",
        "--data.num_volumes": 5,
        "--data.phantom.slices": 8,
        "--data.phantom.size": 64,
        "--data.image_size": 64,
        "--data.min_pixels": 3,
        "--data.num_workers": 0,
        "--data.batch_size": 24,  # all training slices: one step
        "--data.split_fractions": "[0.6, 0.2, 0.2]",
        "--model.pam.map_size": 16,
        "--model.pam.radius": 2.0,
        "--model.pam.grid": 2,
        "--trainer.max_epochs": 1,
        "--trainer.enable_progress_bar": "false",
        "--trainer.default_root_dir": folder,
    }
    return [word for name in names for word in ("--config", name)] + [
        str(word) for pair in options.items() for word in pair
    ]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return tmp_path_factory.mktemp("scans")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_trains_refines_and_predicts_through_the_same_pipeline(backbone, scans, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def run(subcommand, folder, *more):
        common = [*words(backbone, scans, folder), *tiny(backbone)]
        monkeypatch.setattr(sys, "argv", ["weakmedsam", subcommand, *common, *more])
        cli.main()

    fitted = tmp_path / "classify"
    run("fit", fitted)
    saved = torch.load(fitted / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert saved["state_dict"]["subclass_ids"].max() > 1
    steps = {round(float(state["step"])) for state in saved["optimizer_states"][0]["state"].values()}
    assert steps == {1}
    with (fitted / "history.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["val/cam_dice"]) >= 0
    assert float(row["val/pam_dice"]) >= 0
    last = ["--ckpt_path", str(fitted / "checkpoints/last.ckpt")]
    run("predict", tmp_path / "pseudo", "--return_predictions", "false", *last)
    labels = [load_file(path)["label"] for path in sorted((tmp_path / "pseudo").glob("*.safetensors"))]
    assert len(labels) == 3
    assert all(label.shape == (8, 64, 64) for label in labels)
    assert any(label.any() for label in labels)
    run("test", tmp_path / "test", *last)
    with (tmp_path / "test/cam_cases.csv").open() as file:
        assert {row["class"] for row in csv.DictReader(file)} == {"lesion", "cyst"}
    made = json.loads((fitted / "provenance.json").read_text())
    assert "torch" in made["versions"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pocket(64, "none"),
        lambda: SAMUS(64, "tiny", "none"),
        lambda: EfficientSAM(64, "tiny", "none", encode_size=64),
        lambda: SAM(64, "tiny", "none"),
    ],
    ids=["pocket", "samus", "efficient_sam", "sam"],
)
def test_bf16_changes_the_activation_by_less_than_three_hundredths(make):
    torch.manual_seed(0)
    model = WeakMedSAM(make(), ["a", "b"]).eval()
    image, whole = torch.rand(2, 1, 64, 64), torch.tensor([[0, 64, 0, 64]]).expand(2, 4)
    with torch.no_grad():
        plain = model(image, whole).cam
        with torch.autocast("cpu", torch.bfloat16):
            half = model(image, whole).cam
    assert half.dtype == torch.float32
    assert (half - plain).abs().max() < 0.03
    assert not torch.equal(half, plain)


def test_random_weights_are_said_to_be_random(caplog):
    for make in (Pocket, SAMUS, EfficientSAM, SAM):
        caplog.clear()
        made = make(64, weights="none") if make is Pocket else make(64, "tiny", "none")
        assert f"{made.name} starts from random numbers" in caplog.text
