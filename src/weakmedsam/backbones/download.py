"""One file over HTTP, by pooch: it verifies and moves into place; its downloader here resumes a partial file.

pooch's own downloader starts from zero after a break or a kill, and pooch's own retries download a file of a
wrong hash again and again. Proxies are those of ``requests`` (``https_proxy``, ``no_proxy``).
"""

from __future__ import annotations

import shutil
import sys
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import pooch
import requests
from tqdm import tqdm
from urllib3.exceptions import NameResolutionError

from weakmedsam.system.atomic_io import WEIGHTS_CACHE, put_away

TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""

RETRIES = 4
"""Attempts after one that brought nothing new; any progress starts the count anew."""

PAUSE = 1.0
"""Seconds before the first retry, doubled each time."""

CHUNK_BYTES = 2**16
"""Bytes written at once; less is lost when a connection breaks."""

_PASSING = (408, 416, 425, 429)
"""HTTP client errors after which a request may succeed; 416: the partial file was too long and is removed."""


def retrieve(url: str, path: Path, size: int, sha256: str, published: str) -> None:
    """Download a file, verified; what arrived before a break or a kill is continued.

    Args:
        url: http or https.
        path: where it goes, in a folder that exists; ``.<published>.part`` beside it is the partial file.
        size: bytes of the file, unpacked.
        sha256: of the file, unpacked.
        published: name of the file at ``url``; of a zip archive where it is not ``path``'s name.

    Raises:
        OSError: it cannot be downloaded or written; the partial file is kept.
        ValueError: its content is not the published one.
    """
    pooch.get_logger().setLevel("WARNING")  # the next line says it in one line, on standard error
    announce(f"downloading {url} to {path}")
    download = _Download(path, size, published)
    for last in (False, True):
        try:
            pooch.retrieve(url, sha256, path.name, path.parent, downloader=download)
            return
        except ValueError as error:
            if last or not download.resumed:
                raise
            announce(f"{error} It came in parts and is downloaded again in one")


class _Download:
    """A downloader as pooch calls it: continues a partial file, retries, and unpacks an archive."""

    def __init__(self, path: Path, size: int, published: str) -> None:
        self.path, self.size = path, size
        self.archive = path.with_name(published) if published != path.name else None
        self.part = path.with_name(f".{published}.part")
        # The size of an archive is published nowhere.
        self.whole = None if self.archive else size
        self.resumed = False

    def __call__(self, url: str, output_file: str, _: object) -> None:
        target = Path(output_file)
        target.unlink()  # pooch's temporary file would stay behind after a kill
        if self.archive and self.archive.exists():  # put there by hand
            try:
                self._unpack(self.archive, target)
                return
            except ValueError as error:
                announce(f"{error}: kept as {self.archive.name}.old<number>, downloaded again")
                put_away(self.archive)
        self.resumed = self._length() > 0
        self._complete(url)
        if self.archive:
            try:
                self._unpack(self.part, target)
            finally:
                self.part.unlink()
        else:
            self.part.replace(target)

    def _complete(self, url: str) -> None:
        """Request until the partial file is complete."""
        failures, most = 0, self._length()
        while self._length() != self.whole:
            try:
                self._request(url)
                return
            except requests.RequestException as error:
                failures = 1 if self._length() > most else failures + 1
                most = max(most, self._length())
                if failures > RETRIES or _is_final(error):
                    raise
                pause = PAUSE * 2 ** (failures - 1)
                announce(f"{url}: {reason_of(error)}; next attempt in {pause:g} s")
                time.sleep(pause)

    def _request(self, url: str) -> None:
        """One request for what follows the partial file."""
        have = self._length()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as answer:
            if answer.status_code == 416:
                self.part.unlink()
            answer.raise_for_status()
            start = have if answer.status_code == 206 else 0  # a server may ignore the range
            self.resumed = start > 0
            remaining = int(answer.headers.get("Content-Length", 0))
            total = start + remaining if remaining else None
            if self.whole and total not in (None, self.whole):
                raise requests.ConnectionError(f"{total:,} bytes are offered, {self.whole:,} are published")
            if remaining > (free := shutil.disk_usage(self.part.parent).free):
                raise OSError(
                    f"{remaining:,} bytes are needed in {self.part.parent}, {free:,} are free: put {WEIGHTS_CACHE}"
                )
            self._store(answer, start, total)
        if self.whole and self._length() != self.whole:
            raise requests.ConnectionError(f"{self._length():,} of {self.whole:,} bytes arrived")

    def _store(self, answer: requests.Response, start: int, total: int | None) -> None:
        terminal = sys.stderr.isatty()
        with (
            self.part.open("ab" if start else "wb", buffering=0) as file,
            # In a log file: nothing for a short download, a line now and then for a long one.
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=self.path.name, file=sys.stderr,
                 delay=0 if terminal else 5, mininterval=0.2 if terminal else 10) as bar,
        ):  # fmt: skip
            for chunk in answer.iter_content(CHUNK_BYTES):
                try:
                    file.write(chunk)
                except OSError as error:
                    raise OSError(f"{self.part} cannot be written ({error.strerror}): put {WEIGHTS_CACHE}") from error
                bar.update(len(chunk))

    def _unpack(self, archive: Path, target: Path) -> None:
        """Write the one member that is wanted; the path that the archive gives it is never used."""
        try:
            with zipfile.ZipFile(archive) as packed:
                wanted = [m for m in packed.infolist() if PurePosixPath(m.filename).name == self.path.name]
                if [member.file_size for member in wanted] != [self.size]:
                    raise ValueError(f"{archive} does not hold {self.path.name} of {self.size:,} bytes")
                with packed.open(wanted[0]) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{archive} is not a sound zip file ({error})") from error

    def _length(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0


def reason_of(error: Exception) -> str:
    """What an error says, without the layers that requests puts around it."""
    return str(_cause(error) or error)


def _cause(error: Exception) -> Exception | None:
    return getattr(error.args[0], "reason", None) if error.args else None


def _is_final(error: requests.RequestException) -> bool:
    """Whether waiting mends nothing: HTTP 404 and its like, an unknown host, a certificate that does not hold."""
    if error.response is not None:
        code = error.response.status_code
        return 400 <= code < 500 and code not in _PASSING
    return isinstance(error, requests.exceptions.SSLError) or isinstance(_cause(error), NameResolutionError)


def announce(text: str) -> None:
    """Tell the user, on standard error: it must not get into a command's output."""
    print(text, file=sys.stderr, flush=True)
