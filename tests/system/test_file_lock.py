import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weakmedsam.errors import ConfigError
from weakmedsam.system import file_lock as locks
from weakmedsam.system.file_lock import alone

ROOT = Path(__file__).parents[2]
# Holds the lock, says so, and starts a process that holds it too.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from weakmedsam.system.file_lock import alone
with alone(Path(sys.argv[1])) as lock:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock] * int(sys.argv[2]))
    print(child.pid, flush=True)
    time.sleep(60)
"""


TRAINING = [
    word
    for name in ("classify", "data/phantom", "backbone/pocket")
    for word in ("--config", f"experiments/{name}.yaml")
]


def hold(folder, shared):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(shared)], stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline())


def test_the_second_process_is_told_who_is_there_and_a_kill_frees_the_folder(tmp_path):
    process, child = hold(tmp_path, 0)
    try:
        with (
            pytest.raises(ConfigError, match=rf"worked on by process {process.pid} on {os.uname().nodename}: "),
            alone(tmp_path),
        ):
            pass
        process.kill()
        process.wait()
        with alone(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)


def test_a_stage_that_outlives_its_pipeline_keeps_the_folder(tmp_path):
    process, child = hold(tmp_path, 1)
    process.kill()
    process.wait()
    told = "After a kill a stage that it had started may still be running"
    with pytest.raises(ConfigError, match=told), alone(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until the system has taken the process down
        try:
            with alone(tmp_path):
                return
        except ConfigError:
            time.sleep(0.05)
    pytest.fail("the folder is still locked")


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError("Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="a disk without locks"), alone(tmp_path):
        pass


@pytest.mark.parametrize(
    "words",
    [
        ("weakmedsam.run.pipeline", "prepare", "--runs", "RUNS", "--experiment", "twice"),
        ("weakmedsam.sweep.cli", "pam", "--local", "--runs", "RUNS", "--experiment", "twice"),
        ("weakmedsam", "fit", *TRAINING, "--trainer.default_root_dir", "RUNS/phantom/twice"),
    ],
)
def test_a_second_command_on_a_run_is_refused_in_one_line(tmp_path, words):
    with alone(tmp_path / "phantom/twice"):
        done = subprocess.run(
            [sys.executable, "-m", *(w.replace("RUNS", str(tmp_path)) for w in words)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    *_, line = done.stderr.strip().splitlines()
    assert f"twice is being worked on by process {os.getpid()} on " in line
