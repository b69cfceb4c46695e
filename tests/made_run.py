"""A finished run as far as whoever takes its networks looks at it: stamps, settings, empty checkpoints."""

import json
from pathlib import Path

import yaml

PAM = {
    "class_path": "weakmedsam.callbacks.PromptAffinityMining",
    "init_args": {"grid": 8, "presence": "given"},
}


def write_stage(run: Path, stage: str, made: int, **after: int) -> Path:
    """A stage as it lies there when it is done."""
    folder = run / stage
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints/best.ckpt").touch()
    (folder / "stage.json").write_text(json.dumps({"made": made, "settings": {"after": after}}))
    args = {"class_names": ["left", "right"], "pam": json.loads(json.dumps(PAM))}
    config = {
        "seed_everything": 0,
        "model": {"class_path": stage, "init_args": args},
        "data": {
            "class_path": "data_modules.phantom.Phantom",
            "init_args": {
                "data_dir": "elsewhere",
                "image_size": 32,
                "labels": {"supervision": "pseudo", "pseudo_labels_dir": "gone"},
            },
        },
        "trainer": {"devices": 8, "precision": "bf16-mixed", "max_epochs": 3, "logger": True, "callbacks": [1]},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_run(run: Path) -> Path:
    """A round, of two classes, as ``make segment`` leaves it."""
    write_stage(run, "classify", 1, prepare=0)
    write_stage(run, "pseudo_labels", 2, classify=1)
    write_stage(run, "segment", 3, pseudo_labels=2)
    (run / "prepare").mkdir()
    (run / "prepare/data.json").write_text(json.dumps({"classes": {"left": [4], "right": [5]}}))
    return run


def write_second_round(run: Path) -> None:
    """As ``ROUNDS=2`` adds it."""
    write_stage(run, "pseudo_labels_2", 4, classify=1, segment=3)
    write_stage(run, "segment_2", 5, pseudo_labels_2=4)


def pam_of(config: dict) -> dict:
    """PAM's settings."""
    return config["model"]["init_args"]["pam"]["init_args"]
