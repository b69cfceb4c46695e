"""Commands of the product, in this process as torchgeo's tests run theirs; ranks are processes of their own."""

import contextlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import wandb
from jsonargparse import set_parsing_settings

from weakmedsam import cli
from weakmedsam.run import pipeline, predict
from weakmedsam.system.signals import Relay

ROOT = Path(__file__).parent.parent


def _torch_settings() -> list[tuple[Callable[..., object], tuple[object, ...]]]:
    """What sets them to what they are now."""
    strict = torch.are_deterministic_algorithms_enabled()
    return [
        (torch.set_rng_state, (torch.get_rng_state(),)),
        (torch.set_num_threads, (torch.get_num_threads(),)),
        (torch.set_float32_matmul_precision, (torch.get_float32_matmul_precision(),)),
        (torch.use_deterministic_algorithms, (strict,)),
        (setattr, (torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)),
        (setattr, (torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)),
    ]


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """What a command may leave changed because its process ends with it, and the tests' does not, is put back.

    Working folder, variables, signals' handlers, loggers, warnings' filters, random numbers, torch's settings and
    process group, jsonargparse's settings, W&B's runs.
    """
    folder, environment = Path.cwd(), dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    # A name of modules that have loggers is none before it is asked for, and would keep what a command sets.
    named = [logging.getLogger(name) for name in ("weakmedsam", "data_modules", *logging.Logger.manager.loggerDict)]
    logs = [(log, log.level, log.propagate, log.handlers[:]) for log in (logging.root, *named)]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - libraries' own
    form = warnings.formatwarning
    of_torch, group = _torch_settings(), torch.distributed.is_initialized()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            os.chdir(folder)
            warnings.formatwarning = form
            wandb.finish()
            wandb.teardown()  # as at a process's end, with its variables
            os.environ.clear()
            os.environ.update(environment)
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
            for log, level, propagate, attached in logs:
                if log.level != level:  # it clears what all loggers have kept, thousands of times a command
                    log.setLevel(level)
                log.propagate, log.handlers[:] = propagate, attached
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for put_back, value in of_torch:
                put_back(*value)
            if torch.distributed.is_initialized() and not group:
                torch.distributed.destroy_process_group()
            set_parsing_settings(omegaconf_absolute_to_relative_paths=False)


def run_command(*words: object) -> None:
    """``python -m weakmedsam`` with a stage's words, in this process and without W&B.

    Raises:
        SystemExit: as the process would end.
    """
    with as_it_was():
        os.chdir(ROOT)
        os.environ["WANDB_MODE"] = "disabled"
        cli.main([str(word) for word in words])


class InThisProcess(Relay):
    """Runs the stages' commands where the pipeline runs; signals find no process to go to."""

    def run(self, words: Sequence[str]) -> int:
        """Exit status of ``python -m weakmedsam`` with these words."""
        with as_it_was():
            try:
                cli.main(list(words[words.index("weakmedsam") + 1 :]))
            except SystemExit as left:
                print(left.code)
                return left.code if isinstance(left.code, int) else 1
        return 0


def run_pipeline(*words: object) -> None:
    """``weakmedsam TARGET ...``, or ``weakmedsam predict ...``, in this process, with the stages' commands.

    Raises:
        SystemExit: as the process would end.
    """
    name, *rest = [str(word) for word in words]
    with as_it_was():
        os.chdir(ROOT)
        if name == "predict":
            predict.main(rest, InThisProcess)
        else:
            pipeline.main([name, *rest], InThisProcess)


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def run_commands_by_ranks(commands: Sequence[Sequence[object]], processes: int) -> None:
    """Stages' commands one after another in the same processes: a start costs more than a tiny training."""
    told = json.dumps([[str(word) for word in command] for command in commands])
    run_ranks([ROOT / "tests/commands_of_rank.py", told], processes)


def run_ranks(words: Sequence[object], processes: int, timeout: float = 600) -> None:
    """``python`` with these words, by the ranks that a launcher would start.

    Raises:
        AssertionError: a process failed; the message has what all have printed.
    """
    shared = {
        **os.environ,
        "WANDB_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "NODE_RANK": "0",
    }
    # Into files: a pipe that nobody reads yet would stop a process that has much to say.
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        ranks = [
            subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=shared | {"LOCAL_RANK": str(rank)},
            )
            for rank, log in enumerate(logs)
        ]  # fmt: skip
        # One that fails leaves the others waiting for it.
        end = time.monotonic() + timeout
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        for rank in ranks:
            if any(other.poll() != 0 for other in ranks):
                rank.kill()
            rank.wait()
        said = [(log.seek(0), log.read())[1] for log in logs]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)
