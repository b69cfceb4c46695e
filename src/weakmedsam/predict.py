"""Segment new scans with a run's network: ``python -m weakmedsam.predict --scans FOLDER --dataset cardiac``.

One NIfTI file a scan goes in, of which nothing need be known; one of class ids comes out, voxel for voxel beside it.
The work is Lightning's ``predict`` with the run's own model and settings; this file puts its configuration together,
and says what was found. It imports neither torch nor Lightning, so it says at once that all is segmented.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data_modules.cases import Case
from data_modules.new_scans import find_scans, find_unsegmented, measure, segmentation_path
from weakmedsam.contracts import ConfigError, WeakMedSAMError
from weakmedsam.files import write_table, write_whole
from weakmedsam.locks import alone
from weakmedsam.rounds import in_round
from weakmedsam.settings import deciding
from weakmedsam.stages import REFINED

console = Console(highlight=False)

TRAINER = ("accelerator", "devices", "num_nodes", "strategy", "precision")
"""What of the trainer's settings a prediction takes over from the run."""
SHOWN = 20
"""How many rows of figures the terminal shows; all are in the table."""


class Network(NamedTuple):
    """What segments.

    Attributes:
        config: of the stage whose model it is, nested.
        checkpoint: with its weights.
        made: the moments at which its parts were trained; another training has others.
    """

    config: dict[str, Any]
    checkpoint: Path
    made: list[int]


def last_round(run: Path) -> int:
    """Number of the run's last round with a finished segmentation network.

    Raises:
        ConfigError: it has none.
    """
    number = 0
    while (run / in_round("segment", number + 1) / "stage.json").is_file():
        number += 1
    if number == 0:
        raise ConfigError(
            f"{run} has no trained segmentation network: name the DATASET and EXPERIMENT of a run, or make it first "
            "(make train)"
        )
    return number


def find_network(run: Path, plain: bool) -> Network:
    """The run's last segmentation network, refined by PAM or not.

    Args:
        run: its folder.
        plain: the network's own segmentations; otherwise PAM walks what it predicts, with the settings of the run's
            stage ``refined``, or, where no test case had a mask and that never ran, with its default ones.

    Raises:
        ConfigError: the run has no network, or files of it are gone.
    """
    number = last_round(run)
    segment = run / in_round("segment", number)
    checkpoint = segment / "checkpoints/best.ckpt"
    made = [_read(segment / "stage.json")["made"]]
    if plain:
        return Network(_read(segment / "config.yaml"), checkpoint, made)
    refined, classify = run / in_round("refined", number), run / "classify"
    if (refined / "stage.json").is_file():
        config = _read(refined / "config.yaml")
    else:
        config = _read(classify / "config.yaml")
        own = _read(REFINED)["model"]["init_args"]["pam"]["init_args"]
        config["model"]["init_args"]["pam"]["init_args"] |= own
    config["model"]["init_args"]["pam"]["init_args"]["start"] = str(checkpoint)
    made.append(_read(classify / "stage.json")["made"])
    return Network(config, classify / "checkpoints/best.ckpt", made)


