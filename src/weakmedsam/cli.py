"""The command line: LightningCLI, stock but for what a user would trip over.

The only file that knows both the models and the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from data_modules.base import SliceDataModule
from weakmedsam.backbones.checkpoints import REPLACED, read_checkpoint
from weakmedsam.callbacks.divergence import EndDiverged
from weakmedsam.callbacks.preemption import Preemption
from weakmedsam.callbacks.reseed import Reseed
from weakmedsam.callbacks.resume_guard import KeepSettings, check_settings
from weakmedsam.callbacks.stage_progress import StageProgress
from weakmedsam.callbacks.throughput import Throughput
from weakmedsam.callbacks.wandb_lineage import Lineage
from weakmedsam.callbacks.wandb_tables import SendTables
from weakmedsam.cli_parser import MODE, Parser, check_nulls, check_trainer, typed
from weakmedsam.config_diff import check_version, deciding
from weakmedsam.data_commands import check_command, prepare_command
from weakmedsam.errors import DIVERGED, ConfigError, DivergenceError
from weakmedsam.loggers import use_wandb_offline_unless_asked
from weakmedsam.run.cli_errors import AboveBars
from weakmedsam.system.atomic_io import replacing, write_whole
from weakmedsam.system.file_lock import alone
from weakmedsam.system.fingerprints import check_checkpoint
from weakmedsam.system.library_errors import explain, flat_settings
from weakmedsam.system.progress import is_stage_of_run, is_verbose
from weakmedsam.system.signals import REQUEUE
from weakmedsam.system.yaml_files import check_words

PACKAGES = (
    "torch",
    "lightning",
    "torchmetrics",
    "monai",
    "faiss-gpu",
    "faiss-cpu",
    "segment-anything",
    "wandb",
    "numpy",
)


def provenance(words: Sequence[str] = ()) -> dict[str, Any]:
    """Versions, git commit and command of this run; what is not there is left out.

    Args:
        words: of the command line, behind the program's name.
    """
    versions = {"python": sys.version.split()[0], "weakmedsam": version("weakmedsam")}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ModuleNotFoundError:
            continue
    here = Path(__file__).parent
    found = {"versions": versions, "command": shlex.join([sys.argv[0], *words])}
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return found
    return found | {"git": git.stdout.strip()}


def store_fingerprint(store: Path) -> str:
    """Short hash of a slice store's index: which cases, from which files, under which settings.

    Empty where nothing is prepared.
    """
    index = store / "index.json"
    return hashlib.sha256(index.read_bytes()).hexdigest()[:16] if index.is_file() else ""


class SaveRun(SaveConfigCallback):
    """Put the whole configuration, versions and git commit beside the run and into its loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Rank 0 only; no collectives here."""
        folder = Path(trainer.default_root_dir)
        config = self.parser.dump(self.config, skip_none=False)
        write_whole(folder / "config.yaml", config)
        store = cast(SliceDataModule, trainer.datamodule).store  # type: ignore[attr-defined]
        facts = provenance(Parser.words)
        facts["data"] = {"store": store.name, "fingerprint": store_fingerprint(store)}
        write_whole(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
        settings = {"config": yaml.safe_load(config), **facts}
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all.

    Lightning's own way goes through the folder for temporary files; where that is another file system, a
    kill during the move leaves a torn ``last.ckpt``, from which no run can go on.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Write beside the file, then rename."""
        with replacing(Path(path)) as part:
            torch.save(checkpoint, part)


