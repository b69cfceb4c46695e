"""A training that gets a signal, as SLURM sends it before a job's end: a real process, a real signal."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import free_port, run_command
from lightning.pytorch.utilities.exceptions import SIGTERMException
from trainings import assert_same_training

from weakmedsam import cli
from weakmedsam.callbacks import preemption as preempt
from weakmedsam.callbacks.preemption import Preemption
from weakmedsam.errors import ConfigError
from weakmedsam.system.atomic_io import read_table
from weakmedsam.system.signals import REQUEUE, Relay

ROOT = Path(__file__).parents[2]
EPOCHS = 4


def words(folder, *more):
    """Of a training with sub-class exploration of a dozen steps an epoch, which goes on where there is a checkpoint."""
    options = {
        "--data.data_dir": folder.parent / "scans",
        "--data.prepare.store_dir": folder.parent / "store",
        "--data.num_volumes": 5,
        "--data.phantom.slices": 16,
        "--data.phantom.size": 48,
        "--data.image_size": 64,
        "--data.slices.min_pixels": 3,
        "--data.num_workers": 1,
        "--data.batch_size": 4,
        "--data.split.fractions": "[0.6, 0.2, 0.2]",
        "--model.pam": "null",
        "--model.sce.pictures": 0,
        "--trainer.max_epochs": EPOCHS,
        "--trainer.logger": "false",
        "--trainer.enable_progress_bar": "false",
        "--trainer.default_root_dir": folder,
    }
    files = ("classify", "data/phantom", "backbone/pocket")
    command = ["fit"]
    command += [word for name in files for word in ("--config", f"experiments/{name}.yaml")]
    command += [str(word) for pair in options.items() for word in pair]
    last = folder / "checkpoints/last.ckpt"
    command += ["--ckpt_path", str(last)] if last.is_file() else []
    return [*command, *more]


def start(folder, *more, launcher=()):
    return subprocess.Popen(
        [*(launcher or [sys.executable]), "-m", "weakmedsam", *words(folder, *more)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def rows(folder):
    return read_table(folder / "history.csv")


def wait_for_an_epoch(process, folder):
    """Until one has left its checkpoint."""
    last, deadline = folder / "checkpoints/last.ckpt", time.monotonic() + 900
    before = last.stat().st_mtime_ns if last.exists() else 0
    while not last.exists() or last.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def signal_inside_an_epoch(process, folder, number, after=1):
    """Send a signal a third into the next epoch; returns how many had ended before, and the output."""
    for _ in range(after):
        wait_for_an_epoch(process, folder)
    ended = len(rows(folder))
    time.sleep(0.3 * float(rows(folder)[-1]["seconds"]))
    process.send_signal(number)
    output, _ = process.communicate(timeout=900)
    return ended, output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("trainings") / "whole"
    run_command(*words(folder))
    assert len(rows(folder)) == EPOCHS
    return folder


@pytest.mark.slow
def test_signals_end_a_training_at_a_whole_epoch_and_the_same_command_ends_with_the_same_files(whole):
    broken = whole.parent / "broken"
    process = start(broken)
    ended, output = signal_inside_an_epoch(process, broken, signal.SIGTERM)
    assert process.returncode == REQUEUE, output
    assert "SIGTERM: the running epoch has 100 seconds to end" in output
    assert "Traceback" not in output
    assert len(rows(broken)) == ended + 1 < EPOCHS  # the epoch that was running has ended
    held = torch.load(broken / "checkpoints/last.ckpt", weights_only=True)
    assert held["epoch"] == ended

    process = start(broken, "--preemption.grace", "0")
    ended, output = signal_inside_an_epoch(process, broken, signal.SIGUSR1)
    assert process.returncode == REQUEUE, output
    assert "stopped at once (SIGUSR1)" in output
    assert len(rows(broken)) == ended < EPOCHS  # what was running has left nothing
    assert torch.load(broken / "checkpoints/last.ckpt", weights_only=True)["epoch"] == ended - 1

    run_command(*words(broken))
    assert_same_training(broken, whole)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux can limit the files of another process")
def test_a_disk_that_fills_up_leaves_the_last_epoch_whole_and_the_same_command_goes_on(whole):
    folder = whole.parent / "full"
    process = start(folder, launcher=[sys.executable])
    wait_for_an_epoch(process, folder)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # less than a checkpoint
    output, _ = process.communicate(timeout=900)
    assert process.returncode not in (0, REQUEUE), output
    assert "Traceback" not in output
    assert "its disk is full" in output
    assert "Free space there" in output
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    held = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert held["epoch"] < EPOCHS - 1
    run_command(*words(folder))
    assert_same_training(folder, whole)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_machines_train_what_two_processes_do_that_a_signal_has_stopped(tmp_path):
    shared, broken = tmp_path / "shared", tmp_path / "broken"
    port = str(free_port())
    nodes = [
        start(
            shared, "--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp",
            launcher=(
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", node, "--nproc-per-node",
                "1", "--master-addr", "127.0.0.1", "--master-port", port,
            ),
        )
        for node in ("0", "1")
    ]  # fmt: skip
    said = [node.communicate(timeout=900)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), "\n".join(said)
    assert len(rows(shared)) == EPOCHS

    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    process = start(broken, *two)
    # The first process tells the second. The first epoch is longer than others: loaders start their workers.
    ended, output = signal_inside_an_epoch(process, broken, signal.SIGTERM, after=2)
    assert process.returncode == REQUEUE, output
    assert "Traceback" not in output
    assert len(rows(broken)) == ended + 1 < EPOCHS
    process = start(broken, *two, "--data.num_workers", "0")  # workers change nothing
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert_same_training(broken, shared)


@pytest.fixture
def left(monkeypatch):
    """Exit statuses with which the process would have left at once."""
    statuses = []
    monkeypatch.setattr(preempt.os, "_exit", statuses.append)
    return statuses


@pytest.fixture
def training():
    """What the callback asks of a trainer that trains."""
    said = []
    strategy = SimpleNamespace(launcher=None, reduce_boolean_decision=lambda decision, **_: decision)
    return SimpleNamespace(strategy=strategy, state=SimpleNamespace(fn="fit"), print=said.append, said=said)


@pytest.fixture
def listening(training):
    made = []

    def listen(**changes):
        made.append(Preemption(**changes))
        made[-1].setup(training, None, "fit")
        return made[-1]

    yield listen
    for callback in made:
        callback._disarm()
        callback.teardown(training, None, "fit")


def test_the_run_leaves_between_two_epochs_only(listening, training, left):
    before = signal.getsignal(signal.SIGUSR1)
    callback = listening(grace=60)
    callback.on_train_epoch_start(training, None)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)  # the same one, by another way
    assert training.said == ["SIGUSR1: the running epoch has 60 seconds to end"]
    with pytest.raises(SystemExit) as stopped:
        callback.on_train_epoch_start(training, None)
    assert stopped.value.code == REQUEUE
    assert left == []
    assert not any(isinstance(thread, threading.Timer) and not thread.finished.is_set()
                   for thread in threading.enumerate())  # fmt: skip
    callback.teardown(training, None, "fit")
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_training_that_is_through_is_through(listening, training, left):
    callback = listening(grace=0.2)
    os.kill(os.getpid(), signal.SIGUSR1)
    callback.on_train_end(training, None)
    time.sleep(0.4)
    assert left == []


def test_at_the_graces_end_the_run_leaves_at_once(listening, left, capsys):
    listening(grace=0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 20
    while not left and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == [REQUEUE]
    assert "SIGTERM, and the 0.1 seconds are over" in capsys.readouterr().err


def test_at_a_second_signal_the_run_leaves_at_once(listening, left, capsys, monkeypatch):
    listening(grace=60)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert left == []
    monkeypatch.setattr(preempt, "SAME", -1.0)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert left == [REQUEUE]
    assert "a second SIGUSR1" in capsys.readouterr().err


def test_what_does_not_train_leaves_at_once_and_takes_its_ranks_along(listening, training, left):
    sent = []
    training.state.fn = "predict"
    training.strategy.launcher = SimpleNamespace(kill=sent.append)
    listening(signals=("SIGUSR2",))
    os.kill(os.getpid(), signal.SIGUSR2)
    assert left[0] == REQUEUE
    assert sent[:2] == [signal.SIGUSR2, signal.SIGKILL]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "USR1"])
def test_signals_that_cannot_be_answered_are_refused(name):
    with pytest.raises(ConfigError, match=rf"preemption\.signals: '{name}'"):
        Preemption(signals=(name,))


def test_a_signal_that_lightning_answers_is_no_success(monkeypatch):
    def stopped(words):
        raise SIGTERMException

    monkeypatch.setattr(cli, "WeakMedSAMCLI", stopped)
    with pytest.raises(SystemExit) as left:
        run_command("fit")
    assert left.value.code == REQUEUE


def test_a_relay_passes_signals_on_and_says_that_it_was_asked():
    child = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9)); print(1, flush=True); time.sleep(60)"  # noqa: E501
    before = signal.getsignal(signal.SIGUSR1)
    with Relay().listening() as relay:
        reading, writing = os.pipe()
        process = relay.start([sys.executable, "-c", child], log=os.fdopen(writing, "wb"))
        os.read(reading, 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert process.wait(timeout=20) == 9
        assert relay.asked
        assert relay.run([sys.executable, "-c", "import time; time.sleep(60)"]) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGUSR1) == before
