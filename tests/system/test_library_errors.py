"""What libraries and the system refuse is one message; a fault of ours keeps its traceback."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from commands import run_command
from lightning import Trainer

from weakmedsam import cli
from weakmedsam.errors import ConfigError, DataError, DiskError, MemoryShortError
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.system.library_errors import explain, flat_settings, is_short_of_memory

ROOT = Path(__file__).parents[2]
CLASSIFY = [word for name in ("classify", "data/folder") for word in ("--config", f"experiments/{name}.yaml")]
SEGMENT = [word for name in ("segment", "data/folder") for word in ("--config", f"experiments/{name}.yaml")]
PREPARE = ["--config", "experiments/data/folder.yaml"]


def caught(action):
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def raised(error):
    def action():
        raise error

    return caught(action)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """What the command line prints at its end: nothing is trained."""
    monkeypatch.setattr(cli.LightningCLI, "_run_subcommand", lambda self, subcommand: None)

    def run(*words):
        with pytest.raises(SystemExit) as left:
            run_command(*words)
        return str(left.value.code)

    return run


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trainer.accelerator", "abacus", "take cpu, or auto"),
        ("trainer.devices", "0", "give a number from 1 on"),
        ("trainer.devices", "-3", "give a number from 1 on"),
        ("trainer.devices", "two", "give a number from 1 on"),
        ("trainer.max_epochs", "-2", "give a number from 1 on"),
        ("trainer.strategy", "nonsense", "take auto, ddp"),
        ("trainer.num_nodes", "0", "from 1 on"),
        ("trainer.accumulate_grad_batches", "0", "it must be 1 or more"),
        ("trainer.gradient_clip_val", "-1", "it must be 0 or more"),
        ("trainer.gradient_clip_val", ".nan", "it must be 0 or more"),
        ("trainer.limit_train_batches", "-1", "Lightning does not take"),
        ("trainer.profiler", "nonsense", "Lightning does not take"),
        ("trainer.max_time", "nonsense", "Lightning does not take"),
        ("trainer.precision", "16-true", "choose 32-true, bf16-mixed or 16-mixed"),
        ("seed_everything", "-1", r"in [0, 4,294,967,295]"),
        ("data.prepare.store_dir", "null", "give a value, or leave it out for 'data'"),
        ("model.pooling", "null", "give a value"),
        ("trainer.logger.save_dir", "null", "give a value"),
        ("data.prepare.store_dir", "${", "cannot be resolved"),
        ("data.prepare.store_dir", "${nothing}", "cannot be resolved"),
        ("model.learning_rate", "${oc.env:NOT_SET_ANYWHERE}", "cannot be resolved"),
        ("model.learning_rate", "1e400", "model.learning_rate is inf"),
        ("model.sce.sub_classes.number", "1000000000", "in [1, 1,000]"),
        ("model.pam.prompts.grid", "100000", "in [1, 128]"),
        ("data.image_size", "1000000", "in [8, 4,096]"),
    ],
)
def test_a_setting_that_is_refused_is_named_in_one_line(call, tmp_path, key, value, said):
    told = call("fit", *CLASSIFY, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path),
                f"--{key}", value)  # fmt: skip
    assert told.startswith(f"\nweakmedsam: ConfigError: {key}")
    assert said in told
    assert len(told.strip().splitlines()) == 1


@pytest.mark.parametrize("key", ["data.labels.supervision", "data.split.fractions", "data.slices.min_pixels"])
def test_null_for_a_setting_of_a_group_that_takes_none_is_refused(call, capsys, key):
    assert call("fit", *CLASSIFY, f"--{key}", "null") == "2"
    told = capsys.readouterr().err
    assert told.startswith(f"\nweakmedsam: --{key}:")
    assert "Got value: None" in told


@pytest.mark.parametrize(("text", "said"), [("trainer: 3\n", "trainer is 3"), ("data: null\n", "data is null")])
def test_a_value_where_settings_belong_is_refused(call, tmp_path, text, said):
    (tmp_path / "own.yaml").write_text(text)
    told = call("fit", *SEGMENT, "--config", str(tmp_path / "own.yaml"))
    assert f"ConfigError: {said}; it has to hold settings" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_with_the_key(call, tmp_path):
    told = call("fit", *CLASSIFY, "--trainer.accelerator", "gpu", "--trainer.default_root_dir", str(tmp_path))
    assert "ConfigError: trainer.accelerator is 'gpu'" in told


@pytest.mark.parametrize("command", ["fit", "prepare"])
def test_a_place_below_a_file_is_named_with_its_option(call, tmp_path, command):
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.nii.gz").touch()
    if command == "prepare":
        (tmp_path / "labels.csv").write_text("case,slice,tumour\na,0,1\n")
        words, key = (
            ["--data.data_dir", str(tmp_path), "--data.prepare.store_dir", str(file / "x")],
            "--data.prepare.store_dir",
        )
        told = call(command, *PREPARE, *words)
    else:
        key = "trainer.default_root_dir"
        told = call(command, *CLASSIFY, "--trainer.default_root_dir", str(file / "x"))
    assert f"ConfigError: {key} is {file / 'x'}, but {file / 'x'}" in told
    assert "Not a directory" in told


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    words = ["fit", *CLASSIFY, "--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]

    def wrong(*_):
        return torch.zeros(2).reshape(3)

    for place in (
        "weakmedsam.classification.local_encoder._convolution",
        "weakmedsam.classification.module.check_optimiser",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, wrong)
            with pytest.raises((RuntimeError, ValueError), match="shape"):
                run_command(*words)


def test_who_refuses_decides():
    known = flat_settings({"trainer": {"max_epochs": -2, "devices": 1}, "model": {"init_args": {"lr": 1}}})
    assert known == {"trainer.max_epochs": -2, "trainer.devices": 1, "model.lr": 1}
    refused = caught(lambda: Trainer(max_epochs=-2, logger=False))
    assert str(explain(refused, known)).startswith("trainer.max_epochs is -2, which Lightning does not take")
    for ours in (ValueError("max_epochs"), RuntimeError("x"), KeyError("trainer"), RecursionError()):
        assert explain(raised(ours), known) is None
    meant = DataError("a.nii: odd")
    wrapped = raised(ValueError("jsonargparse says"))
    wrapped.__cause__ = meant
    assert explain(wrapped, known) is meant


def test_what_a_worker_says_comes_without_its_traceback():
    error = DataError("Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                      "  File x\nweakmedsam.contracts.DataError: a.nii: is damaged")  # fmt: skip
    assert str(explain(error, {})) == "a.nii: is damaged"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_where_memory_is_short_the_settings_that_lower_it_are_named(error):
    found = explain(raised(error), {})
    assert isinstance(found, MemoryShortError)
    for word in ("num_workers", "prepare.workers", "batch_size", "image_size", "the same command continues"):
        assert word in str(found)
    assert not is_short_of_memory(RuntimeError("shapes differ"))


class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_known_by_what_torch_says():
    error = caught(lambda: list(torch.utils.data.DataLoader(Killed(), num_workers=1)))
    assert str(explain(error, {})).startswith("a process that reads slices (process ")


def test_a_full_disk_of_a_library_is_said():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/deep/file")
    found = explain(raised(full), {"data.prepare.store_dir": "/there", "model.size": "vit_b"})
    assert isinstance(found, DiskError)
    assert str(found).startswith("data.prepare.store_dir is /there, but the disk is full")
    assert isinstance(explain(raised(OSError(errno.ENOSPC, "full")), {}), DiskError)


def test_commands_that_chain_others_name_their_option(tmp_path):
    file = tmp_path / "file"
    file.touch()
    said = f"ConfigError: --runs is {file}, but {file}/x cannot be used"
    with pytest.raises(SystemExit, match=said), ending_in_a_message("where it was", {"runs": file}):
        (file / "x").mkdir()


def test_settings_can_be_flat_as_they_are_typed():
    nested = {"data": {"class_path": "a.B", "init_args": {"augment": {"noise": 1}}}, "ckpt_path": None}
    assert json.dumps(flat_settings(nested)) == (
        '{"data.class_path": "a.B", "data.augment.noise": 1, "ckpt_path": null}'
    )
    assert isinstance(explain(raised(ConfigError("x")), {}), ConfigError)


def test_a_fault_of_ours_while_another_error_is_handled_is_still_ours():
    with pytest.raises(KeyError) as found:  # noqa: PT012
        try:
            raise DataError("handled")
        except DataError:
            {}["a fault"]
    assert explain(found.value, {}) is None
