"""Published files: in a folder whole and verified, or fetched into it; never half.

A file comes over HTTP into a hidden ``.part`` file beside its place, is continued there after a break or
a kill, and takes its place only when its size and SHA-256 are the published ones. Processes that want
the same file at once wait for the first. No torch here: ``make weights`` starts fast.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from weakmedsam.backbones.transfer import CHUNK, PATIENCE, FetchError, Patience, download, forget
from weakmedsam.errors import CheckpointError
from weakmedsam.system.atomic_io import WEIGHTS, replacing, write_whole

try:
    import fcntl
except ImportError:  # not on Windows: two processes at once are then the user's own care
    fcntl = None  # type: ignore[assignment]


class Published(NamedTuple):
    """A file whose content is known.

    Attributes:
        file: its name.
        size: bytes.
        sha256: hexadecimal digest of its content.
        base: official address of the folder it lies in.
        archive: name of the zip file at ``base`` that holds it; empty where it lies there itself.
    """

    file: str
    size: int
    sha256: str
    base: str
    archive: str = ""

    def url(self, mirror: str = "") -> str:
        """Where it is fetched from; ``mirror`` takes the place of ``base``."""
        return f"{(mirror or self.base).rstrip('/')}/{self.archive or self.file}"


def obtain(item: Published, folder: Path, mirror: str = "", patience: Patience = PATIENCE) -> Path:
    """A published file in a folder: the one that is there, else fetched.

    What is there but is not the published file is named, moved aside (``<file>.damaged``) and fetched
    again. A small ``<file>.verified`` beside the file saves hashing it at each start, for as long as its
    size and time of change stay.

    Args:
        item: what is wanted.
        folder: where files are kept; made where it is missing, may be read-only where the file is there.
        mirror: address of a folder with the same file names, instead of the official one.
        patience: timeout and retries.

    Returns:
        Its path, verified.

    Raises:
        CheckpointError: it can be had neither here nor there; says which file to put where.
    """
    path = folder / item.file
    if is_verified(path, item):
        return path
    try:
        with _locked(path):
            # Another process may have brought it in the meantime.
            if not is_verified(path, item):
                if path.exists():
                    say(f"{path} is not the published file: kept as {_set_aside(path).name}, fetched again")
                (_bring_packed if item.archive else _bring)(item, path, item.url(mirror), patience)
                _stamp(path, item)
    except (FetchError, OSError) as error:
        packed = f" ({item.file} lies in it)" if item.archive else ""
        raise CheckpointError(
            f"{item.file} ({item.size:,} bytes) is not there and cannot be fetched: {error}.\n"
            f"Without a network: fetch {item.url()}{packed} elsewhere and put it at "
            f"{path.with_name(item.archive or item.file)}.\n"
            "weights: none starts from random numbers, a path takes a file of your own as it is."
        ) from error
    return path


def is_verified(path: Path, item: Published) -> bool:
    """Whether a file is the published one; read whole only if it has changed since it was last read."""
    if not path.is_file():
        return False
    try:
        stamp = json.loads(_stamp_file(path).read_text())
    except (OSError, ValueError):
        stamp = None
    seen = _seen(path, item)
    if seen["size"] != item.size or (stamp != seen and sha256(path) != item.sha256):
        return False
    if stamp != seen:
        _stamp(path, item)
    return True


def _seen(path: Path, item: Published) -> dict[str, int | str]:
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": item.sha256}


def _stamp_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _stamp(path: Path, item: Published) -> None:
    with suppress(OSError):  # a read-only folder: hashed again next time
        write_whole(_stamp_file(path), json.dumps(_seen(path, item)))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def say(text: str) -> None:
    """Tell the user, on standard error: it must not get into a command's output."""
    print(text, file=sys.stderr, flush=True)


def _bring(item: Published, path: Path, url: str, patience: Patience) -> None:
    part = path.with_name(f".{path.name}.part")
    say(f"fetching {url} to {path}")
    _fetch(url, part, item.size, patience, lambda: _check(part, item, url))
    part.replace(path)
    forget(part)


def _bring_packed(item: Published, path: Path, url: str, patience: Patience) -> None:
    archive = path.with_name(item.archive)
    if archive.exists():  # put there by hand
        try:
            _unpack(archive, item, path)
            return
        except FetchError as error:
            say(f"{error}: kept as {_set_aside(archive).name}, fetched again")
    part = path.with_name(f".{archive.name}.part")
    say(f"fetching {url} to {path}")
    # The archive's own hash is published nowhere: what it holds decides.
    _fetch(url, part, None, patience, lambda: _unpack(part, item, path))
    forget(part)


def _fetch(url: str, part: Path, size: int | None, patience: Patience, accept: Callable[[], None]) -> None:
    """Download until ``accept`` is content; pieces that do not belong together are given one more go."""
    if download(url, part, size, patience):
        try:
            accept()
            return
        except FetchError as error:
            say(f"{error}; it came in pieces and is fetched again in one")
            forget(part)
            download(url, part, size, patience)
    try:
        accept()
    except FetchError:
        forget(part)
        raise


def _unpack(archive: Path, item: Published, path: Path) -> None:
    """Write the one member that is wanted, after verifying it, to ``path``; its own path is never used."""
    try:
        with zipfile.ZipFile(archive) as packed:
            members = packed.infolist()
            for name in (member.filename for member in members):
                if ".." in PurePosixPath(name).parts or name.startswith("/") or "\\" in name:
                    raise FetchError(f"{archive} holds {name!r}, which leads out of its folder: refused")
            wanted = [member for member in members if PurePosixPath(member.filename).name == item.file]
            if len(wanted) != 1 or wanted[0].file_size != item.size:
                raise FetchError(f"{archive} does not hold {item.file} of {item.size:,} bytes")
            with replacing(path, WEIGHTS) as part:
                with packed.open(wanted[0]) as source, part.open("wb") as target:
                    while block := source.read(CHUNK):
                        target.write(block)
                _check(part, item, str(archive))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FetchError(f"{archive} is not a sound zip file ({error})") from error


def _check(part: Path, item: Published, source: str) -> None:
    found = sha256(part)
    if found != item.sha256:
        raise FetchError(
            f"{source} gave another file than the published {item.file}: "
            f"its SHA-256 is {found}, published is {item.sha256}"
        )


def _set_aside(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged{number if number > 1 else ''}")).exists():
        number += 1
    return path.rename(kept)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; a killed one leaves no lock behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{path.name}: another process is fetching it; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
