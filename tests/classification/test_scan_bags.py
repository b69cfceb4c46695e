"""Labels of whole scans: bags, their loss, and what a classifier that learns from nothing else finds in the slices."""

import csv
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifiers import Die, explorer, trainer
from data_settings import data_settings
from fakes import save_nifti
from pam_settings import pam_callback
from safetensors.torch import load_file
from tiny import TinyBackbone, same_state

from data_modules.augmentation import Augmentation
from data_modules.folder import Folder
from data_modules.loaders import BagSampler, Order
from weakmedsam.classification.cam import Pooling
from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.classification.scan_bags import ScanScores, bag_loss, infer_presence, pool_bags
from weakmedsam.contracts import SOMEWHERE

BAG = torch.tensor([0, 0, 1, 1, 1])


def logits_of(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None].requires_grad_()


def test_a_bag_has_the_mean_odds_of_its_slices_and_not_those_of_another():
    logits = logits_of(0.0, 2.0, -1.0, -1.0, -1.0)
    pooled = pool_bags(logits, BAG)
    odds = logits.exp()
    assert torch.allclose(pooled[:2].exp(), odds[:2].mean().expand(2, 1))
    assert torch.allclose(pooled[2:], torch.full((3, 1), -1.0))
    assert torch.allclose(pool_bags(logits[None].expand(2, -1, -1), BAG)[1], pooled)  # members


def test_a_bag_without_the_class_learns_as_its_slices_do():
    logits, label = logits_of(0.3, -2.0, 1.0, 0.5, -1.0), torch.tensor([[0.0], [0.0], [1.0], [0.0], [1.0]])
    assert torch.equal(bag_loss(logits, label, BAG), F.binary_cross_entropy_with_logits(logits, label))


def test_of_a_bag_with_the_class_the_likelier_slice_learns_most_and_others_are_left_alone():
    logits = logits_of(0.0, 2.0, 0.5, 0.5, 0.5)
    label = torch.tensor([[SOMEWHERE]] * 2 + [[0]] * 3).float()
    loss = bag_loss(logits, label, BAG)
    expected = 2 * F.softplus(-(logits[:2].exp().mean().log())) + 3 * F.softplus(logits[2])
    assert torch.allclose(loss, expected / 5)
    loss.backward()
    up = -logits.grad[:2, 0]
    assert 0 < up[0] < up[1]
    assert (logits.grad[2:] > 0).all()


def test_at_least_one_slice_of_a_scan_has_the_class_and_none_of_a_scan_without():
    logits = torch.tensor([[-3.0], [-2.0], [1.0], [2.0], [5.0]])
    label, case = torch.tensor([[SOMEWHERE]] * 4 + [[0]]).float(), torch.tensor([0, 0, 1, 1, 2])
    points = torch.tensor([0.5])
    assert infer_presence(logits, label, points, case).flatten().tolist() == [0, 1, 1, 1, 0]
    assert infer_presence(logits, label, torch.tensor([0.8]), case).flatten().tolist() == [0, 1, 0, 1, 0]
    assert infer_presence(logits[:2], label[:2], points).flatten().tolist() == [0, 1]
    known = torch.tensor([[1.0], [0.0]])
    assert infer_presence(logits[:2], known, points).equal(known)


def test_scans_are_scored_by_their_slices_in_whatever_batches_they_come():
    scores = ScanScores(1)
    logits, label = logits_of(0.0, 2.0, -1.0, -3.0, -1.0).detach(), torch.tensor([[SOMEWHERE]] * 2 + [[0]] * 3).float()
    for rows in ([4, 0], [1, 3, 2]):
        scores.update(logits[rows], label[rows], BAG[rows] + 7)
    found = scores.finish()
    pooled = torch.stack([logits[:2].exp().mean().log(), logits[2:].exp().mean().log()])
    assert torch.allclose(found.loss, (F.softplus(-pooled[0]) + F.softplus(pooled[1])) / 2)
    assert (found.highest.flatten().tolist(), found.label.flatten().tolist()) == ([2, -1], [1, 0])
    assert found.open
    assert torch.allclose(found.points, logits[2:].sigmoid().max())


DEPTH = 12
SCANS = 16
"""Twelve to train, four to validate; every second one shows the class, in three slices."""


