"""W&B that is there, is not there, or goes away; each run in a process of its own, as wandb wants it."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import wandb
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from wandb_server import KEY, Server

from data_modules.config import Labels
from weakmedsam.callbacks import History
from weakmedsam.callbacks.wandb_lineage import Lineage
from weakmedsam.errors import ConfigError
from weakmedsam.loggers import WeightsAndBiases, use_wandb_offline_unless_asked
from weakmedsam.system.atomic_io import read_table

EPOCHS = 6


class Slope(LightningModule):
    """Logs its epoch's number, and trains a weight."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.log("train/epoch_number", float(self.current_epoch), on_step=False, on_epoch=True)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Numbers(LightningDataModule):
    labels = Labels()

    def train_dataloader(self):
        return DataLoader(torch.ones(4, 1), batch_size=2)


class Cut(Callback):
    """Takes the server away after the third epoch."""

    def __init__(self, server):
        self.server = server

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.server.shut()


def train(folder, what, url=""):
    """A training with a server that dies ("dies"), never was ("none") or stays ("stays").

    With a ``url``, that of a server elsewhere, half of it ("half"), or what is missing after that ("rest").
    """
    server = None if url else Server()
    address = url or server.url
    os.environ.update({"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": KEY})
    use_wandb_offline_unless_asked()
    if what == "none":
        server.shut()
    logger = WeightsAndBiases(save_dir=folder, lineage=True, init_timeout=3, finish_timeout=2)
    best = ModelCheckpoint(Path(folder) / "checkpoints", "best", enable_version_counter=False)
    trainer = Trainer(
        default_root_dir=folder, max_epochs=EPOCHS // 2 if what == "half" else EPOCHS, accelerator="cpu", logger=logger,
        callbacks=[History(), best, Lineage(), *([Cut(server)] if what == "dies" else [])], enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    half = Path(folder) / "half.ckpt"
    trainer.fit(Slope(), Numbers(), ckpt_path=half if what == "rest" else None, weights_only=True)
    if what == "half":
        trainer.save_checkpoint(half)
    print("training went on to epoch", trainer.current_epoch, flush=True)
    if what == "stays":
        wandb.finish()
        (Path(folder) / "told.json").write_text(json.dumps(what_was_told(server)))


def what_was_told(server):
    """Figures and settings that a server got, without what differs from one run to the next."""
    (number,) = server.runs().values()
    figures = [{k: v for k, v in row.items() if k[0] != "_"} for row in server.history()]
    settings = {k: v for k, v in server.config(number).items() if k[0] != "_"}
    settings["lineage_makes"] = list(settings["lineage_makes"])  # of a network there is a digest too
    return {"name": list(server.runs()), "figures": figures, "settings": settings}


def run(folder, *what):
    return subprocess.run(
        [sys.executable, __file__, str(folder), *what], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def sync(folder):
    """Send a folder's run to a server that is there; gives what it was told."""
    server = Server()
    runs = [path for path in (folder / "wandb").glob("*run-*") if path.is_dir() and not path.is_symlink()]
    # A start without a server leaves the try behind too.
    (place,) = [path for path in runs if path.name.startswith("offline")] or runs
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--no-skip-online", str(place)],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"},
    )  # fmt: skip
    server.shut()
    assert done.returncode == 0, done.stderr
    return server


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a training was run with -> its folder, what it printed, and what a later sync tells.

    All run at once: most of their time they wait for a server that does not answer.
    """

    def train_once(what):
        folder = folders[what]
        done = run(folder, what)
        assert done.returncode == 0, done.stderr
        return folder, done, sync(folder) if what != "stays" else None

    folders = {what: tmp_path_factory.mktemp(what) / "set/name/classify" for what in ("none", "dies", "stays")}
    with ThreadPoolExecutor() as pool:
        held = {what: pool.submit(train_once, what) for what in folders}
        yield lambda what: held[what].result()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["none", "dies"])
def test_without_a_server_training_goes_on_and_nothing_is_lost(trained, what):
    folder, done, told = trained(what)
    assert f"training went on to epoch {EPOCHS}" in done.stdout
    assert done.stderr.count("W&B cannot be reached") == (what == "none")
    assert "anonymous" not in done.stdout + done.stderr  # a warning of wandb's about what nobody set
    assert len(list((folder / "wandb").glob("offline-run-*"))) == (what == "none")
    wanted = list(range(EPOCHS))
    assert [float(row["train/epoch_number"]) for row in read_table(folder / "history.csv")] == wanted
    assert [row["train/epoch_number"] for row in told.history() if "train/epoch_number" in row] == wanted
    assert told.variables("UpsertBucket")[0]["displayName"] == "set/name/classify"
    assert told.variables("UpsertBucket")[0]["groupName"] == "set/name"
    # Of the network a run that had gone offline keeps a copy; one whose server died says where it lies.
    assert len(told.variables("CommitArtifact")) == (what == "none")
    assert ("did not take model" in done.stderr) == (what == "dies")


@pytest.mark.slow
def test_a_run_that_was_offline_tells_after_its_sync_what_one_with_a_server_tells_at_once(trained):
    _, _, later = trained("none")
    folder, _, _ = trained("stays")
    at_once = json.loads((folder / "told.json").read_text())
    assert what_was_told(later) == at_once
    assert at_once["name"] == ["set/name/classify"]
    assert sum("train/epoch_number" in row for row in at_once["figures"]) == EPOCHS


@pytest.mark.slow
def test_a_training_that_is_continued_goes_on_as_the_same_run(tmp_path):
    folder, server = tmp_path / "set/name/classify", Server()
    for what in ("half", "rest"):
        done = run(folder, what, server.url)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"W&B: {server.url}/me/weakmedsam/runs/") == 1
        assert "wandb:" not in done.stdout + done.stderr
    server.shut()
    (number,) = {given["name"] for given in server.variables("UpsertBucket") if given["name"]}
    assert (folder / "wandb_run.txt").read_text().strip() == number
    figures = [row for row in server.history(number) if "train/epoch_number" in row]
    assert [row["train/epoch_number"] for row in figures] == list(range(EPOCHS))
    steps = [row["_step"] for row in figures]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("setting", ["init_timeout", "finish_timeout"])
def test_times_that_cannot_be_are_refused_by_key(setting):
    with pytest.raises(ConfigError, match=rf"trainer\.logger\.{setting} is -1"):
        WeightsAndBiases(**{setting: -1})


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    train(*sys.argv[1:])
