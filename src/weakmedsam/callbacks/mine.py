"""PAM as a callback: refine activation maps, score them, write pseudo-labels."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from weakmedsam.affinity import (
    AFFINITIES,
    border_map,
    edge_weights,
    grid_points,
    half_disc,
    prompt_maps,
    random_walk,
)
from weakmedsam.classify import Activation
from weakmedsam.contracts import ConfigError, SliceBatch, VolumeBatch
from weakmedsam.frames import to_native
from weakmedsam.metrics import VolumeDice, dice_from_counts, overlap_counts
from weakmedsam.pictures import Row, draw_grid
from weakmedsam.pseudo_labels import (
    PseudoLabel,
    agreement,
    gated_scores,
    read_quality,
    read_settings,
    threshold_scores,
    write_pseudo_label,
)


class Refined(NamedTuple):
    """PAM's result for B slices.

    Attributes:
        affinity: (B, s, s) in [0, 1], a picture of the affinity.
        walked: (B, C, s, s) in [0, 1], activation after the random walk.
        before: (B, C, S, S) gated scores of the activation as it was.
        after: (B, C, S, S) gated scores after the walk.
    """

    affinity: Tensor
    walked: Tensor
    before: Tensor
    after: Tensor


class PromptAffinityMining(Callback):
    """Refine class activation maps with the affinity that point prompts reveal.

    In validation it logs the Dice of the activation and of the refined map, gated by the given label, as
    ``val/cam_dice`` and ``val/pam_dice`` (per volume, see docs/metrics.md), with a picture grid; in test
    the same per case to ``cam_cases.csv``; in prediction it writes one pseudo-label file a volume.
    Images are not encoded again.

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
        ConfigError: an unknown affinity.
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
        if affinity not in AFFINITIES:
            raise ConfigError(
                f"model.pam.affinity: {affinity!r} is unknown; choose one of {', '.join(AFFINITIES)}"
            )
        self.grid = grid
        self.affinity = affinity
        self.offsets = half_disc(radius)
        self.beta = beta
        self.contrast = contrast
        self.steps = steps
        self.map_size = map_size
        self.threshold = threshold
        self.sigma = sigma
        self.pictures = pictures
        self.settings = {
            "grid": grid, "affinity": affinity, "radius": radius, "beta": beta, "contrast": contrast,
            "steps": steps, "map_size": map_size, "threshold": threshold, "sigma": sigma,
        }  # fmt: skip
        self._dice: dict[str, VolumeDice] = {}
        self._rows: dict[str, tuple[int, Row]] = {}
        self._cases: list[dict[str, object]] = []
        self._fingerprint = ""

    @torch.no_grad()
    def refine(self, module: LightningModule, activation: Activation, label: Tensor) -> Refined:
        """Mine the affinity of slices and walk their activation along it.

        Args:
            module: the ``WeakMedSAM`` module.
            activation: of B slices.
            label: (B, C) image-level label; an absent class gets an empty map.
        """
        size = module.backbone.image_size
        points = grid_points(self.grid, size).to(activation.cam.device)
        parts = []
        step = module.slices_per_step
        for cam, embedding, present in zip(
            activation.cam.split(step), activation.embedding.split(step), label.split(step), strict=True
        ):
            maps = prompt_maps(
                module.backbone.masks_at_points(embedding, points), self.map_size, self.affinity
            )
            weights = edge_weights(maps, self.offsets, self.beta, self.contrast)
            start = torch.nn.functional.interpolate(cam.float(), size=(self.map_size,) * 2, mode="bilinear")
            walked = random_walk(start, weights, self.offsets, self.steps)
            before = gated_scores(cam, present, size, self.sigma)
            after = gated_scores(walked, present, size, self.sigma)
            parts.append(Refined(border_map(weights, self.offsets), walked, before, after))
        return Refined(*(torch.cat(column) for column in zip(*parts, strict=True)))

    # Validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the epoch's counts."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._rows.clear()
        if data.has_val_masks and not self._dice:
            self._dice = {
                name: VolumeDice(data.val_cases, len(pl_module.class_names)) for name in ("cam", "pam")
            }
        for metric in self._dice.values():
            metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: SliceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refine the slices that have a class; on the others nothing is predicted, with or without PAM."""
        chosen = batch["label"].any(dim=1).nonzero().flatten()
        if "mask" not in batch or not len(chosen):
            return
        refined = self.refine(
            pl_module, Activation(*(part[chosen] for part in outputs)), batch["label"][chosen]
        )
        truth = batch["mask"][chosen]
        after = torch.zeros_like(truth)
        for name, scores in (("cam", refined.before), ("pam", refined.after)):
            after = threshold_scores(scores, self.threshold)[0]
            self._dice[name].update(after, truth, batch["index"][chosen])
        if trainer.is_global_zero:
            for i, row in enumerate(chosen.tolist()):
                self._remember(pl_module, batch, row, outputs.cam[row], refined, i, after[i])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log both Dice and the pictures."""
        for name, metric in self._dice.items():
            values = metric.compute()
            for class_name, value in zip(pl_module.class_names, values, strict=True):
                pl_module.log(f"val/{name}_dice/{class_name}", value)
            pl_module.log(f"val/{name}_dice", values.nanmean(), prog_bar=True)
        if self._rows and not trainer.sanity_checking:
            path = Path(trainer.default_root_dir) / "pictures" / f"epoch_{trainer.current_epoch:03d}.png"
            draw_grid(self._chosen_rows(), path)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("pam", [str(path)])

    # Test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the table."""
        self._cases.clear()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Activation,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Dice of a volume, on the scan's own slices, before and after refinement."""
        chosen = batch["label"].any(dim=1).nonzero().flatten()
        counts = {
            name: torch.zeros(len(pl_module.class_names), 3, dtype=torch.int64) for name in ("cam", "pam")
        }
        truth = batch["mask"]
        for some in _chunks(chosen, pl_module.slices_per_step):
            refined = self.refine(
                pl_module, Activation(*(part[some] for part in outputs)), batch["label"][some]
            )
            for name, scores in (("cam", refined.before), ("pam", refined.after)):
                label = threshold_scores(to_native(scores, batch["frame"]), self.threshold)[0]
                counts[name] += overlap_counts(label, truth[some], len(pl_module.class_names)).sum(0).cpu()
        empty = torch.ones(len(truth), dtype=torch.bool)
        empty[chosen.cpu()] = False
        rest = truth[empty.to(truth.device)]
        missed = overlap_counts(torch.zeros_like(rest), rest, len(pl_module.class_names)).sum(0).cpu()
        dice = {name: dice_from_counts(count + missed) for name, count in counts.items()}
        for c, name in enumerate(pl_module.class_names):
            row = {
                "case": batch["case"],
                "class": name,
                "cam_dice": float(dice["cam"][c]),
                "pam_dice": float(dice["pam"][c]),
            }
            self._cases.append(row)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``cam_cases.csv``; log ``test/cam_dice`` and ``test/pam_dice``."""
        gathered: list[Any] = [self._cases]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self._cases)
        rows = sorted(
            {(r["case"], r["class"]): r for part in gathered for r in part}.values(),
            key=lambda r: (r["case"], r["class"]),
        )
        for column in ("cam_dice", "pam_dice"):
            means = []
            for name in pl_module.class_names:
                values = torch.tensor([r[column] for r in rows if r["class"] == name])
                means.append(values.nanmean())
                pl_module.log(f"test/{column}/{name}", means[-1])
            pl_module.log(f"test/{column}", torch.stack(means).nanmean())
        if trainer.is_global_zero:
            _write_table(Path(trainer.default_root_dir) / "cam_cases.csv", rows)

    # Pseudo-labels

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the volumes that are done under these settings and by this network."""
        self._fingerprint = _fingerprint(pl_module)
        wanted = {**self.settings, "network": self._fingerprint}
        folder = Path(trainer.default_root_dir)
        done = (path for path in folder.glob("*.safetensors") if read_settings(path) == wanted)
        pl_module.finished_cases = {path.stem for path in done}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Activation | None,
        batch: VolumeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the volume's file, and a picture of its slice of the most refined pixels."""
        if outputs is None:
            return
        size, label = pl_module.backbone.image_size, batch["label"]
        result = PseudoLabel(
            torch.zeros(len(label), size, size, dtype=torch.uint8),
            torch.ones(len(label), size, size),
            torch.full(label.shape, torch.nan),
        )
        shown: tuple[int, Row] | None = None
        for some in _chunks(label.any(dim=1).nonzero().flatten(), pl_module.slices_per_step):
            refined = self.refine(pl_module, Activation(*(part[some] for part in outputs)), label[some])
            after, confidence = threshold_scores(refined.after, self.threshold)
            before, _ = threshold_scores(refined.before, self.threshold)
            rows = some.cpu()
            result.label[rows], result.confidence[rows] = after.cpu(), confidence.cpu()
            result.quality[rows] = agreement(before, after, label[some]).cpu()
            best = int((after > 0).flatten(1).sum(1).argmax())
            area = int((after[best] > 0).sum())
            if shown is None or area > shown[0]:
                title = f"{batch['case']} slice {int(some[best])}"
                row = self._row(
                    pl_module,
                    title,
                    batch["image"][some[best], 0],
                    outputs.cam[some[best]],
                    refined,
                    best,
                    after[best],
                    None,
                )
                shown = area, row
        folder = Path(trainer.default_root_dir)
        if shown is not None:
            draw_grid([shown[1]], folder / "pictures" / f"{batch['case']}.png")
        write_pseudo_label(
            folder / f"{batch['case']}.safetensors", result, {**self.settings, "network": self._fingerprint}
        )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``quality.csv`` from the files, those of earlier, interrupted runs included."""
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        folder, rows = Path(trainer.default_root_dir), []
        for path in sorted(folder.glob("*.safetensors")):
            quality = read_quality(path)
            for c, name in enumerate(pl_module.class_names):
                values = torch.from_numpy(quality[:, c])
                slices = int((~values.isnan()).sum())
                rows.append(
                    {"case": path.stem, "class": name, "slices": slices, "quality": float(values.nanmean())}
                )
        _write_table(folder / "quality.csv", rows)

    # Pictures

    def _remember(
        self,
        module: LightningModule,
        batch: SliceBatch,
        row: int,
        cam: Tensor,
        refined: Refined,
        i: int,
        after: Tensor,
    ) -> None:
        """Keep the slice with the largest mask of each case."""
        case, area = batch["case"][row], int((batch["mask"][row] > 0).sum())
        if area > self._rows.get(case, (0, None))[0]:
            title = f"{case} slice {int(batch['slice'][row])}"
            made = self._row(
                module, title, batch["image"][row, 0], cam, refined, i, after, batch["mask"][row]
            )
            self._rows[case] = area, made

    def _row(
        self,
        module: LightningModule,
        title: str,
        image: Tensor,
        cam: Tensor,
        refined: Refined,
        i: int,
        after: Tensor,
        mask: Tensor | None,
    ) -> Row:
        """Pictures show the class with the highest score in the slice."""
        c = int(refined.after[i].flatten(1).sum(1).argmax())
        panels = [
            panel.float().cpu().numpy()
            for panel in (image, cam[c], refined.affinity[i], refined.walked[i, c])
        ]
        ids = after.to(torch.uint8).cpu().numpy()
        truth = None if mask is None else mask.to(torch.uint8).cpu().numpy()
        return Row(f"{title}\n{module.class_names[c]}", *panels, ids, truth)

    def _chosen_rows(self) -> list[Row]:
        cases = sorted(self._rows)
        step = max(1, len(cases) // self.pictures)
        return [self._rows[case][1] for case in cases[::step][: self.pictures]]


def _chunks(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """``rows.split(size)``, which gives one empty chunk for no rows; here it gives none."""
    return rows.split(size) if len(rows) else ()


def _fingerprint(module: LightningModule) -> str:
    """Short hash of the network's weights: pseudo-labels of another network are not its own."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["case", "class"])
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
