"""The whole chain as a user runs it, on four small drawn volumes: with a kill, and without."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import same_state

ROOT = Path(__file__).parent.parent


def command(folder):
    options = {
        "--data.data_dir": folder / "scans",
        "--data.store_dir": folder / "store",
        "--data.num_volumes": 5,
        "--data.phantom.slices": 8,
        "--data.phantom.size": 64,
        "--data.image_size": 64,
        "--data.min_pixels": 3,
        "--data.num_workers": 0,
        "--data.split_fractions": "[0.6, 0.2, 0.2]",
        "--trainer.max_epochs": 2,
        "--segment.model.network_args": "{features: [8, 8, 8, 8, 8, 8]}",
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [
        sys.executable,
        "-m",
        "weakmedsam.pipeline",
        "train",
        "--runs",
        str(folder / "runs"),
        "--",
        *words,
    ]


def start(folder):
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(folder),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return folder, output


@pytest.mark.slow
def test_labels_go_in_and_a_scored_network_comes_out(whole):
    folder, output = whole
    run = folder / "runs/phantom/default"
    for stage in ("prepare", "classify", "pseudo_labels", "segment", "test_maps", "test"):
        assert json.loads((run / stage / "stage.json").read_text())["seconds"] > 0
    for file in (
        *(
            "classify/history.csv",
            "classify/checkpoints/best.ckpt",
            "classify/pictures/epoch_001.png",
            "classify/config.yaml",
        ),
        *(
            "pseudo_labels/quality.csv",
            "segment/history.csv",
            "test/cases.csv",
            "test/summary.json",
            "report.html",
        ),
    ):
        assert (run / file).stat().st_size > 0
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_second_run_says_that_all_is_up_to_date_at_once(whole):
    folder, _ = whole
    begin = time.monotonic()
    process = start(folder)
    output, _ = process.communicate(timeout=60)
    assert output.count("up to date") == 6
    assert time.monotonic() - begin < 30


STAGES = ("prepare", "classify", "pseudo_labels", "segment", "test_maps", "test")


def kill_inside(folder, stage, seconds):
    """Start the command, and kill it some seconds into a stage."""
    process = start(folder)
    run = folder / "runs/phantom/default" / stage
    deadline = time.monotonic() + 300
    while not (run / "settings.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    time.sleep(seconds)
    assert not (run / "stage.json").exists(), f"{stage} was over before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def without_times(table):
    with table.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_killed_inside_every_stage_the_same_command_ends_with_the_same_files(whole, tmp_path):
    reference, _ = whole
    moments = random.Random(0)
    for stage in STAGES:
        # Importing and building the parser take some four seconds of each stage.
        kill_inside(tmp_path, stage, moments.uniform(1, 3) if stage == "prepare" else moments.uniform(3, 7))
    process = start(tmp_path)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    ours, theirs = tmp_path / "runs/phantom/default", reference / "runs/phantom/default"
    for stage in ("classify", "segment"):
        for name in ("last", "best"):
            states = [
                torch.load(run / stage / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]
                for run in (ours, theirs)
            ]
            assert same_state(*states), (stage, name)
        assert without_times(ours / stage / "history.csv") == without_times(theirs / stage / "history.csv")
    for file in theirs.glob("pseudo_labels/*.safetensors"):
        a, b = load_file(file), load_file(ours / "pseudo_labels" / file.name)
        # NaN, of an absent class or an unmeasured stability, equals NaN.
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key], equal_nan=a[key].dtype.kind == "f") for key in a)
    for table in ("test/cases.csv", "test_maps/cam_cases.csv", "pseudo_labels/quality.csv"):
        assert (ours / table).read_text() == (theirs / table).read_text()
    assert not list(ours.rglob("*.part"))
