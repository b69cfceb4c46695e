"""The segmentation stage on tiny real networks."""

import csv
import json
import math
import re

import pytest
import torch
from lightning import seed_everything
from segmenters import (
    CLASSES,
    ORACLE,
    SIZE,
    UNET,
    Disks,
    features,
    segmenter,
    trainer,
)
from torch import nn

from weakmedsam.contracts import IGNORE, Frame
from weakmedsam.errors import CheckpointError, ConfigError
from weakmedsam.segmentation.loss import Loss, segmentation_loss
from weakmedsam.segmentation.module import Segmenter, build_network, network_signature

# Loss


def loss_of(logits, target, kept=None, background_weight=1.0, dice_weight=0.0):
    kept = target != IGNORE if kept is None else kept
    return segmentation_loss(logits, target, kept, Loss(background_weight, dice_weight))


def test_loss_is_the_weighted_cross_entropy_of_kept_pixels():
    logits = torch.tensor([[[[2.0, 0.0, 5.0]], [[0.0, 1.0, 5.0]]]])
    target = torch.tensor([[[0, 1, IGNORE]]])
    background, organ = math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1))
    assert loss_of(logits, target).item() == pytest.approx((background + organ) / 2)
    want = (10 * background + organ) / 11
    assert loss_of(logits, target, background_weight=10.0).item() == pytest.approx(want)


def test_dice_part_falls_as_the_prediction_gets_better():
    target = torch.zeros(2, 4, 4, dtype=torch.int64)
    target[0, :2] = 1
    right = 20.0 * nn.functional.one_hot(target, 3).movedim(-1, 1)
    extra = [loss_of(x, target, dice_weight=1.0) - loss_of(x, target) for x in (right, 0 * right, -right)]
    assert extra[0] < extra[1] < extra[2]


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_pixels_left_out_do_not_change_the_loss(dice_weight):
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    target[:, :2] = IGNORE
    other_logits, other_target = logits.clone(), target.clone()
    other_logits[:, :, :2], other_target[:, :2] = 7.0, 2
    kept = target != IGNORE
    want = loss_of(logits, target, kept, dice_weight=dice_weight)
    assert loss_of(other_logits, other_target, kept, dice_weight=dice_weight).equal(want)
    assert not loss_of(other_logits, other_target, dice_weight=dice_weight).equal(want)


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_a_batch_without_a_kept_pixel_has_loss_and_gradient_zero(dice_weight):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = loss_of(logits, torch.full((2, 4, 4), IGNORE), dice_weight=dice_weight)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_uncertain_pixels_are_left_out_from_the_threshold_down():
    model = segmenter(loss=Loss(ignore_below=0.5, dice_weight=0.0))
    logits = torch.zeros(1, 3, 1, 3)
    logits[0, 1, 0] = torch.tensor([3.0, -1.0, 4.0])
    target, confidence = torch.tensor([[[1, 1, 1]]]), torch.tensor([[[0.5, 0.49, 1.0]]])
    loss = model._loss(logits, {"target": target, "confidence": confidence})
    assert loss == loss_of(logits[..., ::2], target[..., ::2])


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_slices_of_low_quality_are_left_out(dice_weight):
    model = segmenter(loss=Loss(min_quality=0.5, dice_weight=dice_weight))
    logits, target = torch.randn(3, 3, 4, 4), torch.randint(0, 3, (3, 4, 4))
    loss = model._loss(logits, {"target": target, "quality": torch.tensor([0.5, 0.49, 1.0])})
    assert loss.item() == pytest.approx(loss_of(logits[::2], target[::2], dice_weight=dice_weight).item())


def test_a_slice_of_half_the_quality_weighs_half():
    model = segmenter(loss=Loss(quality_weight=True, dice_weight=0.0))
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    loss = model._loss(logits, {"target": target, "quality": torch.tensor([0.5, 1.0])})
    one, other = (loss_of(logits[i : i + 1], target[i : i + 1]) for i in range(2))
    assert loss.item() == pytest.approx(((0.5 * one + other) / 1.5).item(), rel=1e-5)
    with_dice = segmenter(loss=Loss(quality_weight=True, dice_weight=1.0))
    batch = {"target": target, "quality": torch.tensor([0.0, 1.0])}
    only = loss_of(logits[1:], target[1:], dice_weight=1.0).item()
    assert with_dice._loss(logits, batch).item() == pytest.approx(only, rel=1e-5)


def test_a_trusted_slice_weighs_as_much_as_the_setting_says():
    model = segmenter(loss=Loss(trusted_weight=4.0, dice_weight=0.0))
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    loss = model._loss(logits, {"target": target, "trusted": torch.tensor([True, False])})
    one, other = (loss_of(logits[i : i + 1], target[i : i + 1]) for i in range(2))
    assert loss.item() == pytest.approx(((4 * one + other) / 5).item(), rel=1e-5)


