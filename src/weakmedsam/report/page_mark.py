"""By what a page is known to show a run as it is: its mark, so that a run that is up to date writes none anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

from weakmedsam import __version__

HEAD = 4096
"""Bytes of a page within which its mark stands."""

_NOTES = ("stage.json", "settings.json", "clock.json")
"""What a stage writes as it begins and as it ends."""


def page_mark(run: Path) -> str:
    """Short hash of what a run's page depends on: notes of the run's stages, and the code that writes the page.

    Args:
        run: ``runs/<dataset>/<experiment>``.
    """
    code = Path(__file__).parent
    files = [
        *(path for name in _NOTES for path in run.glob(f"*/{name}")),
        *code.glob("*.py"),
        *code.glob("templates/*"),
    ]
    found = [(path.parent.name, path.name, (held := path.stat()).st_size, held.st_mtime_ns) for path in files]
    return hashlib.sha256(repr((__version__, sorted(found))).encode()).hexdigest()[:16]


def is_up_to_date(page: Path) -> bool:
    """Whether a page is there and shows its run, the folder that it lies in, as it is."""
    try:
        with page.open("rb") as file:
            return page_mark(page.parent).encode() in file.read(HEAD)
    except OSError:
        return False
