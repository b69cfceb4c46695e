"""What a job does that is about to be taken off its machine: the signals, and the exit status that asks for more.

SLURM sends a signal some time before the end (``--signal``). It is passed on to the stage that runs; a training
lets its epoch end (``callbacks/preemption.py``), anything else stops at once. The exit status is then ``REQUEUE``,
and the batch script puts the job back into the queue. The same command continues.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

REQUEUE = 75
"""Exit status of what was stopped by a signal and can go on: EX_TEMPFAIL of sysexits.h, "try again later"."""

KILLED = (-9, 128 + 9)
"""Status of a process that SIGKILL has ended, as Python and as a shell or launcher says it."""

SIGNALS = ("SIGTERM", "SIGUSR1")
"""Names of the signals that are understood, unless others are set."""


class Relay:
    """Starts processes and passes on to them the signals that this one gets.

    Args:
        held: file descriptors that the processes keep open: of the lock of the folder they work in. Where this
            process alone is killed, nobody else begins to write there before they have ended.

    Attributes:
        asked: a signal has come: start nothing new.
    """

    def __init__(self, held: Sequence[int] = ()) -> None:
        self.asked = False
        self._held = tuple(held)
        self._children: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def listening(self) -> Iterator[Relay]:
        """Understand the signals meanwhile, instead of ending by them."""
        before = {name: signal.signal(getattr(signal, name), self._pass_on) for name in SIGNALS}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def run(self, words: Sequence[str]) -> int:
        """Run a command to its end; returns its exit status."""
        return self.start(words).wait()

    def start(
        self,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        log: IO[bytes] | None = None,
        held: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a command.

        Args:
            words: the command.
            environment: its variables; this process's by default.
            log: where its output goes; this process's by default.
            held: descriptors that this command alone keeps open, besides those of all.
        """
        errors = None if log is None else subprocess.STDOUT
        child = subprocess.Popen(words, env=environment, stdout=log, stderr=errors, pass_fds=(*self._held, *held))
        self._children = [other for other in self._children if other.poll() is None] + [child]
        if self.asked:  # it came while the process was being started
            child.terminate()
        return child

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for child in self._children:
            child.send_signal(number)