def slices_with(number: int) -> range:
    first = 1 + 2 * number % (DEPTH - 4)
    return range(first, first + 3) if number % 2 else range(0)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Noise, with a bright box in the slices that show the class; masks, and a table that says so of scans only."""
    root = tmp_path_factory.mktemp("scans")
    rows = ["case,class"]
    for number in range(SCANS):
        rng = np.random.default_rng(number)
        image, mask = rng.integers(1, 300, (24, 24, DEPTH)).astype(np.int16), np.zeros((24, 24, DEPTH), np.uint8)
        row, column = rng.integers(2, 14, 2)
        for z in slices_with(number):
            mask[row : row + 8, column : column + 8, z] = 1
        image[mask > 0] += 400
        save_nifti(root / f"images/scan{number:02d}.nii.gz", image)
        save_nifti(root / f"masks/scan{number:02d}.nii.gz", mask)
        rows.append(f"scan{number:02d},{'tumour' if number % 2 else 'none'}")
    (root / "labels.csv").write_text("\n".join(rows))
    split = [f"scan{number:02d},{'train' if number < 12 else 'val'}" for number in range(SCANS)]
    (root / "split.csv").write_text("\n".join(["case,split", *split]))
    return root


def data_of(root, **changes):
    settings = {
        "prepare__store_dir": str(root / "store"),
        "prepare__workers": 1,
        "split__file": str(root / "split.csv"),
        "slices__window": (350, 700),
        "slices__percentiles": None,
        "image_size": 32,
        "batch_size": 8,
        "num_workers": 0,
        **changes,
    }
    data = Folder(str(root), {"tumour": [1]}, **data_settings(**settings))
    data.prepare_data()
    return data


def network(**changes):
    torch.manual_seed(0)
    encoder = LocalEncoder(32, cells=8, width=16)
    return WeakMedSAM(TinyBackbone(), ["tumour"], encoder, Pooling("log_sum_exp"), sce=explorer(2), **changes)


def test_batches_are_two_bags_spread_over_their_volumes_and_each_slice_comes_once(scans):
    data = data_of(scans)
    data.setup("fit")
    epochs = [list(loader) for loader in (data.train_dataloader(), data.train_dataloader())]
    indices = [torch.cat([batch["index"] for batch in batches]) for batches in epochs]
    assert indices[0].equal(indices[1])
    assert indices[0].sort().values.tolist() == list(range(data.train_slices))
    for batch in epochs[0]:
        assert len(batch["index"]) == 8
        for some in (slice(0, 4), slice(4, 8)):
            assert len(set(batch["case"][some])) == 1
            assert (batch["slice"][some] // 3).tolist() == [0, 1, 2, 3]
        assert "mask" not in batch
        assert batch["label"][:, 0].tolist() == [SOMEWHERE if bag % 2 else 0 for bag in batch["bag"]]


def test_each_epoch_draws_other_bags_and_ranks_share_them(scans):
    data = data_of(scans)
    data.setup("fit")
    case = data.train_cases()

    def drawn(*order: int) -> list[tuple[int, ...]]:
        return [tuple(bag) for bag in BagSampler(case, 5, Order(*order), augmented=False)]

    assert drawn(0, 0) == drawn(0, 0)
    assert {*drawn(0, 0)} != {*drawn(0, 1)}
    assert sorted(drawn(0, 0, 0, 2) + drawn(0, 0, 1, 2)) == sorted(drawn(0, 0))
    assert {len(bag) for bag in drawn(0, 0)} == {4}  # of twelve slices, three bags
    pairs = [*BagSampler(case, 5, Order(0, 3), augmented=True)]
    assert [tuple(index for _, index in bag) for bag in pairs] == drawn(0, 3)
    assert {epoch for bag in pairs for epoch, _ in bag} == {3}


def test_a_segmentation_network_learns_slices_in_their_usual_order(scans):
    data = data_of(scans, labels__supervision="expert")
    data.setup("fit")
    assert any(len(set(batch["case"])) > 2 for batch in data.train_dataloader())


def test_scans_alone_teach_which_slices_show_a_class_and_pseudo_labels_lie_in_those(scans, tmp_path):
    model, data = network(pam=pam_callback(walk__map_size=16, affinity__radius=2.0)), data_of(scans)
    trainer(tmp_path / "fit", 8).fit(model, data)
    with (tmp_path / "fit/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["val/auroc"]) > 0.9  # of slices: the masks of validation know them
    assert float(rows[-1]["val/loss"]) < float(rows[0]["val/loss"])
    assert 0 < (model.subclass_ids > 0).sum() < 6 * DEPTH
    trainer(tmp_path / "pseudo").predict(model, data, return_predictions=False)
    found = right = 0
    for number in range(12):
        said = load_file(tmp_path / f"pseudo/scan{number:02d}.safetensors")["quality"][:, 0].isfinite()
        assert said.any() == (number % 2 == 1)
        found += int(said.sum())
        right += int(said[slices_with(number)].sum())
    assert right >= 0.8 * 6 * 3  # recall
    assert right >= 0.6 * found  # precision; of all slices of these scans a quarter shows the class


def test_without_masks_validation_is_of_scans(scans, tmp_path):
    root = tmp_path / "bare"
    shutil.copytree(scans / "images", root / "images")
    for table in ("labels.csv", "split.csv"):
        shutil.copy(scans / table, root / table)
    trainer(tmp_path / "fit", 2).fit(network(), data_of(root))
    with (tmp_path / "fit/history.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["val/auroc"]) in (0, 0.25, 0.5, 0.75, 1)  # two scans with the class, two without
    assert float(row["val/loss"]) > 0


def test_a_continued_run_equals_an_uninterrupted_one(scans, tmp_path):
    trainer(tmp_path / "whole", 3).fit(network(), data_of(scans, augment=Augmentation()))
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path / "cut", 3, Die(2, 1)).fit(network(), data_of(scans, augment=Augmentation()))
    torch.manual_seed(99)
    last = tmp_path / "cut/checkpoints/last.ckpt"
    again = network(), data_of(scans, augment=Augmentation())
    trainer(tmp_path / "cut", 3).fit(*again, ckpt_path=last, weights_only=True)
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert states[0]["state_dict"]["subclass_ids"].any()
    assert same_state(states[0]["state_dict"], states[1]["state_dict"])
