import csv

import pytest
import torch
from classifiers import Die, explorer, module, trainer
from lightning.pytorch import Callback
from tiny import TinyBackbone, same_state, tiny_phantom

from data_modules.augmentation import Augmentation
from weakmedsam.backbones.efficient_sam import EfficientSAM
from weakmedsam.backbones.sam import SAM
from weakmedsam.backbones.samus import SAMUS
from weakmedsam.callbacks import PromptAffinityMining, SubClassExploration
from weakmedsam.classification.cam import Pooling, mirror_axes, pool_evidence
from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.errors import CheckpointError, ConfigError
from weakmedsam.geometry import inside_box, min_max
from weakmedsam.pam.config import Affinity, Prompts


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    tiny_phantom(folder).prepare_data()
    return folder


def test_activation_over_mirrored_views_follows_the_image_when_it_is_mirrored():
    model = module(local_encoder=LocalEncoder(32, cells=8, width=4)).eval()
    image, box = torch.rand(2, 1, 32, 32), torch.tensor([[0, 32, 0, 32]]).expand(2, 4)
    with torch.no_grad():
        plain, mirrored = model(image, box), model(image.flip(-1), box)
        assert not torch.allclose(plain.cam, mirrored.cam.flip(-1), atol=0.05)
        model.views = mirror_axes(columns=True, rows=True)
        averaged = model(image, box)
        for axes in model.views:
            assert torch.allclose(averaged.cam, model(image.flip(axes), box).cam.flip(axes), atol=1e-5)
    # Logits are those of the plain image: it is what training has seen them pooled from.
    assert torch.equal(averaged.logits, plain.logits)


def test_training_learns_from_image_level_labels(scans, tmp_path):
    run = trainer(tmp_path, 8)
    run.fit(module(), tiny_phantom(scans))
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(8))
    assert float(rows[-1]["train/class_loss"]) < 0.9 * float(rows[0]["train/class_loss"])
    assert float(rows[-1]["train/subclass_loss"]) < float(rows[0]["train/subclass_loss"])
    assert 0 <= float(rows[-1]["val/auroc/lesion"]) <= 1
    assert 0 <= float(rows[0]["sce/kept/cyst"]) <= 1


def test_operating_points_are_those_of_the_last_validation_of_a_training(scans, tmp_path):
    run, model, data = trainer(tmp_path, 2), module(), tiny_phantom(scans)
    run.fit(model, data)
    learnt = model.operating_points.clone()
    assert learnt.gt(0).all()
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=False)["state_dict"]["operating_points"].equal(
        learnt
    )
    run.validate(model, data, verbose=False)
    assert model.label_scores.points.equal(learnt)  # the same slices and weights
    run.test(model, data, verbose=False)
    assert not model.label_scores.points.equal(learnt)
    assert model.operating_points.equal(learnt)


def test_the_loss_is_the_papers(scans):
    data = tiny_phantom(scans)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert "mask" not in batch
    assert "target" not in batch
    model = module(pooling=Pooling("average"))
    model.log = lambda *args, **kwargs: None
    features = model.backbone.encode(batch["image"]).features
    pooled = pool_evidence(features, inside_box(batch["box"], 32, features.shape[-1]), Pooling("average"))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(pooled @ model.class_head.weight.flatten(1).T, batch["label"])
    assert torch.allclose(model.training_step(batch, 0)["loss"], expected)
    model.subclass_ids = torch.zeros(data.train_slices, 2, dtype=torch.int64)
    model.subclass_ids[batch["index"]] = batch["label"].long() * 2
    targets = torch.zeros(len(pooled), 7)
    targets[:, 2], targets[:, 5] = batch["label"][:, 0], batch["label"][:, 1]
    targets[:, 0] = 1 - batch["label"].amax(1)
    second = bce(pooled @ model.subclass_head.weight.flatten(1).T, targets)
    assert torch.allclose(model.training_step(batch, 0)["loss"], expected + 0.5 * second)


@pytest.mark.parametrize("pooling", ["average", "log_sum_exp"])
def test_logits_are_the_pooled_evidence_whichever_comes_first(pooling):
    model, scan = module(pooling=Pooling(pooling)), torch.tensor([[0, 32, 0, 32], [4, 20, 8, 32]])
    features = torch.randn(2, model.feature_dim, 8, 8, generator=torch.Generator().manual_seed(0))
    for head in (model.class_head, model.subclass_head):
        expected = model.pool(head(features), scan)[None]
        assert torch.allclose(model.logits(head, features, scan), expected, atol=1e-6)
        half = model.logits(head.bfloat16(), features.bfloat16(), scan)  # trainer.precision: bf16-true
        assert half.dtype == torch.float32
        assert torch.allclose(half, expected, atol=0.02)


