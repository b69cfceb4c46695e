"""The whole chain as a user runs it, on five small drawn volumes: with kills, and without; and what W&B gets of it."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from commands import as_it_was, run_pipeline
from report_pages import table_rows
from safetensors.numpy import load_file
from terminals import run_in_terminal, seen
from trainings import assert_same_training
from wandb_server import KEY, Server

from data_modules.volumes import read_volume
from weakmedsam import load_run
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.system.atomic_io import read_table

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def command(folder, target="train", runs=None, rounds=1):
    """Words of a target; its scans lie in the folder, its results there too or in ``runs``."""
    options = {
        "--data.data_dir": folder / "scans",
        "--data.prepare.store_dir": folder / "store",
        "--data.num_volumes": 5,
        "--data.phantom.slices": 8,
        "--data.phantom.size": 64,
        "--data.image_size": 64,
        "--data.slices.min_pixels": 3,
        "--data.num_workers": 0,
        "--data.prepare.workers": 1,
        "--data.split.fractions": "[0.6, 0.2, 0.2]",
        "--model.sce.sub_classes.number": 2,
        "--model.pam.prompts.grid": 2,
        "--model.pam.validation.every_n_epochs": 1,
        "--model.pam.walk.map_size": 16,
        "--trainer.max_epochs": 2,
        "--segment.model.network_args": "{features: [8, 8, 8, 8, 8, 8]}",
    }
    words = [str(word) for pair in options.items() for word in pair]
    run = ["--runs", str(runs or folder / "runs"), "--logger", "lineage", f"--rounds={rounds}"]
    return [target, *run, "--", *words]


def surroundings(folder):
    """Variables of a user who has no W&B account and no network."""
    nowhere = "http://127.0.0.1:9"  # who asks the network gets no answer
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), nowhere),
        "NETRC": str(folder / "nobody"),
        "WANDB_DATA_DIR": str(folder),
    }


def start(folder, *target, rounds=1):
    """A process, whose stages are processes too, as a user has them."""
    return subprocess.Popen(
        [sys.executable, "-m", "weakmedsam", *command(folder, *target, rounds=rounds)],
        cwd=ROOT, env=surroundings(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def bring_up_to_date(folder, *target, rounds=1):
    """The same command, in this process."""
    with as_it_was():
        for name in os.environ.keys() - (here := surroundings(folder)).keys():
            del os.environ[name]
        os.environ.update(here)
        run_pipeline(*command(folder, *target, rounds=rounds))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, whose stages are processes as a user has them."""
    folder = tmp_path_factory.mktemp("whole")
    status, output = run_in_terminal([sys.executable, "-m", "weakmedsam", *command(folder)], 80, surroundings(folder))
    assert status == 0, output
    return folder, output


def test_labels_go_in_and_a_scored_network_comes_out(whole):
    folder, output = whole
    run = folder / "runs/phantom/default"
    for stage in ("prepare", "classify", "pseudo_labels", "segment", "test_maps", "test", "threshold", "refined"):
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
            "refined/cases.csv",
            "refined/summary.json",
            "report.html",
        ),
    ):
        assert (run / file).stat().st_size > 0
    assert "Traceback" not in output


NOTICES = (
    *("Seed set", "a step learns", "Trainable params", "wandb:", "argparse", "GPU available", "litlogger", "Tip"),
    *("WARNING", "Warning", "warning", "DataLoader", "LOCAL_RANK", "Traceback", "nan"),
)
"""What no one needs to read who trains the phantom."""

FEW_LABELS = re.compile(r"warning: only \d+ of 24 training slices have (lesion|cyst): add patients with it\n")
"""What ``prepare`` says, rightly, of the few slices of these tests."""


