import json
import logging
import os
import warnings
from pathlib import Path

import pytest
import torch
from commands import as_it_was, run_command
from lightning.pytorch.callbacks import LearningRateMonitor, ModelSummary, ProgressBar

from tests.backbone_checks import BACKBONES, tiny_words
from weakmedsam import cli, loggers
from weakmedsam.backbones import checkpoints
from weakmedsam.callbacks import Throughput
from weakmedsam.callbacks.stage_progress import StageProgress
from weakmedsam.classification.module import WeakMedSAM
from weakmedsam.errors import DIVERGED, DivergenceError
from weakmedsam.segmentation.module import Segmenter
from weakmedsam.system.progress import VERBOSE

ROOT = Path(__file__).parent.parent
DATA_SETS = sorted(path.stem for path in (ROOT / "experiments/data").glob("*.yaml"))


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run the command line in this process; training itself is left out."""
    made = []
    monkeypatch.setattr(cli.WeakMedSAMCLI, "_run_subcommand", lambda self, subcommand: made.append(self))

    def run(*words):
        run_command(*words)
        return made[-1] if made else None

    return run


def configs(stage, data="phantom", backbone="pocket"):
    names = [f"experiments/{stage}.yaml", f"experiments/data/{data}.yaml"]
    names += [f"experiments/backbone/{backbone}.yaml"] if stage == "classify" else []
    return [word for name in names for word in ("--config", name)]


def test_a_training_that_diverges_has_an_exit_status_of_its_own(call, tmp_path, monkeypatch, capsys):
    def diverge(self, subcommand):
        raise DivergenceError("classify has diverged")

    monkeypatch.setattr(cli.WeakMedSAMCLI, "_run_subcommand", diverge)
    with pytest.raises(SystemExit) as left:
        call("fit", *configs("classify"), "--trainer.default_root_dir", str(tmp_path))
    assert left.value.code == DIVERGED
    assert capsys.readouterr().err.strip() == "weakmedsam: DivergenceError: classify has diverged"


def test_without_a_backbones_file_it_is_the_embedded_one(call, tmp_path):
    words = ["--config", "experiments/classify.yaml", "--config", "experiments/data/abdomen.yaml"]
    made = call("fit", *words, "--trainer.devices", "1", "--trainer.default_root_dir", str(tmp_path))
    assert made.model.backbone.name == "pocket"
    assert made.model.backbone.image_size == made.datamodule.image_size == 256


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_data_set_and_backbone_makes_a_classifier(call, tmp_path, data, backbone):
    words = [
        *configs("classify", data, backbone),
        *tiny_words(backbone),
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    made = call("fit", *words)
    assert isinstance(made.model, WeakMedSAM)
    assert made.model.class_names == made.datamodule.class_names
    assert made.model.backbone.image_size == made.datamodule.image_size
    kinds = [type(callback).__name__ for callback in made.model.configure_callbacks()]
    assert kinds == ["SubClassExploration", "PromptAffinityMining"]


@pytest.mark.parametrize("data", DATA_SETS)
def test_every_data_set_makes_a_segmenter_of_its_classes(call, tmp_path, data):
    made = call("fit", *configs("segment", data), "--trainer.default_root_dir", str(tmp_path))
    assert isinstance(made.model, Segmenter)
    assert made.model.class_names == made.datamodule.class_names


def test_numbers_can_be_set_flat(call, tmp_path):
    made = call(
        *("fit", *configs("classify"), "--trainer.default_root_dir", str(tmp_path)),
        *(
            "--model.sce.sub_classes.number",
            "4",
            "--model.pam.affinity.beta",
            "2.5",
            "--model.sce.source",
            "pass",
            "--data.image_size",
            "64",
        ),
    )
    assert made.model.subclass_head.out_channels == 2 * 4 + 1
    sce, pam = made.model.configure_callbacks()
    assert (sce.source, pam.settings.affinity.beta) == ("pass", 2.5)
    assert made.model.backbone.image_size == 64
    folders = {getattr(callback, "dirpath", None) for callback in made.trainer.callbacks}
    assert str(tmp_path / "checkpoints") in folders


def test_the_number_of_sub_classes_is_a_number_or_auto(call, tmp_path):
    words = ["fit", *configs("classify"), "--trainer.default_root_dir", str(tmp_path)]
    words += ["--model.sce.sub_classes.number"]
    made = call(*words, "auto", "--model.sce.sub_classes.maximum", "5")
    assert made.model.sub_classes.automatic
    assert made.model.subclass_head.out_channels == 2 * 5 + 1
    with pytest.raises(SystemExit):
        call(*words, "some")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.sub_clases", "4"], "sub_clases"),
        (["--trainer.max_epocs", "4"], "max_epocs"),
        (["--data.clases", "{lesion: [1]}"], "clases"),
        (["--model.sce.source", "disk"], "choose one of bank, pass"),
        (["--data.classes", "{leison: [1]}"], "leison"),
    ],
)
def test_what_is_misspelt_is_refused_by_name(call, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        call("fit", *configs("classify"), "--trainer.default_root_dir", str(tmp_path), *words)
    told = f"{stopped.value.code} {capsys.readouterr().err}"
    assert message in told
    assert len(told.splitlines()) < 40


@pytest.mark.parametrize("subcommand", ["test", "predict", "validate"])
def test_without_a_checkpoint_nothing_is_scored(call, tmp_path, subcommand):
    with pytest.raises(SystemExit, match=f"{subcommand} needs a trained network: add --ckpt_path"):
        call(subcommand, *configs("classify"), "--trainer.default_root_dir", str(tmp_path))
    # Lightning knows "best" and "last" of a run in the same process; in a fresh one it would go on untrained.
    for path in ("nowhere.ckpt", "last", "best"):
        with pytest.raises(SystemExit, match=f"ckpt_path {path}: there is no such file"):
            call(subcommand, *configs("classify"), "--ckpt_path", path)


class Payload:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_a_damaged_checkpoint_or_one_with_code_is_one_clear_error(call, tmp_path, subcommand):
    damaged, code, made = tmp_path / "damaged.ckpt", tmp_path / "code.ckpt", tmp_path / "made"
    torch.save({"state_dict": {}, "epoch": 1}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:300])
    torch.save({"state_dict": Payload(str(made))}, code)
    for path, said in ((damaged, "damaged or not a checkpoint"), (code, "contains code")):
        with pytest.raises(SystemExit, match=rf"CheckpointError: .*{path.name} .*{said}"):
            call(subcommand, *configs("classify"), "--ckpt_path", str(path))
    assert not made.exists()


def test_a_checkpoint_overrides_nothing_that_was_typed(call, tmp_path):
    path = tmp_path / "theirs.ckpt"
    torch.save({"hyper_parameters": {"sub_classes": 3, "learning_rate": 9.0}}, path)
    words = ["--model.sce.sub_classes.number", "5", "--ckpt_path", str(path)]
    made = call("fit", *configs("classify"), *words)
    assert (made.model.sub_classes.number, made.model.learning_rate) == (5, 2e-3)


def test_weights_that_a_checkpoint_replaces_are_not_looked_for(call, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "find", lambda name: pytest.fail(f"{name} was looked for"))
    path = tmp_path / "ours.ckpt"
    torch.save({}, path)
    words = [*configs("classify", backbone="samus"), "--model.backbone.size", "tiny"]
    made = call("test", *words, "--ckpt_path", str(path))
    assert made.config["test"].model.init_args.backbone.init_args.weights == "sam"


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    cli.WholeCheckpoints().save_checkpoint({"epoch": 1}, str(path))

    def killed(content, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        cli.WholeCheckpoints().save_checkpoint({"epoch": 2}, str(path))
    assert torch.load(path, weights_only=True) == {"epoch": 1}


def test_every_trainer_writes_whole_checkpoints(call, tmp_path):
    made = call("fit", *configs("classify"), "--trainer.default_root_dir", str(tmp_path))
    assert isinstance(made.trainer.strategy.checkpoint_io, cli.WholeCheckpoints)


@pytest.mark.parametrize("logger", ["false", "wandb"])
def test_without_a_logger_the_learning_rate_is_not_watched(call, tmp_path, capsys, logger):
    words = ["--trainer.default_root_dir", str(tmp_path)] + (["--trainer.logger", "false"] * (logger == "false"))
    made = call("fit", *configs("classify"), *words)
    watched = any(isinstance(callback, LearningRateMonitor) for callback in made.trainer.callbacks)
    assert watched == (logger == "wandb")
    assert ("LearningRateMonitor is left out" in capsys.readouterr().out) == (not watched)


@pytest.mark.parametrize("verbose", ["", "1"])
def test_a_stage_has_one_bar_of_ours_and_a_model_summary_if_verbose(call, tmp_path, monkeypatch, verbose):
    monkeypatch.setenv(VERBOSE, verbose)
    made = call("fit", *configs("segment"), "--trainer.default_root_dir", str(tmp_path))
    (bar,) = [callback for callback in made.trainer.callbacks if isinstance(callback, ProgressBar)]
    assert isinstance(bar, StageProgress)
    assert any(isinstance(callback, ModelSummary) for callback in made.trainer.callbacks) == bool(verbose)


def test_what_the_user_sets_of_bars_and_summaries_stays(call, tmp_path):
    common = ["fit", *configs("segment"), "--trainer.default_root_dir", str(tmp_path)]
    bar, summary = (f"lightning.pytorch.callbacks.{name}" for name in ("TQDMProgressBar", "ModelSummary"))
    none = call(*common, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "true").trainer
    assert not [callback for callback in none.callbacks if isinstance(callback, ProgressBar)]
    assert [callback for callback in none.callbacks if isinstance(callback, ModelSummary)]
    own = [word for name in (bar, summary) for word in ("--trainer.callbacks+", name)]
    found = call(*common, *own).trainer.callbacks
    assert [type(c).__name__ for c in found if isinstance(c, ProgressBar | ModelSummary)] == [
        "TQDMProgressBar",
        "ModelSummary",
    ]


OURS = ["weakmedsam.callbacks.throughput", "data_modules.base"]
LIBRARIES = ["torch.utils.data", "weakmedsamlike"]


@pytest.mark.parametrize("verbose", ["", "1"])
def test_our_own_warnings_are_a_line_each_and_libraries_notices_are_shown_if_verbose(monkeypatch, verbose):
    monkeypatch.setenv(VERBOSE, verbose)
    with as_it_was(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        cli.quieten()
        for module in (*OURS, *LIBRARIES):
            warnings.warn_explicit(f"by {module}", UserWarning, "file.py", 1, module)
        warnings.warn_explicit(
            "by weakmedsam.cli", DeprecationWarning, "file.py", 1, "weakmedsam.cli"
        )  # of a library's
        heard = [name for name in (*OURS, "a_library") if logging.getLogger(name).isEnabledFor(logging.WARNING)]
        line = warnings.formatwarning("said", UserWarning, "file.py", 1)
    shown = [*OURS, *LIBRARIES, "weakmedsam.cli"] if verbose else OURS
    assert [str(warning.message) for warning in caught] == [f"by {module}" for module in shown]
    assert heard == ([*OURS, "a_library"] if verbose else OURS)
    assert (line == "warning: said\n") != bool(verbose)


def test_every_run_measures_its_throughput(call, tmp_path):
    words = ["--trainer.default_root_dir", str(tmp_path), "--throughput.warn_share", "0.75"]
    made = call("fit", *configs("segment"), *words)
    (found,) = [callback for callback in made.trainer.callbacks if isinstance(callback, Throughput)]
    assert found.warn_share == 0.75


def test_provenance_needs_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = cli.provenance()
    assert "git" not in found
    assert found["versions"]["torch"]


def test_prepare_refuses_a_misspelt_key_in_few_words(call, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("prepare", "--config", "experiments/data/phantom.yaml", "--data.imagesize", "3")
    told = capsys.readouterr().err
    assert "imagesize" in told
    assert len(told.splitlines()) < 5


def test_prepare_writes_the_store_and_what_is_in_it(call, tmp_path, capsys):
    call(
        *("prepare", "--config", "experiments/data/phantom.yaml", "--data.data_dir", str(tmp_path / "scans")),
        *(
            "--data.num_volumes",
            "4",
            "--data.phantom.slices",
            "8",
            "--data.prepare.store_dir",
            str(tmp_path / "store"),
        ),
        *("--data.image_size", "32", "--data.prepare.workers", "1", "--summary", str(tmp_path / "data.json")),
    )
    summary = json.loads((tmp_path / "data.json").read_text())
    assert sum(split["cases"] for split in summary["splits"].values()) == 4
    assert summary["splits"]["train"]["slices"] == 8 * summary["splits"]["train"]["cases"]
    assert Path(summary["store"]).is_dir()
    assert any("training slices have lesion: add" in sentence for sentence in summary["label_warnings"])
    told = capsys.readouterr().err
    assert all(f"warning: {sentence}\n" in told for sentence in summary["label_warnings"])


def test_wandb_stays_offline_unless_the_user_is_logged_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_SILENT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SHOW_INFO", "false")
    loggers.use_wandb_offline_unless_asked()
    assert os.environ["WANDB_MODE"] == "offline"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    loggers.use_wandb_offline_unless_asked()
    assert "WANDB_MODE" not in os.environ
    monkeypatch.setenv("WANDB_MODE", "online")
    loggers.use_wandb_offline_unless_asked()
    assert os.environ["WANDB_MODE"] == "online"


def test_the_datas_fingerprint_follows_the_index(tmp_path):
    assert cli.store_fingerprint(tmp_path) == ""
    found = set()
    for text in ("a", "b", "a"):
        (tmp_path / "index.json").write_text(text)
        found.add(cli.store_fingerprint(tmp_path))
    assert len(found) == 2


def test_provenance_names_versions_and_commit():
    found = cli.provenance()
    assert {"torch", "lightning", "monai"} <= found["versions"].keys()
    assert found["git"]
