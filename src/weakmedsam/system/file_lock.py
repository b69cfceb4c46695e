"""One process a folder: two runs of one name do not write over each other.

Not by filelock, as other locks of this project: a stage's process has to keep the lock when the command that started it
is killed, and so inherits the descriptor.
"""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weakmedsam.errors import ConfigError
from weakmedsam.system.atomic_io import put_away

LOCK = ".lock"


@contextmanager
def alone(folder: Path, wait: bool = False) -> Iterator[int]:
    """Work in a folder alone; it is made where it is missing.

    The lock goes with the process however that ends, SIGKILL included; the file stays and means nothing then.
    A process that is started with the descriptor (``pass_fds``) holds the lock too, as long as it lives.

    Args:
        folder: of a run, a sweep or a stage.
        wait: until another process that works there has ended, instead of an error.

    Yields:
        The lock's file descriptor.

    Raises:
        ConfigError: another process works there; names it and its machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / LOCK).is_dir():
        put_away(folder / LOCK)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"{folder} is being worked on by {holder}: wait for it, or choose another name (EXPERIMENT, NAME, "
                "OUT or --trainer.default_root_dir). After a kill a stage that it had started may still be running"
            ) from error
        except OSError as error:  # some network disks know no locks
            warnings.warn(
                f"{folder} is on a disk without locks ({error}): see yourself that no other run of this name is on",
                stacklevel=1,  # the caller's frame is contextlib's
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield file.fileno()
