"""Every file of ``experiments/`` runs one step, small; what needs a GPU is parsed. Backbones: test_backbones.py.

Sweeps: sweep/test_definition.py. Batch scripts: test_slurm.py.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
import yaml
from commands import run_command
from data_sets import data_set
from fakes import draw_data_set
from tensorboardX.proto.event_pb2 import Event

from weakmedsam import cli
from weakmedsam.fsdp import FullySharded
from weakmedsam.pam.feature_cache import score_setting
from weakmedsam.pam.pseudo_label_io import read_origin
from weakmedsam.sweep.agent import pam_settings, words_of
from weakmedsam.sweep.definition import read_definition
from weakmedsam.sweep.trials import sample
from weakmedsam.system.atomic_io import read_table

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
PHANTOM = {"--data.num_volumes": 6, "--data.phantom.slices": 8, "--data.phantom.size": 64}
RUN = ("cpu", "debug", "gpu", "slurm")
"""Trainer files that run here, on a processor; the others are parsed, two processes in files of their own."""
SLURM = {
    **{f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")},
    **{"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost"},
}


SMALL = ["--model.pam.prompts.grid", "2", "--model.pam.walk.map_size", "16"]
"""What PAM's settings do not matter for."""


def names(folder):
    return sorted(path.stem for path in (EXPERIMENTS / folder).glob("*.yaml"))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Small scans of a data set, drawn when first asked for."""
    made = {}

    def sample(data):
        if data not in made:
            made[data] = tmp_path_factory.mktemp(data) / "scans"
            info = data_set(data).info
            if info.example:
                draw_data_set(made[data], info)
        return made[data]

    return sample


@pytest.fixture
def call(tmp_path, scans):
    """Run a stage in this process: ``call("fit", ["classify"], "phantom", ...)``."""

    def run(subcommand, files, data, *words, more=()):
        files = [*files, f"data/{data}", *(["backbone/pocket"] if "classify" in files else []), *more]
        options = {
            "--data.data_dir": scans(data),
            "--data.prepare.store_dir": scans(data).parent / "store",
            "--data.image_size": 64,
            "--data.slices.min_pixels": 1,
            "--data.num_workers": 0,
            "--data.batch_size": 6,
            "--data.prepare.workers": 1,
            "--data.split.file": "null",
            "--data.split.fractions": "[0.4, 0.3, 0.3]",
            "--trainer.default_root_dir": tmp_path / "run",
            "--trainer.enable_progress_bar": "false",
            **(PHANTOM if data == "phantom" else {}),
        }
        arguments = [word for name in files for word in ("--config", f"experiments/{name}.yaml")]
        arguments += [str(word) for pair in options.items() for word in pair]
        run_command(subcommand, *arguments, *words)
        return tmp_path / "run"

    return run


def test_every_file_is_run_by_some_test():
    known = {"classify", "pseudo_labels", "another_round", "threshold", "refined", "features", "segment", "published"}
    known.add("compare_refinements")
    assert {path.stem for path in EXPERIMENTS.glob("*.yaml")} == known
    assert {path.name for path in EXPERIMENTS.iterdir() if path.is_dir()} == {
        *("backbone", "data", "logger", "slurm", "study", "sweeps", "trainer"),
    }


@pytest.mark.parametrize("data", names("data"))
def test_every_data_set_trains_a_step_of_each_stage(call, data):
    one = ["--trainer.max_steps", "1", "--trainer.logger", "false"]
    run = call("fit", ["classify"], data, *one, *SMALL, "--model.sce.sub_classes.number", "2")
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
    network = [
        "--model.network_args",
        "{features: [8, 8, 8, 8, 8, 8]}",
        "--data.labels.supervision",
        "expert",
    ]
    (run / "checkpoints").rename(run / "of_classify")
    run = call("fit", ["segment"], data, *one, *network)
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert "segmenter" in saved


@pytest.fixture
def on_predictions(call):
    """Runs PAM by a file of settings from what a segmentation network, trained a step, predicts."""
    one = ["--trainer.max_steps", "1", "--trainer.logger", "false"]
    run = call("fit", ["segment"], "phantom", *one, "--data.labels.supervision", "expert")
    segmenter = (run / "checkpoints").rename(run.parent / "of_segment") / "last.ckpt"
    run = call("fit", ["classify"], "phantom", *one, *SMALL)
    start = [
        "--model.pam.walk.map_size",
        "16",
        "--model.pam.start.checkpoint",
        str(segmenter),
        "--ckpt_path",
        str(run / "checkpoints/last.ckpt"),
    ]

    def walk(command, configs, name, *more):
        run = call(command, configs, "phantom", *start, more=[*more, name])
        held = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["pam"]["init_args"]
        own = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())["model"]["init_args"]["pam"]
        for group, settings in own["init_args"].items():
            assert {key: held[group][key] for key in settings} == settings
        return run, held

    return walk


def test_another_round_labels_volumes_from_a_segmentation_network(on_predictions):
    run, held = on_predictions("predict", ["classify", "pseudo_labels"], "another_round")
    stamps = [read_origin(path).settings for path in run.glob("*.safetensors")]
    assert stamps
    assert all(len(stamp["start"]) == 16 and stamp["walk"]["steps"] == held["walk"]["steps"] for stamp in stamps)


def test_refined_segments_test_volumes_by_its_own_settings(on_predictions):
    run, _ = on_predictions("test", ["classify"], "refined")
    assert (run / "cases.csv").is_file()


def test_the_threshold_is_chosen_on_validation_volumes(on_predictions):
    run, held = on_predictions("test", ["classify"], "threshold", "refined")
    chosen = json.loads((run / "threshold.json").read_text())
    assert chosen["threshold"] in held["start"]["thresholds"]
    assert not (run / "cases.csv").exists()


@pytest.mark.parametrize("name", names("sweeps"))
def test_a_drawn_setting_of_every_sweep_is_run_a_step(call, name):
    definition = read_definition(EXPERIMENTS / f"sweeps/{name}.yaml")
    drawn = words_of(sample(definition, [], seed=0))
    if name == "pam":
        one = ["--trainer.max_steps", "1", "--trainer.logger", "false"]
        run = call("fit", ["classify"], "phantom", *one, *SMALL)
        run = call("validate", ["classify", "features"], "phantom", "--ckpt_path", str(run / "checkpoints/last.ckpt"))
        assert "val/pam_dice" in score_setting(run, pam_settings(drawn))
        return
    stage, options = "classify", ["--model.pam", "null"]
    if name == "segment":
        stage = "segment"
        options = [
            "--model.network_args",
            "{features: [8, 8, 8, 8, 8, 8]}",
            "--data.labels.supervision",
            "expert",
        ]
    elif any(word.startswith("--model.pam") for word in drawn):
        options = []  # null and a setting of it contradict each other
    run = call("fit", [stage], "phantom", "--trainer.max_steps", "1", "--trainer.logger", "false", *options, *drawn)
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("trainer", names("trainer"))
def test_every_trainer_runs_a_step_or_is_parsed(call, monkeypatch, trainer):
    if trainer == "slurm":  # as the only process of a job
        for name, value in SLURM.items():
            monkeypatch.setenv(name, value)
    if trainer in RUN:
        one = ["--trainer.max_steps", "1", "--trainer.max_epochs", "1", "--trainer.logger", "false"]
        one += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
        run = call("fit", ["classify"], "phantom", *one, *SMALL, more=[f"trainer/{trainer}"])
        held = yaml.safe_load((run / "config.yaml").read_text())["trainer"]
        assert (held["plugins"] is None) == (trainer != "slurm")
        assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
        return
    parsed = []
    monkeypatch.setattr(cli.WeakMedSAMCLI, "instantiate_classes", lambda self: parsed.append(self))
    monkeypatch.setattr(cli.WeakMedSAMCLI, "_run_subcommand", lambda self, subcommand: None)
    for stage in ("classify", "segment"):
        call("fit", [stage], "phantom", more=[f"trainer/{trainer}"])
        held = parsed[-1].config["fit"]["trainer"]
        wanted = yaml.safe_load((EXPERIMENTS / f"trainer/{trainer}.yaml").read_text())["trainer"]
        assert (held["devices"], held["precision"]) == (wanted["devices"], wanted["precision"])
        built = parsed[-1].parser.instantiate_classes(parsed[-1].config)["fit"]["trainer"]
        if trainer == "fsdp":
            assert isinstance(built["strategy"], FullySharded)


def test_the_published_setting_trains_a_step_and_the_study_scores_its_settings(call):
    more = ["published"]
    one = ["--data.split.fractions", "[0.5, 0.3, 0.2]"]  # test volume: the study walks it by every setting
    step = [*one, "--trainer.max_steps", "1", "--trainer.logger", "false", "--model.pam.walk.map_size", "16"]
    run = call("fit", ["classify"], "phantom", *step, more=more)
    weights = run / "checkpoints/last.ckpt"
    held = torch.load(weights, weights_only=True)
    assert held["weakmedsam"]["pooling.kind"] == "average"
    assert not held["weakmedsam"]["local_encoder"]
    settings = yaml.safe_load((EXPERIMENTS / "compare_refinements.yaml").read_text())
    named = settings["trainer"]["callbacks"][0]["init_args"]["settings"]
    more = [*more, "compare_refinements"]
    call("test", ["classify"], "phantom", "--ckpt_path", str(weights), *SMALL, *one, more=more)
    assert {row["setting"] for row in read_table(run / "refinements_mean.csv")} == set(named)


def scalars(events):
    """Figures of a TensorBoard file: records of length, check sum, event, check sum."""
    content, told = events.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        for value in Event.FromString(content[12 : 12 + length]).summary.value:
            told.setdefault(value.tag, []).append(value.simple_value)
        content = content[16 + length :]
    return told


@pytest.mark.parametrize("logger", names("logger"))
def test_every_logger_takes_the_figures_of_an_epoch(call, logger):
    files = ["classify", f"logger/{logger}"]
    run = call("fit", files, "phantom", "--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1", *SMALL)
    columns = read_table(run / "history.csv")[0].keys()
    assert {"val/auroc", "val/pam_dice/cyst"} <= columns
    assert len(json.loads((run / "provenance.json").read_text())["data"]["fingerprint"]) == 16
    if logger == "csv":
        rows = read_table(run / "csv/version_0/metrics.csv")
        for name in ("val/auroc", "val/pam_dice/cyst", "throughput/images_per_second"):
            assert sum(bool(row[name]) for row in rows) == 1, name
        assert sum(bool(row["lr-AdamW"]) for row in rows) == 1
    elif logger == "tensorboard":
        (events,) = run.glob("tensorboard/version_0/events*")
        told = scalars(events)
        assert len(told["lr-AdamW"]) == len(told["throughput/images_per_second"]) == 1
        (kept,) = read_table(run / "history.csv")
        for name in ("val/auroc", "val/cam_dice", "val/pam_dice/cyst", "val/loss"):
            assert told[name] == [pytest.approx(float(kept[name]), rel=1e-5)], name


def test_pseudo_labels_and_features_are_made_of_a_trained_network(call):
    one = ["--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1", "--trainer.logger", "false"]
    run = call("fit", ["classify"], "phantom", *one, *SMALL)
    best = ["--ckpt_path", str(run / "checkpoints/best.ckpt")]
    call("predict", ["classify", "pseudo_labels"], "phantom", *best, *SMALL)
    labels = {path.name for path in run.glob("*.safetensors")}
    assert len(labels) == 2
    call("validate", ["classify", "features"], "phantom", *best, *SMALL)
    assert {path.name for path in run.glob("*.safetensors")} - labels == {"0000000.safetensors", "0000006.safetensors",
                                                                          "0000012.safetensors"}  # fmt: skip
    assert (run / "scores.json").is_file()
