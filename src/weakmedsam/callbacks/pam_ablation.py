"""Compare settings of PAM on the test volumes of one trained network, asking each prompt once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor

from weakmedsam.backbones.base import Backbone, Encoded
from weakmedsam.classification.module import Activation, WeakMedSAM
from weakmedsam.contracts import VolumeBatch
from weakmedsam.errors import ConfigError
from weakmedsam.pam.config import Refinement
from weakmedsam.pam.occlusion import Drops, drops_under_occlusion
from weakmedsam.pam.prompt_masks import PamBatch
from weakmedsam.pam.tables import CaseDice, gather_cases
from weakmedsam.pam.volumes import labelled_rows, score_volume
from weakmedsam.system.atomic_io import write_table

COLUMNS = ("setting", "case", "class", "cam_dice", "pam_dice")
"""Of ``refinements.csv``. Of an ellipsoid that looks at no image the test has a row of its own."""


class Remembering(Backbone):
    """A backbone that answers a question it has been asked before from memory.

    Args:
        backbone: answers new questions.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.name, self.image_size, self.feature_dim = (
            backbone.name,
            backbone.image_size,
            backbone.feature_dim,
        )
        self.asked = 0
        self._backbone = [backbone]  # in a list, so that it does not become a part of this module
        self._answers: dict[bytes, Any] = {}

    def encode(self, image: Tensor) -> Encoded:  # noqa: D102
        return self._backbone[0].encode(image)

    def masks_at_points(self, embedding: Tensor, points: Tensor) -> Tensor:  # noqa: D102
        key = _digest(embedding, points, b"masks")
        if key not in self._answers:
            self.asked += 1
            self._answers[key] = self._backbone[0].masks_at_points(embedding, points)
        return cast(Tensor, self._answers[key])

    def prompted(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        key = _digest(embedding, points, b"prompted")
        if key not in self._answers:
            self.asked += 1
            self._answers[key] = self._backbone[0].prompted(embedding, points)
        return cast(tuple[Tensor, Tensor], self._answers[key])

    def set_trainable(self, policy: str) -> None:  # noqa: D102
        self._backbone[0].set_trainable(policy)


class RememberingDrops:
    """Drops of the class logits under occlusion, computed once for each slice and its masks.

    Args:
        drops: computes new ones.
    """

    def __init__(self, drops: Drops) -> None:
        self.asked = 0
        self._drops = drops
        self._answers: dict[bytes, Tensor] = {}

    def __call__(self, some: PamBatch, masks: Tensor) -> Tensor:
        """(B, C, P)."""
        rows = []
        for b in range(len(masks)):
            one = some.rows(slice(b, b + 1))
            key = _digest(one.image, masks[b], b"drops")
            if key not in self._answers:
                self.asked += 1
                self._answers[key] = self._drops(one, masks[b : b + 1])
            rows.append(self._answers[key])
        return torch.cat(rows)


def _digest(about: Tensor, asked: Tensor, question: bytes) -> bytes:
    digest = hashlib.blake2b(question)
    for part in (about, asked):
        digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.digest()


class CompareRefinements(Callback):
    """Score many settings of PAM in one test: ``refinements.csv`` and ``refinements_mean.csv``.

    Slices are encoded once, every prompt is put once and every mask occluded once, however many settings there
    are. No network is chosen and nothing is tuned here: it is for the table of a study.

    Args:
        settings: name -> what differs from ``model.pam``'s defaults in code (the paper's values): dotted keys and
            values of ``pam.config.Refinement``.

    Raises:
        ConfigError: an unknown key or a value out of range; names the setting.
    """

    def __init__(self, settings: dict[str, dict[str, Any]]) -> None:
        self.settings: dict[str, Refinement] = {}
        for name, values in settings.items():
            try:
                self.settings[name] = Refinement().changed(values)
            except ConfigError as error:
                raise ConfigError(f"settings.{name}: {error}") from error
        self._cases: dict[str, list[CaseDice]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the tables."""
        self._cases = {name: [] for name in self.settings}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score a volume under every setting."""
        module, activation = cast(WeakMedSAM, pl_module), cast(Activation, outputs)
        backbone, drops = (
            Remembering(module.backbone),
            RememberingDrops(drops_under_occlusion(module.evidence)),
        )
        rows = labelled_rows(batch)
        if len(rows) and any(settings.prompted for settings in self.settings.values()):
            made = module.embedding(activation.rows(rows), batch["image"][rows])
            embedding = made.new_zeros(len(batch["image"]), *made.shape[1:])
            embedding[rows] = made
            activation = activation._replace(embedding=embedding)
        for name, settings in self.settings.items():
            self._cases[name] += score_volume(module, activation, batch, settings, backbone, drops)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both tables: by case and class, and means over cases, a class without a target left out."""
        rows: list[Mapping[str, object]] = []
        means: list[Mapping[str, object]] = []
        for name, cases in self._cases.items():
            gathered = gather_cases(cases)
            rows += [dict(zip(COLUMNS, (name, *case[:-1]), strict=True)) for case in gathered]
            for class_name in cast(WeakMedSAM, pl_module).class_names:
                own = [(case.cam_dice, case.pam_dice) for case in gathered if case.class_name == class_name]
                cam, pam = torch.tensor(own).view(-1, 2).nanmean(dim=0).tolist()
                means.append(
                    {
                        "setting": name,
                        "class": class_name,
                        "cases": len(own),
                        "cam_dice": cam,
                        "pam_dice": pam,
                    }
                )
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            write_table(folder / "refinements.csv", COLUMNS, rows)
            columns = ("setting", "class", "cases", "cam_dice", "pam_dice")
            write_table(folder / "refinements_mean.csv", columns, means)
