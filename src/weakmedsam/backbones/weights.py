"""Official weights: found in the cache or downloaded, and verified; ``python -m weakmedsam.backbones.weights NAME``.

A backbone's own file declares its weights in a literal dictionary ``WEIGHTS``, by the name of
``experiments/backbone/<name>.yaml``: the fields of ``Weights``, the name of other weights, or None where there
is nothing to download. The dictionary is read without importing the file, so that this module loads no torch.
Where sizes and hashes are published: ``docs/weights.md``.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pooch
from filelock import FileLock, Timeout

from weakmedsam.backbones.download import announce, reason_of, retrieve
from weakmedsam.errors import CheckpointError, ConfigError, WeakMedSAMError
from weakmedsam.system.atomic_io import put_away, write_whole

CACHE = "WEAKMEDSAM_CACHE"
"""Environment variable: the folder that weights are kept in."""

MIRROR = "WEAKMEDSAM_WEIGHTS_URL"
"""Environment variable: address of a folder to download the files from instead of the official ones."""


@dataclass(frozen=True)
class Weights:
    """A published file of weights.

    Attributes:
        url: official address: of the file, or of a zip archive ``<file>.zip`` that holds it.
        size: bytes, unpacked.
        sha256: hexadecimal digest of the file, unpacked.
        licence: of the weights.
    """

    url: str
    size: int
    sha256: str
    licence: str

    @property
    def published(self) -> str:
        """Name of the file at ``url``, which may be an archive."""
        return PurePosixPath(self.url).name

    @property
    def file(self) -> str:
        """Name of the file in the cache."""
        return self.published.removesuffix(".zip")


def declared(folder: Path = Path(__file__).parent) -> dict[str, Weights | None]:
    """Weights by backbone, from ``WEIGHTS`` in every module of a folder; None: nothing to download.

    Raises:
        ConfigError: a declaration that is no literal, has other fields, or names unknown weights.
    """
    found: dict[str, Weights | None] = {}
    same: dict[str, str] = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WEIGHTS"):
                continue
            try:
                for name, entry in ast.literal_eval(node.value).items():
                    if name in found or name in same:
                        raise ValueError(f"{name!r} is declared twice")
                    if isinstance(entry, str):
                        same[name] = entry
                    else:
                        found[name] = entry and Weights(**entry)
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{path}: WEIGHTS is a literal dictionary, of each backbone's name to url, size, sha256 and "
                    f"licence, to another name or to None ({error})"
                ) from error
    if unknown := sorted(set(same.values()) - set(found)):
        raise ConfigError(f"WEIGHTS of a backbone in {folder} names {', '.join(unknown)}, declared nowhere")
    return found | {name: found[other] for name, other in same.items()}


def find(name: str) -> Path:
    """The verified file of a backbone's official weights: from the cache, else downloaded.

    Raises:
        ConfigError: an unknown name, nothing to download, or a mirror that is no http address.
        CheckpointError: neither in the cache nor to be downloaded; says which file to put where.
    """
    known = declared()
    if (item := known.get(name)) is None:
        names = ", ".join(sorted(name for name, item in known.items() if item))
        raise ConfigError(f"{name!r} has no official weights; they are known of {names}")
    mirror = os.environ.get(MIRROR, "")
    if mirror and not mirror.startswith(("http://", "https://")):
        raise ConfigError(
            f"{MIRROR} is {mirror!r}, which is no http address; for a folder on this machine set {CACHE} to it"
        )
    return obtain(item, cache_folder(), mirror)


def cache_folder() -> Path:
    """``WEAKMEDSAM_CACHE``, else ``XDG_CACHE_HOME/weakmedsam``, else ``~/.cache/weakmedsam``."""
    if own := os.environ.get(CACHE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "weakmedsam"


def obtain(item: Weights, folder: Path, mirror: str = "") -> Path:
    """The verified file in a folder, downloaded where it is missing.

    A file of other content is kept under another name and downloaded again. A small ``<file>.verified`` beside
    the file saves hashing it at each start, as long as its size and modification time stay.

    Args:
        item: the file.
        folder: made where it is missing; may be read-only where the file is there.
        mirror: address of a folder with files of the same names, instead of the official one.

    Raises:
        CheckpointError: neither in the folder nor to be downloaded; says which file to put where.
    """
    path = folder / item.file
    if is_verified(path, item):
        return path
    url = f"{mirror.rstrip('/')}/{item.published}" if mirror else item.url
    try:
        with _locked(path):
            # Another process may have downloaded it in the meantime.
            if not is_verified(path, item):
                if path.exists():
                    announce(f"{path} is not the published file: kept as {path.name}.old<number>, downloaded again")
                    put_away(path)
                retrieve(url, path, item.size, item.sha256, item.published)
                _stamp(path, item)
    except (OSError, ValueError) as error:  # of requests, of the disk; of the content
        packed = f" ({item.file} lies in it)" if item.published != item.file else ""
        raise CheckpointError(
            f"{item.file} ({item.size:,} bytes, SHA-256 {item.sha256}) is not in {folder} and cannot be downloaded "
            f"from {url}: {reason_of(error)}. The same command tries again, and continues a partial file.\n"
            f"Without a network: download {item.url}{packed} elsewhere and put it at {folder / item.published}.\n"
            "weights: none starts from random numbers; the path of a file of your own is taken as it is."
        ) from error
    return path


def is_verified(path: Path, item: Weights) -> bool:
    """Whether a file is the published one; hashed only if it has changed since it was last hashed."""
    if not path.is_file() or path.stat().st_size != item.size:
        return False
    with suppress(OSError, ValueError):
        if _stamp_file(path).read_text() == _fingerprint(path, item):
            return True
    if pooch.file_hash(path) != item.sha256:
        return False
    _stamp(path, item)
    return True


def _fingerprint(path: Path, item: Weights) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {item.sha256}\n"


def _stamp_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _stamp(path: Path, item: Weights) -> None:
    with suppress(OSError):  # a read-only folder: hashed again next time
        write_whole(_stamp_file(path), _fingerprint(path, item))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; a killed one leaves no lock behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        announce(f"{path.name}: another process is downloading it; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def main(arguments: Sequence[str] | None = None) -> int:
    """Find or download weights by name, or list what is declared; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m weakmedsam.backbones.weights",
        description="Find or download the official weights of backbones, verified; without a name: list them.",
        epilog=f"Kept in {cache_folder()} ({CACHE}); {MIRROR} names a mirror. See docs/weights.md.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of experiments/backbone/<name>.yaml, or resnet18")
    names = parser.parse_args(arguments).names
    try:
        known = declared()
        for name in names or known:
            item = known.get(name)
            if name in known and item is None:
                print(f"{name}: nothing to download")
            elif item and not names:
                print(f"{name}: {item.file}, {item.size:,} bytes, licence: {item.licence}")
                print(f"  {item.url}\n  SHA-256 {item.sha256}")
            else:
                print(f"{name}: {find(name)}")
    except WeakMedSAMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
