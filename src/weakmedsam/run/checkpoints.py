"""From which checkpoint a training goes on: one answer for the stages of a run and the runs of a sweep. No torch."""

from __future__ import annotations

from pathlib import Path

from weakmedsam.system.atomic_io import put_away, read_table
from weakmedsam.system.fingerprints import is_whole


def resume_options(folder: Path) -> list[str]:
    """Options with which a training goes on in its folder; none where it starts anew.

    It goes on from ``last.ckpt``, or, where that is lost or damaged, from ``best.ckpt``, which holds its epoch as
    fully. Where ``best.ckpt`` was there and is lost or damaged, no later epoch would bring it back: the training
    starts anew. What cannot be gone on from is kept under another name, and a line says what is done.

    Args:
        folder: of the stage, or of the run of a sweep.
    """
    if not (folder / "checkpoints").is_dir():
        put_away(folder / "checkpoints")
    best, last = (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    there = [path for path in (best, last) if path.exists()]
    whole = [path for path in there if is_whole(path)]
    damaged = [path for path in there if path not in whole]
    for path in damaged:
        put_away(path)
    if not there:
        return []
    if best in whole or (best not in damaged and not _was_validated(folder)):
        if last not in whole and best in whole:
            _say(f"{last} is {'damaged' if damaged else 'not there'}: the training goes on from {best.name}")
        return ["--ckpt_path", str(last if last in whole else best)] if whole else []
    for path in whole:
        put_away(path)
    _say(
        f"{best} is {'damaged' if best in damaged else 'gone'}, and later epochs do not bring it back: the training "
        "starts anew"
    )
    return []


def _was_validated(folder: Path) -> bool:
    """Whether an epoch had figures of validation, by which the best one is chosen."""
    rows = read_table(folder / "history.csv")
    return any(value for row in rows for name, value in row.items() if name.startswith("val/"))


def _say(text: str) -> None:
    print(f"  {text}", flush=True)