def test_a_terminal_shows_a_heading_and_a_bar_of_each_stage_and_one_table(whole):
    folder, output = whole
    told, few = FEW_LABELS.subn("", "\n".join(seen(output)))
    assert few == 2
    lines = told.split("\n")
    report = f"report: {folder / 'runs/phantom/default/report.html'}"
    assert max(len(line) for line in lines if line != report) <= 80
    assert not [notice for notice in NOTICES if notice in "\n".join(lines)]
    heads = [number for number, line in enumerate(lines) if line.startswith("[")]
    assert [lines[number][:5] for number in heads] == [f"[{number}/8]" for number in range(1, 9)]
    assert heads == list(range(0, 16, 2))
    for number, unit in zip(heads, ("volume", "epoch", "volume", "epoch", *["volume"] * 4), strict=True):
        assert lines[number + 1].split()[0] == unit
        assert " 100%    took " in lines[number + 1]
    end = lines[16:]
    assert end[:2] == ["", "phantom / default: Dice on 1 test case"]
    rows = table_rows("\n".join(end))
    assert rows.keys() == {"lesion", "cyst", "mean"}
    assert list(rows["mean"]) == ["CAM", "PAM", "network", "refined", "no image"]
    assert end[-2:] == [report, ""]


def is_plain(captured):
    """What goes into a file: no escape code, no bar, no notice."""
    said = captured.out + FEW_LABELS.sub("", captured.err)
    bars = [sign for sign in ("\x1b", "\r", "%|", "100%") if sign in said]
    return not bars and not [notice for notice in NOTICES if notice in said]


def test_a_second_run_says_that_all_is_up_to_date_and_starts_nothing(whole, capsys):
    folder, _ = whole
    logs = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.name != ".lock"}
    bring_up_to_date(folder)
    assert capsys.readouterr().out.count("up to date") == 8
    rewritten = {path for path, at in logs.items() if path.stat().st_mtime_ns != at and path.is_file()}
    assert {path.name for path in rewritten} <= {"report.html"}


STAGES = {
    **{"prepare": None, "classify": "prepare", "pseudo_labels": "classify", "segment": "pseudo-labels"},
    **{"test_maps": "segment", "test": None, "threshold": None, "refined": None},
}
"""Each with the target that ends before it, where there is one."""


def kill_inside(folder, stage, seconds, after=None, target=("train",), rounds=1):
    """Start the command, and kill it some seconds into a stage, or after a file of it (a pattern) is there.

    A stage that was over by then, because the machine has less to do than it had, is begun once more and
    killed earlier.
    """
    run = (target[1] if len(target) > 1 else folder / "runs") / "phantom/default" / stage
    over = True
    while over:
        process = start(folder, *target, rounds=rounds)
        deadline = time.monotonic() + 300
        while not (run / "settings.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        while after and not any(run.glob(after)) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        time.sleep(seconds)
        over = (run / "stage.json").exists()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert (run / "settings.json").exists()
        if over:
            shutil.rmtree(run)
            seconds /= 2


def test_killed_inside_every_stage_the_same_command_ends_with_the_same_files(whole, tmp_path, capsys):
    reference, _ = whole
    seed = int.from_bytes(os.urandom(4), "big")
    print("moments drawn with seed", seed)  # shown where the test fails
    moments = random.Random(seed)
    for stage, before in STAGES.items():
        if before is not None:  # a process that is killed costs the more the more it has to do before
            capsys.readouterr()
            bring_up_to_date(tmp_path, before)
            assert is_plain(capsys.readouterr())
        told = json.loads((reference / "runs/phantom/default" / stage / "stage.json").read_text())
        kill_inside(tmp_path, stage, moments.uniform(0.1, 0.6) * told["seconds"])
        if stage in ("classify", "segment"):  # with an epoch done, from which the training goes on
            kill_inside(tmp_path, stage, moments.uniform(0, 0.1), after="checkpoints/last.ckpt")
        if stage == "pseudo_labels":  # with a volume done
            kill_inside(tmp_path, stage, moments.uniform(0, 0.02), after="*.safetensors")
    bring_up_to_date(tmp_path)
    ours, theirs = tmp_path / "runs/phantom/default", reference / "runs/phantom/default"
    for stage in ("classify", "segment"):
        assert "--ckpt_path" in json.loads((ours / stage / "stage.json").read_text())["command"]
        assert_same_training(ours / stage, theirs / stage)
    for file in theirs.glob("pseudo_labels/*.safetensors"):
        a, b = load_file(file), load_file(ours / "pseudo_labels" / file.name)
        # NaN, of an absent class or an unmeasured stability, equals NaN.
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key], equal_nan=a[key].dtype.kind == "f") for key in a)
    for table in (
        "test/cases.csv",
        "refined/cases.csv",
        "test_maps/cam_cases.csv",
        "pseudo_labels/quality.csv",
    ):
        assert (ours / table).read_text() == (theirs / table).read_text()
    for note in ("test/summary.json", "threshold/threshold.json"):
        assert (ours / note).read_text() == (theirs / note).read_text()
    assert not list(ours.rglob("*.part"))