class WeakMedSAMCLI(LightningCLI):
    """A run = stage x data x backbone x trainer, each a YAML.

    Args:
        words: of the command line, behind the program's name.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.config: Any = None
        self._words = list(words)
        try:
            super().__init__(
                save_config_callback=SaveRun,
                save_config_kwargs={"save_to_log_dir": False},
                seed_everything_default=0,
                trainer_defaults={"callbacks": [EndDiverged(), SendTables(), Lineage(), Reseed()]},
                auto_configure_optimizers=False,
                parser_class=Parser,
                parser_kwargs={"parser_mode": MODE},
            )
        except Exception as error:
            known: dict[str, Any] = {} if self.config is None else self.config[self.config.subcommand].as_dict()
            meant = explain(error, flat_settings(known)) if known else None
            if meant is None:
                raise
            raise meant from None

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that was typed; all, to be listed, where none was. Each costs a tenth of a second to set up."""
        known = super().subcommands()
        return {name: known[name] for name in self._words[:1] if name in known} or known

    def _dump_config(self) -> None:
        """Nothing: Lightning would keep the settings for ``save_hyperparameters``, which no module here calls."""
        self.config_dump: dict[str, Any] = {}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """As Lightning does; the parser knows what was typed."""
        Parser.words = self._words
        return super().init_parser(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning does; what the trainer takes and trips over later is refused."""
        self.config = parser.parse_args(self._words)
        options = self.config[self.config.subcommand]
        check_trainer(options)
        check_nulls(options.as_dict())

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Class names are the data's; the model cannot be told others. Callbacks that every run has."""
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.link_arguments("data.class_names", "model.init_args.class_names", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyper-parameters override, silently, what the user typed.
        return

    def before_instantiate_classes(self) -> None:
        """Refuse a test or prediction with a network that has learnt nothing, and a checkpoint that does not fit."""
        path = self.config[self.subcommand].get("ckpt_path")
        if self.subcommand != "fit" and not path:
            raise ConfigError(
                f"{self.subcommand} needs a trained network: add --ckpt_path "
                "runs/<dataset>/<experiment>/<stage>/checkpoints/best.ckpt"
            )
        # Lightning takes "best" and "last" for a run in the same process; here it would go on untrained.
        if path:
            check_checkpoint(Path(path), "--ckpt_path")
        held = read_checkpoint(Path(path)) if path else {}
        check_version(held, f"--ckpt_path {path}")
        if self.subcommand == "fit":
            self.settings = deciding(self.config.fit.as_dict())
            check_settings(held, self.settings, str(path))

    def instantiate_classes(self) -> None:
        """As Lightning does; a backbone whose weights a checkpoint brings does not look for others first."""
        options = self.config[self.subcommand]
        backbone = options.get("model.init_args.backbone.init_args")
        named = backbone.get("weights") if backbone is not None and options.get("ckpt_path") else None
        if named is not None:
            backbone.weights = REPLACED
        super().instantiate_classes()
        if named is not None:
            backbone.weights = named  # the run's config.yaml says what was asked for

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it, as the only one in its folder; the other ranks are of the same run."""
        folder = Path(self.trainer.default_root_dir)
        with alone(folder) if self.trainer.is_global_zero else contextlib.nullcontext():
            super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """As Lightning does; a stage of a run prints no table of its figures, which stand in the run's own."""
        found: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return found | {"verbose": False} if "verbose" in found and is_stage_of_run() else found

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As Lightning does, with checkpoints that survive a kill, and callbacks that can do without a logger.

        Lightning ends a run whose learning rate is watched while nothing logs it.
        """
        trainer = super().instantiate_trainer(**shown_in_terminal(self.config_init[self.subcommand].trainer), **kwargs)
        if self.subcommand == "fit":
            trainer.callbacks.append(KeepSettings(self.settings))  # type: ignore[attr-defined]
        if not trainer.loggers:
            watchers = [c for c in trainer.callbacks if isinstance(c, LearningRateMonitor)]  # type: ignore[attr-defined]
            for watcher in watchers:
                trainer.callbacks.remove(watcher)  # type: ignore[attr-defined]
                if self.subcommand == "fit":
                    trainer.print("no logger, so the learning rate is not logged (LearningRateMonitor is left out)")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer


def shown_in_terminal(given: Any) -> dict[str, Any]:
    """Arguments of the trainer that give it our bar, and a model summary if verbose.

    What the user has set of bars and summaries stays.

    Args:
        given: the trainer's settings, their callbacks built.
    """
    held = given.callbacks or []
    callbacks = list(held) if isinstance(held, list) else [held]
    found: dict[str, Any] = {}
    if given.enable_model_summary is None and not any(isinstance(c, ModelSummary) for c in callbacks):
        found["enable_model_summary"] = is_verbose()
    if given.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
        found["callbacks"] = [*callbacks, StageProgress()]
    return found


def quieten() -> None:
    """Keep what a user acts on, our own warnings, a line each; drop the libraries' notices, unless verbose."""
    if is_verbose():
        _drop_expected()
        for name in ("lightning.pytorch", "lightning.fabric"):
            # Its handler keeps the standard error of before the bar, and would write into the bar's line.
            log = logging.getLogger(name)
            log.handlers = [AboveBars() if type(held) is logging.StreamHandler else held for held in log.handlers]
        return
    for name in ("lightning.pytorch", "lightning.fabric", "weakmedsam", "data_modules"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.root.setLevel(logging.ERROR)
    if not logging.root.handlers and logging.lastResort is not None:
        logging.root.addHandler(logging.lastResort)  # or the first library that logs has "WARNING:root:" put before all
    warnings.simplefilter("ignore")
    if not _get_rank():
        warnings.filterwarnings("default", category=UserWarning, module=r"(weakmedsam|data_modules)(\.|$)")
    warnings.formatwarning = lambda message, *args, **more: f"warning: {message}\n"


def _drop_expected() -> None:
    """Of the libraries' warnings, those on what is meant to be so."""
    for expected in (
        ".*number of training batches.*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The dirpath has changed.*",
        ".*using `ckpt_path`, callbacks used to create the checkpoint.*",
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        # Of figures that are the same on every rank already, or rank 0's alone.
        r".*It is recommended to use `self.log\('(sce|val|test)/.*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", expected)


def main(words: list[str] | None = None) -> None:
    """Run a stage. An error meant for the user is printed without a traceback, exit status 1 (``DIVERGED``).

    Args:
        words: of the command line, behind the program's name; this process's by default.
    """
    words = sys.argv[1:] if words is None else words
    # Before the parser is built: ${...} then resolves over all --config files and the command line.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    torch.set_float32_matmul_precision("high")
    use_wandb_offline_unless_asked()
    quieten()
    try:
        check_words(words)
        if words[:1] == ["prepare"]:
            prepare_command(words[1:])
        elif words[:1] == ["check"]:
            sys.exit(check_command(words[1:]))
        else:
            WeakMedSAMCLI(words)
    except SIGTERMException:  # before Preemption listened: Lightning would end with status 0
        sys.exit(REQUEUE)
    except Exception as error:
        meant = explain(error, {f"--{key}": value for key, value in typed(words).items()})
        if meant is None:
            raise
        said = f"\nweakmedsam: {type(meant).__name__}: {meant}"
        if isinstance(meant, DivergenceError):
            if not _get_rank():  # all ranks have found it, and one of them says so
                sys.stderr.write(f"{said}\n")
            sys.exit(DIVERGED)
        sys.exit(said)
