"""A run to review; each test has a copy of it, the scans are shared."""

import shutil

import pytest
from reviewed_run import write_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("review"))


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs/phantom/default")
