"""One file over HTTP, continued after a break: RFC 9110 range requests with the standard library."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from weakmedsam.system.atomic_io import WEIGHTS

CHUNK = 1 << 20
"""Bytes read at once."""

_PASSING = (408, 425, 429, *range(500, 600))
"""HTTP status codes after which the same request may succeed."""


class FetchError(Exception):
    """A file cannot be had; the message is the reason."""


class Patience(NamedTuple):
    """How long to go on.

    Attributes:
        timeout: seconds without a byte after which a connection is given up.
        retries: attempts after one that brought nothing new; any progress starts the count anew.
        pause: seconds before the first of them, doubled each time.
    """

    timeout: float = 30.0
    retries: int = 4
    pause: float = 1.0


PATIENCE = Patience()


class _BrokenError(Exception):
    """An attempt failed; another may not."""


def download(url: str, part: Path, size: int | None, patience: Patience) -> bool:
    """Fetch a file into ``part``, continuing what is there of an earlier attempt or process.

    Args:
        url: http or https.
        part: where it goes; what came before a break stays there. ``<part>.json`` notes which version of
            the file it is a piece of, so that pieces of two versions are not put together.
        size: bytes that are expected; None takes what the server announces.
        patience: timeout and retries.

    Returns:
        Whether ``part`` was put together from several pieces.

    Raises:
        FetchError: it cannot be had, or there is no room for it; ``part`` stays as it is.
    """
    failures, most, pieces = 0, _length(part), False
    while True:
        try:
            pieces = _receive(url, part, size, patience.timeout) or pieces
        except (_BrokenError, OSError, HTTPException) as error:
            arrived = _length(part)
            failures = 1 if arrived > most else failures + 1
            most = max(most, arrived)
            reason = _words(error, patience.timeout)
            if failures > patience.retries or _is_final(error):
                raise FetchError(f"{url}: {reason}") from error
            pause = patience.pause * 2 ** (failures - 1)
            print(f"{url}: {reason}; again in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
        else:
            return pieces


def forget(part: Path) -> None:
    """Remove a partial file and the note beside it."""
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _receive(url: str, part: Path, size: int | None, timeout: float) -> bool:
    """One request; returns whether it continued an earlier piece."""
    have, note = _length(part), _read_note(part, url)
    whole = size or note.get("size")
    if have and have == whole:
        return True
    request = urllib.request.Request(url, headers={"User-Agent": "weakmedsam"})
    if have and note and (whole is None or have < whole):
        request.add_header("Range", f"bytes={have}-")
        if note["version"]:
            request.add_header("If-Range", note["version"])
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # a piece longer than the file
            part.unlink(missing_ok=True)
        elif error.code not in _PASSING:
            raise FetchError(f"{url}: HTTP {error.code} {error.reason}") from error
        raise _BrokenError(f"HTTP {error.code} {error.reason}") from error
    with answer:
        start, announced = _span(answer, have, note, part)
        if size is not None and announced not in (None, size):
            raise _BrokenError(f"offers {announced:,} bytes where {size:,} are published")
        goal = size or announced
        _check_room(part, (goal or 0) - start)
        version = _version(answer)
        try:
            _note(part).write_text(json.dumps({"url": url, "version": version, "size": goal}))
        except OSError as error:
            raise FetchError(_say_unwritable(_note(part), error)) from error
        arrived = _store(answer, part, start, goal)
    if goal is not None and arrived != goal:
        raise _BrokenError(f"broke off after {arrived:,} of {goal:,} bytes")
    return start > 0


def _span(answer: HTTPResponse, have: int, note: dict[str, Any], part: Path) -> tuple[int, int | None]:
    """Where the answer's bytes begin in the file, and how long the whole file is, where it is said."""
    if answer.status != 206:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
    # A server that ignores If-Range still says which version it sends.
    if found is None or int(found[1]) != have or _version(answer) != note.get("version"):
        part.unlink(missing_ok=True)
        raise _BrokenError("the file has changed, or another piece came than was asked for")
    return have, int(found[2]) if found[2] != "*" else None


def _version(answer: HTTPResponse) -> str:
    """What tells versions of a file apart: a strong ETag, else the date; as ``If-Range`` takes it."""
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")


def _store(answer: HTTPResponse, part: Path, start: int, goal: int | None) -> int:
    """Append the answer's bytes to the first ``start`` of ``part``; returns its length."""
    position = start
    name = part.name.removeprefix(".").removesuffix(".part")
    terminal = sys.stderr.isatty()
    with (
        part.open("r+b" if start else "wb") as file,
        # In a log file: nothing for a short download, a line now and then for a long one.
        tqdm(total=goal, initial=start, unit="B", unit_scale=True, desc=name, file=sys.stderr,
             delay=0 if terminal else 5, mininterval=0.2 if terminal else 10) as bar,
    ):  # fmt: skip
        file.seek(start)
        file.truncate()
        while chunk := answer.read1(CHUNK):  # what is there, not waiting for more
            if goal is not None and position + len(chunk) > goal:
                raise _BrokenError(f"sends more than the {goal:,} bytes it announced")
            try:
                file.write(chunk)
                file.flush()  # what has arrived survives a kill
            except OSError as error:
                raise FetchError(_say_unwritable(part, error)) from error
            position += len(chunk)
            bar.update(len(chunk))
    return position


def _check_room(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise FetchError(f"{needed:,} bytes are needed in {part.parent}, {free:,} are free: put {WEIGHTS}")


def _say_unwritable(path: Path, error: OSError) -> str:
    return f"{path} cannot be written ({error.strerror}): make room there, or put {WEIGHTS}"


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path, url: str) -> dict[str, Any]:
    """What was noted of the piece; empty where it is of another address or nothing is known."""
    try:
        note = json.loads(_note(part).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) and note.get("url") == url else {}


def _words(error: BaseException, timeout: float) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no byte for {timeout:g} s"
    return str(reason) or type(reason).__name__


def _is_final(error: BaseException) -> bool:
    """A name that cannot be resolved, a certificate that does not hold: waiting a second mends neither."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(reason, socket.gaierror | ssl.SSLCertVerificationError)
