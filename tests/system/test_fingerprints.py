"""What tells a file that was written from a damaged one."""

import errno
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tests.fakes import write_checkpoint
from weakmedsam.errors import CheckpointError, DataError
from weakmedsam.system.fingerprints import SMALL, check_checkpoint, digest, find_damage, is_whole, mark


@pytest.mark.parametrize("size", [0, 10, SMALL + 1])
def test_what_was_written_is_whole_wherever_it_is_copied(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    held = mark(path)
    assert find_damage(path, held) is None
    assert find_damage(shutil.copy(path, tmp_path / "copy"), held) is None


@pytest.mark.parametrize("size", [10, SMALL + 1])
def test_damage_is_told_by_its_kind(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    held = mark(path)
    path.write_bytes(bytes(size - 1))
    assert find_damage(path, held) == f"is damaged ({size - 1:,} bytes, {size:,} were written)"
    path.write_bytes(bytes(size - 1) + b"1")
    os.utime(path, ns=(held.time + 1, held.time + 1))
    assert find_damage(path, held) == "is damaged (its content is not what was written)"
    path.unlink()
    assert find_damage(path, held) == find_damage(path, None) == "is gone"
    path.mkdir()
    assert find_damage(path, held) == find_damage(path, None) == "is a folder"


def test_one_checkpoint_under_two_names_has_one_digest_and_others_have_others(tmp_path):
    for name in ("best", "again"):
        torch.save({"a": torch.ones(100)}, tmp_path / f"{name}.ckpt")
    torch.save({"a": torch.zeros(100)}, tmp_path / "other.ckpt")
    assert digest(tmp_path / "best.ckpt") == digest(tmp_path / "again.ckpt") != digest(tmp_path / "other.ckpt")


def test_a_checkpoint_is_whole_or_not(tmp_path):
    path = tmp_path / "last.ckpt"
    assert not is_whole(path)
    torch.save({"a": torch.rand(1000)}, path)
    assert is_whole(path)
    check_checkpoint(path, "--ckpt_path")
    whole = path.read_bytes()
    parts = {"cut": whole[:-1], "empty": b"", "half": whole[: len(whole) // 2], "flipped": bytearray(whole)}
    parts["flipped"][len(whole) // 2] ^= 1  # in a tensor
    for name, content in {**parts, "garbage": b"garbage", "longer": whole + whole[:50]}.items():
        path.write_bytes(content)
        assert not is_whole(path), name
    path.unlink()
    path.mkdir()
    assert not is_whole(path)


def test_a_packed_archive_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/data.pkl", b"0" * 100)
    assert not is_whole(tmp_path / "a.ckpt")


def test_a_lost_or_damaged_checkpoint_is_refused_with_the_mend(tmp_path):
    path = tmp_path / "best.ckpt"
    with pytest.raises(
        CheckpointError, match=r"best\.ckpt: there is no such file; .*make train\) notices that and makes"
    ):
        check_checkpoint(path, "--ckpt_path")
    write_checkpoint(path)
    path.write_bytes(path.read_bytes().replace(b"weights", b"weightz"))
    with pytest.raises(CheckpointError, match=r"--ckpt_path .*best\.ckpt is damaged or not a checkpoint; .*make train"):
        check_checkpoint(path, "--ckpt_path")


def test_what_the_disk_does_not_give_is_not_taken_for_damaged(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "best.ckpt")
    held = mark(path)
    os.utime(path, ns=(1, 1))

    def fail(self, *words, **more):
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(zipfile.ZipFile, "__init__", fail)
    monkeypatch.setattr(Path, "open", fail)
    for look in (is_whole, digest, lambda path: find_damage(path, held)):
        with pytest.raises(DataError, match=r"best\.ckpt cannot be read \(.*Input/output error.*Give access to it"):
            look(path)
