"""A training that diverges ends at once, in one message, and leaves the checkpoints before it as they were."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyBackbone, tiny_phantom
from torch.utils.data import DataLoader

from weakmedsam.callbacks.divergence import EVERY, EndDiverged
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.errors import DivergenceError
from weakmedsam.metrics.image_labels import LabelScores


class Line(LightningModule):
    """One weight; the loss or the weight is spoilt at a step."""

    def __init__(self, spoil="loss", at=(1, 2), value=float("nan")):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.spoil, self.at, self.value = spoil, at, value

    def due(self, batch_idx):
        return (self.current_epoch, batch_idx) == self.at

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch).mean()
        return loss * self.value if self.spoil == "loss" and self.due(batch_idx) else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.spoil == "weight" and self.due(batch_idx):
            self.weight.data.fill_(self.value)

    def validation_step(self, batch, batch_idx):
        spoilt = self.spoil == "validation" and self.current_epoch == self.at[0]
        self.log("val/loss", (self.weight * batch).mean() * (self.value if spoilt else 1.0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)

    def train_dataloader(self):
        return DataLoader(torch.ones(4, 1))

    val_dataloader = train_dataloader


def fit(folder, module, **changes):
    kept = ModelCheckpoint(folder / "checkpoints", "last", save_on_train_epoch_end=True, enable_version_counter=False)
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "num_sanity_val_steps": 0,
    }
    settings |= {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [EndDiverged(), kept],
    }
    Trainer(default_root_dir=folder, **settings | changes).fit(module)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("loss", r"the loss is -?(nan|inf) in epoch 1, step 2 \(learning rate 0\.25\)"),
        ("weight", "weights are NaN or infinite in epoch 1"),
        ("validation", "the loss in validation is -?(nan|inf) in epoch 1"),
    ],
)
def test_it_ends_at_once_and_the_checkpoint_before_it_is_kept(tmp_path, spoil, value, said):
    at = (1, 2) if spoil != "weight" else (1, 3)  # the epoch's last step: no loss tells what it made of the weights
    with pytest.raises(DivergenceError, match=f"{tmp_path.name} has diverged: {said}.*[Ll]ower.*learning_rate"):
        fit(tmp_path, Line(spoil, at, value))
    (kept,) = (tmp_path / "checkpoints").iterdir()
    held = torch.load(kept, weights_only=True)
    assert held["epoch"] == 0
    assert all(value.isfinite().all() for value in held["state_dict"].values())


def test_a_training_that_does_not_diverge_is_left_alone(tmp_path):
    fit(tmp_path, Line("nothing"))
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


def test_on_a_gpu_or_several_ranks_it_is_asked_now_and_then_and_before_a_checkpoint(tmp_path):
    asked = []

    def decide(value, all):  # noqa: A002
        asked.append(value)
        return value

    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    trainer = SimpleNamespace(
        world_size=2, optimizers=[optimizer], is_last_batch=False, current_epoch=3, default_root_dir=tmp_path,
        strategy=SimpleNamespace(reduce_boolean_decision=decide), state=SimpleNamespace(fn="fit"),
    )  # fmt: skip
    callback = EndDiverged()
    callback.on_train_batch_start(trainer, Line(), None, 0)
    for step in range(EVERY - 1):
        loss = torch.tensor(float("inf") if step == 7 else float("nan") if step > 7 else 1.0)
        callback.on_train_batch_end(trainer, Line(), {"loss": loss}, None, step)
    assert asked == []
    said = r"the loss is inf in epoch 3, step 7 \(learning rate 0\.5\)"
    with pytest.raises(DivergenceError, match=said):
        callback.on_train_batch_end(trainer, Line(), torch.tensor(1.0), None, EVERY - 1)
    with pytest.raises(DivergenceError, match=said):
        callback.on_save_checkpoint(trainer, Line(), {})
    sound = EndDiverged()
    trainer.is_last_batch = True
    sound.on_train_batch_end(trainer, Line(), torch.tensor(1.0), None, 0)
    sound.on_save_checkpoint(trainer, Line(), {})
    assert asked == [True, True, False, False, False]


def test_classification_diverges_by_its_name(tmp_path):
    data = tiny_phantom(tmp_path)
    model = WeakMedSAM(TinyBackbone(), ["lesion", "distractor"], learning_rate=1e6)
    with pytest.raises(DivergenceError, match="has diverged"):
        Trainer(
            default_root_dir=tmp_path, accelerator="cpu", devices=1, max_epochs=4, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[EndDiverged()],
        ).fit(model, data)  # fmt: skip


def test_scores_of_what_is_no_number_are_no_numbers():
    scores = LabelScores(["a", "b"])
    scores.update(torch.tensor([[float("nan"), 1.0], [0.5, -1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    found = scores.finish()
    assert found["auroc/a"].isnan()
    assert float(found["auroc/b"]) == float(found["auroc"]) == 1.0
