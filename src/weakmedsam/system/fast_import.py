"""Starting and leaving a process that imports thousands of modules, quicker."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 128 + 2
"""Exit status after Ctrl-C (SIGINT), as a shell says it."""

MAPPED_FROM, KEPT = 2**28, 2**29
"""Bytes from which on an array gets memory of its own from the system, and that are kept when arrays are freed."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Leave without a traceback at Ctrl-C, imports included: whoever pressed it knows where."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def wait_asleep() -> None:
    """Let threads of OpenMP sleep while they wait for each other, unless the environment says otherwise.

    By default they spin. Beside other work a spinning thread keeps the processor from the one it waits for
    (``benchmarks.busy``). To be called before torch is imported: its OpenMP reads the variable as it is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed arrays for the next ones, unless the environment says otherwise.

    By default each array above 32 MiB gets fresh pages from the system, which zeroes them: layers of a network make
    such arrays all the time, and up to half of a forward pass's processor time went there (``docs/performance.md``).
    """
    if not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        try:
            adjust = ctypes.CDLL(None).mallopt
        except (AttributeError, OSError, TypeError):  # another C library
            return
        trim, mapped = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        adjust(mapped, MAPPED_FROM)
        adjust(trim, KEPT)


@contextmanager
def many_imports() -> Iterator[None]:
    """Import inside; what is imported is never garbage, so it is never searched for any.

    Python's collector would go through all modules again and again while they are imported, and once more at
    the end: a third of what a process costs that imports the command line and does nothing else (5.4 instead of
    3.7 s on two cores).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
