"""Pseudo-labels that start from a segmentation network; here one that sees what is bright, so that all is known."""

import csv
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifiers import module, trainer
from pam_settings import pam_callback
from safetensors.numpy import load_file
from saved_segmenter import BRIGHT, CLASSES, save
from segmenters import trainer as segmentation_trainer
from tiny import tiny_phantom

from weakmedsam.callbacks import wandb_lineage as lineage
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.errors import CheckpointError, ConfigError
from weakmedsam.pam.pseudo_label_io import read_origin
from weakmedsam.pam.self_training import SegmentedStart, find_present, load_segmenter
from weakmedsam.segmentation.module import Segmenter


def test_a_network_comes_back_from_its_checkpoint_alone(tmp_path):
    unet = "monai.networks.nets.BasicUNet"
    ours = save(tmp_path / "best.ckpt", network=unet, features=[4, 4, 4, 4, 4, 4]).eval()
    theirs, _ = load_segmenter(tmp_path / "best.ckpt", CLASSES, 32)
    image = torch.rand(2, 1, 32, 32)
    assert torch.equal(theirs(image), ours(image))
    assert not any(parameter.requires_grad for parameter in theirs.parameters())
    assert not theirs.training


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ({"state_dict": {}}, "does not say which segmentation network"),
        (
            {"segmenter": {"network": "x", "class_names": CLASSES}},
            r"of an earlier version \(then remove .*anew",
        ),
        (
            {"segmenter": {"class_names": CLASSES, "network": "Brightness, 1 parameters", "made_by": BRIGHT}},
            "does not fit Brightness, 1 parameters",
        ),
        ("theirs", r"of the classes \['tumour'\], this run's are \['lesion', 'cyst'\]"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "best.ckpt"
    if content == "theirs":
        save(path, network="monai.networks.nets.BasicUNet", classes=["tumour"], features=[4] * 6)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"model\.pam\.start\.checkpoint: .*best\.ckpt.*{message}"):
        load_segmenter(path, CLASSES, 32)


def test_a_network_of_frames_of_another_size_is_refused(scans, tmp_path):
    network = Segmenter("monai.networks.nets.BasicUNet", CLASSES, {"features": [4] * 6})
    run = segmentation_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(network, tiny_phantom(scans, labels__supervision="expert"))
    run.save_checkpoint(tmp_path / "best.ckpt")
    load_segmenter(tmp_path / "best.ckpt", CLASSES, 32)
    with pytest.raises(CheckpointError, match=r"trained on frames of 32 pixels.* have 64; give --data\.image_size"):
        load_segmenter(tmp_path / "best.ckpt", CLASSES, 64)


def test_a_checkpoint_can_name_a_network_only(tmp_path):
    torch.save({"segmenter": {"class_names": CLASSES, "made_by": {"class_path": "os.system", "arguments": {}}}},
               tmp_path / "best.ckpt")  # fmt: skip
    with pytest.raises(ConfigError, match=r"model\.network: 'os\.system' is no class of networks"):
        load_segmenter(tmp_path / "best.ckpt", CLASSES, 32)


def test_maps_are_probabilities_without_the_background(tmp_path):
    segmenter = save(
        tmp_path / "best.ckpt", classes=["lesion"], network="monai.networks.nets.BasicUNet", features=[4] * 6
    )
    image = torch.rand(3, 1, 32, 32)
    maps = SegmentedStart(tmp_path / "best.ckpt", ["lesion"], 32, 8)(image)
    expected = F.avg_pool2d(segmenter.eval()(image).softmax(1)[:, 1:], 4)
    assert maps.shape == (3, 1, 8, 8)
    assert torch.allclose(maps, expected)


