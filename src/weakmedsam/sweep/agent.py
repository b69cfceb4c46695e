"""One run of a sweep as W&B's agent starts it: ``python -m weakmedsam.sweep.agent FOLDER WORDS... --a.b=1 ...``.

It gives the run a folder of its own, named by W&B's number of the run, and becomes the stage's command.
For a sweep of PAM, WORDS is the folder of the stored features, and the run is scored in this process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from weakmedsam.run.checkpoints import resume_options
from weakmedsam.system.atomic_io import write_whole


def stage_command(folder: Path, words: list[str]) -> list[str]:
    """The stage's command line, with the run's own folder."""
    root = ["--trainer.default_root_dir", str(folder)]
    return [sys.executable, "-m", "weakmedsam", *words, *root, *resume_options(folder)]


def with_null(words: list[str]) -> list[str]:
    """Options as the command line reads them: W&B's agent writes Python's ``None`` where YAML has ``null``."""
    return [f"{word[:-4]}null" if word.endswith("=None") else word for word in words]


def words_of(values: Mapping[str, Any]) -> list[str]:
    """``{"a.b": 1}`` -> ``["--a.b=1"]``, as W&B's agent writes ``${args}``; a list is a YAML list either way."""
    return with_null([f"--{name}={value}" for name, value in values.items()])


def pam_settings(words: list[str]) -> dict[str, Any]:
    """``["--model.pam.affinity.beta=4"]`` -> ``{"affinity.beta": 4}``."""
    pairs = [word.removeprefix("--model.pam.").partition("=") for word in words]
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def score_pam(folder: Path, words: list[str]) -> dict[str, float]:
    """Score a setting of PAM on stored features and send the figures to W&B.

    Args:
        folder: of the run.
        words: the folder of the features, then ``--model.pam.<setting>=<value>``.
    """
    import wandb

    from weakmedsam.pam.feature_cache import score_setting

    figures = score_setting(Path(words[0]), pam_settings(words[1:]))
    write_whole(folder / "scores.json", json.dumps(figures, indent=1) + "\n")
    with wandb.init(project="weakmedsam", dir=folder) as run:
        run.log(figures)
    return figures


def main(words: list[str]) -> None:
    """Run it; returns for a sweep of PAM only."""
    folder = Path(words[0]) / "trials" / os.environ.get("WANDB_RUN_ID", "by_hand")
    folder.mkdir(parents=True, exist_ok=True)
    words = with_null(words)
    if words[1] == "fit":
        command = stage_command(folder, words[1:])
        os.execv(command[0], command)
    score_pam(folder, words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