@pytest.mark.parametrize("pooling", ["average", "log_sum_exp"])
def test_members_learn_alone_and_speak_together(scans, pooling):
    """Losses are means over members; logits and evidence of the class are the members' mean."""
    data = tiny_phantom(scans)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = module(local_encoder=LocalEncoder(32, cells=8, width=8, members=3), pooling=Pooling(pooling)).eval()
    alone = module(local_encoder=LocalEncoder(32, cells=8, width=8, members=1), pooling=Pooling(pooling)).eval()
    for one in (model, alone):
        one.log = one.log_dict = lambda *args, **kwargs: None
        one.subclass_ids = torch.zeros(data.train_slices, 2, dtype=torch.int64)
        one.subclass_ids[batch["index"]] = batch["label"].long() * 2
    parts, losses, maps = [], [], []
    for member in range(3):
        with torch.no_grad():
            for part in ("local_encoder", "class_head", "subclass_head"):
                ours, theirs = (getattr(one, part).parameters() for one in (alone, model))
                for own, held in zip(ours, theirs, strict=True):
                    own.copy_(held.unflatten(0, (3, -1))[member])
            parts.append(alone(batch["image"], batch["box"]).logits)
            losses.append(alone.training_step(batch, 0)["loss"])
            maps.append(alone.class_head(alone.local_encoder(batch["image"])))
    with torch.no_grad():
        seen = model(batch["image"], batch["box"])
        assert torch.allclose(seen.logits, torch.stack(parts).mean(dim=0), atol=1e-5)
        assert torch.allclose(model.evidence(batch["image"], batch["box"]), seen.logits, atol=1e-5)
        assert torch.allclose(seen.cam, min_max(torch.stack(maps).mean(dim=0)), atol=1e-4)
        assert torch.allclose(model.training_step(batch, 0)["loss"], torch.stack(losses).mean(), atol=1e-5)


def test_pooling_is_the_one_chosen_and_leaves_the_padding_out():
    evidence = torch.tensor([[[[1.0, 5.0], [2.0, 3.0]], [[0.0, -1.0], [-2.0, -3.0]]]])
    whole, upper = torch.tensor([[0, 32, 0, 32]]), torch.tensor([[0, 16, 0, 32]])
    model = module(pooling=Pooling("top_k", top_share=0.25))
    assert model.backbone.image_size == 32
    assert model.pool(evidence, whole).tolist() == [[5.0, 0.0]]
    assert module(pooling=Pooling("average")).pool(evidence, upper).tolist() == [[3.0, -0.5]]
    pixels = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    pixels[..., :16, :] = True
    assert module(pooling=Pooling("average")).pool(evidence, pixels).tolist() == [[3.0, -0.5]]
    sharp = module(pooling=Pooling("log_sum_exp", sharpness=100.0)).pool(evidence, upper)
    assert torch.allclose(sharp, torch.tensor([[5.0, 0.0]]), atol=0.01)
    with pytest.raises(ConfigError, match=r"model\.pooling\.kind: 'max' .*average, top_k, log_sum_exp"):
        Pooling("max")


def test_with_a_local_encoder_the_backbone_only_answers_prompts(scans):
    data = tiny_phantom(scans)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = module(local_encoder=LocalEncoder(32, cells=8, width=16), pooling=Pooling("log_sum_exp"))
    model.log = lambda *args, **kwargs: None
    assert model.class_head.weight.shape[1] == 16
    model.training_step(batch, 0)["loss"].backward()
    assert model.backbone.encodings == 0
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.local_encoder.parameters())
    with torch.no_grad():
        found = model.eval()(batch["image"], batch["box"])
    assert found.cam.shape[-1] == 8
    assert found.embedding is None
    assert model.backbone.encodings == 0
    embedding = model.embedding(found, batch["image"])
    assert torch.equal(embedding, model.backbone.encode(batch["image"]).embedding)


@pytest.mark.parametrize("source", ["bank", "pass"])
def test_a_continued_run_equals_an_uninterrupted_one(scans, tmp_path, source):
    def fresh():
        model = module(explorer(source=source))
        return model, tiny_phantom(scans, augment=Augmentation())

    whole = trainer(tmp_path / "whole")
    whole.fit(*fresh())
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path / "cut", 3, Die(2, 1)).fit(*fresh())
    torch.manual_seed(99)
    last = tmp_path / "cut/checkpoints/last.ckpt"
    trainer(tmp_path / "cut").fit(*fresh(), ckpt_path=last, weights_only=True)
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert states[0]["state_dict"]["subclass_ids"].max() == 3
    assert same_state(states[0]["state_dict"], states[1]["state_dict"])
    columns = []
    for name in ("whole", "cut"):
        with (tmp_path / name / "history.csv").open() as file:
            columns.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    assert columns[0] == columns[1]


