"""What is forked ready-made in the tests behaves as a process that was started."""

import os
import signal
import socket
import subprocess
import time

import pytest
from warm import ADDRESS, serving

SAYS = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(9))
print(child.pid, os.environ["GIVEN"], os.getcwd(), *sys.argv[1:], "torch" in sys.modules, flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux only")


@pytest.fixture
def talking(tmp_path):
    """A process, and what it has said."""
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    words, environment = [*serving(), str(script), "one", "t w o"], {**os.environ, "GIVEN": "by me"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    child, *said = process.stdout.readline().split(" ", 1)
    yield process, int(child), said[0].strip()
    process.kill()
    process.stdout.close()
    process.wait()


def ended(number):
    """Whether a process is gone, or only waits to be asked how it ended."""
    for _ in range(100):
        try:
            with open(f"/proc/{number}/stat") as file:  # noqa: PTH123
                state = file.read().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_it_has_arguments_environment_and_folder_of_its_own_and_torch_already(talking, tmp_path):
    assert talking[2] == f"by me {tmp_path} one t w o True"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR2, 9), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_reach_it_and_it_ends_as_it_would(talking, number, status):
    process, child, _ = talking
    process.send_signal(number)
    assert process.wait(timeout=20) == status
    os.kill(child, signal.SIGKILL)  # which a started process would leave behind too


def test_a_client_that_is_killed_before_it_has_said_all_leaves_nobody_behind():
    serving()
    for said in (b"", (1000).to_bytes(8, "big"), (1000).to_bytes(8, "big") + b"[["):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(os.environ[ADDRESS])
            link.sendall(said)
            link.shutdown(socket.SHUT_WR)
            assert link.recv(4) == b""  # whoever attended to it has left


def test_where_it_is_killed_all_that_it_has_started_ends(talking):
    process, child, _ = talking
    process.kill()
    assert process.wait(timeout=20) == -signal.SIGKILL
    assert ended(child)
