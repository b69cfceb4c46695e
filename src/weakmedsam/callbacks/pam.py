"""PAM as a callback: refine activation maps, score them, write pseudo-labels, segment unlabelled scans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor

from weakmedsam.callbacks.overlays import FixedSlices, mask_areas, overlay_of, send_overlays
from weakmedsam.classification.cam import mirror_axes
from weakmedsam.classification.module import Activation, WeakMedSAM
from weakmedsam.config_diff import KnownData
from weakmedsam.contracts import SliceBatch, VolumeBatch
from weakmedsam.errors import DataError, check_range
from weakmedsam.figures import PictureRow, draw_grid
from weakmedsam.metrics.image_labels import stratified_sample
from weakmedsam.metrics.overlap_surface import VolumeDice
from weakmedsam.pam.config import (
    Affinity,
    Occlusion,
    Prompts,
    Refinement,
    Start,
    Threshold,
    Validation,
    Views,
    Vote,
    Walk,
)
from weakmedsam.pam.occlusion import drops_under_occlusion
from weakmedsam.pam.pseudo_label_io import Origin, read_origin, write_pseudo_label
from weakmedsam.pam.refiner import PamBatch, Refined, refine
from weakmedsam.pam.self_training import SegmentedStart
from weakmedsam.pam.tables import CaseDice, best_ellipsoids, gather_cases, write_cases, write_quality
from weakmedsam.pam.threshold_choice import ThresholdChoice, write_threshold
from weakmedsam.pam.thresholding import threshold_scores
from weakmedsam.pam.volumes import (
    draw_row,
    label_volume,
    score_volume,
    segment_volume,
    volume_fingerprint,
)
from weakmedsam.segmentation.evaluator import Evaluation
from weakmedsam.segmentation.prediction_writer import check_new_scans, save_segmentation
from weakmedsam.system.atomic_io import put_away

_DEFAULT = Refinement()


class Mirroring(Protocol):
    """What is asked of an augmentation: the probability of each mirror."""

    flip_columns: float
    flip_rows: float


class ValidationData(Protocol):
    """What ``PromptAffinityMining`` asks of the data module.

    Attributes:
        has_val_masks: whether validation batches hold ``mask``.
        val_cases: the case of each validation slice, by ``index``.
        augment: how training slices are mirrored; None for not at all.
    """

    has_val_masks: bool
    val_cases: list[str]
    augment: Mirroring | None

    def val_labels(self) -> NDArray[np.float32]:
        """(N, C) image-level labels of the validation slices, by ``index``."""


class LabelledVolumes(Protocol):
    """What ``PromptAffinityMining`` asks of the data module in prediction.

    Attributes:
        entries: by case name.
    """

    entries: Mapping[str, object]

    def digest_volume(self, case: str) -> str:
        """Short hash of a case's slices and labels."""