def test_ids_reach_the_loss_from_the_first_epoch_with_persistent_workers(scans, tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ids = pl_module.subclass_ids[batch["index"]]
            seen.append(bool(((ids > 0) == (batch["label"] > 0)).all()))

    trainer(tmp_path, 2, Watch()).fit(module(), tiny_phantom(scans, num_workers=1))
    assert seen
    assert all(seen)


def test_a_checkpoint_of_another_model_is_refused_with_both_named(scans, tmp_path):
    trainer(tmp_path, 1).fit(module(), tiny_phantom(scans))
    last = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(CheckpointError, match=r"sub_classes 3, this run has 5"):
        trainer(tmp_path / "b", 2).fit(module(explorer(5)), tiny_phantom(scans), ckpt_path=last)
    other = module()
    other.backbone.name = "samus"
    with pytest.raises(CheckpointError, match=r"backbone 'tiny', this run has 'samus'"):
        trainer(tmp_path / "c", 2).fit(other, tiny_phantom(scans), ckpt_path=last)
    few = WeakMedSAM(TinyBackbone(), ["lesion"], sce=explorer())
    with pytest.raises(CheckpointError, match=r"class_names \['lesion', 'cyst'\], this run has \['lesion'\]"):
        trainer(tmp_path / "d", 2).fit(few, tiny_phantom(scans, classes={"lesion": [1]}), ckpt_path=last)


def test_a_backbone_of_another_shape_is_refused_with_the_first_differing_keys(scans, tmp_path):
    trainer(tmp_path, 1).fit(module(), tiny_phantom(scans))
    other = module()
    other.backbone.neck = torch.nn.Conv2d(16, 8, 1)
    with pytest.raises(CheckpointError, match=r"(?s)backbone is tiny: .*backbone\.neck\.weight.*checkpoint \(16, 16"):
        trainer(tmp_path / "b", 2).fit(other, tiny_phantom(scans), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(CheckpointError, match=r"pooling\.kind 'average', this run has 'top_k'"):
        trainer(tmp_path / "c", 2).fit(
            module(pooling=Pooling("top_k")),
            tiny_phantom(scans),
            ckpt_path=tmp_path / "checkpoints/last.ckpt",
        )


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: module(learning_rate=-1.0), "model.learning_rate is -1"),
        (lambda: module(slices_per_step=0), "model.slices_per_step is 0"),
        (lambda: SubClassExploration(every_n_epochs=-1), "model.sce.every_n_epochs is -1"),
        (lambda: PromptAffinityMining(pictures=0), "model.pam.pictures is 0"),
        (lambda: SAMUS(64, "tiny", "none", last_blocks=-1), "backbone.last_blocks is -1"),
        (lambda: SAM(64, "tiny", "none", points_per_call=0), "backbone.points_per_call is 0"),
        (lambda: EfficientSAM(64, "tiny", "none", trained_blocks=-1), "backbone.trained_blocks is -1"),
    ],
)
def test_numbers_out_of_range_are_refused_by_key(make, key):
    with pytest.raises(ConfigError, match=key):
        make()


def test_a_checkpoint_of_other_training_data_is_refused(scans, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, 2, Die(1, 0)).fit(module(), tiny_phantom(scans, batch_size=40))
    data = tiny_phantom(scans, batch_size=40, labels__only_positive=True)
    with pytest.raises(CheckpointError, match="belongs to another data set or split"):
        trainer(tmp_path / "b", 2).fit(module(), data, ckpt_path=tmp_path / "checkpoints/last.ckpt")


def test_a_one_cycle_schedule_cannot_be_lengthened(scans, tmp_path):
    trainer(tmp_path, 1).fit(module(), tiny_phantom(scans))
    with pytest.raises(CheckpointError, match="one-cycle schedule has 3 steps, this run 6"):
        trainer(tmp_path / "b", 2).fit(module(), tiny_phantom(scans), ckpt_path=tmp_path / "checkpoints/last.ckpt")


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"model\.sce is Callback, which has no sub_classes"):
        module(Callback())
    with pytest.raises(ConfigError, match=r"sce\.source: 'disk' is unknown; choose one of bank, pass"):
        SubClassExploration(source="disk")
    with pytest.raises(ConfigError, match=r"pam\.affinity\.kind: 'both' is unknown"):
        PromptAffinityMining(Prompts(), Affinity("both"))
