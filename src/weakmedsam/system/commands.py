"""How messages name this program's own commands."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(name: str, **options: str | bool) -> str:
    """A command as it is typed in the current folder: ``make`` in a checkout, elsewhere the installed program.

    Args:
        name: target of the Makefile, which is a command of the program, too.
        options: ``dataset="abdomen"`` is DATASET=abdomen to ``make`` and --dataset abdomen to the program; ``True``
            stands for a flag. The option that is called like the command is the program's first argument.
    """
    if Path("Makefile").is_file() and Path("src/weakmedsam").is_dir():
        return shlex.join(["make", name, *(f"{key.upper()}={_word(value)}" for key, value in options.items())])
    words = ["weakmedsam", name]
    for key, value in options.items():
        words += [] if key == name else [f"--{key.replace('_', '-')}"]
        words += [] if value is True else [str(value)]
    return shlex.join(words)


def _word(value: str | bool) -> str:
    return "1" if value is True else str(value)
