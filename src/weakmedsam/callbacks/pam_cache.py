"""Keep what PAM starts from, for sweeps over its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor

from weakmedsam.backbones.base import Backbone
from weakmedsam.callbacks.pam import PromptAffinityMining
from weakmedsam.classification.module import Activation, WeakMedSAM
from weakmedsam.contracts import SliceBatch
from weakmedsam.errors import ConfigError, DataError, check_range
from weakmedsam.geometry import inside_box
from weakmedsam.pam.affinity import grid_points, onto_map
from weakmedsam.pam.config import Refinement, dotted
from weakmedsam.pam.feature_cache import Head, Part, write_head, write_part
from weakmedsam.pam.occlusion import Drops, drops_under_occlusion
from weakmedsam.pam.prompt_masks import MASKS, PamBatch
from weakmedsam.system.atomic_io import write_whole


class MaskedData(Protocol):
    """What ``KeepFeatures`` asks of the data module.

    Attributes:
        has_val_masks: whether validation batches hold ``mask``.
        val_cases: the case of each validation slice, by ``index``.
    """

    has_val_masks: bool
    val_cases: list[str]


class KeepFeatures(Callback):
    """In ``validate``: write activation, prompt masks, labels and expert masks of the validation slices.

    They go into the run's folder in the form of ``sweep_features``; each process writes its share.
    ``scores.json`` beside them holds what the network reached with the settings of the run.

    Args:
        grids: prompts a side of the grids whose masks are kept, 1 or more, besides the run's own; a slice
            takes 4 KB for each prompt on a map of 64 cells.

    Raises:
        ConfigError: a grid out of range; there is no PAM in the run, or one with summed prompts, whose
            logits uint8 cannot hold.
        DataError: no validation case has an expert mask.
    """

    def __init__(self, grids: list[int] | None = None) -> None:
        for side in grids or []:
            check_range("KeepFeatures.grids", side, 1, 128)
        self._grids = grids or []
        self._settings = Refinement()
        self._sides: list[int] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what PAM is set to, and write it."""
        module = cast(WeakMedSAM, pl_module)
        data = cast(MaskedData, trainer.datamodule)  # type: ignore[attr-defined]
        mining = [c for c in trainer.callbacks if isinstance(c, PromptAffinityMining)]  # type: ignore[attr-defined]
        known = ("per_prompt", "with_intensity")
        settings = mining[0].settings if mining else None
        if settings is None or settings.affinity.kind not in known or settings.prompts.placement != "grid":
            raise ConfigError(
                "model.pam: a sweep of PAM needs it in the run, with prompts.placement: grid and "
                f"affinity.kind: {' or '.join(known)}"
            )
        if not data.has_val_masks:
            raise DataError("no validation case has an expert mask: a sweep of PAM has nothing to score with")
        self._settings = settings
        self._sides = sorted({self._settings.prompts.grid, *self._grids})
        if trainer.is_global_zero:
            size = module.backbone.image_size
            head = Head(module.class_names, list(data.val_cases), size, dotted(self._settings), self._sides)
            write_head(Path(trainer.default_root_dir), head)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: SliceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's part."""
        module, activation = cast(WeakMedSAM, pl_module), cast(Activation, outputs)
        rows = batch["label"].any(dim=1).nonzero().flatten()
        embedding = module.embedding(activation.rows(rows), batch["image"][rows]) if len(rows) else None
        prompts = {side: self._masks(module.backbone, embedding, side) for side in self._sides}
        drops = drops_under_occlusion(module.evidence)
        slices = PamBatch(batch["image"][rows], activation.cam[rows], None, batch["label"][rows], batch["box"][rows])
        part = Part(
            rows=batch["index"],
            mask=batch["mask"].to(torch.uint8),
            labelled=rows,
            cam=activation.cam[rows].float(),
            prompts=prompts,
            drops={side: self._drops(drops, slices, masks) for side, masks in prompts.items()}
            if self._settings.occlusion.weight > 0 and len(rows)
            else {},
            label=batch["label"][rows].to(torch.uint8),
            box=batch["box"][rows],
            image=(batch["image"][rows] * 255).round().to(torch.uint8),
        )
        write_part(Path(trainer.default_root_dir), part)

    def _masks(self, backbone: Backbone, embedding: Tensor | None, side: int) -> Tensor:
        """(L, side * side, s, s) uint8."""
        map_size = self._settings.walk.map_size
        if embedding is None:
            return torch.zeros((0, side * side, map_size, map_size), dtype=torch.uint8)
        points = grid_points(side, backbone.image_size).to(embedding.device)
        parts = []
        for some in embedding.split(max(1, MASKS // len(points))):
            maps = onto_map(backbone.masks_at_points(some, points).float().sigmoid(), map_size)
            parts.append((maps * 255).round().to(torch.uint8).cpu())
        return torch.cat(parts)

    @staticmethod
    def _drops(drops: Drops, slices: PamBatch, masks: Tensor) -> Tensor:
        """(L, C, side * side), of the masks as they come from the store."""
        inside = inside_box(slices.box, slices.image.shape[-1], masks.shape[-1])
        parts = []
        for i in range(0, len(masks), step := max(1, MASKS // masks.shape[1])):
            some = masks[i : i + step].to(inside.device).float() / 255 * inside[i : i + step]
            parts.append(drops(slices.rows(slice(i, i + step)), some))
        return torch.cat(parts)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was reached with the run's own settings."""
        if trainer.is_global_zero:
            figures = {name: float(v) for name, v in trainer.callback_metrics.items() if "_dice" in name}
            write_whole(Path(trainer.default_root_dir) / "scores.json", json.dumps(figures, indent=1) + "\n")
