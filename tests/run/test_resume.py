"""Going on from a checkpoint: what it holds, what is refused, and that random numbers are those of the first run."""

import contextlib
from pathlib import Path

import pytest
import torch
from commands import run_command
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import same_state, tiny_phantom
from trainings import assert_same_checkpoint

from weakmedsam import cli
from weakmedsam.callbacks.reseed import Reseed, epoch_seed
from weakmedsam.callbacks.resume_guard import KeepSettings, check_settings
from weakmedsam.config_diff import RUN_KEY, data_digest, deciding
from weakmedsam.errors import CheckpointError
from weakmedsam.run.checkpoints import resume_options
from weakmedsam.segmentation.module import Segmenter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(monkeypatch, tmp_path):
    """The command line in this process, without training; returns what it would have trained by."""
    made = []
    monkeypatch.setattr(cli.WeakMedSAMCLI, "_run_subcommand", lambda self, subcommand: made.append(self))

    def run(*words, data="phantom", backbone="pocket"):
        files = ("classify", f"data/{data}", f"backbone/{backbone}")
        configs = [word for name in files for word in ("--config", f"experiments/{name}.yaml")]
        root = ["--trainer.default_root_dir", str(tmp_path)]
        run_command("fit", *configs, *root, *words)
        return made[-1].settings

    return run


@pytest.fixture
def checkpoint(call, tmp_path):
    """A checkpoint of the default settings, as far as settings go."""
    path = tmp_path / "last.ckpt"
    torch.save({RUN_KEY: {"settings": call(), "data": {"cases": 1, "digest": "a"}, "version": "0.2.0"}}, path)
    return path


def test_a_checkpoint_of_version_0_1_is_refused(call, checkpoint):
    held = torch.load(checkpoint, weights_only=True)
    del held[RUN_KEY]["version"]
    torch.save(held, checkpoint)
    with pytest.raises(SystemExit, match=r"last\.ckpt was made by weakmedsam 0\.1, this is 0\.2\.0.*train anew"):
        call("--ckpt_path", str(checkpoint))


SAMUS = {"backbone": "samus"}


@pytest.mark.parametrize(
    ("words", "files", "said"),
    [
        (["--model.learning_rate", "0.5"], {}, "model.init_args.learning_rate: 0.002 -> 0.5"),
        (["--seed_everything", "7"], {}, "seed_everything: 0 -> 7"),
        (["--trainer.max_epochs", "3"], {}, "trainer.max_epochs: 12 -> 3"),
        (["--data.data_dir", "/elsewhere"], {}, "data.init_args.data_dir: data/scans -> /elsewhere"),
        (["--model.sce.every_n_epochs", "0"], {}, "model.init_args.sce.init_args.every_n_epochs: 1 -> 0"),
        ([], {"data": "cardiac"}, "data.class_path: data_modules.phantom.Phantom -> data_modules.cardiac"),
        ([], SAMUS, "backbone.class_path: weakmedsam.backbones.pocket.Pocket -> weakmedsam.backbones.samus"),
    ],
)
def test_other_settings_than_the_checkpoints_are_refused_by_name(call, checkpoint, words, files, said):
    with pytest.raises(SystemExit) as refused:
        call(*words, "--ckpt_path", str(checkpoint), **files)
    told = str(refused.value.code)
    assert "was made by other settings (checkpoint -> this run)" in told
    assert said in told


def test_what_decides_nothing_may_change(call, checkpoint):
    call("--data.num_workers", "0", "--data.prepare.store_dir", "/fast", "--trainer.logger", "false",
         "--trainer.accelerator", "cpu", "--model.pam.pictures", "2", "--preemption.grace", "5",
         "--ckpt_path", str(checkpoint))  # fmt: skip


def test_a_setting_that_the_checkpoints_version_did_not_have_is_no_difference():
    check_settings({RUN_KEY: {"settings": {"model": {"a": 1}}}}, {"model": {"a": 1, "new": 2}}, "last.ckpt")
    check_settings({}, {"model": {"a": 1}}, "last.ckpt")  # of an earlier version
    assert deciding({"model": {"pictures": 1, "a": (1, Path("b"))}, "ckpt_path": "c"}) == {
        "seed_everything": None, "model": {"a": [1, "b"]}, "data": None, "trainer": None,
    }  # fmt: skip


class KilledError(Exception):
    """The run ends here."""