def test_a_second_round_is_continued_after_kills_too(whole, tmp_path):
    folder, _ = whole
    runs = [Path(shutil.copytree(folder / "runs", tmp_path / name)) for name in ("killed", "whole")]
    for stage, after in (("pseudo_labels_2", "*.safetensors"), ("segment_2", "checkpoints/last.ckpt")):
        kill_inside(folder, stage, 0.05, after=after, target=("train", runs[0]), rounds=2)
    for place in runs:
        bring_up_to_date(folder, "train", place, rounds=2)
    ours, theirs = (place / "phantom/default" for place in runs)
    assert_same_training(ours / "segment_2", theirs / "segment_2")
    for table in ("pseudo_labels_2/quality.csv", "test_2/cases.csv"):
        assert (ours / table).read_text() == (theirs / table).read_text()
    assert (ours / "test/cases.csv").read_text() == (folder / "runs/phantom/default/test/cases.csv").read_text()
    assert "Test cases, network, round 2" in (ours / "report.html").read_text()


def test_the_upper_bound_is_continued_after_a_kill_too(whole, tmp_path):
    folder, _ = whole
    whole_runs, runs = tmp_path / "whole", tmp_path / "killed"
    kill_inside(folder, "upper_bound", 0.05, after="checkpoints/last.ckpt", target=("upper-bound", runs))
    for target in (("upper-bound", runs), ("upper-bound", whole_runs)):
        bring_up_to_date(folder, *target)
    ours, theirs = (held / "phantom/default/upper_bound" for held in (runs, whole_runs))
    assert_same_training(ours, theirs)
    assert (ours / "test/cases.csv").read_text() == (theirs / "test/cases.csv").read_text()


def segment_new(folder, out, *words):
    scans = next((folder / "scans").glob("phantom-*/images"))
    run_pipeline("predict", "--runs", folder / "runs", "--scans", scans, "--out", out, *words)
    return {(row["case"], row["class"]): row for row in read_table(out / "volumes.csv")}


@pytest.mark.parametrize(("stage", "words"), [("refined", ()), ("test", ("--plain",))])
def test_new_scans_are_segmented_as_test_cases_are(whole, tmp_path, capsys, stage, words):
    folder, _ = whole
    found = segment_new(folder, tmp_path / "out", *words)
    assert "0 of 5 scans are segmented already" in capsys.readouterr().out
    scored = read_table(folder / "runs/phantom/default" / stage / "cases.csv")
    assert len(found) == 2 * 5
    assert len(scored) == 2
    for row in scored:
        assert float(found[row["case"], row["class"]]["ml"]) == pytest.approx(float(row["predicted_ml"]), abs=1e-3)
    if stage == "test":  # refined, the tiny network is nowhere sure enough: tests/pam/test_volumes.py
        assert max(float(row["ml"]) for row in found.values()) > 0
    held, tried = (yaml.safe_load(path.read_text())["model"] for path in (
        folder / "runs/phantom/default" / stage.replace("test", "segment") / "config.yaml",
        tmp_path / "out/provenance/config.yaml",
    ))  # fmt: skip
    assert tried == held  # the tiny network finds nothing in the one test case
    assert len(list((tmp_path / "out/pictures").glob("*.png"))) == 5
    assert not (tmp_path / "out/.slices").exists()
    segment_new(folder, tmp_path / "out", *words)
    assert "all 5 scans are segmented already" in capsys.readouterr().out
    check_scores(folder, tmp_path / "out", *words)
    check_python(folder, tmp_path / "out", stage)


