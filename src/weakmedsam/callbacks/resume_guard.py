"""In every checkpoint: the configuration and data fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback

from weakmedsam import __version__
from weakmedsam.config_diff import RUN_KEY, KnownData, data_digest, differences, say_digest, shared
from weakmedsam.errors import CheckpointError


class KeepSettings(Callback):
    """Put settings and a digest of the data into checkpoints; go on from those of the same data only.

    Args:
        settings: of this run, see ``config_diff.deciding``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what it is of."""
        checkpoint[RUN_KEY] = {
            "settings": self.settings, "data": data_digest(_data(trainer)), "version": __version__
        }  # fmt: skip

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other data under the same settings.

        Raises:
            CheckpointError: cases, their split or their intensities have changed.
        """
        held, ours = checkpoint.get(RUN_KEY, {}).get("data"), data_digest(_data(trainer))
        if held is not None and held != ours:
            raise CheckpointError(
                f"the checkpoint was trained on other data ({say_digest(held)}; now {say_digest(ours)}): scans, their "
                "split or how they are prepared have changed. Restore them, or start anew without --ckpt_path"
            )


def check_settings(checkpoint: Mapping[str, Any], settings: dict[str, Any], path: str) -> None:
    """See that a training goes on by the settings that its checkpoint was made with.

    Optimiser and schedule go on from the checkpoint, so another learning rate, say, would have no effect.

    Args:
        checkpoint: what was read; one of an earlier version, which holds no settings, passes.
        settings: of this run.
        path: of the checkpoint, for the message.

    Raises:
        CheckpointError: they differ; names each setting with both values.
    """
    held = checkpoint.get(RUN_KEY, {}).get("settings", {})
    found = list(differences(shared(held, settings), shared(settings, held)))
    if found:
        raise CheckpointError(
            f"--ckpt_path {path} was made by other settings (checkpoint -> this run):\n  "
            + "\n  ".join(found)
            + "\nContinue with the same settings, or start anew without --ckpt_path"
        )


def _data(trainer: Trainer) -> KnownData:
    return cast(KnownData, trainer.datamodule)  # type: ignore[attr-defined]
