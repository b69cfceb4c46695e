import csv
import math
import shutil

import nibabel
import numpy as np
import pytest
import torch
from classifiers import module, trainer
from data_settings import data_settings
from pam_settings import pam_callback, pam_settings
from safetensors.numpy import load_file
from tiny import tiny_phantom

from data_modules.augmentation import Augmentation
from data_modules.config import Slices
from data_modules.folder import Folder
from weakmedsam.callbacks import PromptAffinityMining
from weakmedsam.classification.cam import Pooling
from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.classification.module import Activation
from weakmedsam.errors import ConfigError
from weakmedsam.metrics.image_labels import stratified_sample
from weakmedsam.pam.config import Validation
from weakmedsam.pam.pseudo_label_io import read_origin


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    tiny_phantom(folder).prepare_data()
    return folder


@pytest.fixture(scope="module")
def run(scans, tmp_path_factory):
    """A trained run with pseudo-labels."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, 2).fit(module(pam=True), tiny_phantom(scans))
    predict(folder / "pseudo", scans)
    return folder


def predict(folder, scans, seed=0, model=None):
    model = module(pam=True) if model is None else model
    with torch.no_grad():
        model.class_head.weight.add_(seed)
    trainer(folder).predict(model, tiny_phantom(scans), return_predictions=False)
    return model


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_validation_logs_both_dice_and_draws_the_steps(run):
    row = read(run / "history.csv")[-1]
    for name in ("val/cam_dice", "val/pam_dice", "val/cam_dice/lesion", "val/pam_dice/cyst"):
        assert 0 <= float(row[name]) <= 1
    assert (run / "pictures/epoch_001.png").stat().st_size > 10_000


def test_every_second_validation_and_the_last_refine(scans, tmp_path):
    model = module(pam=True)
    miner = next(part for part in model.configure_callbacks() if isinstance(part, PromptAffinityMining))
    miner.validation = Validation(2)
    trainer(tmp_path, 3).fit(model, tiny_phantom(scans))
    figures = [float(row["val/pam_dice"]) for row in read(tmp_path / "history.csv")]
    assert np.isnan(figures[0])
    assert 0 <= figures[1] <= 1
    assert 0 <= figures[2] <= 1
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "epoch_001.png",
        "epoch_002.png",
    ]


def test_validation_refines_a_sample_the_same_each_time(scans, tmp_path, monkeypatch):
    seen = []
    inner = PromptAffinityMining.refine

    def refine(self, module, image, activation, label, box):
        seen.append(label)
        return inner(self, module, image, activation, label, box)

    monkeypatch.setattr(PromptAffinityMining, "refine", refine)
    model, data = module(pam=True), tiny_phantom(scans)
    miner = next(part for part in model.configure_callbacks() if isinstance(part, PromptAffinityMining))
    miner.validation = Validation(slices=4)
    trainer(tmp_path, 2).fit(model, data)
    first, second = torch.cat(seen).chunk(2)
    assert first.equal(second)
    assert first.sum(0).ge(2).all()
    assert len(first) <= 4 < int(data.val_labels().any(1).sum())
    row = read(tmp_path / "history.csv")[-1]
    assert 0 <= float(row["val/pam_dice"]) <= 1
    # Of what is in the sample alone.
    counted = miner._dice["pam"].counts.sum((1, 2)).nonzero().flatten()
    chosen = stratified_sample(torch.from_numpy(data.val_labels()), 4).nonzero().flatten()
    assert set(counted.tolist()) <= set(chosen.tolist())


def test_images_are_encoded_once_in_validation(scans, tmp_path):
    model, data = module(sce=False, pam=True), tiny_phantom(scans)
    data.prepare_data()
    trainer(tmp_path).validate(model, data, verbose=False)
    assert model.backbone.encodings == len(data.val_cases)


def test_beside_a_local_encoder_only_slices_that_are_prompted_are_encoded(scans, tmp_path):
    local = LocalEncoder(32, cells=8, width=16)
    model, data = module(pam=True, local_encoder=local, pooling=Pooling("log_sum_exp")), tiny_phantom(scans)
    miner = next(part for part in model.configure_callbacks() if isinstance(part, PromptAffinityMining))
    miner.validation = Validation(2)
    trainer(tmp_path, 3).fit(model, data)  # refines after epochs 2 and 3
    labelled = sum(int(batch["label"].any(dim=1).sum()) for batch in data.val_dataloader())
    assert 0 < labelled < len(data.val_cases)
    assert model.backbone.encodings == 2 * labelled


@pytest.mark.parametrize(("columns", "rows", "views"), [(0.5, 0.0, 2), (0.0, 0.0, 1), (0.2, 0.5, 4)])
def test_activation_is_averaged_over_the_mirrors_that_training_uses(scans, tmp_path, columns, rows, views):
    model, data = module(sce=False, pam=True), tiny_phantom(scans)
    data.augment = Augmentation(flip_columns=columns, flip_rows=rows)
    miner = next(part for part in model.configure_callbacks() if isinstance(part, PromptAffinityMining))
    miner.settings = pam_settings(miner.settings, views__activation="mirrored")
    trainer(tmp_path).validate(model, data, verbose=False)
    assert len(model.views) == views
    # One encoding for the embedding and one for each mirrored view's features.
    assert model.backbone.encodings == views * len(data.val_cases)


def test_unknown_views_are_refused():
    with pytest.raises(ConfigError, match=r"model\.pam\.views\.activation.*plain, mirrored"):
        pam_callback(views__activation="turned")


def test_one_file_a_training_volume_never_a_test_one(run, scans):
    data = tiny_phantom(scans)
    data.setup("fit")
    files = {path.stem for path in (run / "pseudo").glob("*.safetensors")}
    assert files == {entry.name for entry in data.cases("train")}
    assert {row["case"] for row in read(run / "pseudo/quality.csv")} == files


def test_classes_stay_within_the_given_labels(run, scans):
    data = tiny_phantom(scans)
    data.setup("fit")
    labelled = 0
    for batch in data.predict_dataloader():
        tensors = load_file(run / f"pseudo/{batch['case']}.safetensors")
        for label, ids, quality in zip(batch["label"], tensors["label"], tensors["quality"], strict=True):
            assert {int(i) for i in np.unique(ids)} <= {0} | {c + 1 for c in range(2) if label[c]}
            assert (np.isnan(quality) == (label.numpy() == 0)).all()
            labelled += bool(ids.any())
    assert labelled > 5


def test_finished_volumes_are_skipped_and_lost_ones_made_again_alike(run, scans):
    folder = run / "pseudo"
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    before, kept = first.read_bytes(), second.stat().st_mtime_ns
    first.unlink()
    model = predict(folder, scans)
    assert first.read_bytes() == before
    assert second.stat().st_mtime_ns == kept
    assert model.backbone.encodings == len(load_file(first)["label"])


def test_another_network_or_setting_makes_them_anew(run, scans, tmp_path):
    predict(tmp_path, scans)
    path = min(tmp_path.glob("*.safetensors"))
    before = path.stat().st_mtime_ns
    predict(tmp_path, scans, seed=1)
    assert path.stat().st_mtime_ns != before


def test_test_scores_volumes_on_the_scans_own_slices(scans, tmp_path):
    run = trainer(tmp_path)
    run.test(module(pam=True), tiny_phantom(scans), verbose=False)
    rows = read(tmp_path / "cam_cases.csv")
    assert {row["class"] for row in rows} == {"lesion", "cyst"}
    assert 0 <= run.callback_metrics["test/pam_dice"] <= 1
    for name in ("lesion", "cyst"):
        values = [float(row["no_image_dice"] or "nan") for row in rows if row["class"] == name]
        values = [value for value in values if not math.isnan(value)]
        assert run.callback_metrics[f"test/no_image_dice/{name}"] == pytest.approx(sum(values) / len(values), abs=1e-4)
        assert all(0 <= value < 1 for value in values)


def test_a_perfect_activation_scores_high_and_an_absent_class_stays_empty():
    model = module(sce=False, pam=True)
    miner = pam_callback(walk__map_size=16, affinity__radius=2.0, walk__steps=0, threshold__sigma=0.0)
    cam = torch.zeros(1, 2, 8, 8)
    cam[0, :, 2:5, 3:6] = 1.0
    embedding = torch.randn(1, 16, 8, 8)
    label, box = torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 32, 0, 32]])
    activation, image = Activation(torch.zeros(1, 2), cam, embedding), torch.zeros(1, 1, 32, 32)
    refined = miner.refine(model, image, activation, label, box)
    inside = refined.after[0, 0] > 0.5
    assert inside[8:20, 12:24].float().mean() > 0.9
    assert inside.sum() < 1.3 * 144
    assert refined.after[0, 1].eq(0).all()


def mining(**changes):
    """The model of the other tests with PAM under other settings."""
    model = module(pam=True)
    miner = pam_callback(walk__map_size=16, affinity__radius=2.0, **changes)
    model._callbacks = [part for part in model._callbacks if not isinstance(part, PromptAffinityMining)]
    model._callbacks.append(miner)
    return model


def quality_of(folder):
    tensors = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {key: np.concatenate([one[key] for one in tensors]) for key in ("quality", "stability")}


def test_stability_is_measured_on_request_and_lowers_the_quality(scans, tmp_path):
    plain, flipped = mining(), mining(views__stability=True)
    predict(tmp_path / "plain", scans, model=plain)
    predict(tmp_path / "flipped", scans, model=flipped)
    without, measured = quality_of(tmp_path / "plain"), quality_of(tmp_path / "flipped")
    present = ~np.isnan(without["quality"])
    assert np.isnan(without["stability"]).all()
    assert (~np.isnan(measured["stability"]) == present).all()
    np.testing.assert_allclose(
        measured["quality"][present], (without["quality"] * measured["stability"])[present], atol=1e-6
    )
    assert 0 < measured["stability"][present].mean() < 1
    # Two more encodings of every slice that has a class, and of no other.
    slices = present.any(axis=1).sum()
    assert flipped.backbone.encodings == plain.backbone.encodings + 2 * slices
    assert "stability" not in read(tmp_path / "plain/quality.csv")[0]
    rows = read(tmp_path / "flipped/quality.csv")
    assert all(0 <= float(row["stability"]) <= 1 for row in rows if row["slices"] != "0")
    a, b = (load_file(min((tmp_path / name).glob("*.safetensors"))) for name in ("plain", "flipped"))
    assert (a["label"] == b["label"]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {
            "walk__extent": "volume",
            "vote__when": "after",
            "threshold__rule": "profile",
            "threshold__competition": "share",
        },
        {"affinity__kind": "intensity", "walk__extent": "volume", "walk__steps": None, "walk__restart": 0.1},
        {"prompts__placement": "peaks", "vote__when": "before", "vote__normalise": "coverage"},
    ],
)
def test_options_go_through_validation_test_and_pseudo_labels(scans, tmp_path, changes):
    run = trainer(tmp_path)
    data = tiny_phantom(scans)
    data.prepare_data()
    run.validate(mining(**changes), data, verbose=False)
    assert 0 <= run.callback_metrics["val/pam_dice"] <= 1
    run.test(mining(**changes), data, verbose=False)
    assert 0 <= run.callback_metrics["test/pam_dice"] <= 1
    predict(tmp_path / "pseudo", scans, model=mining(**changes))
    files = sorted((tmp_path / "pseudo").glob("*.safetensors"))
    assert any(load_file(path)["label"].any() for path in files)


def test_the_volume_walk_differs_from_the_slices_and_is_stamped(scans, tmp_path):
    predict(tmp_path / "slice", scans, model=mining())
    predict(tmp_path / "volume", scans, model=mining(walk__extent="volume"))
    names = [path.name for path in sorted((tmp_path / "slice").glob("*.safetensors"))]
    pairs = [[load_file(tmp_path / kind / name) for kind in ("slice", "volume")] for name in names]
    assert any((a["confidence"] != b["confidence"]).any() for a, b in pairs)
    assert all(np.array_equal(a["quality"] > -1, b["quality"] > -1) for a, b in pairs)
    assert read_origin(tmp_path / "volume" / names[0]).settings["walk"]["extent"] == "volume"


def test_a_file_of_another_case_a_damaged_one_and_a_folder_are_made_anew(run, scans, tmp_path):
    shutil.copytree(run / "pseudo", tmp_path / "pseudo")
    first, second = sorted((tmp_path / "pseudo").glob("*.safetensors"))[:2]
    before = [path.read_bytes() for path in (first, second)]
    first.write_bytes(before[1])
    second.write_bytes(before[1][:-9] + bytes([before[1][-9] ^ 1]) + before[1][-8:])
    predict(tmp_path / "pseudo", scans)
    assert [path.read_bytes() for path in (first, second)] == before
    first.unlink()
    first.mkdir()
    second.write_bytes(before[1][: len(before[1]) // 2])
    predict(tmp_path / "pseudo", scans)
    assert [path.read_bytes() for path in (first, second)] == before


def test_corrected_labels_make_a_pseudo_label_anew(run, scans, tmp_path):
    shutil.copytree(run / "pseudo", tmp_path / "pseudo")
    path = min((tmp_path / "pseudo").glob("*.safetensors"))
    held = read_origin(path)
    assert held.case == path.stem
    data = tiny_phantom(scans)
    data.setup("fit")
    assert held.volume == data.digest_volume(path.stem)
    data.slices = Slices(min_pixels=10**6)
    assert held.volume != data.digest_volume(path.stem)


def test_without_masks_validation_shows_what_it_refines_and_scores_nothing(scans, tmp_path):
    root = tmp_path / "bare"
    (drawn,) = (scans / "scans").glob("phantom-*")
    shutil.copytree(drawn / "images", root / "images")
    rows = ["case,slice,lesion,cyst"]
    for path in sorted((drawn / "masks").iterdir()):
        mask = np.asarray(nibabel.load(path).dataobj)
        name = path.name.removesuffix(".nii.gz")
        rows += [f"{name},{z},{int((mask[..., z] == 1).any())},{int((mask[..., z] == 2).any())}" for z in range(12)]
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    settings = {"image_size": 32, "split__fractions": (0.5, 0.25, 0.25), "batch_size": 8, "num_workers": 0}
    settings |= {"prepare__store_dir": str(tmp_path / "store"), "prepare__workers": 1}
    data = Folder(str(root), {"lesion": [1], "cyst": [2]}, **data_settings(**settings))
    trainer(tmp_path, 1).fit(module(pam=True), data)
    assert (tmp_path / "pictures/epoch_000.png").stat().st_size > 10_000
    assert "val/pam_dice" not in read(tmp_path / "history.csv")[-1]
