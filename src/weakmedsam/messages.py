"""How the commands that chain others end where something is wrong: one message, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from weakmedsam.contracts import WeakMedSAMError


@contextmanager
def ending_in_a_message(goes_on: str) -> Iterator[None]:
    """Turn an error meant for the user, and Ctrl-C, into a message on stderr and exit status 1.

    Args:
        goes_on: what the same command does next time, after Ctrl-C.

    Raises:
        SystemExit: with the message.
    """
    try:
        yield
    except WeakMedSAMError as error:
        sys.exit(f"\nweakmedsam: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped. The same command continues {goes_on}.")
