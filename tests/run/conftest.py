"""A pipeline whose commands write what a stage leaves, and nothing else."""

import json
from pathlib import Path

import pytest

from tests.fakes import write_checkpoint
from weakmedsam.run import pipeline
from weakmedsam.system.json_files import write_object
from weakmedsam.system.signals import Relay


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of the experiments, and a command that only writes what it was asked."""
    (tmp_path / "experiments").symlink_to(Path("experiments").resolve())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    calls = []
    masked = [3, 2]
    monkeypatch.setattr(pipeline, "masked", masked, raising=False)

    def record(self, arguments):
        calls.append(arguments[arguments.index("weakmedsam") + 1 :])
        if "--summary" in arguments:
            summary = Path(arguments[arguments.index("--summary") + 1])
            summary.parent.mkdir(parents=True, exist_ok=True)
            splits = {"test": {"masked": masked[0]}, "val": {"masked": masked[1]}}
            write_object(tmp_path / "store/index.json", {"cases": []})
            sources = {"root": str(tmp_path / "scans"), "tables": ["labels.csv"]}
            scans = {path.name: path.read_text() for path in (tmp_path / "scans").iterdir()}
            found = {"store": str(tmp_path / "store"), "sources": sources, "splits": splits, "content": scans}
            summary.write_text(json.dumps(found))
        elif "--trainer.default_root_dir" in arguments:
            folder = Path(arguments[arguments.index("--trainer.default_root_dir") + 1])
            for name in ("best", "last"):
                write_checkpoint(folder / f"checkpoints/{name}.ckpt")
            for name in ("a.safetensors", "features.json", "scores.json", "quality.csv", "cam_cases.csv", "cases.csv",
                         "summary.json", "config.yaml", "test/cases.csv"):  # fmt: skip
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
            if folder.name.startswith("threshold"):
                write_object(folder / "threshold.json", {"threshold": 0.55})
        return 0

    monkeypatch.setattr(Relay, "run", record)
    return calls
