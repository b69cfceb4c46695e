"""Segment unlabelled scans with a run's network: ``weakmedsam predict --scans FOLDER --dataset cardiac``.

A scan goes in, of which nothing need be known; a NIfTI file of class ids comes out, voxel for voxel beside it.
The work is Lightning's ``predict`` with the run's own model and settings; this file puts its configuration together,
and says what was found. It imports neither torch nor Lightning, so it says at once that all is segmented.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_modules.cases import Case, warn_of_passed_over
from data_modules.scan_files import READ, has_scan_ending, list_scans, scan_stem
from data_modules.scan_io import find_scans, find_unsegmented, measure, segmentation_path
from weakmedsam.errors import LESS_MEMORY, ConfigError
from weakmedsam.run.cli_errors import ending_in_a_message, show_remarks
from weakmedsam.run.trained_network import Network, class_names, find_network, name_maker, network_settings
from weakmedsam.system.atomic_io import SEGMENTATIONS, read_table, write_table, write_whole
from weakmedsam.system.file_lock import alone
from weakmedsam.system.progress import VERBOSE, tracked
from weakmedsam.system.signals import KILLED, REQUEUE, Relay

console = Console(highlight=False)

CONFIG = "provenance/predict.yaml"
"""Under the folder of the segmentations: what the command was told."""
TRAINER = ("accelerator", "precision")
"""What of the trainer's settings a prediction takes over from the run; it has one device unless asked for more."""
SHOWN_ROWS = 20
"""How many rows of figures the terminal shows; all are in the table."""


def prediction_config(network: Network, scans: Path, out: Path, made_by: str, series: str | None) -> dict[str, Any]:
    """The configuration of LightningCLI's ``predict``.

    Args:
        network: what segments.
        scans: the unlabelled scans.
        out: where their segmentations go.
        made_by: names network and settings.
        series: as of ``find_scans``.
    """
    like = json.loads(json.dumps(network.config["data"]))
    # What training batches held beside the image is of no use here, and its folder may be gone.
    like["init_args"]["labels"] = {"supervision": "image"}
    # Its class names come from the data, by a link.
    model = json.loads(json.dumps(network.config["model"]))
    model["init_args"].pop("class_names", None)
    held = network.config["trainer"]
    return {
        "seed_everything": network.config["seed_everything"],
        "model": model,
        "data": {
            "class_path": "data_modules.scan_module.UnseenScans",
            "init_args": {
                "scans": str(scans.resolve()),
                "out": str(out),
                "like": like,
                "made_by": made_by,
                "series": series,
            },
        },
        "trainer": {
            **{key: held[key] for key in TRAINER if key in held},
            "devices": 1,
            "default_root_dir": str((out / CONFIG).parent),
            "logger": False,
            "callbacks": [],
            "enable_checkpointing": False,
        },
        "return_predictions": False,
        "ckpt_path": str(network.checkpoint),
    }


