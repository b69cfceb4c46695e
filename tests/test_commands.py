"""A command that runs in the tests' process leaves it as it was."""

import contextlib
import logging
import os
import random
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from commands import as_it_was, run_command
from jsonargparse import set_parsing_settings
from jsonargparse._common import get_parsing_setting


def state():
    log = logging.getLogger("data_modules")
    return {
        "folder": Path.cwd(), "variables": dict(os.environ), "signal": signal.getsignal(signal.SIGUSR1),
        "log": (log.level, log.handlers[:], log.propagate), "filters": warnings.filters[:],
        "drawn": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),  # noqa: NPY002
        "threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision(),
        "strict": torch.are_deterministic_algorithms_enabled(), "benchmark": torch.backends.cudnn.benchmark,
        "group": torch.distributed.is_initialized(), "run": wandb.run,
        "paths": get_parsing_setting("omegaconf_absolute_to_relative_paths"),
    }  # fmt: skip


def change_all(folder):
    os.chdir(folder)
    os.environ["WANDB_MODE"] = "offline"
    os.environ["PL_GLOBAL_SEED"] = "7"
    os.environ.pop("PATH")
    signal.signal(signal.SIGUSR1, lambda *_: None)
    log = logging.getLogger("data_modules")
    log.setLevel(logging.ERROR)
    log.addHandler(logging.NullHandler())
    log.propagate = False
    warnings.filterwarnings("ignore", "of a command")
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=0, world_size=1)
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    wandb.init(mode="disabled", dir=folder)


def test_what_a_command_changes_is_put_back_also_where_it_fails(tmp_path):
    before = state()
    with as_it_was():
        change_all(tmp_path)
        changed = state()
    assert all(changed[name] != value for name, value in before.items())
    assert state() == before
    with contextlib.suppress(KeyboardInterrupt), as_it_was():
        change_all(tmp_path)
        raise KeyboardInterrupt
    assert state() == before


def test_a_logger_that_only_its_parts_have_asked_for_is_heard_again():
    logging.getLogger("asked_for_by.its_part")
    with as_it_was():
        logging.getLogger("asked_for_by").setLevel(logging.ERROR)
    assert logging.getLogger("asked_for_by.its_part").getEffectiveLevel() != logging.ERROR


def test_a_command_line_that_is_refused_leaves_all_as_it_was(capsys):
    before = state()
    with pytest.raises(SystemExit) as left:
        run_command("fit", "--config", "experiments/classify.yaml", "--trainer.max_epocs", 4)
    assert left.value.code == 2
    assert "max_epocs" in capsys.readouterr().err
    assert state() == before
