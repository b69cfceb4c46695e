"""``TRAINER=fsdp`` by two gloo processes: the same networks and files as with ``ddp``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import same_state
from torch import nn

from weakmedsam.contracts import ConfigError
from weakmedsam.sharding import FullySharded, large_layers

ROOT = Path(__file__).parent.parent
OPTIONS = {
    # The second process has one batch less of training slices, of validation slices, and one volume less.
    "--data.num_volumes": 7,
    "--data.phantom.slices": 9,
    "--data.phantom.size": 64,
    "--data.image_size": 64,
    "--data.min_pixels": 3,
    "--data.num_workers": 0,
    "--data.batch_size": 2,
    "--data.split_fractions": "[0.7, 0.15, 0.15]",
    "--trainer.max_epochs": 2,
    "--trainer.accelerator": "cpu",
    "--trainer.devices": 2,
    "--trainer.precision": "32-true",
    "--trainer.enable_progress_bar": "false",
    "--trainer.logger": "false",
}
CLASSIFY = {"--model.sub_classes": 2, "--model.pam.grid": 2, "--model.pam.map_size": 16}
SEGMENT = {"--model.network_args": "{features: [8, 8, 8, 8, 8, 8]}", "--data.supervision": "expert"}
SHARDED = {
    "--trainer.strategy.least_parameters": 50_000
}  # layers of pocket's decoder are shared out one by one
EVERY = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: %s, filename: '{epoch}', monitor: epoch, mode: max, save_top_k: -1, save_on_train_epoch_end: true}}"  # noqa: E501


def call(folder, subcommand, stage, trainer, options, *more):
    run = folder / trainer
    names = [
        stage,
        "data/phantom",
        *(["backbone/pocket"] if stage == "classify" else []),
        f"trainer/{trainer}",
    ]
    names += ["pseudo_labels"] if subcommand == "predict" else []
    words = [word for name in names for word in ("--config", f"experiments/{name}.yaml")]
    given = OPTIONS | options | (SHARDED if trainer == "fsdp" else {})
    given |= {"--data.data_dir": folder / "scans", "--data.store_dir": folder / "store"}
    words += [str(word) for pair in given.items() for word in pair]
    if subcommand == "fit":
        words += ["--trainer.callbacks+", EVERY % (run / stage / "every")]
    done = subprocess.run(
        [sys.executable, "-m", "weakmedsam", subcommand, *words, "--trainer.default_root_dir", str(run / stage), *more],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return run / stage


def assert_same(one, two):
    held = [torch.load(path, weights_only=True) for path in (one, two)]
    assert same_state(*(state["state_dict"] for state in held))
    optimizers = [state["optimizer_states"][0] for state in held]
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]
    moments = [optimizer["state"] for optimizer in optimizers]
    assert moments[0].keys() == moments[1].keys()
    assert all(
        torch.equal(moments[0][i][key], value) for i, s in moments[1].items() for key, value in s.items()
    )


@pytest.mark.slow
@pytest.mark.ddp
def test_sharded_training_gives_the_files_of_ddp_and_goes_on_under_either(tmp_path):
    runs = {name: call(tmp_path, "fit", "classify", name, CLASSIFY) for name in ("ddp", "fsdp")}
    assert_same(*(run / "checkpoints/last.ckpt" for run in runs.values()))
    first, last = (tmp_path / name for name in ("first.ckpt", "last.ckpt"))
    (runs["fsdp"] / "every/epoch=0.ckpt").rename(first)
    (runs["fsdp"] / "checkpoints/last.ckpt").rename(last)
    for name in runs:
        runs[name].rename(tmp_path / f"{name}_whole")
        run = call(tmp_path, "fit", "classify", name, CLASSIFY, "--ckpt_path", str(first))
        assert_same(run / "checkpoints/last.ckpt", last)
    for name in runs:
        call(tmp_path, "predict", "classify", name, CLASSIFY, "--ckpt_path", str(last))
    made = sorted(path.name for path in runs["ddp"].glob("*.safetensors"))
    assert len(made) == 5
    for name in made:  # with the settings and the network's fingerprint that they were made by
        assert (runs["ddp"] / name).read_bytes() == (runs["fsdp"] / name).read_bytes()


@pytest.mark.slow
@pytest.mark.ddp
def test_the_segmentation_network_is_shared_out_too(tmp_path):
    runs = [call(tmp_path, "fit", "segment", name, SEGMENT) for name in ("ddp", "fsdp")]
    assert_same(*(run / "checkpoints/last.ckpt" for run in runs))


def test_large_layers_are_the_blocks_of_lists():
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Linear(10, 10), nn.Linear(2, 2)])
    network.alone = nn.Linear(100, 100)
    assert large_layers(network, 110) == [network.blocks[0]]
    assert large_layers(network, 111) == []


def test_no_parameters_at_least_is_refused():
    with pytest.raises(ConfigError, match="least_parameters"):
        FullySharded(0)