def check_scores(folder, out, *words):
    """What is thresholded lies on the segmentation: by the network the largest probability wins, by PAM from 0.4 on."""
    segment_new(folder, out.parent / "scored", *words, "--scores")
    assert {path.name for path in (out.parent / "scored/scores").iterdir()} == {
        f"{path.name[:-7]}_{number}_{name}.nii.gz"
        for path in out.glob("*.nii.gz")
        for number, name in enumerate(("lesion", "cyst"), start=1)
    }
    for path in out.glob("*.nii.gz"):
        parts = [
            nib.load(out.parent / "scored/scores" / f"{path.name[:-7]}_{name}.nii.gz")
            for name in ("1_lesion", "2_cyst")
        ]
        ids, again = (nib.load(folder / path.name) for folder in (out, out.parent / "scored"))
        scores = np.stack([part.get_fdata() for part in parts])
        assert np.array_equal(np.asanyarray(ids.dataobj), np.asanyarray(again.dataobj))
        assert all(np.array_equal(part.affine, ids.affine) and part.get_data_dtype() == np.float32 for part in parts)
        rest = np.full(ids.shape, 0.4) if not words else 1 - scores.sum(0)
        decided = np.abs(np.diff(np.sort(np.stack([rest, *scores]), axis=0)[-2:], axis=0))[0] > 1e-5
        assert decided.mean() > 0.99
        assert np.array_equal(np.stack([rest, *scores]).argmax(0)[decided], np.asanyarray(ids.dataobj)[decided])


def check_python(folder, out, stage):
    """``load_run`` segments as the command has, files and arrays."""
    run = load_run(folder / "runs/phantom/default", refined=stage == "refined", device="cpu")
    assert run.class_names == ["lesion", "cyst"]
    for path in sorted((folder / "scans").rglob("images/*.nii.gz"))[:2]:
        mask = run.predict(path)
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, np.asanyarray(nib.load(out / path.name).dataobj))
        voxels, geometry = read_volume(path, run.plane)
        slices = run.predict(voxels, spacing=geometry.spacing)
        assert np.array_equal(geometry.from_slices(slices), mask)
    with pytest.raises(ConfigError, match="spacing: an array does not say it"):
        run.predict(voxels)
    with pytest.raises(ConfigError, match="says its own"):
        run.predict(path, spacing=(1, 1, 1))
    with pytest.raises(DataError, match="scan: an array of 2 axes"):
        run.predict(voxels[0], spacing=(1, 1, 1))
    with pytest.raises(DataError, match="holds 5 scans"):
        run.predict(path.parent)


def test_the_notebook_runs_on_a_run(whole, monkeypatch):
    folder, _ = whole
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "docs/notebooks/trained_run.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    held = {}
    for cell in cells:
        exec(cell.replace('"runs/', f'"{folder}/runs/').replace('"data/scans"', f'"{folder}/scans"'), held)
    assert held["mask"].shape == held["truth"].shape
    assert held["dice"].keys() == {"lesion", "cyst"}
    assert held["walked"].shape == (1, 2, 64, 64)
    assert held["walked"].amax() == 1
    assert sorted(np.bincount(held["clusters"].ids[:, 0])[1:]) == [100, 100]


