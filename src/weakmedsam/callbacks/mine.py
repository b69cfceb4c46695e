"""PAM as a callback: refine activation maps, score them, write pseudo-labels."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from weakmedsam.callbacks.mine_tables import CaseDice, gather_cases, write_cases, write_quality
from weakmedsam.classify import Activation, WeakMedSAM
from weakmedsam.contracts import SliceBatch, VolumeBatch, check_least
from weakmedsam.frames import to_native
from weakmedsam.metrics import VolumeDice, dice_from_counts, overlap_counts
from weakmedsam.pictures import Row, draw_grid
from weakmedsam.pseudo_labels import (
    PseudoLabel,
    agreement,
    read_settings,
    threshold_scores,
    write_pseudo_label,
)
from weakmedsam.refine import Refined, Refinement, refine


class ValidationData(Protocol):
    """What ``PromptAffinityMining`` asks of the data module.

    Attributes:
        has_val_masks: whether validation batches hold ``mask``.
        val_cases: the case of each validation slice, by ``index``.
    """

    has_val_masks: bool
    val_cases: list[str]


class PromptAffinityMining(Callback):
    """Refine class activation maps with the affinity that point prompts reveal.

    In validation it logs the Dice of the activation and of the refined map, gated by the given label, as
    ``val/cam_dice`` and ``val/pam_dice`` (per volume, see docs/metrics.md), with a picture grid; in test
    the same per case to ``cam_cases.csv``; in prediction it writes one pseudo-label file a volume.
    Images are not encoded again. The arguments are those of ``refine.Refinement``, and ``pictures``.

    Args:
        grid: points a side; the paper uses 4.
        affinity: ``per_prompt``, or ``summed`` as published.
        radius: of the neighbourhood, cells of the map; the paper uses 5.
        beta: exponent of the affinity; the paper uses 4.
        contrast: scale of mask differences before the exponent; published: 1.
        steps: of the random walk; the paper uses 4.
        map_size: side of the map that is walked on, cells; the paper uses 64.
        threshold: score above which a pixel belongs to a class; the paper uses 0.5.
        sigma: of the smoothing before the threshold, pixels of the frame.
        pictures: rows of a picture grid.

    Raises:
        ConfigError: an unknown affinity, or a number out of its range.
    """

    def __init__(
        self,
        grid: int = 4,
        affinity: str = "per_prompt",
        radius: float = 5.0,
        beta: float = 4.0,
        contrast: float = 10.0,
        steps: int = 4,
        map_size: int = 64,
        threshold: float = 0.5,
        sigma: float = 1.0,
        pictures: int = 6,
    ) -> None:
        self.settings = Refinement(grid, affinity, radius, beta, contrast, steps, map_size, threshold, sigma)
        check_least("model.pam.pictures", pictures, 1)
        self.pictures = pictures
        self._dice: dict[str, VolumeDice] = {}
        self._rows: dict[str, tuple[int, Row]] = {}
        self._cases: list[CaseDice] = []
        self._stamp: dict[str, object] = {}

    def refine(self, module: WeakMedSAM, activation: Activation, label: Tensor, box: Tensor) -> Refined:
        """Refine B slices with these settings, some at once; label (B, C), box (B, 4)."""
        backbone, chunk = module.backbone, module.slices_per_step
        return refine(backbone, activation.cam, activation.embedding, label, box, self.settings, chunk)

    # Validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the epoch's counts."""
        module = cast(WeakMedSAM, pl_module)
        data = cast(ValidationData, trainer.datamodule)  # type: ignore[attr-defined]
        self._rows.clear()
        if data.has_val_masks and not self._dice:
            self._dice = {
                name: VolumeDice(data.val_cases, len(module.class_names)) for name in ("cam", "pam")
            }
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
        """Refine the slices that have a class; on the others nothing is predicted, with or without PAM."""
        module, activation = cast(WeakMedSAM, pl_module), cast(Activation, outputs)
        if "mask" not in batch:
            return
        labelled = batch["label"].any(dim=1)
        chosen, others = (rows.nonzero().flatten() for rows in (labelled, ~labelled))
        if len(others):  # what lies there below data.min_pixels is missed, as in the test
            for metric in self._dice.values():
                metric.update(
                    torch.zeros_like(batch["mask"][others]), batch["mask"][others], batch["index"][others]
                )
        if not len(chosen):
            return
        refined = self.refine(
            module, _select(activation, chosen), batch["label"][chosen], batch["box"][chosen]
        )
        truth = batch["mask"][chosen]
        before, _ = threshold_scores(refined.before, self.settings.threshold)
        after, _ = threshold_scores(refined.after, self.settings.threshold)
        for name, ids in (("cam", before), ("pam", after)):
            self._dice[name].update(ids, truth, batch["index"][chosen])
        if trainer.is_global_zero:
            for i, row in enumerate(chosen.tolist()):
                case, area = batch["case"][row], int((truth[i] > 0).sum())
                if area > (self._rows[case][0] if case in self._rows else 0):
                    title = f"{case} slice {int(batch['slice'][row])}\n"
                    made = _draw_row(module, title, batch["image"][row, 0], refined, i, after[i], truth[i])
                    self._rows[case] = area, made

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log both Dice and the pictures."""
        module = cast(WeakMedSAM, pl_module)
        for name, metric in self._dice.items():
            # torchmetrics drops the dimension of a single class.
            values = torch.atleast_1d(metric.compute())
            for class_name, value in zip(module.class_names, values, strict=True):
                module.log(f"val/{name}_dice/{class_name}", value)
            module.log(f"val/{name}_dice", values.nanmean(), prog_bar=True)
        if self._rows and not trainer.sanity_checking:
            path = Path(trainer.default_root_dir) / "pictures" / f"epoch_{trainer.current_epoch:03d}.png"
            draw_grid(self._chosen_rows(), path)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("pam", [str(path)])

    def _chosen_rows(self) -> list[Row]:
        cases = sorted(self._rows)
        step = max(1, len(cases) // self.pictures)
        return [self._rows[case][1] for case in cases[::step][: self.pictures]]

    # Test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the table."""
        self._cases.clear()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Dice of a volume, on the scan's own slices, before and after refinement."""
        module, activation = cast(WeakMedSAM, pl_module), cast(Activation, outputs)
        truth, names = batch["mask"], module.class_names
        chosen = batch["label"].any(dim=1).nonzero().flatten()
        empty = torch.ones(len(truth), dtype=torch.bool, device=truth.device)
        empty[chosen] = False
        missed = overlap_counts(torch.zeros_like(truth[empty]), truth[empty], len(names)).sum(0).cpu()
        counts = {"cam": missed, "pam": missed}
        for some in _chunks(chosen, module.slices_per_step):
            refined = self.refine(
                module, _select(activation, some), batch["label"][some], batch["box"].expand(len(some), 4)
            )
            for name, scores in (("cam", refined.before), ("pam", refined.after)):
                ids, _ = threshold_scores(to_native(scores, batch["frame"]), self.settings.threshold)
                counts[name] = counts[name] + overlap_counts(ids, truth[some], len(names)).sum(0).cpu()
        cam, pam = (dice_from_counts(counts[name]).tolist() for name in ("cam", "pam"))
        self._cases += [CaseDice(batch["case"], *row) for row in zip(names, cam, pam, strict=True)]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``cam_cases.csv``; log ``test/cam_dice`` and ``test/pam_dice``."""
        module = cast(WeakMedSAM, pl_module)
        cases = gather_cases(self._cases)
        means = []
        for name in module.class_names:
            dice = [(case.cam_dice, case.pam_dice) for case in cases if case.class_name == name]
            means.append(torch.tensor(dice).view(-1, 2).nanmean(dim=0))
            module.log(f"test/cam_dice/{name}", means[-1][0])
            module.log(f"test/pam_dice/{name}", means[-1][1])
        mean = torch.stack(means).nanmean(dim=0)
        module.log("test/cam_dice", mean[0])
        module.log("test/pam_dice", mean[1])
        if trainer.is_global_zero:
            write_cases(Path(trainer.default_root_dir) / "cam_cases.csv", cases)

    # Pseudo-labels

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the volumes that are done under these settings and by this network."""
        module = cast(WeakMedSAM, pl_module)
        self._stamp = {**asdict(self.settings), "network": _fingerprint(module)}
        folder = Path(trainer.default_root_dir)
        done = (path for path in folder.glob("*.safetensors") if read_settings(path) == self._stamp)
        module.finished_cases = {path.stem for path in done}

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
        result, row = self._label_volume(cast(WeakMedSAM, pl_module), cast(Activation, outputs), batch)
        if row is not None:
            draw_grid([row], folder / "pictures" / f"{case}.png")
        write_pseudo_label(folder / f"{case}.safetensors", result, self._stamp)

    def _label_volume(
        self, module: WeakMedSAM, activation: Activation, batch: VolumeBatch
    ) -> tuple[PseudoLabel, Row | None]:
        """Pseudo-labels of all slices, and the picture's row; none for a volume without a class."""
        size, label, threshold = module.backbone.image_size, batch["label"], self.settings.threshold
        result = PseudoLabel(
            torch.zeros(len(label), size, size, dtype=torch.uint8),
            torch.ones(len(label), size, size),
            torch.full(label.shape, torch.nan),
        )
        shown: Row | None = None
        largest = -1
        for some in _chunks(label.any(dim=1).nonzero().flatten(), module.slices_per_step):
            refined = self.refine(
                module, _select(activation, some), label[some], batch["box"].expand(len(some), 4)
            )
            after, confidence = threshold_scores(refined.after, threshold)
            before, _ = threshold_scores(refined.before, threshold)
            rows = some.cpu()
            result.label[rows], result.confidence[rows] = after.cpu(), confidence.cpu()
            result.quality[rows] = agreement(before, after, label[some]).cpu()
            areas = (after > 0).flatten(1).sum(1)
            best = int(areas.argmax())
            if int(areas[best]) > largest:
                z, largest = int(some[best]), int(areas[best])
                title, image = f"{batch['case']} slice {z}\n", batch["image"][z, 0]
                shown = _draw_row(module, title, image, refined, best, after[best], None)
        return result, shown

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``quality.csv`` from the files, those of earlier, interrupted runs included."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            write_quality(Path(trainer.default_root_dir), cast(WeakMedSAM, pl_module).class_names)


def _select(activation: Activation, rows: Tensor) -> Activation:
    return Activation(*(part[rows] for part in activation))


def _chunks(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """``rows.split(size)``, which gives one empty chunk for no rows; here it gives none."""
    return rows.split(size) if len(rows) else ()


def _draw_row(
    module: WeakMedSAM,
    title: str,
    image: Tensor,
    refined: Refined,
    i: int,
    after: Tensor,
    mask: Tensor | None,
) -> Row:
    """Row of slice ``i`` of ``refined``; shows the class with the highest score in it."""
    c = int(refined.after[i].flatten(1).sum(1).argmax())
    return Row(
        title + module.class_names[c],
        image=image.float().cpu().numpy(),
        cam=refined.cam[i, c].float().cpu().numpy(),
        affinity=refined.affinity[i].float().cpu().numpy(),
        refined=refined.walked[i, c].float().cpu().numpy(),
        pseudo_label=after.to(torch.uint8).cpu().numpy(),
        mask=None if mask is None else mask.to(torch.uint8).cpu().numpy(),
    )


def _fingerprint(module: WeakMedSAM) -> str:
    """Short hash of the network's weights: pseudo-labels of another network are not its own."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
