"""Commands of the product, one after another in the same processes: a start costs more than a tiny training."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from warm import serving

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def run_commands(commands: Sequence[Sequence[object]], processes: int = 1, timeout: float = 600) -> None:
    """``python -m weakmedsam`` with the words of each command; see ``run_processes``."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    run_processes([__file__, words], processes, timeout)


def run_processes(words: Sequence[object], processes: int = 1, timeout: float = 600) -> None:
    """``python`` with these words, by one process or by the ranks of a launcher.

    Raises:
        AssertionError: a process failed; the message has what all have printed.
    """
    shared = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if processes > 1:
        shared |= {
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
                [*serving(), *map(str, words)],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env=shared | ({"LOCAL_RANK": str(rank)} if processes > 1 else {}),
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


def main(words: str) -> None:
    """Run them; the first that fails ends the process."""
    from weakmedsam.system.fast_import import many_imports

    with many_imports():
        from weakmedsam import cli

    for command in json.loads(words):
        sys.argv[1:] = command
        cli.main()


if __name__ == "__main__":
    main(sys.argv[1])
