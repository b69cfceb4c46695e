"""How the commands that chain others end where something is wrong: one message, no traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from weakmedsam.system.library_errors import explain


@contextmanager
def ending_in_a_message(goes_on: str, typed: Mapping[str, object] | None = None) -> Iterator[None]:
    """Turn an error meant for the user, and Ctrl-C, into a message on stderr and exit status 1.

    Args:
        goes_on: what the same command does next time, after Ctrl-C.
        typed: names of the command's options (``data_dir`` of ``--data-dir``) with their values, for naming
            the one that is meant.

    Raises:
        SystemExit: with the message.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\nstopped. The same command continues {goes_on}.")
    except Exception as error:
        meant = explain(error, {f"--{name.replace('_', '-')}": value for name, value in (typed or {}).items()})
        if meant is None:
            raise
        sys.exit(f"\nweakmedsam: {type(meant).__name__}: {meant}")


def show_remarks() -> None:
    """Show what the data modules remark on files that they pass over: for commands that look at a user's files.

    Trainings look at them too, and would remark the same at each stage.
    """
    log = logging.getLogger("data_modules")
    log.setLevel(logging.INFO)
    log.propagate = False  # or what is a warning would be shown twice
    if not log.handlers:
        log.addHandler(AboveBars())


class AboveBars(logging.Handler):
    """Writes to what standard error is at the time: above a bar while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        print(self.format(record), file=sys.stderr)
