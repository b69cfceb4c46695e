"""What the user asked for, where a run keeps that, and where the files of ``experiments/`` lie."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from weakmedsam.errors import DataError
from weakmedsam.system.json_files import read_object, seal, write_object

EXPERIMENTS = Path("experiments")
"""Of the working folder; a file that it lacks is the installed package's."""
PACKAGED = Path(__file__).parents[1] / "experiments"
"""Of the installed package; in a checkout there is no such folder."""
REQUEST = "request.json"
"""In the folder of a run."""
CHECK = "check"
"""Beside the runs of a data set: what ``weakmedsam check`` leaves."""
_RECORDED = ("backbone", "data_dir", "options", "trainer", "logger", "rounds")


def experiment_file(name: str) -> Path:
    """Where a file of ``experiments/`` lies, ``data/phantom.yaml``: in the working folder's own, or the package's."""
    own, packaged = EXPERIMENTS / name, PACKAGED / name
    return packaged if packaged.is_file() and not own.is_file() else own


def experiment_name(path: Path) -> str:
    """``experiments/data/phantom.yaml``, wherever the file lies: settings are known by it."""
    return str(EXPERIMENTS / path.relative_to(PACKAGED) if path.is_relative_to(PACKAGED) else path)


class Request(NamedTuple):
    """What the user asked for.

    Attributes:
        dataset: of ``experiments/data/<dataset>.yaml``.
        experiment: name of the run.
        backbone: of ``experiments/backbone/<backbone>.yaml``.
        data_dir: folder of the scans, None = the YAML's.
        runs: folder of all runs.
        options: further command-line options, (key, values) in order.
        trainer: of ``experiments/trainer/<trainer>.yaml``, None = what the stages' YAMLs say.
        logger: of ``experiments/logger/<logger>.yaml``, None = what the stages' YAMLs say.
        launcher: words that start the processes of a stage with a trainer, in place of this interpreter:
            ``srun python``, ``torchrun --nproc-per-node 8``.
        rounds: of pseudo-labels and segmentation network, 1 or more; see ``another_round``.
    """

    dataset: str
    experiment: str
    backbone: str
    data_dir: str | None
    runs: Path
    options: list[tuple[str, list[str]]]
    trainer: str | None = None
    logger: str | None = None
    launcher: tuple[str, ...] = ()
    rounds: int = 1

    @property
    def folder(self) -> Path:
        """Everything of the run lies here."""
        return self.runs / self.dataset / self.experiment


def keep_request(request: Request) -> None:
    """Note in the run's folder what was asked for last, for ``recorded_request``."""
    path = request.folder / REQUEST
    asked = {key: getattr(request, key) for key in _RECORDED}
    with contextlib.suppress(DataError):  # a damaged one is written anew
        if seal(asked) == seal(read_object(path)):
            return
    write_object(path, asked)


def recorded_request(runs: Path, dataset: str, experiment: str) -> Request:
    """What a run was asked for last; the defaults where there is none.

    Raises:
        DataError: it is damaged.
    """
    held = {"backbone": "pocket", "data_dir": None, "options": []} | read_object(runs / dataset / experiment / REQUEST)
    held["options"] = [(key, values) for key, values in held["options"]]
    return Request(dataset, experiment, runs=runs, **{key: held[key] for key in _RECORDED if key in held})
