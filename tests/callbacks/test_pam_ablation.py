import csv

import pytest
import torch
from classifiers import module, trainer
from tiny import TinyBackbone, tiny_phantom

from weakmedsam.callbacks import CompareRefinements
from weakmedsam.callbacks.pam_ablation import Remembering, RememberingDrops
from weakmedsam.classification.cam import Pooling
from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.errors import ConfigError
from weakmedsam.pam.prompt_masks import PamBatch

TINY = {"walk.map_size": 16, "affinity.radius": 2.0}


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_each_setting_scores_as_it_does_alone_and_prompts_are_put_once(tmp_path, monkeypatch):
    tiny_phantom(tmp_path).prepare_data()
    asked = []
    answer = TinyBackbone.masks_at_points
    monkeypatch.setattr(
        TinyBackbone, "masks_at_points", lambda self, *question: asked.append(1) or answer(self, *question)
    )
    trainer(tmp_path / "alone").test(module(pam=True), tiny_phantom(tmp_path), verbose=False)
    once = len(asked)
    asked.clear()
    compare = CompareRefinements(
        {"same": TINY, "walkless": {**TINY, "walk.steps": 0}, "long": {**TINY, "walk.steps": 40}}
    )
    run = trainer(tmp_path / "both", 3, compare)
    run.test(module(), tiny_phantom(tmp_path), verbose=False)
    assert 0 < len(asked) == once  # three settings, and as many questions as one
    rows = read(tmp_path / "both/refinements.csv")
    assert {row["setting"] for row in rows} == {"same", "walkless", "long"}
    assert list(rows[0]) == ["setting", "case", "class", "cam_dice", "pam_dice"]
    alone = {(row["case"], row["class"]): row["pam_dice"] for row in read(tmp_path / "alone/cam_cases.csv")}
    assert alone == {(row["case"], row["class"]): row["pam_dice"] for row in rows if row["setting"] == "same"}
    means = {(row["setting"], row["class"]): row for row in read(tmp_path / "both/refinements_mean.csv")}
    assert means["walkless", "cyst"]["pam_dice"] != means["long", "cyst"]["pam_dice"]
    assert len(means) == 6


@pytest.mark.parametrize(("affinities", "times"), [(["per_prompt", "intensity"], 1), (["intensity", "none"], 0)])
def test_beside_a_local_encoder_slices_are_encoded_once_if_some_setting_prompts(tmp_path, affinities, times):
    local = LocalEncoder(32, cells=8, width=16)
    model, data = module(local_encoder=local, pooling=Pooling("log_sum_exp")), tiny_phantom(tmp_path)
    compare = CompareRefinements({name: {**TINY, "affinity.kind": name} for name in affinities})
    trainer(tmp_path / "both", 3, compare).test(model, data, verbose=False)
    labelled = sum(int(batch["label"].any(dim=1).sum()) for batch in data.test_dataloader())
    assert labelled > 0
    assert model.backbone.encodings == times * labelled
    assert len(read(tmp_path / "both/refinements_mean.csv")) == 4


def test_an_answer_from_memory_is_the_answer():
    backbone = TinyBackbone().eval()
    memory = Remembering(backbone)
    embedding, points = torch.randn(2, 16, 8, 8), torch.rand(3, 2) * 32
    with torch.no_grad():
        first = memory.masks_at_points(embedding, points)
        assert torch.equal(first, backbone.masks_at_points(embedding, points))
        assert torch.equal(memory.masks_at_points(embedding.clone(), points.clone()), first)
        assert memory.asked == 1
        memory.masks_at_points(embedding, points + 1)
        memory.masks_at_points(embedding.flip(0), points)
    assert memory.asked == 3
    assert not list(memory.parameters())


def test_logit_drops_are_asked_once_for_a_slice_and_its_masks():
    def drops(some, masks):
        return torch.stack([some.image.mean() + masks.mean((2, 3))], dim=1)

    memory = RememberingDrops(drops)
    box = torch.tensor([0, 32, 0, 32]).expand(2, 4)
    slices = PamBatch(torch.rand(2, 1, 32, 32), torch.rand(2, 1, 8, 8), None, torch.ones(2, 1), box)
    masks = torch.rand(2, 3, 8, 8)
    first = memory(slices, masks)
    assert first.shape == (2, 1, 3)
    assert memory.asked == 2
    assert torch.equal(memory(slices, masks), first)
    assert memory.asked == 2
    assert not torch.equal(memory(slices, masks.flip(0)), first)
    assert memory.asked == 4


def test_a_setting_that_is_wrong_is_named():
    with pytest.raises(ConfigError, match=r"settings\.long: walk\.stepps is no setting.*walk\.steps"):
        CompareRefinements({"long": {"walk.stepps": 3}})
    with pytest.raises(ConfigError, match=r"settings\.wide: model\.pam\.affinity\.radius is 0"):
        CompareRefinements({"wide": {"affinity.radius": 0}})
