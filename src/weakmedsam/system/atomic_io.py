"""Files that are there whole or not at all: what a run leaves behind survives being killed."""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from weakmedsam.errors import DiskError, WeakMedSAMError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where nothing more can be written: disk, quota or the limit of a file's size."""


RUN = "the run elsewhere (make RUNS=..., --trainer.default_root_dir)"
STORE = "the slice store elsewhere (--data.prepare.store_dir)"
SCANS = "the drawn scans elsewhere (make DATA_DIR=..., --data.data_dir)"
SEGMENTATIONS = "the segmentations elsewhere (make predict OUT=..., --out)"
WEIGHTS_CACHE = "the weights elsewhere (the environment's WEAKMEDSAM_CACHE)"
"""What can be put on another disk, and by which option: a property of each file that is written."""


@contextmanager
def explaining_full_disk(path: Path, part: Path, movable: str = RUN) -> Iterator[None]:
    """Turn what a library raises when the disk runs full into one error that names the file and the mend.

    Args:
        path: what is being written.
        part: where it is written to meanwhile, a file or folder that is thrown away on failure. It is tried
            then whether more can be written to it: torch, numpy and safetensors hide the system's own error.
        movable: what can be put elsewhere, and by which option: ``RUN``, ``STORE``, ...

    Raises:
        DiskError: nothing more can be written there.
    """
    try:
        yield
    except WeakMedSAMError:
        raise
    except Exception as error:
        if says_full(error) or _is_full(part):
            raise DiskError(
                f"{path} could not be written: its disk is full (or a quota or limit of file size is reached). "
                f"Free space there, or put {movable}; earlier files are whole, and the same command continues"
            ) from error
        raise


def says_full(error: BaseException | None) -> bool:
    """Whether the system's word that nothing more can be written is among the causes of an error."""
    while error is not None:
        # Libraries written in Rust pass it on as text.
        if getattr(error, "errno", None) in FULL or any(f"(os error {n})" in str(error) for n in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_full(part: Path) -> bool:
    """Whether no more can be written to a file, or into a folder, that is thrown away anyway."""
    probe = part / "probe" if part.is_dir() else part
    try:
        with probe.open("ab") as file:
            file.write(bytes(2**16))
    except OSError as error:
        return error.errno in FULL
    return False


@contextmanager
def replacing(path: Path, movable: str = RUN) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; what lies there takes its place when all went well.

    Folders are made. Two processes may write the same file: the last one counts.

    Args:
        path: the file; an earlier one stays whole until the new one is.
        movable: as of ``explaining_full_disk``.

    Yields:
        The path to write to, of another ending.

    Raises:
        DiskError: the disk is full; the earlier file is untouched, and nothing is left beside it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with explaining_full_disk(path, part, movable):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str, movable: str = RUN) -> None:
    """Write a file whole or not at all; text is written as UTF-8. ``movable`` as of ``explaining_full_disk``."""
    with replacing(path, movable) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]], movable: str = RUN) -> None:
    """Write a CSV whole or not at all; a row without a column leaves its field empty. ``movable`` as above."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, restval="")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue(), movable)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV of our own as text, none where there is no file; rows that are damaged are left out.

    A user's tables: ``data_modules.tables``.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error:  # a cell beyond any length
        return []
    return [row for row in rows if None not in row and None not in row.values()]


def put_away(path: Path) -> None:
    """Make room for a file: what lies there is kept under another name."""
    if not os.path.lexists(path):
        return
    number = 1
    while (kept := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    shutil.move(path, kept)


def rows_before(path: Path, epoch: int) -> list[dict[str, str]]:
    """Rows of a table by epoch that are of earlier epochs; one with damaged rows is kept under another name."""
    rows = [row for row in read_table(path) if row.get("epoch", "").isdecimal()]
    if path.is_dir() or (path.is_file() and len(rows) < path.read_bytes().count(b"\n") - 1):
        put_away(path)
    return [row for row in rows if int(row["epoch"]) < epoch]