def _read(path: Path) -> Any:
    """A YAML or JSON file of the run."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is gone: make the run again (make train says what is missing)") from error


def prediction_config(network: Network, scans: Path, out: Path, made_by: str) -> dict[str, Any]:
    """The configuration of ``python -m weakmedsam predict``.

    Args:
        network: what segments.
        scans: the new scans.
        out: where their segmentations go.
        made_by: names network and settings.
    """
    like = json.loads(json.dumps(network.config["data"]))
    # What training batches held beside the image is of no use here, and its folder may be gone.
    like["init_args"] |= {"supervision": "image", "pseudo_labels_dir": None}
    # Its class names come from the data, by a link.
    model = json.loads(json.dumps(network.config["model"]))
    model["init_args"].pop("class_names", None)
    held = network.config["trainer"]
    return {
        "seed_everything": network.config["seed_everything"],
        "model": model,
        "data": {
            "class_path": "data_modules.unseen.UnseenScans",
            "init_args": {"scans": str(scans), "out": str(out), "like": like, "made_by": made_by},
        },
        "trainer": {
            **{key: held[key] for key in TRAINER if key in held},
            "default_root_dir": str(out / "provenance"),
            "logger": False,
            "callbacks": [],
            "enable_checkpointing": False,
        },
        "return_predictions": False,
        "ckpt_path": str(network.checkpoint),
    }


def name_maker(network: Network, options: list[str]) -> str:
    """A short text that differs where segmentations can: by weights, by settings, by what was typed.

    Not by where the run lies: it may be moved.
    """
    held = deciding(network.config)
    held["data"]["init_args"].pop("data_dir", None)
    (held["model"]["init_args"].get("pam") or {"init_args": {}})["init_args"].pop("start", None)
    parts = [network.made, held["model"], held["data"], held["trainer"].get("precision"), options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def predict(run: Path, scans: Path, out: Path, plain: bool, options: list[str]) -> None:
    """Segment what is not segmented yet, and say how much there is of each class.

    Args:
        run: folder of the run.
        scans: folder of NIfTI files, or one.
        out: gets ``<scan>.nii.gz``, ``pictures/``, ``volumes.csv`` and, under ``provenance/``, what made them.
        plain: as of ``find_network``.
        options: further ones of ``python -m weakmedsam predict``.

    Raises:
        WeakMedSAMError: no network, no scans, or one that cannot be used.
        SystemExit: the prediction failed; its own message has been printed.
    """
    network = find_network(run, plain)
    made_by = name_maker(network, options)
    cases = find_scans(scans)
    if out.resolve() == (scans if scans.is_dir() else scans.parent).resolve():
        raise ConfigError(
            f"OUT={out} is the folder of the scans, which would be written over: name another one"
        )
    with alone(out) as lock:
        todo = find_unsegmented(cases, out, made_by)
        done = f"{len(cases) - len(todo)} of {len(cases)} scans are segmented already"
        console.print(done if todo else f"all {len(cases)} scans are segmented already")
        if todo:
            config = prediction_config(network, scans, out, made_by)
            path = out / "provenance/predict.yaml"
            write_whole(path, yaml.safe_dump(config, sort_keys=False))
            words = [sys.executable, "-m", "weakmedsam", "predict", "--config", str(path), *options]
            code = subprocess.run(words, check=False, pass_fds=(lock,)).returncode
            if code:
                console.print("stopped. The same command continues with the scans that are left.")
                raise SystemExit(code)
        shutil.rmtree(out / ".slices", ignore_errors=True)
        left = find_unsegmented(cases, out, made_by)
        _report(run, out, [case for case in cases if case not in left])
    for case in left:  # data.on_bad_case: skip
        console.print(f"not segmented: {case.image}")


def _report(run: Path, out: Path, cases: list[Case]) -> None:
    """Write ``volumes.csv`` and show how it begins."""
    class_names = list(_read(run / "prepare/data.json")["classes"])
    columns = ("case", "class", "ml", "voxels", "slices")
    rows = [
        (found.case, found.class_name, f"{found.ml:.3f}", str(found.voxels), str(found.slices))
        for case in tqdm(cases, desc="measuring", unit="scan", leave=False, disable=len(cases) < SHOWN)
        for found in measure(segmentation_path(out, case.name), class_names)
    ]
    write_table(out / "volumes.csv", columns, [dict(zip(columns, row, strict=True)) for row in rows])
    table = Table(*columns)
    for row in rows[:SHOWN]:
        table.add_row(*row)
    console.print(table)
    more = f" ({len(rows) - SHOWN} more rows there)" if len(rows) > SHOWN else ""
    console.print(f"{out / 'volumes.csv'}{more}; pictures: {out / 'pictures'}")


def main(words: list[str] | None = None) -> None:
    """Parse the command line and segment."""
    words = sys.argv[1:] if words is None else words
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m weakmedsam.predict", description="Segment new scans with the network of a run."
    )
    parser.add_argument(
        "--scans", type=Path, required=True, help="folder of .nii or .nii.gz files, or one file"
    )
    parser.add_argument("--out", type=Path, default=None, help="default: RUN/segmentations/<name of scans>")
    parser.add_argument(
        "--plain", action="store_true", help="the network's own segmentations, not refined by PAM"
    )
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--experiment", default="default")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args(words[:split])
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    run = args.runs / args.dataset / args.experiment
    out = args.out or run / "segmentations" / args.scans.resolve().name
    try:
        predict(run, args.scans, out, args.plain, words[split + 1 :])
    except WeakMedSAMError as error:
        sys.exit(f"\nweakmedsam: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped. The same command continues with the scans that are left.")


if __name__ == "__main__":
    main()