@pytest.fixture(scope="module")
def sent(whole):
    """A W&B server on this machine, after the offline runs of all stages have been synced to it."""
    folder, _ = whole
    server = Server()
    sync = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *sorted((folder / "runs").rglob("offline-run-*/"))],
        env={**os.environ, "WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    server.shut()
    assert sync.returncode == 0, sync.stdout + sync.stderr
    return server


def named(server, stage):
    return server.runs()[f"phantom/default/{stage}"]


def test_every_stage_is_a_run_with_its_settings_commit_versions_and_data(sent):
    stages = ("classify", "pseudo_labels", "segment", "test_maps", "test", "refined")
    assert set(sent.runs()) == {f"phantom/default/{stage}" for stage in stages}
    marks = set()
    for stage in stages:
        settings = sent.config(named(sent, stage))
        assert settings["config"]["trainer"]["max_epochs"] == 2
        assert {"torch", "lightning", "wandb", "python"} <= settings["versions"].keys()
        assert settings["git"]
        assert settings["command"]
        marks.add(settings["data"]["fingerprint"])
    assert len(marks) == 1
    model = sent.config(named(sent, "classify"))["config"]["model"]["init_args"]
    assert model["sce"]["init_args"]["sub_classes"]["number"] == 2


@pytest.mark.parametrize("stage", ["classify", "pseudo_labels", "segment", "test_maps", "test", "refined"])
def test_all_figures_pictures_and_tables_stand_on_one_axis_of_steps(sent, stage):
    rows = sent.history(named(sent, stage))
    assert rows
    # Lightning logs an epoch's training figures at its last step, validation's after it: not in order.
    assert all(0 <= row["trainer/global_step"] <= 6 for row in rows)


@pytest.mark.parametrize(
    ("stage", "kinds"),
    [
        ("classify", ("val/cam_dice", "val/pam_dice")),
        ("segment", ("val/dice",)),
        ("test_maps", ("test/cam_dice", "test/pam_dice")),
    ],
)
def test_dice_of_each_class_and_kind_is_a_figure(sent, stage, kinds):
    rows = sent.history(named(sent, stage))
    for kind in kinds:
        for name in (kind, f"{kind}/lesion", f"{kind}/cyst"):
            assert sum(name in row for row in rows) == (1 if stage == "test_maps" else 2), name


def test_test_dice_of_the_segmentation_is_a_figure_of_each_class(sent):
    (row,) = [row for row in sent.history(named(sent, "test")) if "test/dice" in row]
    assert {"test/dice_lesion", "test/dice_cyst"} <= row.keys()


def test_masks_of_the_same_slices_can_be_toggled_in_both_stages(sent):
    captions = []
    for stage, names in (
        ("classify", {"cam", "pseudo_label", "ground_truth"}),
        ("segment", {"prediction", "ground_truth"}),
    ):
        rows = [row["val/overlays"] for row in sent.history(named(sent, stage)) if "val/overlays" in row]
        assert len(rows) == 2  # epochs
        for shown in rows:
            assert all(masks.keys() == names for masks in shown["all_masks"])
            captions.append(shown["captions"])
    assert captions[0]
    assert all(shown == captions[0] for shown in captions)


@pytest.mark.parametrize(
    ("stage", "name"), [("test", "cases"), ("test_maps", "cam_cases"), ("pseudo_labels", "quality")]
)
def test_the_cases_are_a_table(sent, stage, name):
    (table,) = [row[name] for row in sent.history(named(sent, stage)) if name in row]
    assert table["_type"] == "table-file"
    assert table["nrows"] == 2 * (3 if stage == "pseudo_labels" else 1)  # classes x volumes


def test_artifacts_say_what_was_made_of_what_though_the_runs_were_offline(sent):
    def of(stage, operation):
        run = named(sent, stage)
        put = [given["input"] for given in sent.variables(operation) if given["input"].get("runName") == run]
        found = {given.get("artifactID") or f"{given['artifactCollectionName']}@{given['digest']}" for given in put}
        return {mark for mark in found if not mark.startswith("run-")}  # tables are artifacts of wandb's own

    stages = ("classify", "pseudo_labels", "segment", "test_maps", "test", "refined")
    used = {stage: of(stage, "UseArtifact") for stage in stages}
    made = {stage: of(stage, "CreateArtifact") for stage in stages}  # one that a run only uses names no run
    assert used["classify"] == made["test"] == made["test_maps"] == made["refined"] == set()
    assert len(made["classify"]) == len(made["pseudo_labels"]) == len(made["segment"]) == 1
    assert made["classify"] == used["pseudo_labels"] == used["test_maps"]
    assert made["pseudo_labels"] == used["segment"]
    assert made["segment"] == used["test"]
    assert used["refined"] == made["classify"] | made["segment"]
    assert json.dumps(sent.config(named(sent, "test"))["lineage_uses"]).startswith('{"phantom-default-segment": "')
