"""From which checkpoint a training goes on."""

import pytest

from tests.fakes import write_checkpoint
from weakmedsam.run.checkpoints import resume_options


def damage(path, how):
    if how == "whole":
        write_checkpoint(path)
    elif how == "cut":
        path.write_bytes(write_checkpoint(path).read_bytes()[:-10])
    elif how == "garbage":
        path.write_bytes(b"garbage")
    elif how == "empty":
        path.touch()
    elif how == "folder":
        path.mkdir()


BROKEN = ["cut", "garbage", "empty", "folder"]


@pytest.fixture
def checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("last", ["gone", *BROKEN])
def test_without_a_whole_last_checkpoint_it_goes_on_from_the_best(tmp_path, checkpoints, last, capsys):
    damage(checkpoints / "last.ckpt", last)
    damage(checkpoints / "best.ckpt", "whole")
    assert resume_options(tmp_path) == ["--ckpt_path", str(checkpoints / "best.ckpt")]
    said = capsys.readouterr().out
    assert f"last.ckpt is {'not there' if last == 'gone' else 'damaged'}: the training goes on from best.ckpt" in said
    assert not (checkpoints / "last.ckpt").exists()


@pytest.mark.parametrize("best", ["gone", *BROKEN])
@pytest.mark.parametrize("last", ["whole", "cut"])
def test_without_a_whole_best_checkpoint_it_starts_anew_and_says_so(tmp_path, checkpoints, best, last, capsys):
    damage(checkpoints / "last.ckpt", last)
    damage(checkpoints / "best.ckpt", best)
    (tmp_path / "history.csv").write_text("epoch,val/auroc\n0,0.5\n")
    kept = {path.name: path.read_bytes() for path in checkpoints.iterdir() if path.is_file()}
    assert resume_options(tmp_path) == []
    assert "the training starts anew" in capsys.readouterr().out
    assert not list(checkpoints.glob("*.ckpt"))
    assert all((checkpoints / f"{name}.old1").read_bytes() == content for name, content in kept.items())


def test_before_the_first_validation_it_goes_on_from_the_last_checkpoint(tmp_path, checkpoints, capsys):
    damage(checkpoints / "last.ckpt", "whole")
    (tmp_path / "history.csv").write_text("epoch,train/loss,val/auroc\n0,0.5,\n")
    assert resume_options(tmp_path) == ["--ckpt_path", str(checkpoints / "last.ckpt")]
    damage(checkpoints / "last.ckpt", "cut")
    assert resume_options(tmp_path) == []
    assert not capsys.readouterr().out


def test_what_is_whole_is_gone_on_from_without_a_word(tmp_path, checkpoints, capsys):
    assert resume_options(tmp_path / "new") == resume_options(tmp_path) == []
    for name in ("best", "last"):
        damage(checkpoints / f"{name}.ckpt", "whole")
    assert resume_options(tmp_path) == ["--ckpt_path", str(checkpoints / "last.ckpt")]
    assert capsys.readouterr().out == ""


def test_a_file_in_the_place_of_the_checkpoints_folder_is_no_hindrance(tmp_path):
    (tmp_path / "checkpoints").touch()
    assert resume_options(tmp_path) == []
    assert not (tmp_path / "checkpoints").exists()