class PromptAffinityMining(Callback):
    """Refine class activation maps with the affinity that point prompts reveal.

    In validation it logs the Dice of the activation and of the refined map, gated by the given label, as
    ``val/cam_dice`` and ``val/pam_dice`` (per volume, see docs/metrics.md), with a picture grid and, on
    W&B, the masks ``cam``, ``pseudo_label`` (what PAM makes of it) and ``ground_truth``; in test the
    same per case to ``cam_cases.csv``; in prediction it writes one pseudo-label file a volume.
    Slices without a class are not prompted, and PAM encodes none twice (``occlusion`` and ``views`` apart).
    Validation has slices, not volumes: it walks on each by itself, and Otsu's rule takes each by itself.

    Args:
        prompts: point prompts and their masks. This and the groups that follow: ``pam.config`` has every setting.
        affinity: what two pixels are compared by.
        walk: the random walk.
        occlusion: the mask without which a class loses most of its evidence.
        vote: of the masks, weighted by their agreement with the activation.
        threshold: from the refined map to the classes of pixels.
        views: mirrored images.
        start: what is walked, and who says which classes a slice has.
        validation: what validations refine.
        pictures: rows of a picture grid, and slices that W&B shows with their masks, 1 to 1,000.

    Raises:
        ConfigError: settings that do not go together, or a number out of its range.
    """

    def __init__(
        self,
        prompts: Prompts = _DEFAULT.prompts,
        affinity: Affinity = _DEFAULT.affinity,
        walk: Walk = _DEFAULT.walk,
        occlusion: Occlusion = _DEFAULT.occlusion,
        vote: Vote = _DEFAULT.vote,
        threshold: Threshold = _DEFAULT.threshold,
        views: Views = _DEFAULT.views,
        start: Start = Start(),  # noqa: B008
        validation: Validation = Validation(),  # noqa: B008
        pictures: int = 6,
    ) -> None:
        self.settings = Refinement(prompts, affinity, walk, occlusion, vote, threshold, views)
        check_range("model.pam.pictures", pictures, 1, 1000)
        self._pictures = pictures
        self.validation = validation
        self._sample: Tensor | None = None
        self.start = start.checkpoint
        self.predicted = start.presence == "predicted"
        self._thresholds = start.thresholds if self.predicted else None
        self._choice: ThresholdChoice | None = None
        self._dice: dict[str, VolumeDice] = {}
        self._rows: FixedSlices[PictureRow] = FixedSlices(pictures)
        self._cases: list[CaseDice] = []
        self._evaluation: Evaluation | None = None
        self._stamp: dict[str, Any] = {}
        self._start: str | None = None

    def refine(self, module: WeakMedSAM, image: Tensor, activation: Activation, label: Tensor, box: Tensor) -> Refined:
        """Refine B slices with these settings: image (B, 1, S, S), label (B, C), box (B, 4)."""
        embedding = module.embedding(activation, image) if self.settings.prompted else None
        slices = PamBatch(image, activation.cam, embedding, label, box)
        return refine(
            module.backbone,
            slices,
            self.settings,
            module.slices_per_step,
            drops_under_occlusion(module.evidence),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the module in which mirrors to look, and what to start from."""
        module, data = cast(WeakMedSAM, pl_module), cast(ValidationData, trainer.datamodule)  # type: ignore[attr-defined]
        if self.start is not None:
            size, cells = module.backbone.image_size, self.settings.walk.map_size
            segmented = SegmentedStart(Path(self.start), module.class_names, size, cells)
            if self.predicted and stage == "predict":
                check_new_scans(data)
            else:
                segmented.compare_data(cast(KnownData, data))
            module.start, self._start = segmented, volume_fingerprint(segmented.network)
        if self.settings.views.activation == "mirrored" and data.augment is not None:
            module.views = mirror_axes(data.augment.flip_columns > 0, data.augment.flip_rows > 0)

    # Validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the epoch's counts."""
        module = cast(WeakMedSAM, pl_module)
        data = cast(ValidationData, trainer.datamodule)  # type: ignore[attr-defined]
        self._rows.clear()
        if data.has_val_masks and not self._dice:
            self._dice = {name: VolumeDice(data.val_cases, len(module.class_names)) for name in ("cam", "pam")}
        if self._sample is None:
            # Without masks there is nothing to score: only what is shown is refined.
            size = self.validation.slices if data.has_val_masks else self._pictures
            if size is not None:
                self._sample = stratified_sample(torch.from_numpy(data.val_labels() > 0), size)
        for metric in self._dice.values():
            metric.to(module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: SliceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refine the sample, or all slices that have a class: on others nothing is predicted, with or without PAM.

        Without masks these are the slices of the pictures.
        """
        module, activation = cast(WeakMedSAM, pl_module), cast(Activation, outputs)
        if not self._due(trainer):
            return
        labelled = (batch["label"] > 0).any(dim=1)
        if self._sample is not None:
            labelled &= self._sample.to(labelled.device)[batch["index"]]
        chosen, others = (rows.nonzero().flatten() for rows in (labelled, ~labelled))
        if len(others) and self._sample is None:
            # What lies there below data.slices.min_pixels is missed, as in the test.
            for metric in self._dice.values():
                metric.update(torch.zeros_like(batch["mask"][others]), batch["mask"][others], batch["index"][others])
        if not len(chosen):
            return
        refined = self.refine(
            module,
            batch["image"][chosen],
            activation.rows(chosen),
            batch["label"][chosen],
            batch["box"][chosen],
        )
        truth = batch["mask"][chosen] if "mask" in batch else None
        before, _ = threshold_scores(refined.before, self.settings.threshold.value)
        after, _ = threshold_scores(refined.after, self.settings.threshold.value)
        for name, ids in (("cam", before), ("pam", after)):
            if truth is not None:
                self._dice[name].update(ids, truth, batch["index"][chosen])
        if trainer.is_global_zero:
            areas = [1] * len(chosen) if truth is None else mask_areas(truth)  # without masks the first of a case
            for i, row in enumerate(chosen.tolist()):
                case = batch["case"][row]
                if self._rows.wants(case, areas[i]):
                    title = f"{case} slice {int(batch['slice'][row])}\n"
                    image, mask = batch["image"][row, 0], None if truth is None else truth[i]
                    made = draw_row(module, title, image, refined, i, before[i], after[i], mask)
                    self._rows.keep(case, areas[i], made)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log both Dice and the pictures."""
        module = cast(WeakMedSAM, pl_module)
        count = len(module.class_names)
        for name, metric in self._dice.items():
            # torchmetrics drops the dimension of a single class. NaN where nothing was refined: a figure that
            # is not logged would keep its last value.
            values = torch.atleast_1d(metric.compute()) if self._due(trainer) else torch.full((count,), torch.nan)
            for class_name, value in zip(module.class_names, values, strict=True):
                module.log(f"val/{name}_dice/{class_name}", value)
            module.log(f"val/{name}_dice", values.nanmean(), prog_bar=True)
        rows = self._rows.chosen()
        if rows and not trainer.sanity_checking:
            path = Path(trainer.default_root_dir) / "pictures" / f"epoch_{trainer.current_epoch:03d}.png"
            draw_grid(rows, path)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("pam", [str(path)], step=trainer.global_step)
            send_overlays(trainer, [overlay_of(row) for row in rows], module.class_names)

    def _due(self, trainer: Trainer) -> bool:
        """Whether this validation refines."""
        epoch = trainer.current_epoch + 1
        return (
            trainer.state.fn != TrainerFn.FITTING
            or epoch % self.validation.every_n_epochs == 0
            or epoch == trainer.max_epochs
        )

    # Test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        self._cases.clear()
        if self._thresholds:
            self._choice = ThresholdChoice(self._thresholds)
        elif self.predicted:
            names = cast(WeakMedSAM, pl_module).class_names
            self._evaluation = Evaluation(names, Path(trainer.default_root_dir))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Dice of a volume, on the scan's own slices, before and after refinement; or score what is predicted."""
        module, activation = cast(WeakMedSAM, pl_module), cast(Activation, outputs)
        if self._choice is not None:
            self._choice.add(module, activation, batch, self.settings)
        elif self._evaluation is None:
            self._cases += score_volume(module, activation, batch, self.settings)
        else:
            self._evaluation.add(batch, segment_volume(module, activation, batch, self.settings))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``cam_cases.csv`` and log the Dice of the test's maps; or of what is refined of predictions."""
        module = cast(WeakMedSAM, pl_module)
        if self._choice is not None:
            chosen = self._choice.choose(self.settings.threshold.value)
            module.log("test/threshold", chosen["threshold"])
            if trainer.is_global_zero:
                write_threshold(Path(trainer.default_root_dir), chosen)
            return
        if self._evaluation is not None:
            for name, value in self._evaluation.finish(trainer.is_global_zero).items():
                module.log(f"test/{name}", value)
            return
        cases = gather_cases(self._cases)
        kinds, means = ("cam_dice", "pam_dice", "no_image_dice"), []
        no_image = best_ellipsoids(cases)
        scored = [(*case[1:4], dice) for case, dice in zip(cases, no_image, strict=True)]
        for name in module.class_names:
            dice = [row[1:] for row in scored if row[0] == name]
            means.append(torch.tensor(dice).view(-1, len(kinds)).nanmean(dim=0))
            module.log_dict({f"test/{kind}/{name}": value for kind, value in zip(kinds, means[-1], strict=True)})
        mean = torch.stack(means).nanmean(dim=0)
        module.log_dict({f"test/{kind}": value for kind, value in zip(kinds, mean, strict=True)})
        if trainer.is_global_zero:
            write_cases(Path(trainer.default_root_dir) / "cam_cases.csv", cases, no_image)

    # Pseudo-labels, and segmentations of unlabelled scans

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the volumes that are done by this network and these settings; of unlabelled scans the data knows."""
        if self.predicted:
            return
        module = cast(WeakMedSAM, pl_module)
        self._stamp = {**asdict(self.settings), "network": volume_fingerprint(module)}
        if self._start is not None:
            self._stamp["start"] = self._start
        folder = Path(trainer.default_root_dir)
        data = cast(LabelledVolumes, trainer.datamodule)  # type: ignore[attr-defined]
        done = (path for path in folder.glob("*.safetensors") if path.stem in data.entries)
        module.finished_cases = {path.stem for path in done if self._is_of(path, path.stem, data)}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the volume's file, and a picture of its slice of the most refined pixels."""
        if outputs is None:
            return
        folder, case = Path(trainer.default_root_dir), batch["case"]
        module, activation = cast(WeakMedSAM, pl_module), cast(Activation, outputs)
        if self.predicted:
            scans, frame = check_new_scans(trainer.datamodule), batch["frame"]  # type: ignore[attr-defined]
            shape = (len(batch["image"]), len(module.class_names), frame.height, frame.width)
            scores = torch.zeros(shape) if scans.scores else None
            ids = segment_volume(module, activation, batch, self.settings, scores)
            save_segmentation(scans, batch, ids, scores)
            return

        def look(part: VolumeBatch) -> Activation:
            with trainer.precision_plugin.forward_context():
                return module.look_at_volume(part)

        result, row = label_volume(module, activation, batch, self.settings, look)
        if row is not None:
            draw_grid([row], folder / "pictures" / f"{case}.png")
        data = cast(LabelledVolumes, trainer.datamodule)  # type: ignore[attr-defined]
        path = folder / f"{case}.safetensors"
        if path.is_dir():
            put_away(path)
        write_pseudo_label(path, result, Origin(case, self._stamp, data.digest_volume(case)))

    def _is_of(self, path: Path, case: str, data: LabelledVolumes) -> bool:
        """Whether a file is whole, and what this network would make of the case; another one is made again."""
        try:
            return read_origin(path) == Origin(case, self._stamp, data.digest_volume(case))
        except DataError:
            return False

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``quality.csv`` from the files, those of earlier, interrupted runs included."""
        trainer.strategy.barrier()
        if trainer.is_global_zero and not self.predicted:
            write_quality(Path(trainer.default_root_dir), cast(WeakMedSAM, pl_module).class_names)
