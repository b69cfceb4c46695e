"""Order of the tests: files with slow ones first, so that no worker is left alone with one at the end."""

import gc
import logging
import os
import warnings
from collections.abc import Iterator

import pytest

# Before torch is imported. What is compared bit for bit is computed alike in this process and in those it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("ddp")}
    items.sort(key=lambda item: item.path not in slow)
    gc.freeze()  # all modules are imported by now; a worker would look through them for garbage in every test


@pytest.fixture(autouse=True)
def what_a_command_silences_is_heard_again() -> Iterator[None]:
    """A command that runs in this process lowers loggers and shortens warnings, for its own process as it may think."""
    names = ("", "lightning.pytorch", "lightning.fabric", "weakmedsam", "data_modules")
    levels, shape = {name: logging.getLogger(name).level for name in names}, warnings.formatwarning
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    if logging.lastResort is not None:
        logging.root.removeHandler(logging.lastResort)
    warnings.formatwarning = shape
