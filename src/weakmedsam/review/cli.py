"""See and correct a run's pseudo-labels: ``weakmedsam review --dataset heart``, and a page in the browser."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from weakmedsam.errors import ConfigError
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.run.clicks import REVIEW, is_reviewed
from weakmedsam.system.fast_import import wait_asleep
from weakmedsam.system.file_lock import alone

NEEDED = ("starlette", "uvicorn")
"""Packages of the extra ``review``."""
PORT = 8765


def review(run: Path, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        run: folder of the run.
        port: 0 for any that is free.

    Raises:
        ConfigError: a package is missing, the port is in use, or the run has no pseudo-labels.
        DataError: a table of the review is damaged.
    """
    for package in NEEDED:
        if find_spec(package) is None:
            raise ConfigError(f"weakmedsam review needs {package}: pip install 'weakmedsam[review]'")
    from weakmedsam.review.guard import listen
    from weakmedsam.review.server import serve
    from weakmedsam.review.session import Session  # torch

    with listen(port) as door, _alone(run):
        serve(Session(run), door, _say)


def replay(run: Path) -> None:
    """Write the corrected pseudo-labels that do not follow from the tables as they are.

    Raises:
        WeakMedSAMError: as ``review``.
    """
    if not is_reviewed(run):
        print("nothing is reviewed: no pseudo-label is corrected")
        return
    from weakmedsam.review.session import Session

    with _alone(run):
        session = Session(run, rank=False)
        written = session.replay()
    cases, clicks = session.reviewed.cases(), len(session.reviewed.clicks)
    print(f"corrected pseudo-labels: {len(cases)} cases, {clicks} clicks ({written} written)")


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One process at a time writes a review; a run that is not there is not made for it.

    Raises:
        ConfigError: there is no such run, or its review is open.
    """
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such run; name its data set and experiment")
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(run / REVIEW))
        except ConfigError as error:
            holder = str(error).partition(":")[0]
            raise ConfigError(f"{holder}: the review is open; end it there (Ctrl-C), every click is kept") from error
        yield


def _say(address: str) -> None:
    print(f"review: {address}\nCtrl-C ends it; every click is kept.", flush=True)


def main(words: list[str] | None = None) -> None:
    """Parse the command line and serve the page; see ``review``."""
    parser = argparse.ArgumentParser(prog="weakmedsam review", description="See and correct a run's pseudo-labels.")
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--experiment", default="default")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--port", type=int, default=PORT, help="of 127.0.0.1; 0 takes any that is free")
    parser.add_argument("--replay", action="store_true", help="no page: write the corrected pseudo-labels")
    args = parser.parse_args(words)
    run = args.runs / args.dataset / args.experiment
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    wait_asleep()
    with ending_in_a_message("with every click", vars(args)):
        if args.replay:
            replay(run)
        else:
            review(run, args.port)


if __name__ == "__main__":
    main()
