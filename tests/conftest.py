"""Order of the tests: files with slow ones first, so that no worker is left alone with one at the end."""

import gc
import os

import pytest

# Before torch is imported. What is compared bit for bit is computed alike in this process and in those it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("ddp")}
    items.sort(key=lambda item: item.path not in slow)
    gc.freeze()  # all modules are imported by now; a worker would look through them for garbage in every test