def test_a_class_is_not_looked_for_inside_another_nor_where_there_is_only_noise(tmp_path):
    save(tmp_path / "best.ckpt")
    start = SegmentedStart(tmp_path / "best.ckpt", CLASSES, 32, 8)
    start.network = lambda image: image  # probabilities as they are given
    start.network.to = lambda device: None
    probability = torch.full((2, 3, 8, 8), 1e-6)
    probability[0, 1, :4] = 0.85  # a lesion, within it a little of a cyst, and beside it less
    probability[0, 2, 1, 1], probability[0, 2, 6, 6] = 0.05, 0.03
    probability[1, 1, 2, 2] = 0.005
    probability[:, 0] = 1 - probability[:, 1:].sum(dim=1)
    maps = start(probability.log())
    assert maps[0, 1].flatten().argmax() == 6 * 8 + 6
    assert maps[0, 0, 0, 0] == pytest.approx(0.85, abs=1e-3)
    assert maps[1].eq(0).all()
    assert (maps <= 1).all()


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    tiny_phantom(folder).prepare_data()
    return folder


def predict(folder, scans, start, **settings):
    torch.manual_seed(0)
    miner = pam_callback(start=str(start), affinity__kind="none", threshold__sigma=0.0, walk__map_size=32, **settings)
    model = module()
    model._callbacks.append(miner)
    trainer(folder).predict(model, tiny_phantom(scans), return_predictions=False)
    return model


def test_pseudo_labels_are_what_the_network_predicts_gated_by_the_labels(scans, tmp_path):
    save(tmp_path / "best.ckpt")
    model = predict(tmp_path / "labels", scans, tmp_path / "best.ckpt")
    assert not any("level" in name for name in model.state_dict())
    data = tiny_phantom(scans)
    data.setup("fit")
    seen, agreeing = 0, []
    for batch in data.predict_dataloader():
        ids = load_file(tmp_path / f"labels/{batch['case']}.safetensors")["label"]
        bright = (batch["image"][:, 0] > 0.5).numpy()
        lesion = batch["label"][:, 0].numpy() == 1
        # Each map reaches from 0 to 1 in its slice, and within a slice the network is sure of nearly every pixel.
        agreeing += [*((ids[lesion] == 1) == bright[lesion])]
        assert not (ids[~lesion] == 1).any()
        assert not ids[(batch["label"] == 0).all(dim=1).numpy()].any()
        seen += int((ids == 1).sum())
    assert seen > 500
    assert np.mean(agreeing) > 0.97


def test_those_of_another_network_are_made_anew_and_of_the_same_kept(scans, tmp_path):
    save(tmp_path / "first.ckpt")
    save(tmp_path / "second.ckpt", level=0.6)
    folder = tmp_path / "labels"

    def made(start):
        predict(folder, scans, tmp_path / start)
        path = min(folder.glob("*.safetensors"))
        return path.stat().st_mtime_ns, read_origin(path).settings["start"], load_file(path)["label"]

    first, again, other = made("first.ckpt"), made("first.ckpt"), made("second.ckpt")
    assert first[:2] == again[:2]
    assert other[0] != first[0]
    assert other[1] != first[1]
    assert not np.array_equal(other[2], first[2])


@pytest.mark.parametrize("start", [None, "segment/checkpoints/best.ckpt"])
def test_lineage_tells_of_both_networks(monkeypatch, start):
    told = []
    monkeypatch.setattr(lineage, "record", lambda trainer, *what: told.append(what))
    held = SimpleNamespace(ckpt_path="classify/best.ckpt", callbacks=[pam_callback(start=start)])
    lineage.Lineage().on_predict_start(held, None)
    assert told == [("uses", "model", Path("classify/best.ckpt"), *([Path(start)] if start else []))]


def test_the_mirrored_images_are_looked_at_by_it_too(scans, tmp_path):
    save(tmp_path / "best.ckpt")
    predict(tmp_path / "labels", scans, tmp_path / "best.ckpt", views__stability=True)
    found = [load_file(path)["stability"] for path in (tmp_path / "labels").glob("*.safetensors")]
    # Brightness knows no sides; the classifier, untrained, does.
    assert found
    assert min(np.nanmin(stability) for stability in found) == 1


def score(folder, scans, start, **settings):
    torch.manual_seed(0)
    fixed = {"affinity__kind": "none", "threshold__sigma": 0.0, "walk__map_size": 32, "walk__rescale": False}
    model = module()
    model._callbacks.append(pam_callback(start=str(start), presence="predicted", **(fixed | settings)))
    trainer(folder).test(model, tiny_phantom(scans), verbose=False)
    return list(csv.DictReader((folder / "cases.csv").open()))


