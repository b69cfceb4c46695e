"""Messages name commands that can be typed where they are read."""

from pathlib import Path

import pytest

from weakmedsam.system.commands import command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_in_a_checkout_it_is_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert command("check", dataset="clinic") == "make check DATASET=clinic"
    assert command("sweep", sweep="pam", local=True) == "make sweep SWEEP=pam LOCAL=1"


def test_elsewhere_it_is_the_installed_program(elsewhere: Path) -> None:
    assert command("check", dataset="clinic") == "weakmedsam check --dataset clinic"
    assert command("sweep", sweep="pam", local=True) == "weakmedsam sweep pam --local"
    assert command("predict", data_dir="my scans") == "weakmedsam predict --data-dir 'my scans'"


def test_another_makefile_is_not_ours(elsewhere: Path) -> None:
    (elsewhere / "Makefile").write_text("train:\n")
    assert command("train") == "weakmedsam train"
