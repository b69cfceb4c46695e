"""Every backbone's YAML through the same command line: one training step, pseudo-labels, scores."""

import csv
import json

import pytest
import torch
from commands import run_command
from safetensors.numpy import load_file

from benchmarks.costs import candidates, class_at
from tests.backbone_checks import BACKBONES, CLASSES, tiny, tiny_words
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.errors import ConfigError


def words(backbone, scans, folder):
    names = [f"experiments/{name}.yaml" for name in ("classify", "data/phantom", f"backbone/{backbone}")]
    options = {
        "--data.data_dir": scans / "scans",
        "--data.prepare.store_dir": scans / "store",
        "--data.num_volumes": 5,
        "--data.phantom.slices": 8,
        "--data.phantom.size": 64,
        "--data.image_size": 64,
        "--data.slices.min_pixels": 3,
        "--data.num_workers": 0,
        "--data.batch_size": 24,  # all training slices: one step
        "--data.split.fractions": "[0.6, 0.2, 0.2]",
        "--model.pam.walk.map_size": 16,
        "--model.pam.affinity.radius": 2.0,
        "--model.pam.prompts.grid": 2,
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
def test_trains_refines_and_predicts_through_the_same_pipeline(backbone, scans, tmp_path):
    def run(subcommand, folder, *more):
        common = [*words(backbone, scans, folder), *tiny_words(backbone)]
        run_command(subcommand, *common, *more)

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


@pytest.mark.parametrize("made", CLASSES.values(), ids=CLASSES)
def test_bf16_changes_the_activation_by_less_than_three_hundredths(made):
    torch.manual_seed(0)
    model = WeakMedSAM(tiny(made), ["a", "b"]).eval()
    image, whole = torch.rand(2, 1, 64, 64), torch.tensor([[0, 64, 0, 64]]).expand(2, 4)
    with torch.no_grad():
        plain = model(image, whole).cam
        with torch.autocast("cpu", torch.bfloat16):
            half = model(image, whole).cam
    assert half.dtype == torch.float32
    assert (half - plain).abs().max() < 0.03
    assert not torch.equal(half, plain)


@pytest.mark.parametrize("made", CLASSES.values(), ids=CLASSES)
def test_random_weights_are_said_to_be_random(made, caplog):
    assert f"{tiny(made).name} starts from random numbers" in caplog.text


@pytest.mark.parametrize("made", CLASSES.values(), ids=CLASSES)
def test_every_backbone_keeps_the_contract(made):
    torch.manual_seed(0)
    model = tiny(made).eval()
    image, points = torch.rand(2, 1, 64, 64), torch.rand(2, 3, 2) * 64
    assert model.image_size == 64
    with torch.no_grad():
        features, embedding = model.encode(image)
        assert features.shape[:2] == (2, model.feature_dim)
        assert torch.allclose(model.features(image), features, atol=1e-5)
        assert torch.allclose(model.embed(image), embedding, atol=1e-5)
        masks, quality = model.prompted(embedding, points)
        assert quality.shape == (2, 3)
        assert torch.allclose(model.masks_at_points(embedding, points), masks, atol=1e-5)
        for b in range(2):
            own, score = model.prompted(embedding[b : b + 1], points[b])
            assert torch.allclose(masks[b], own[0], atol=1e-4)
            assert torch.allclose(quality[b], score[0], atol=1e-5)
    with pytest.raises(ConfigError, match=r"set data\.image_size and model\.backbone\.image_size"):
        model.encode(torch.rand(1, 1, 32, 32))


@pytest.mark.parametrize("made", CLASSES.values(), ids=CLASSES)
def test_every_policy_is_known_and_others_are_refused(made):
    model = tiny(made)
    for policy in model.policies:
        model.set_trainable(policy)
        trained = any(parameter.requires_grad for parameter in model.parameters())
        assert trained or policy in ("none", "published")
    model.set_trainable("none")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match=f"model.trainable: 'nonsense' is unknown; {model.name} knows"):
        model.set_trainable("nonsense")


@pytest.mark.parametrize("name", BACKBONES)
def test_the_name_of_a_backbone_is_that_of_its_yaml(name):
    path, arguments = candidates()[name]
    with torch.device("meta"):
        assert class_at(path)(**arguments).name == name