def test_refined_predictions_without_a_walk_are_what_the_network_segments(scans, tmp_path):
    segmenter = save(tmp_path / "best.ckpt")
    trainer(tmp_path / "own").test(segmenter, tiny_phantom(scans), verbose=False)
    own = list(csv.DictReader((tmp_path / "own/cases.csv").open()))
    found = score(tmp_path / "refined", scans, tmp_path / "best.ckpt")
    assert [(row["case"], row["class"]) for row in found] == [(row["case"], row["class"]) for row in own]
    volumes = [(float(a["predicted_ml"]), float(b["predicted_ml"])) for a, b in zip(found, own, strict=True)]
    assert sum(b for _, b in volumes) > 1
    # Nearly: on the map a class has its share of the probability too.
    assert all(a == pytest.approx(b, rel=0.05) for a, b in volumes)
    assert (tmp_path / "refined/summary.json").is_file()
    assert len(list((tmp_path / "refined/pictures").glob("*.png"))) == len({row["case"] for row in own})
    assert not (tmp_path / "refined/cam_cases.csv").exists()


def test_that_a_network_learnt_from_other_data_is_said_once_and_nothing_of_the_same(scans, tmp_path):
    save(tmp_path / "best.ckpt", data=tiny_phantom(scans, slices__percentiles=(5, 95)))
    with pytest.warns(UserWarning, match=r"best\.ckpt was trained on other data \(.*intensities") as told:
        score(tmp_path / "other", scans, tmp_path / "best.ckpt")
    assert sum("other data" in str(warning.message) for warning in told) == 1
    save(tmp_path / "best.ckpt", data=tiny_phantom(scans))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained on other data")
        score(tmp_path / "same", scans, tmp_path / "best.ckpt")


def test_no_label_of_a_test_case_is_used(scans, tmp_path, monkeypatch):
    save(tmp_path / "best.ckpt")
    as_given = score(
        tmp_path / "given", scans, tmp_path / "best.ckpt", affinity__kind="intensity", walk__extent="volume"
    )
    step = WeakMedSAM.test_step

    def without_labels(self, batch, batch_idx):
        found = step(self, batch, batch_idx)
        batch["label"] = 1 - batch["label"]
        return found

    monkeypatch.setattr(WeakMedSAM, "test_step", without_labels)
    inverted = score(
        tmp_path / "other", scans, tmp_path / "best.ckpt", affinity__kind="intensity", walk__extent="volume"
    )
    assert inverted == as_given


def test_a_class_is_present_where_it_is_likelier_than_all_else():
    maps = torch.zeros(2, 2, 4, 4)
    maps[0, 0, 1, 2], maps[0, 1, 3, 3], maps[1, 1, 0, 0] = 0.5, 0.49, 0.9
    assert find_present(maps, torch.zeros(2, 2)).tolist() == [[1, 0], [0, 1]]


def test_a_veto_counts_against_a_few_pixels_and_less_against_a_large_region():
    maps = torch.zeros(4, 1, 100, 100)
    maps[0, 0, :10, :10] = 0.9  # 1 %
    maps[1, 0, :10, :20] = 0.9
    maps[2, 0, :40, :20] = 0.9
    log_of_4 = 2 * math.log(2)
    for classified, found in (
        (0.0, [1, 1, 1, 0]),
        (-0.01, [0, 1, 1, 0]),
        (-log_of_4 + 0.01, [0, 1, 1, 0]),
        (-log_of_4 - 0.01, [0, 0, 1, 0]),
        (-3 * log_of_4 - 0.01, [0, 0, 0, 0]),
        (math.inf, [1, 1, 1, 0]),
    ):
        assert find_present(maps, torch.full((4, 1), classified)).flatten().tolist() == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presence": "guessed"}, "presence: 'guessed' is unknown; choose one of given, predicted"),
        ({"presence": "predicted"}, r"presence: predicted is what .* best\.ckpt as model\.pam\.start"),
    ],
)
def test_who_says_what_is_present_is_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        pam_callback(**settings)
