"""``TRAINER=fsdp`` by two gloo processes: the same networks and files as with ``ddp``."""

import pytest
import torch
from commands import run_commands_by_ranks
from torch import nn
from trainings import assert_same_checkpoint

from weakmedsam.errors import ConfigError
from weakmedsam.fsdp import FullySharded, large_layers

OPTIONS = {
    # The second process has one batch less of training slices, of validation slices, and one volume less.
    "--data.num_volumes": 7,
    "--data.phantom.slices": 9,
    "--data.phantom.size": 64,
    "--data.image_size": 64,
    "--data.slices.min_pixels": 3,
    "--data.num_workers": 0,
    "--data.batch_size": 2,
    "--data.split.fractions": "[0.7, 0.15, 0.15]",
    "--trainer.max_epochs": 2,
    "--trainer.accelerator": "cpu",
    "--trainer.devices": 2,
    "--trainer.precision": "32-true",
    "--trainer.enable_progress_bar": "false",
    "--trainer.logger": "false",
}
CLASSIFY = {
    "--model.sce.sub_classes.number": 2,
    "--model.pam.prompts.grid": 2,
    "--model.pam.walk.map_size": 16,
}
SEGMENT = {"--model.network_args": "{features: [8, 8, 8, 8, 8, 8]}", "--data.labels.supervision": "expert"}
SHARDED = {"--trainer.strategy.least_parameters": 50_000}  # layers of pocket's decoder are shared out one by one
KINDS = ("ddp", "fsdp")
EVERY = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: %s, filename: '{epoch}', monitor: epoch, mode: max, save_top_k: -1, save_on_train_epoch_end: true}}"  # noqa: E501


def words(folder, subcommand, stage, trainer, options, run, *more):
    """Of a command whose files go to ``folder / run``."""
    names = [
        stage,
        "data/phantom",
        *(["backbone/pocket"] if stage == "classify" else []),
        f"trainer/{trainer}",
    ]
    names += ["pseudo_labels"] if subcommand == "predict" else []
    given = OPTIONS | options | (SHARDED if trainer == "fsdp" else {})
    given |= {"--data.data_dir": folder / "scans", "--data.prepare.store_dir": folder / "store"}
    given |= {"--trainer.callbacks+": EVERY % (folder / run / "every")} if subcommand == "fit" else {}
    configs = [word for name in names for word in ("--config", f"experiments/{name}.yaml")]
    given = [word for pair in given.items() for word in pair]
    return [subcommand, *configs, *given, "--trainer.default_root_dir", folder / run, *more]


@pytest.mark.slow
@pytest.mark.ddp
def test_sharded_training_gives_the_files_of_ddp_and_goes_on_under_either(tmp_path):
    first, last = (tmp_path / f"fsdp/{name}.ckpt" for name in ("every/epoch=0", "checkpoints/last"))
    run_commands_by_ranks(
        [
            *(words(tmp_path, "fit", "classify", name, CLASSIFY, name) for name in KINDS),
            *(words(tmp_path, "fit", "classify", name, CLASSIFY, f"{name}_on", "--ckpt_path", first) for name in KINDS),
            *(
                words(tmp_path, "predict", "classify", name, CLASSIFY, f"{name}_maps", "--ckpt_path", last)
                for name in KINDS
            ),
            *(words(tmp_path, "fit", "segment", name, SEGMENT, f"{name}_segment") for name in KINDS),
        ],
        processes=2,
    )
    assert torch.load(first, weights_only=True)["epoch"] == 0
    for run in ("ddp", "ddp_on", "fsdp_on"):
        # FSDP leaves each rank the running statistics of its own batches, and validates with them.
        assert_same_checkpoint(tmp_path / run / "checkpoints/last.ckpt", last, nearly="operating_points")
    assert_same_checkpoint(*(tmp_path / f"{name}_segment/checkpoints/last.ckpt" for name in KINDS))
    made = sorted(path.name for path in (tmp_path / "ddp_maps").glob("*.safetensors"))
    assert len(made) == 5
    for name in made:  # with the settings and the network's fingerprint that they were made by
        one, two = ((tmp_path / f"{kind}_maps" / name).read_bytes() for kind in KINDS)
        assert one == two


def test_large_layers_are_the_blocks_of_lists():
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Linear(10, 10), nn.Linear(2, 2)])
    network.alone = nn.Linear(100, 100)
    assert large_layers(network, 110) == [network.blocks[0]]
    assert large_layers(network, 111) == []


def test_no_parameters_at_least_is_refused():
    with pytest.raises(ConfigError, match="least_parameters"):
        FullySharded(0)
