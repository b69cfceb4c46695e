"""Names of stages in rounds: the first round's stand as they are, later ones have a number."""

from __future__ import annotations

import re


def in_round(name: str, number: int) -> str:
    """A stage's name in a round: ``segment``, ``segment_2``, ``segment_3``."""
    return name if number == 1 else f"{name}_{number}"


def split_round(name: str) -> tuple[str, int]:
    """``segment_2`` -> ("segment", 2); of another name round 1."""
    found = re.fullmatch(r"(pseudo_labels|segment|test_maps|test|refined)_([2-9]|[1-9]\d+)", name)
    return (found[1], int(found[2])) if found else (name, 1)