def check_place(scans: Path, out: Path) -> None:
    """See that results of other scans are not mixed with these.

    Raises:
        ConfigError: ``out`` is a file, the folder of the scans, or that of others' segmentations.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    folder = scans if scans.is_dir() else scans.parent
    if out.resolve() == folder.resolve():
        raise ConfigError(f"--out {out} is the folder of the scans, which would be written over: name another one")
    earlier = out / CONFIG
    if earlier.is_file():
        try:
            held = Path(str(network_settings(earlier, "data.init_args")["data"]["init_args"].get("scans")))
        except ConfigError as error:
            raise ConfigError(
                f"{earlier} is damaged: remove it if --out {out} holds segmentations of these scans, or name another"
            ) from error
        before = held.parent if has_scan_ending(held.name) and not held.is_dir() else held
        if before.exists() and before.resolve() != folder.resolve():
            raise ConfigError(f"--out {out} holds segmentations of the scans in {before}: name another folder")


def predict(
    run: Path,
    scans: Path,
    out: Path,
    plain: bool,
    options: list[str],
    series: str | None = None,
    relay_class: type[Relay] = Relay,
) -> None:
    """Segment what is not segmented yet, and print how much there is of each class.

    Args:
        run: folder of the run.
        scans: folder of scans, or one file.
        out: gets ``<scan>.nii.gz``, of a DICOM series ``<scan>.dcm`` as well, ``pictures/``, ``volumes.csv``,
            ``scores/`` where they are asked for, ``skipped.csv`` where scans were left out, and, under
            ``provenance/``, what made them.
        plain: as of ``find_network``.
        options: further ones of LightningCLI's ``predict``.
        series: as of ``find_scans``; None takes that of the training scans.
        relay_class: what runs it.

    Raises:
        WeakMedSAMError: no network, no scans, or one that cannot be used.
        SystemExit: the prediction failed; its own message has been printed.
    """
    network = find_network(run, plain)
    names = class_names(run, network)
    made_by = name_maker(network, options)
    series = series or network.config["data"]["init_args"].get("series")
    cases = find_scans(scans, series)
    if scans.is_dir():
        warn_of_passed_over(list_scans(scans, ".", anywhere=True).passed_over, scans, READ)
    check_place(scans, out)
    print_line(f"network: {network.said}")
    with alone(out) as lock, relay_class([lock]).listening() as relay:
        for part in out.rglob(".*.part"):  # of a call that was killed
            part.unlink(missing_ok=True)
        todo = find_unsegmented(cases, out, made_by)
        done = f"{len(cases) - len(todo)} of {len(cases)} scans are segmented already"
        print_line(done if todo else f"all {len(cases)} scans are segmented already")
        if todo:
            config = prediction_config(network, scans, out, made_by, series)
            write_whole(out / CONFIG, yaml.safe_dump(config, sort_keys=False), SEGMENTATIONS)
            code = relay.run([sys.executable, "-m", "weakmedsam", "predict", "--config", str(out / CONFIG), *options])
            if code in KILLED:
                print_line(f"the process that segments was killed: {LESS_MEMORY}")
            if code:
                print_line("stopped. What is segmented stays; the command continues with the scans that are left.")
                raise SystemExit(REQUEUE if relay.asked else code)
            todo = find_unsegmented(cases, out, made_by)
        _keep_reasons(out, todo)
        shutil.rmtree(out / ".slices", ignore_errors=True)
        plane = network.config["data"]["init_args"].get("plane", "axial")
        _report(out, [case for case in cases if case not in todo], names, plane)


def _keep_reasons(out: Path, left: list[Case]) -> None:
    """Write ``skipped.csv`` (``data.prepare.on_bad_case: skip``), and name what it holds."""
    path = out / "skipped.csv"
    if not left:
        path.unlink(missing_ok=True)
        return
    found = [row for table in out.glob(".slices/*/skipped.csv") for row in read_table(table)]
    reasons = {row["case"]: row["reason"] for row in found}
    rows = [{"case": c.name, "reason": reasons.get(c.name, "it has changed meanwhile")} for c in left]
    write_table(path, ("case", "reason"), rows, SEGMENTATIONS)
    for row in rows:
        print_line(f"not segmented: {row['case']}: {row['reason']}")


def _report(out: Path, cases: list[Case], names: list[str], plane: str) -> None:
    """Write ``volumes.csv`` and show how it begins."""
    columns = ("case", "class", "ml", "voxels", "slices")
    rows = [
        (found.case, found.class_name, f"{found.ml:.3f}", str(found.voxels), str(found.slices))
        for case in tracked(cases, len(cases), "scan", kept=False)
        for found in measure(segmentation_path(out, case.name), names, plane)
    ]
    write_table(out / "volumes.csv", columns, [dict(zip(columns, row, strict=True)) for row in rows], SEGMENTATIONS)
    table = Table(*columns)
    for row in rows[:SHOWN_ROWS]:
        table.add_row(*(escape(text) for text in row))
    console.print(table)
    print_line(
        f"{out / 'volumes.csv'}" + (f" ({len(rows) - SHOWN_ROWS} more rows there)" if len(rows) > SHOWN_ROWS else "")
    )
    print_line(f"{out / 'pictures'}")


def print_line(text: str) -> None:
    """A line for the terminal, as it is: names may hold brackets."""
    console.print(text, markup=False, soft_wrap=True)


def main(words: list[str] | None = None, relay_class: type[Relay] = Relay) -> None:
    """Parse the command line and segment; see ``predict``."""
    words = sys.argv[1:] if words is None else words
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="weakmedsam predict", description="Segment unlabelled scans with the network of a run."
    )
    parser.add_argument("--scans", type=Path, required=True, help="folder of scans of any format, or one file")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="default: RUN/segmentations/<name of scans>, with -plain behind it if so",
    )
    parser.add_argument("--plain", action="store_true", help="the network's own segmentations, not refined by PAM")
    parser.add_argument("--scores", action="store_true", help="write what is thresholded, too: a volume a class")
    parser.add_argument(
        "--series", default=None, help="of DICOM: pattern of modality and description; default: the training scans'"
    )
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--experiment", default="default")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("-v", "--verbose", action="store_true", help="show the libraries' notices, too")
    args = parser.parse_args(words[:split])
    os.environ[VERBOSE] = "1" if args.verbose else os.environ.get(VERBOSE, "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    show_remarks()
    run = args.runs / args.dataset / args.experiment
    name = scan_stem(args.scans.resolve().name) + ("-plain" if args.plain else "")
    out = args.out or run / "segmentations" / name
    with ending_in_a_message("with the scans that are left", vars(args)):
        options = [*(("--data.scores", "true") if args.scores else ()), *words[split + 1 :]]
        predict(run, args.scans, out, args.plain, options, args.series, relay_class)


if __name__ == "__main__":
    main()