def train(folder, data, epochs=3, last=None, stop=None, callbacks=(), seed=4, deterministic=None):
    """Train a network with dropout; ``stop`` is the epoch after which the run is killed."""
    seed_everything(seed, verbose=False)
    network = Segmenter("monai.networks.nets.BasicUNet", data.class_names, {"features": [8] * 6, "dropout": 0.3})

    class Kill(ModelCheckpoint):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == stop:
                raise KilledError

    trainer = Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, deterministic=deterministic,
        callbacks=[*callbacks, Kill(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)],
    )  # fmt: skip
    with contextlib.suppress(KilledError):
        trainer.fit(network, data, ckpt_path=last, weights_only=True)
    return network.state_dict()


@pytest.mark.parametrize("reseed", [True, False])
def test_dropout_draws_the_same_after_a_kill(tmp_path, reseed):
    data = tiny_phantom(tmp_path, labels__supervision="expert")
    callbacks = [Reseed()] if reseed else []
    whole = train(tmp_path / "whole", data, callbacks=callbacks)
    train(tmp_path / "broken", data, stop=1, callbacks=callbacks)
    torch.rand(17)  # what else drew meanwhile
    broken = train(tmp_path / "broken", data, last=tmp_path / "broken/last.ckpt", callbacks=callbacks)
    assert same_state(whole, broken) == reseed  # the test can fail: without the callback it does


def test_a_continued_run_sees_the_slices_in_the_same_order_with_workers_too(tmp_path):
    data = tiny_phantom(tmp_path, labels__supervision="expert", num_workers=1, batch_size=4)
    whole = train(tmp_path / "whole", data, callbacks=[Reseed()])
    train(tmp_path / "broken", data, stop=1, callbacks=[Reseed()])
    broken = train(tmp_path / "broken", data, last=tmp_path / "broken/last.ckpt", callbacks=[Reseed()])
    assert same_state(whole, broken)


def test_the_same_seed_gives_the_same_network_and_deterministic_changes_nothing_on_processors(tmp_path):
    data = tiny_phantom(tmp_path, labels__supervision="expert")
    found = [train(tmp_path, data, epochs=1, seed=seed, callbacks=[Reseed()]) for seed in (1, 2)]
    try:
        again = train(tmp_path, data, epochs=1, seed=1, callbacks=[Reseed()], deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_state(found[0], again)
    assert not same_state(found[0], found[1])


def test_epochs_and_ranks_draw_differently():
    found = {epoch_seed(seed, epoch, rank) for seed in (0, 1) for epoch in (0, 1) for rank in (0, 1)}
    assert len(found) == 8
    assert all(0 <= seed < 2**32 for seed in found)


def test_other_scans_under_the_same_settings_are_refused(tmp_path):
    data, others = tiny_phantom(tmp_path, labels__supervision="expert"), tiny_phantom(
        tmp_path / "more", labels__supervision="expert", num_volumes=7
    )  # fmt: skip
    train(tmp_path, data, stop=1, callbacks=[KeepSettings({})])
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)[RUN_KEY]
    assert held["data"] == data_digest(data)
    with pytest.raises(CheckpointError, match=r"trained on other data \(6 cases, \w+; now 7 cases, \w+\)"):
        train(tmp_path, others, last=tmp_path / "last.ckpt", callbacks=[KeepSettings({})])


def test_the_digest_of_the_data_holds_no_path(tmp_path):
    digests = []
    for name in ("a", "b"):
        data = tiny_phantom(tmp_path / name)
        data.prepare_data()
        data.setup("fit")
        digests.append(data_digest(data))
    assert digests[0] == digests[1]


def test_where_the_last_checkpoint_is_cut_the_training_from_the_best_one_comes_to_the_same(tmp_path):
    data = tiny_phantom(tmp_path, labels__supervision="expert")

    def best(folder):  # of the highest loss: the first epoch
        return ModelCheckpoint(folder, "best", monitor="train/loss", mode="max", save_on_train_epoch_end=True,
                               enable_version_counter=False)  # fmt: skip

    folders = [tmp_path / name / "checkpoints" for name in ("whole", "broken")]
    whole = train(folders[0], data, callbacks=[Reseed(), best(folders[0])])
    train(folders[1], data, stop=2, callbacks=[Reseed(), best(folders[1])])
    last = folders[1] / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    words = resume_options(folders[1].parent)
    assert words == ["--ckpt_path", str(folders[1] / "best.ckpt")]
    assert torch.load(words[1], weights_only=True)["epoch"] == 0
    broken = train(folders[1], data, last=words[1], callbacks=[Reseed(), best(folders[1])])
    assert same_state(whole, broken)
    for name in ("best", "last"):
        assert_same_checkpoint(*(folder / f"{name}.ckpt" for folder in folders))
