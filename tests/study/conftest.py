"""A study whose stages only write made-up tables, so that whole studies run in a second."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from drawn_run import draw_picture, write_csv

from tests.fakes import write_checkpoint
from weakmedsam.study import cli
from weakmedsam.system.json_files import write_object
from weakmedsam.system.signals import Relay

DICE = {"no_image_dice": 0.2, "cam_dice": 0.3, "pam_dice": 0.5, "test": 0.6, "refined": 0.7, "upper_bound": 0.8}
"""Of seed 0 with the first variant; another seed has 0.02 more, each, without SCE it is 0.1 less, by seed 1 0.05."""
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CASES = {"a": -0.1, "b": 0.0, "c": 0.1}


def option(words: list[str], key: str) -> str:
    """The value that wins."""
    return next((words[n + 1] for n in range(len(words) - 1, -1, -1) if words[n] == f"--{key}"), "")


class MadeUp(Relay):
    """Writes what stages leave.

    Attributes:
        calls: stage of each command.
        statuses: stage, or (stage, seed) -> the exit status with which it fails.
    """

    calls: list[str]
    statuses: dict[object, int]

    def run(self, words: list[str]) -> int:
        seed = option(words, "seed_everything")
        if "--summary" in words:
            self.calls.append("prepare")
            prepare(Path(option(words, "summary")))
            return 0
        folder = Path(option(words, "trainer.default_root_dir"))
        stage = folder.parent.name if folder.parent.name == "upper_bound" else folder.name
        self.calls.append(stage)
        if (status := self.statuses.get(stage) or self.statuses.get((stage, seed))) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.txt").touch()  # begun
            return status
        leave(folder, stage, int(seed), option(words, "model.sce") == "null")
        return 0


def prepare(summary: Path) -> None:
    root = summary.parents[4]
    write_object(root / "store/index.json", {"cases": []})
    summary.parent.mkdir(parents=True, exist_ok=True)
    sources = {"root": str(root), "tables": []}
    found = {"store": str(root / "store"), "sources": sources, "splits": {"test": {"masked": 3}}, "content": {}}
    summary.write_text(json.dumps(found))


def leave(folder: Path, stage: str, seed: int, changed: bool) -> None:
    """The files of a stage; two classes, of which the second is 0.1 worse."""
    shift = 0.02 * seed - (0.1 - 0.05 * (seed == 1)) * changed

    def rows(*columns: str) -> list[dict[str, object]]:
        return [
            {"case": case, "class": name}
            | {"dice" if column in ("test", "refined", "upper_bound") else column: DICE[column] + less + by + shift
               for column in columns}
            for case, by in CASES.items()
            for name, less in (("rv", 0.0), ("lv", -0.1))
        ]  # fmt: skip

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("{}\n")
    if stage in ("classify", "segment", "upper_bound") and folder.name != "test":
        for name in ("best", "last"):
            write_checkpoint(folder / f"checkpoints/{name}.ckpt")
    elif stage == "pseudo_labels":
        (folder / "a.safetensors").touch()
        write_csv(folder / "quality.csv", [{"case": "d", "class": "rv", "quality": 0.5}])
    elif stage == "test_maps":
        write_csv(folder / "cam_cases.csv", rows("no_image_dice", "cam_dice", "pam_dice"))
    elif stage == "threshold":
        write_object(folder / "threshold.json", {"threshold": 0.5})
    else:
        write_csv(folder / "cases.csv", rows(stage))
        (folder / "summary.json").write_text("{}")
        for case in CASES:
            draw_picture(folder / f"pictures/{case}.png", ("image",), 1, np.random.default_rng(0))


STUDY = {
    "seeds": [0, 1],
    "upper_bound": True,
    "sets": {
        "heart": {"dataset": "folder", "data_dir": "heart", "options": {"data.classes": {"rv": [1], "lv": [3]}}},
    },
    "variants": {"default": {}, "no_sce": {"model.sce": None}},
}


class Studio:
    """Writes studies and runs them below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.relay = type("Own", (MadeUp,), {"calls": [], "statuses": {}})
        (folder / "scans/heart").mkdir(parents=True)

    @property
    def calls(self) -> list[str]:
        found = self.relay.calls[:]
        self.relay.calls.clear()
        return found

    @property
    def page(self) -> Path:
        return self.folder / "runs/studies/own"

    def write(self, content: object) -> None:
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        (self.folder / "experiments/study/own.yaml").write_text(text)

    def run(self, *words: str) -> int:
        return cli.main(["own", "--data-dir", "scans", *words], self.relay)


def make_studio(folder: Path, patch: pytest.MonkeyPatch) -> Studio:
    """In a folder of its own with a copy of the experiments, which is the working folder from now on."""
    (folder / "experiments/study").mkdir(parents=True)
    for path in EXPERIMENTS.iterdir():
        if path.name != "study":
            (folder / "experiments" / path.name).symlink_to(path)
    patch.chdir(folder)
    patch.setenv("WEAKMEDSAM_VERBOSE", "0")
    patch.setenv("PYTHONWARNINGS", "")
    made = Studio(folder)
    made.write(STUDY)
    return made


@pytest.fixture
def studio(tmp_path, monkeypatch) -> Studio:
    """A study that has not run."""
    return make_studio(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Studio:
    """A study that has run, to look at."""
    with pytest.MonkeyPatch.context() as patch:
        made = make_studio(tmp_path_factory.mktemp("finished"), patch)
        assert made.run() == 0
    return made
