"""Whether files are what was written: their size, their time and a digest of their content.

A leaf, without torch. Looking at a mark costs a look at the folder; content is read only of small files, and of
others where their time says that they were written to since (a gigabyte takes about a second).
"""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

from weakmedsam.errors import CheckpointError, DataError
from weakmedsam.system.commands import command

SMALL = 2**20
"""Bytes up to which a file's content is read at every look."""

_CHECKPOINT = ".ckpt"


class Mark(NamedTuple):
    """What is known of a file that was written.

    Attributes:
        size: bytes.
        time: of its last change, ns.
        digest: of its content.
    """

    size: int
    time: int
    digest: str


def mark(path: Path) -> Mark:
    """Of a file as it is now."""
    found = path.stat()
    return Mark(found.st_size, found.st_mtime_ns, digest(path))


def find_damage(path: Path, held: Mark | None) -> str | None:
    """What is wrong with a file, for a message: "is gone"; None where it is what was written.

    Args:
        path: the file.
        held: its mark; None where there is none (an earlier version): it has to be there.
    """
    if not path.is_file():
        return "is a folder" if path.is_dir() else "is gone"
    if held is None:
        return None
    found = path.stat()
    if found.st_size != held.size:
        return f"is damaged ({found.st_size:,} bytes, {held.size:,} were written)"
    if (found.st_mtime_ns != held.time or found.st_size <= SMALL) and digest(path) != held.digest:
        return "is damaged (its content is not what was written)"
    return None


def digest(path: Path) -> str:
    """Of a file's content, 16 hexadecimal digits.

    A whole checkpoint's is that of its parts: torch writes the name of the file it first wrote to into it.

    Raises:
        DataError: the disk does not give it.
    """
    if path.suffix == _CHECKPOINT and (parts := _parts(path)):
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    try:
        found = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
        with path.open("rb") as file:
            while chunk := file.read(SMALL):
                found.update(chunk)
    except OSError as error:
        raise _unreadable(path, error) from error
    return found.hexdigest()[:16]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there, as ``torch.save`` has written it, to the last byte.

    Raises:
        DataError: the disk does not give it.
    """
    return path.is_file() and bool(_parts(path))


def check_checkpoint(path: Path, key: str) -> None:
    """See that a checkpoint is there and, where it is of torch's packed format, whole: torch compares no checksums.

    It is read once more for that, about a second for 1 GB; whoever loads it then has it in memory.

    Args:
        path: the file.
        key: the setting that names it.

    Raises:
        CheckpointError: it is not; names the mend.
    """
    mend = (
        f"of a run's own checkpoint, the run's command ({command('train')}) notices that and makes it anew; of "
        "another's, copy it again"
    )
    if not path.is_file():
        raise CheckpointError(f"{key} {path}: there is no such file; {mend}")
    with path.open("rb") as file:
        packed = file.read(4) == b"PK\3\4"
    if path.stat().st_size == 0 or (packed and not _parts(path)):
        raise CheckpointError(f"{key} {path} is damaged or not a checkpoint; {mend}")


def _unreadable(path: Path, error: OSError) -> DataError:
    """Not damage, as far as anybody knows: what may be whole is not overwritten without a word."""
    return DataError(
        f"{path} cannot be read ({error}). Give access to it, or remove it, and the same command makes it anew"
    )


def _ends_there(path: Path) -> bool:
    """Whether nothing follows an archive's last record, which has 22 bytes."""
    with path.open("rb") as file:
        file.seek(-22, os.SEEK_END)
        return file.read(4) == b"PK\5\6"


def _parts(path: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, checksum) of a checkpoint's parts, whose content has been compared with them; none of a damaged."""
    try:
        with zipfile.ZipFile(path) as packed:
            parts = packed.infolist()
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
            if not stored or not _ends_there(path) or packed.testzip() is not None:
                return []
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # of a place before the beginning of a short file
            raise _unreadable(path, error) from error
        return []
    except Exception:  # whatever a damaged file makes the reader raise: it is the file's fault
        return []
    # The first part of each name is the archive's.
    return [(part.filename.partition("/")[2], part.file_size, part.CRC) for part in parts]
