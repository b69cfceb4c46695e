"""Which run made what of what: checkpoints and pseudo-labels as W&B artifacts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol, cast

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from weakmedsam.callbacks.pam import PromptAffinityMining
from weakmedsam.loggers import WeightsAndBiases


class Labelling(Protocol):
    """What training slices are labelled with.

    Attributes:
        supervision: "pseudo" where training reads ``pseudo_labels_dir``.
        pseudo_labels_dir: folder of pseudo-label files.
    """

    @property
    def supervision(self) -> str:
        """See above."""

    @property
    def pseudo_labels_dir(self) -> str | None:
        """See above."""


class LearntData(Protocol):
    """What ``Lineage`` asks of the data module.

    Attributes:
        labels: what training slices are labelled with.
    """

    labels: Labelling


class Lineage(Callback):
    """Tell W&B what a run was made of and what it made, where its logger has ``lineage``.

    A training makes a model (``best.ckpt``), prediction makes a data set (the pseudo-label files); test and
    prediction use the model they were given, a training on pseudo-labels uses their data set. An artifact
    is named after its folder and told apart by its content, so the run that uses one needs not know
    which run made it, and both may be offline: wandb keeps the files until they are sent. The digests are
    in the run's settings too, as ``lineage_uses`` and ``lineage_makes``. Where the server is lost, one
    warning says so and training goes on.

    Rank 0 only.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the pseudo-labels that are learnt."""
        data = cast(LearntData, trainer.datamodule)  # type: ignore[attr-defined]
        if data.labels.supervision == "pseudo" and data.labels.pseudo_labels_dir:
            record(trainer, "uses", "dataset", Path(data.labels.pseudo_labels_dir))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the network that is tested."""
        self._use_network(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the network that makes pseudo-labels."""
        self._use_network(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log what was made: after the last hook of the others, when all ranks have written their files."""
        if stage == "fit":
            # The first one is the best by validation; a run can also keep no checkpoint.
            for kept in [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)][:1]:
                if kept.best_model_path:
                    record(trainer, "makes", "model", Path(kept.best_model_path))
        elif stage == "predict":
            record(trainer, "makes", "dataset", Path(trainer.default_root_dir))

    def _use_network(self, trainer: Trainer) -> None:
        # PAM may start from a segmentation network (``model.pam.start.checkpoint``).
        starts = [c.start for c in trainer.callbacks if isinstance(c, PromptAffinityMining)]  # type: ignore[attr-defined]
        used = [Path(path) for path in (trainer.ckpt_path, *starts) if path is not None]
        if used:
            record(trainer, "uses", "model", *used)


def record(trainer: Trainer, verb: str, kind: str, *places: Path) -> None:
    """Tell the loggers that have ``lineage`` of artifacts; nothing on other ranks.

    Args:
        trainer: whose run it is.
        verb: "uses" or "makes".
        kind: "model", of which a place is the checkpoint, or "dataset", of which it is the folder.
        places: what each artifact holds; folders above it give its name.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WeightsAndBiases) and logger.lineage:
            offline = logger.experiment.offline
            artifacts = [make_artifact(kind, place, offline) for place in places]
            logger.log_hyperparams({f"lineage_{verb}": {a.name: a.digest for a in artifacts}})
            for artifact, place in zip(artifacts, places, strict=True):
                _send(logger, artifact, verb == "uses", kind, place)


def _send(logger: WeightsAndBiases, artifact: Any, used: bool, kind: str, place: Path) -> None:
    try:
        # wandb's own use_artifact refuses to work offline and waits for the server online; what it
        # calls for a new artifact does neither. "User created" is what no run has made.
        logger.experiment._log_artifact(artifact, is_user_created=used, use_after_commit=used)
    except Exception as error:  # wandb has several kinds for a server that is lost
        rank_zero_warn(
            f"W&B did not take {kind} {artifact.name} as an artifact ({error}). The files are in {place}; "
            f"name and digest are in the run's settings, under lineage_{'uses' if used else 'makes'}"
        )


def make_artifact(kind: str, place: Path, offline: bool) -> Any:
    """The artifact of a checkpoint or a folder of pseudo-labels; equal files have equal digests.

    Args:
        kind: "model" or "dataset".
        place: the checkpoint ``<folder>/checkpoints/best.ckpt``, or the folder.
        offline: copy the files, since they may have changed when they are sent.
    """
    import wandb

    folder = (place.parent.parent if kind == "model" else place).resolve()
    name = re.sub(r"[^\w.-]+", "_", "-".join(folder.parts[-3:]).strip("/-"))
    artifact = wandb.Artifact(name, kind)
    files = [place] if kind == "model" else sorted([*place.glob("*.safetensors"), *place.glob("quality.csv")])
    for file in files:
        artifact.add_file(str(file), policy="mutable" if offline else "immutable")
    return artifact
