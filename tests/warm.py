"""``python tests/warm.py ARGUMENTS``: what ``python ARGUMENTS`` does, without the seconds of its imports.

Half of what the tests' processes cost is that each imports torch and Lightning anew. Here they are forked from a
server that has imported them once. A process that is asked for is a client: it hands its arguments, environment,
folder and open files over to its double, passes on the signals that it gets, and ends as its double does. Where the
client is killed, so is the double with all that it has started.

Not the same: what is read while Python or a library starts (``OMP_NUM_THREADS``, ``PYTHONWARNINGS``) is the
server's, and so is the order of sets; the double has a number and a process group of its own, and no other files
than the three. Without a server (``serving`` was not called, or no Linux) the client becomes ``python ARGUMENTS``
itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

WARM = (sys.executable, __file__)
"""In the interpreter's place in the words of a command; a launcher too."""

ADDRESS = "WEAKMEDSAM_TESTS_WARM"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_ONE_AT_A_TIME = threading.Lock()


def serving() -> tuple[str, ...]:
    """Start the server, if this process has none yet; returns ``WARM``."""
    with _ONE_AT_A_TIME:
        if hasattr(os, "pidfd_open") and ADDRESS not in os.environ:
            folder = tempfile.TemporaryDirectory(prefix="warm-")
            address = str(Path(folder.name) / "socket")
            # No threads, and no CUDA: neither survives a fork.
            own = {ADDRESS: address, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            own |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
            server = subprocess.Popen(
                [*WARM, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **own},
                start_new_session=True,  # a Ctrl-C is for the clients, who pass it on
            )  # fmt: skip
            atexit.register(folder.cleanup)
            assert server.stdin is not None
            assert server.stdout is not None
            atexit.register(server.wait)
            atexit.register(server.stdin.close)  # which ends it
            assert server.stdout.readline(), "the server of tests/warm.py did not start"
            os.environ[ADDRESS] = address
    return WARM


def ask(address: str, words: list[str]) -> NoReturn:
    """The client: let a double do it, and end as it does."""
    told = b""

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):  # the double has just ended
            link.sendall(bytes([number]))

    with socket.socket(socket.AF_UNIX) as link:
        link.connect(address)
        order = json.dumps([words, dict(os.environ), str(Path.cwd())]).encode()
        socket.send_fds(link, [len(order).to_bytes(8, "big")], [0, 1, 2])
        link.sendall(order)
        for number in PASSED_ON:
            signal.signal(number, pass_on)
        with contextlib.suppress(ConnectionResetError):
            told = link.recv(4)
    code = int.from_bytes(told, "big", signed=True) if told else -signal.SIGKILL
    if code >= 0:
        os._exit(code)
    if -code in PASSED_ON:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    os._exit(128 - code)  # of a signal that does not end a process


def serve(address: str) -> list[str]:
    """The server: fork for each client until the input ends. What returns is a double, with its arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who attend to clients
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
            link = door.accept()[0]
            if os.fork() == 0:
                break
            link.close()
        else:
            os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return attend(link)


def attend(link: socket.socket) -> list[str]:
    """To one client, in a fork of the server, until its double has ended. What returns is the double."""
    head, files, _, _ = socket.recv_fds(link, 8, 3)
    order, length = b"", int.from_bytes(head, "big")
    while len(order) < length and (part := link.recv(1 << 16)):
        order += part
    if not head or len(order) < length:  # the client was killed before it had said all
        os._exit(0)
    double = os.fork()
    os.setpgid(double, double)  # by both, so that it is done before either goes on
    if double == 0:
        link.close()
        return become(files, *json.loads(order))
    for file in files:
        os.close(file)
    ended = os.pidfd_open(double)
    while ended not in select.select([link, ended], [], [])[0]:
        signals = link.recv(64)
        if not signals:
            os.killpg(double, signal.SIGKILL)
            os._exit(0)
        for number in signals:
            os.kill(double, number)
    code = os.waitstatus_to_exitcode(os.waitpid(double, 0)[1])
    with contextlib.suppress(BrokenPipeError):  # killed just now
        link.sendall(code.to_bytes(4, "big", signed=True))
    os._exit(0)


def become(files: list[int], words: list[str], environment: dict[str, str], folder: str) -> list[str]:
    """The double: take over what the client is known by; returns its arguments."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    first = folder if words[0] == "-m" else str(Path(words[0]).parent)
    sys.path[:1] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    import numpy as np  # here, so that a client need not

    random.seed()
    np.random.seed()  # noqa: NPY002 - what others may draw from
    return words


def main() -> None:
    """Of the client; of the server; of a double."""
    words = sys.argv[1:]
    address = os.environ.get(ADDRESS)
    if words != ["--serve"]:
        if address is None:
            os.execv(sys.executable, [sys.executable, *words])
        ask(address, words)
    assert address is not None
    from weakmedsam.system.fast_import import many_imports

    with many_imports():
        from weakmedsam import cli  # noqa: F401
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not to be forked"  # noqa: PTH208
    words = serve(address)
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
