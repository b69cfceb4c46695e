"""The batch scripts, run by a shell that finds a false make, srun and scontrol."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from weakmedsam.system.signals import REQUEUE

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "experiments/slurm").glob("*.sbatch"))


@pytest.fixture
def false_slurm(tmp_path):
    """Commands that write down how they were called; make gives ./work as what it would run.

    That works as long as a file named `go` is missing, and leaves with the status in `status` at a signal.
    """
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "status").write_text("75")
    work = """trap 'exit "$(cat status)"' USR1
touch started
for _ in $(seq 600); do [ -e go ] && exit 7; sleep 0.05; done"""
    for path, does in (
        (tools / "make", 'case " $* " in *" --just-print "*) echo "./work \'two words\'";; esac'),
        (tools / "scontrol", ""),
        (tmp_path / "work", work),
    ):
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{path.name}" "$@" >> calls\n{does}\n')
        path.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "42",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
    }
    return {**os.environ, **job, "PATH": f"{tools}:{os.environ['PATH']}"}


def start(script, environment, folder, *words):
    process = subprocess.Popen(["bash", script, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_that_is_about_to_end_passes_the_signal_on_and_is_requeued_by_the_exit_status(
    script, false_slurm, tmp_path
):
    process = start(script, false_slurm, tmp_path, "DATASET=phantom")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert "job 42 is about to end" in said
    assert "job 42 is requeued" in said
    calls = (tmp_path / "calls").read_text().split("\n")
    assert calls[calls.index("work") :][:2] == ["work", "two words"]  # as the shell of make would take it
    assert calls[calls.index("scontrol") :][:3] == ["scontrol", "requeue", "42"]
    assert process.returncode == REQUEUE


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_that_fails_after_the_signal_is_not_requeued(script, false_slurm, tmp_path):
    (tmp_path / "status").write_text("1")
    process = start(script, false_slurm, tmp_path)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert "scontrol" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(("target", "first"), [("train", "train"), ("sweep", "sweep")])
def test_make_prints_the_one_command_that_it_would_run(target, first):
    words = ["make", "--silent", "--just-print", "-o", ".venv/.installed", target, "ARGS=--a 1 --b '{x: 1}'"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.replace("\\\n", "").splitlines()  # a shell joins them too
    assert shlex.split(line)[:4] == [".venv/bin/python", "-m", "weakmedsam", first]
    assert shlex.split(line)[-5:] == ["--", "--a", "1", "--b", "{x: 1}"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_ends_as_its_command_does(script, false_slurm, tmp_path):
    (tmp_path / "go").touch()
    process = start(script, false_slurm, tmp_path, "DATASET=abdomen", "EXPERIMENT=k8")
    process.communicate(timeout=60)
    assert process.returncode == 7
    calls = (tmp_path / "calls").read_text().split("\n")
    assert {"DATASET=abdomen", "EXPERIMENT=k8"} <= set(calls)
    assert "scontrol" not in calls


def test_training_tells_lightning_the_size_of_the_job(false_slurm, tmp_path):
    (tmp_path / "go").touch()
    environment = {**false_slurm, "ARGS": "--model.sce.sub_classes.number 4"}
    start(ROOT / "experiments/slurm/train.sbatch", environment, tmp_path).communicate(timeout=60)
    calls = (tmp_path / "calls").read_text()
    wanted = "--trainer.num_nodes 2 --trainer.devices 4 --data.num_workers 7 --model.sce.sub_classes.number 4"
    assert f"ARGS={wanted}\n" in calls
    assert "LAUNCHER=srun --kill-on-bad-exit=1 .venv/bin/python\n" in calls


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_asks_for_requeue_and_for_the_signal_to_its_shell(script):
    asked = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    grace = yaml.safe_load((ROOT / "experiments/trainer/slurm.yaml").read_text())["preemption"]["grace"]
    assert grace <= 570
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@600"} <= set(asked)
