"""The batch scripts, run by a shell that finds a false make, srun and scontrol."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "experiments/slurm").glob("*.sbatch"))


@pytest.fixture
def false_slurm(tmp_path):
    """Commands that write down how they were called; make takes as long as a file named `go` is missing."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, does in (
        ("make", "touch started; for _ in $(seq 600); do [ -e go ] && exit 7; sleep 0.05; done"),
        ("scontrol", "touch go"),
    ):
        tool = tools / name
        tool.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name}" "$@" >> calls\n{does}\n')
        tool.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "42",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
    }
    return {**os.environ, **job, "PATH": f"{tools}:{os.environ['PATH']}"}


def start(script, environment, folder, *words):
    process = subprocess.Popen(
        ["bash", script, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    while not (folder / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_that_is_about_to_end_is_requeued(script, false_slurm, tmp_path):
    process = start(script, false_slurm, tmp_path, "DATASET=phantom")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert "job 42 is about to end: requeued" in said
    calls = (tmp_path / "calls").read_text().split("\n")
    assert calls[calls.index("scontrol") :][:3] == ["scontrol", "requeue", "42"]
    assert process.returncode == 7  # what make gave


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_ends_as_its_command_does(script, false_slurm, tmp_path):
    (tmp_path / "go").touch()
    process = start(script, false_slurm, tmp_path, "DATASET=abdomen", "EXPERIMENT=k8")
    process.communicate(timeout=30)
    assert process.returncode == 7
    calls = (tmp_path / "calls").read_text().split("\n")
    assert {"DATASET=abdomen", "EXPERIMENT=k8"} <= set(calls)
    assert "scontrol" not in calls


def test_training_tells_lightning_the_size_of_the_job(false_slurm, tmp_path):
    (tmp_path / "go").touch()
    environment = {**false_slurm, "ARGS": "--model.sub_classes 4"}
    start(ROOT / "experiments/slurm/train.sbatch", environment, tmp_path).communicate(timeout=30)
    calls = (tmp_path / "calls").read_text()
    wanted = "--trainer.num_nodes 2 --trainer.devices 4 --data.num_workers 7 --model.sub_classes 4"
    assert f"ARGS={wanted}\n" in calls
    assert "LAUNCHER=srun --kill-on-bad-exit=1 .venv/bin/python\n" in calls


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_asks_for_requeue_and_for_the_signal_to_its_shell(script):
    asked = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120"} <= set(asked)
