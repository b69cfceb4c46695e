"""A stage's result: the files it leaves, what tells them from damaged ones, and what tells it from another result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weakmedsam.errors import ConfigError
from weakmedsam.system.fingerprints import Mark, find_damage, mark

if TYPE_CHECKING:
    from weakmedsam.run.stages import Stage


def mark_results(stage: Stage, folder: Path) -> dict[str, Mark]:
    """File of the result -> its mark, as ``stage.json`` keeps them.

    Args:
        stage: what has ended well.
        folder: its folder.

    Raises:
        ConfigError: it has left no file of one of its patterns.
    """
    found = {pattern: sorted(folder.glob(pattern)) for pattern in stage.kept}
    missing = [pattern for pattern in stage.results if not found[pattern]]
    if missing:
        raise ConfigError(
            f"{folder}: the stage has ended, but left no {missing[0]}, which what follows reads. Are callbacks or "
            f"limits of the trainer set so that it is not written? Set them as in experiments/{stage.name}.yaml"
        )
    return {str(path.relative_to(folder)): mark(path) for paths in found.values() for path in paths}


def find_broken(folder: Path, held: Any) -> dict[str, str]:
    """Files of a result that are lost or damaged -> in which way, for a message.

    Args:
        folder: of the stage.
        held: what ``stage.json`` has under ``results``; of an earlier version a list of names.
    """
    marks: dict[str, Mark | None] = dict.fromkeys(held) if isinstance(held, list) else {}
    if isinstance(held, Mapping):
        marks = {name: Mark(*values) for name, values in held.items()}
    damage = {name: find_damage(folder / name, known) for name, known in marks.items()}
    return {name: what for name, what in damage.items() if what is not None}


def name_result(stage: Stage, settings: Mapping[str, Any], inputs: str, results: Mapping[str, Mark]) -> str:
    """Short hash of what was made, and from what: what follows is out of date where it changes.

    A result that was lost and came out the same again has the same name, and what follows stays as it is. What the
    stage's configuration is written down as does not count: a later version has more keys.

    Args:
        stage: that was run.
        settings: of ``stage.json``.
        inputs: the digest of its inputs.
        results: as of ``mark_results``.
    """
    deciding = sorted(
        (name, held.digest)
        for name, held in results.items()
        if any(Path(name).match(pattern) for pattern in stage.results)
    )
    text = json.dumps([settings, inputs, deciding], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
