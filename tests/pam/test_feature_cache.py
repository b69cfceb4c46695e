"""Stored features against the network they are of: the same Dice, without encoding."""

import json

import pytest
import torch
from lightning import Trainer
from pam_settings import pam_callback
from tiny import TinyBackbone, tiny_phantom

from weakmedsam.callbacks import KeepFeatures
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.pam import prompt_masks as answers
from weakmedsam.pam.affinity import grid_points
from weakmedsam.pam.feature_cache import StoredPrompts, read_head, read_parts, score_setting

SETTINGS = {
    "prompts.grid": 3,
    "walk.map_size": 16,
    "affinity.radius": 3.0,
    "affinity.contrast": 20.0,
    "threshold.value": 0.6,
}


def validate(folder, data, pam, *callbacks):
    torch.manual_seed(0)
    model = WeakMedSAM(TinyBackbone(), data.class_names, pam=pam)
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.validate(model, data, verbose=False)
    return model, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    data = tiny_phantom(folder)
    _, figures = validate(folder / "kept", data, pam_callback(**SETTINGS), KeepFeatures([2, 5]))
    return folder, data, figures


def test_the_runs_own_settings_give_the_runs_own_dice(stored):
    folder, data, figures = stored
    ours = score_setting(folder / "kept", {})
    assert ours.keys() == {name for name in figures if "_dice" in name}
    for name, value in ours.items():
        assert value == pytest.approx(figures[name], abs=0.002 if "pam" in name else 1e-6), name
    assert json.loads((folder / "kept/scores.json").read_text())["val/pam_dice"] == figures["val/pam_dice"]
    head = read_head(folder / "kept")
    assert head.cases == data.val_cases
    assert sorted(torch.cat([part.rows for part in read_parts(folder / "kept")]).tolist()) == list(
        range(len(head.cases))
    )


@pytest.mark.parametrize("grid", [3, 5])
def test_other_settings_give_what_a_new_run_with_them_gives(stored, grid):
    folder, data, figures = stored
    changes = {
        "affinity.beta": 0.5,
        "walk.steps": 16,
        "affinity.radius": 2.0,
        "affinity.contrast": 2.0,
        "threshold.value": 0.3,
        "threshold.sigma": 2.0,
    }
    changes |= {"prompts.grid": grid}
    _, theirs = validate(folder / f"new{grid}", data, pam_callback(**SETTINGS | changes))
    ours = score_setting(folder / "kept", changes)
    assert theirs["val/pam_dice"] != pytest.approx(figures["val/pam_dice"], abs=0.006)  # they do change something
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], abs=0.002), name


def test_logit_drops_are_stored_with_the_masks_where_the_run_occludes(stored, tmp_path):
    folder, data, _ = stored
    pam = SETTINGS | {"occlusion.weight": 0.05, "walk.steps": 0, "threshold.sigma": 0.0}
    changes = {"occlusion.weight": 1.0, "occlusion.share": 0.4, "prompts.grid": 5}
    _, figures = validate(tmp_path / "kept", data, pam_callback(**pam), KeepFeatures([5]))
    _, theirs = validate(tmp_path / "new", data, pam_callback(**pam | changes))
    assert figures["val/pam_dice"] != pytest.approx(theirs["val/pam_dice"], abs=0.006)
    for run, changed in ((figures, {}), (theirs, changes)):
        ours = score_setting(tmp_path / "kept", changed)
        assert ours["val/pam_dice"] == pytest.approx(run["val/pam_dice"], abs=0.004)
    with pytest.raises(DataError, match=r"occlusion\.weight: .*kept was written with weight 0"):
        score_setting(folder / "kept", {"occlusion.weight": 0.5})


def test_chunks_change_nothing(stored, monkeypatch):
    folder, _, _ = stored
    whole = score_setting(folder / "kept", {"prompts.grid": 5}, chunk=50)
    assert score_setting(folder / "kept", {"prompts.grid": 5}, chunk=1) == pytest.approx(whole)
    monkeypatch.setattr(answers, "DECODED_AT_ONCE", 30)  # the grid is asked for in parts
    assert score_setting(folder / "kept", {"prompts.grid": 5}, chunk=4) == pytest.approx(whole)


def test_a_slice_is_not_encoded_again(stored):
    prompts = torch.full((2, 4, 8, 8), 128, dtype=torch.uint8)
    prompts[1] = 255
    prompts[:, 3] = 0
    stand_in = StoredPrompts(prompts, 32)
    large = StoredPrompts(prompts.new_zeros(1, 900, 8, 8), 256)  # where a rounded distance is not 0
    assert large.masks_at_points(large.stand_ins(), grid_points(30, 256)).shape == (1, 900, 8, 8)
    points = grid_points(2, 32)
    logits = stand_in.masks_at_points(stand_in.stand_ins()[[1, 0]], points[1:])  # as in parts of the grid
    assert torch.allclose(logits.sigmoid() * 255, prompts[[1, 0], 1:].float(), atol=0.3)
    assert logits.isfinite().all()
    with pytest.raises(NotImplementedError):
        stand_in.encode(torch.zeros(1, 1, 32, 32))
    with pytest.raises(DataError, match="a grid of 2 x 2 prompts are stored; others are asked for"):
        stand_in.masks_at_points(stand_in.stand_ins(), points + 1)


def test_what_cannot_be_scored_is_refused(stored, tmp_path):
    folder, data, _ = stored
    with pytest.raises(DataError, match=r"model\.pam\.walk\.map_size decides what is stored"):
        score_setting(folder / "kept", {"walk.map_size": 32})
    with pytest.raises(
        DataError, match=r"grid: 4 is not stored in .*kept, \[2, 3, 5\] are; name it in .*features\.yaml"
    ):
        score_setting(folder / "kept", {"prompts.grid": 4})
    with pytest.raises(ConfigError, match=r"KeepFeatures\.grids is 0"):
        KeepFeatures([0])
    with pytest.raises(ConfigError, match=r"model\.pam\.affinity\.radius is 0\.5"):
        score_setting(folder / "kept", {"affinity.radius": 0.5})
    with pytest.raises(DataError, match="no stored features; `make sweep SWEEP=pam`"):
        score_setting(tmp_path, {})
    for pam in (None, pam_callback(**SETTINGS | {"affinity.kind": "summed"})):
        with pytest.raises(ConfigError, match=r"affinity\.kind: per_prompt"):
            validate(tmp_path, data, pam, KeepFeatures())
