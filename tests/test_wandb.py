"""What W&B gets of a whole chain of stages: run offline, sent later to a server on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_server import KEY, Server

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "--data.num_volumes": 5,
    "--data.phantom.slices": 8,
    "--data.phantom.size": 64,
    "--data.image_size": 64,
    "--data.min_pixels": 3,
    "--data.num_workers": 0,
    "--data.prepare_workers": 1,
    "--data.split_fractions": "[0.6, 0.2, 0.2]",
    "--model.sub_classes": 2,
    "--model.pam.grid": 2,
    "--model.pam.every_n_epochs": 1,
    "--model.pam.map_size": 16,
    "--trainer.max_epochs": 2,
    "--segment.model.network_args": "{features: [8, 8, 8, 8, 8, 8]}",
}
pytestmark = pytest.mark.slow


def call(*words, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """The server, after an offline chain with ``LOGGER=lineage`` has been synced to it."""
    folder = tmp_path_factory.mktemp("chain")
    options = OPTIONS | {"--data.data_dir": folder / "scans", "--data.store_dir": folder / "store"}
    words = ["train", "--runs", folder / "runs", "--logger", "lineage", "--"]
    words += [word for pair in options.items() for word in pair]
    call("weakmedsam.pipeline", *words, WANDB_MODE="offline", WANDB_DATA_DIR=str(folder))
    server = Server()
    places = sorted((folder / "runs").rglob("offline-run-*/"))
    call("wandb", "sync", *places, WANDB_MODE="online", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    server.shut()
    return server


def named(server, stage):
    return server.runs()[f"phantom/default/{stage}"]


def test_every_stage_is_a_run_with_its_settings_commit_versions_and_data(sent):
    stages = ("classify", "pseudo_labels", "segment", "test_maps", "test")
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
    assert sent.config(named(sent, "classify"))["config"]["model"]["init_args"]["sub_classes"] == 2


@pytest.mark.parametrize("stage", ["classify", "segment", "test_maps", "test"])
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
        found = {
            given.get("artifactID") or f"{given['artifactCollectionName']}@{given['digest']}" for given in put
        }
        return {mark for mark in found if not mark.startswith("run-")}  # tables are artifacts of wandb's own

    stages = ("classify", "pseudo_labels", "segment", "test_maps", "test")
    used = {stage: of(stage, "UseArtifact") for stage in stages}
    made = {stage: of(stage, "CreateArtifact") for stage in stages}  # one that a run only uses names no run
    assert used["classify"] == made["test"] == made["test_maps"] == set()
    assert len(made["classify"]) == len(made["pseudo_labels"]) == len(made["segment"]) == 1
    assert made["classify"] == used["pseudo_labels"] == used["test_maps"]
    assert made["pseudo_labels"] == used["segment"]
    assert made["segment"] == used["test"]
    assert json.dumps(sent.config(named(sent, "test"))["lineage_uses"]).startswith(
        '{"phantom-default-segment": "'
    )