def test_one_weight_for_all_slices_changes_nothing_and_no_loss_is_below_zero():
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    model = segmenter(loss=Loss(trusted_weight=4.0))
    plain = model._loss(logits, {"target": target}).item()
    all_trusted = model._loss(logits, {"target": target, "trusted": torch.tensor([True, True])}).item()
    assert all_trusted == pytest.approx(plain, rel=1e-4)
    right = 50 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    found = model._loss(right, {"target": target, "trusted": torch.tensor([True, False])}).item()
    assert found == pytest.approx(0, abs=1e-4)


# Settings


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Loss(background_weight=0.0), "model.loss.background_weight is 0"),
        (lambda: Loss(dice_weight=-1.0), "model.loss.dice_weight is -1"),
        (lambda: Loss(min_quality=-0.5), "model.loss.min_quality is -0.5"),
        (lambda: Loss(ignore_below=1.5), "model.loss.ignore_below is 1.5"),
        (lambda: segmenter(warmup=1.0), "model.warmup is 1"),
        (lambda: segmenter(slices_per_step=0), "model.slices_per_step is 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_key(make, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        make()


@pytest.mark.parametrize("classes", [("liver",), CLASSES, ("a", "b", "c", "d")])
def test_the_network_is_built_for_slices_and_as_many_classes_as_there_are_names(classes):
    model = segmenter(classes=classes)
    assert model(torch.rand(2, 1, SIZE, SIZE)).shape == (2, len(classes) + 1, SIZE, SIZE)


def test_the_networks_other_arguments_reach_it():
    narrow, wide = (build_network(UNET, {"features": features(width)}, 2) for width in (4, 8))
    assert network_signature(narrow) != network_signature(wide)
    default = Segmenter(ORACLE, ["liver"])  # without other arguments
    assert default.network.channels == 2


@pytest.mark.parametrize("name", ["monai.networks.nets.NoSuchNet", "no_such_package.Net", "BasicUNet", ""])
def test_an_unknown_network_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"model\.network: '{name}' cannot be built.*BasicUNet$"):
        segmenter(name)


@pytest.mark.parametrize("arguments", [{"featuers": [8]}, {"out_channels": 3}])
def test_an_argument_the_network_does_not_take_is_refused_with_both_names(arguments):
    (argument,) = arguments
    with pytest.raises(ConfigError, match=rf"model\.network_args: {UNET} does not take .*{argument}"):
        segmenter(network_args=arguments)


def test_a_network_that_gives_something_else_is_refused():
    with pytest.raises(ConfigError, match="gives 5 channels; 2 classes"):
        segmenter("segmenters.Deaf")(torch.rand(1, 1, SIZE, SIZE))
    with pytest.raises(ConfigError, match="gives list channels; 2 classes"):
        segmenter("segmenters.Supervised")(torch.rand(1, 1, SIZE, SIZE))


def test_data_of_other_classes_and_an_endless_run_are_refused(tmp_path):
    model = segmenter(classes=("liver", "kidney"))
    with pytest.raises(ConfigError, match=r"liver.*bright"):
        trainer(tmp_path).validate(model, datamodule=Disks(), verbose=False)
    with pytest.raises(ConfigError, match="max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(segmenter(), datamodule=Disks())


# A run


@pytest.mark.parametrize("has_val_masks", [True, False])
def test_training_finds_the_disks_and_logs_what_it_scored_against(tmp_path, has_val_masks):
    seed_everything(0)
    run = trainer(tmp_path, max_epochs=3, num_sanity_val_steps=0)
    run.fit(segmenter(learning_rate=1e-2), datamodule=Disks(has_val_masks))
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    # Untrained it is 0.07, and whoever does not learn one of the two classes stays at 0.5 or below; three
    # seeds reached 0.98, 0.98 and 0.81.
    assert logged["val/score"] > 0.6
    name, other = ("val/dice", "val/agreement") if has_val_masks else ("val/agreement", "val/dice")
    assert logged[name] == logged["val/score"]
    classes = [logged[f"{name}/bright"], logged[f"{name}/dark"]]
    assert sum(classes) / 2 == pytest.approx(logged["val/score"])
    assert other not in logged
    assert ("val/loss" in logged) is not has_val_masks


def test_a_checkpoint_comes_back_safely_and_a_foreign_one_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    model = segmenter()
    run.fit(model, datamodule=Disks())
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path, weights_only=True)
    saved = torch.load(path, weights_only=True)
    # The command line would let them override what the user typed.
    assert "hyper_parameters" not in saved

    def validate(other, data=None):
        run = trainer(tmp_path)
        run.validate(other, datamodule=data or Disks(), ckpt_path=path, weights_only=True, verbose=False)

    again = segmenter()
    assert not all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    validate(again)
    for old, new in zip(model.network.parameters(), again.network.parameters(), strict=True):
        assert old.equal(new)
    with pytest.raises(CheckpointError, match=r"BasicUNet.*the settings say Oracle"):
        validate(segmenter(ORACLE))
    with pytest.raises(CheckpointError, match=r"BasicUNet.*the settings say BasicUNet"):
        validate(segmenter(network_args={"features": features(4)}))
    with pytest.raises(CheckpointError, match=r"\['bright', 'dark'\].*\['liver'\]"):
        trainer(tmp_path).test(segmenter(classes=("liver",)), Liver(), ckpt_path=path)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.5"}, path)
    with pytest.raises(CheckpointError, match="not of a Segmenter"):
        validate(segmenter())


