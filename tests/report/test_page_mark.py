"""When a page shows its run as it is, and is not written anew."""

import os
import shutil
from pathlib import Path

import pytest
from drawn_run import draw_run, write_stage

from weakmedsam.report import page_mark
from weakmedsam.report.cli import write_report
from weakmedsam.report.page_mark import is_up_to_date


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Of a finished run."""
    return write_report(draw_run(tmp_path / "phantom" / "k4"))


def test_a_page_that_was_just_written_is_up_to_date_wherever_its_run_lies(page: Path, tmp_path: Path) -> None:
    assert is_up_to_date(page)
    moved = page.parent.rename(tmp_path / "elsewhere") / page.name
    assert is_up_to_date(moved)
    moved.write_bytes(moved.read_bytes()[:100])
    assert not is_up_to_date(moved)
    moved.unlink()
    assert not is_up_to_date(moved)


def test_so_it_is_by_a_path_from_the_working_folder(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_up_to_date(page.relative_to(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda run: write_stage(run, "upper_bound", 9.0),
        lambda run: shutil.rmtree(run / "refined"),
        lambda run: os.utime(run / "test/stage.json", ns=(1, 1)),
        lambda run: (run / "segment/clock.json").write_text("{}"),
    ],
)
def test_a_stage_that_was_added_removed_run_again_or_begun_puts_it_out_of_date(page: Path, change) -> None:
    change(page.parent)
    assert not is_up_to_date(page)


def test_so_does_another_version(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_mark, "__version__", "9.9")
    assert not is_up_to_date(page)