class Liver(Disks):
    class_names = ("liver",)

    def __init__(self):
        super().__init__(volumes=[volume("a", torch.zeros(2, 9, 9))])


# Test


def volume(case, seen, mask=None):
    """A volume in whose image the oracle sees ``seen``; slices of odd shape, padded to a square."""
    depth, height, width = seen.shape
    side = max(height, width)
    image = torch.zeros(depth, 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    image[:, 0, top : top + height, left : left + width] = seen / 2
    return {
        "image": image,
        "case": case,
        "index": 0,
        "frame": Frame(height, width, side, side),
        "spacing": (3.0, 1.0, 2.0),
        "mask": (seen if mask is None else mask).long(),
    }


def organ(z, shape=(5, 17, 12)):
    mask = torch.zeros(shape)
    mask[z : z + 2, 3:7, 2:6] = 1
    mask[z, 10:14, 5:9] = 2
    return mask


def test_the_test_scores_volumes_and_writes_tables_and_pictures(tmp_path):
    shifted, missed = organ(2), organ(1)
    missed[missed == 2] = 0
    volumes = [
        volume("right", organ(1)),
        volume("shifted", shifted, organ(1)),
        volume("missed", missed, organ(1)),
        volume("right", organ(1)),  # a sampler that pads brings a case twice
    ]
    run = trainer(tmp_path)
    logged = run.test(segmenter(ORACLE, slices_per_step=2), Disks(volumes=volumes), verbose=False)[0]
    with (tmp_path / "cases.csv").open() as file:
        rows = {(row["case"], row["class"]): row for row in csv.DictReader(file)}
    assert len(rows) == 6
    assert float(rows["right", "dark"]["dice"]) == 1
    assert float(rows["right", "bright"]["hd95_mm"]) == 0
    assert float(rows["shifted", "bright"]["dice"]) == 0.5
    assert float(rows["shifted", "dark"]["assd_mm"]) == 3  # one slice on
    assert rows["missed", "dark"]["missed"] == "True"
    assert float(rows["missed", "dark"]["hd95_mm"]) == pytest.approx(math.hypot(5 * 3, 17 * 1, 12 * 2))
    assert rows["missed", "dark"]["slice_assd_mm"] == ""
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cases"] == 3
    assert summary["classes"]["dark"]["missed"] == 1
    assert summary["classes"]["bright"]["volume"]["dice"]["mean"] == pytest.approx(2.5 / 3)
    assert logged["test/dice_bright"] == pytest.approx(2.5 / 3)
    assert logged["test/dice"] == pytest.approx((2.5 / 3 + 1 / 3) / 2)
    assert {"test/jaccard", "test/assd_mm", "test/hd95_mm_dark"} <= set(logged)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    names = {f"pictures/{case}.png" for case in ("right", "shifted", "missed")}
    assert files == {"cases.csv", "summary.json"} | names


def test_one_class_works_as_many_do(tmp_path):
    mask = (organ(1) == 1).float()
    data = Liver()
    data.volumes = [volume("a", 2 * mask, mask)]
    run = trainer(tmp_path)
    assert run.test(segmenter(ORACLE, ["liver"]), data, verbose=False)[0]["test/dice"] == 1


def test_without_anything_to_learn_from_the_setting_is_named():
    network = {"network": "monai.networks.nets.BasicUNet", "network_args": {"features": [2] * 6}}
    model = Segmenter(class_names=["a"], **network)
    with pytest.raises(ConfigError, match=r"data\.labels\.supervision is image"):
        model.training_step({"image": torch.zeros(1, 1, 32, 32)}, 0)
