"""What PAM starts from, kept on disk, so that its settings can be tried without encoding again.

A folder of parts, each a safetensors file of some validation slices, beside ``features.json``. Prompt
masks are kept as uint8 on the map that is walked on, for each grid that may be asked for: 64 KB a slice at
4 x 4 prompts and 64 cells.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weakmedsam.backbones.base import Backbone, Encoded
from weakmedsam.errors import DataError
from weakmedsam.metrics.overlap_surface import VolumeDice
from weakmedsam.pam.affinity import grid_points
from weakmedsam.pam.refiner import PamBatch, Refinement, refine
from weakmedsam.pam.thresholding import threshold_scores
from weakmedsam.system.atomic_io import replacing, write_whole
from weakmedsam.system.commands import command
from weakmedsam.system.json_files import read_object

HEAD = "features.json"
PROMPTS = "prompts."
DROPS = "drops."
STORED = (
    *("affinity.kind", "walk.map_size", "prompts.placement", "prompts.content_share", "prompts.peaks"),
    *("prompts.min_quality", "prompts.weigh_by_quality"),
)
"""Settings of PAM that decide the stored prompt masks: they cannot be swept on one store."""


@dataclass(frozen=True)
class Head:
    """What all parts of a store share.

    Attributes:
        class_names: C names, id 1 first.
        cases: the case of each validation slice, by ``index``.
        image_size: side of the working frame, pixels.
        settings: PAM's, with which the prompt masks were made; sweeps vary those not in ``STORED``.
        grids: prompts a side of each grid whose masks are stored.
    """

    class_names: list[str]
    cases: list[str]
    image_size: int
    settings: dict[str, float | int | str | None]
    grids: list[int]


class Part(NamedTuple):
    """B validation slices, L of them with a class.

    Attributes:
        rows: (B,) int64, row of each slice within its split, the batch's ``index``.
        mask: (B, S, S) uint8 expert class ids.
        labelled: (L,) int64, rows of the slices that have a class; the following are theirs.
        cam: (L, C, h, w) float32 in [0, 1], class activation.
        prompts: by prompts a side g: (L, g * g, s, s) uint8, masks of the prompts, 255 = inside.
        drops: by prompts a side g: (L, C, g * g) float32, drops of the class logits (``occlusion.logit_drops``); none
            where the run's ``occlusion.weight`` was 0.
        label: (L, C) uint8, image-level label.
        box: (L, 4) int64, where the scan lies in the frame.
        image: (L, 1, S, S) uint8, 255 = 1, for affinities that look at grey values.
    """

    rows: Tensor
    mask: Tensor
    labelled: Tensor
    cam: Tensor
    prompts: dict[int, Tensor]
    drops: dict[int, Tensor]
    label: Tensor
    box: Tensor
    image: Tensor


class StoredPrompts(Backbone):
    """Answers the points of a grid from a part's stored masks; stands in for a network in ``refine``.

    Args:
        prompts: (L, g * g, s, s) uint8.
        image_size: side of the working frame, pixels.
    """

    name = "stored"
    feature_dim = 0

    def __init__(self, prompts: Tensor, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.prompts = prompts
        self.points = grid_points(math.isqrt(prompts.shape[1]), image_size)

    def stand_ins(self) -> Tensor:
        """(L, 1, 1, 1), what stands in for the embedding: which masks are a slice's."""
        return torch.arange(len(self.prompts)).view(-1, 1, 1, 1)

    def encode(self, image: Tensor) -> Encoded:
        """There is no encoder here.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("prompt masks are stored; there is no image to encode")

    def masks_at_points(self, embedding: Tensor, points: Tensor) -> Tensor:
        """(B, P, s, s) logits at P points of the grid, of the slices whose rows ``embedding`` holds.

        Raises:
            DataError: a point that is not of the grid.
        """
        apart = torch.cdist(points, self.points, compute_mode="donot_use_mm_for_euclid_dist")
        if len(points) and float(apart.amin(dim=1).max()) > 0.01:  # pixels
            side = math.isqrt(len(self.points))
            raise DataError(f"masks of a grid of {side} x {side} prompts are stored; others are asked for")
        chosen = self.prompts[embedding.flatten()[:, None], apart.argmin(dim=1)]
        # 0 and 255 stand for the outermost half steps, whose logits are finite.
        return chosen.float().div(255).clamp(1 / 1020, 1 - 1 / 1020).logit()

    def set_trainable(self, policy: str) -> None:
        """Nothing can be trained."""


WRITTEN_ANEW = f"`{command('sweep', sweep='pam')}` notices that and writes it anew"


def write_head(folder: Path, head: Head) -> None:
    """Write ``features.json``, whole or not at all."""
    write_whole(folder / HEAD, json.dumps(asdict(head), indent=1) + "\n")


def write_part(folder: Path, part: Part) -> None:
    """Write a part, whole or not at all, named by its first slice."""
    tensors = {name: value for name, value in part._asdict().items() if name not in ("prompts", "drops")}
    tensors |= {f"{PROMPTS}{side}": masks for side, masks in part.prompts.items()}
    tensors |= {f"{DROPS}{side}": drops for side, drops in part.drops.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(folder / f"{int(part.rows[0]):07d}.safetensors") as path:
        save_file(tensors, path)


def read_head(folder: Path) -> Head:
    """What the parts of a store share.

    Raises:
        DataError: there is no store.
    """
    path = folder / HEAD
    if not path.is_file():
        raise DataError(f"{path}: there are no stored features; `{command('sweep', sweep='pam')}` writes them first")
    try:
        return Head(**read_object(path))
    except (DataError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): {WRITTEN_ANEW}") from error


def read_parts(folder: Path) -> Iterator[Part]:
    """The parts of a store, one at a time, in order of their slices."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors = load_file(path)
            part = Part(prompts=_by_side(tensors, PROMPTS), drops=_by_side(tensors, DROPS), **tensors)
        except (OSError, SafetensorError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}): {WRITTEN_ANEW}") from error
        yield part


def _by_side(tensors: dict[str, Tensor], prefix: str) -> dict[int, Tensor]:
    names = [name for name in tensors if name.startswith(prefix)]
    return {int(name.removeprefix(prefix)): tensors.pop(name) for name in names}


@torch.no_grad()
def score_setting(folder: Path, changes: Mapping[str, float | int | str], chunk: int = 16) -> dict[str, float]:
    """Dice of the maps that PAM makes of stored features with other settings.

    Args:
        folder: of the store.
        changes: settings of ``Refinement`` that differ from the stored ones.
        chunk: slices refined at once; bounds memory, changes nothing else.

    Returns:
        ``val/pam_dice`` and ``val/cam_dice``, and the same with ``/<class>``, as the classification stage
        logs them, but for the half steps that uint8 takes from the prompts' masks.

    Raises:
        ConfigError: a setting out of its range.
        DataError: no store, or a setting that decides what is stored.
    """
    head = read_head(folder)
    fixed = [name for name in changes if name in STORED]
    if fixed:
        raise DataError(f"model.pam.{fixed[0]} decides what is stored in {folder}; it cannot be swept there")
    settings = Refinement().changed({**head.settings, **changes})
    if settings.prompts.grid not in head.grids:
        raise DataError(
            f"model.pam.prompts.grid: {settings.prompts.grid} is not stored in {folder}, {head.grids} are; name it "
            "in KeepFeatures's grids, in experiments/features.yaml"
        )
    if settings.occlusion.weight > 0 and not head.settings.get("occlusion.weight"):
        raise DataError(
            f"model.pam.occlusion.weight: {folder} was written with weight 0, so it does not hold the drops of the "
            "class logit; write it anew with a value above 0"
        )
    dice = {name: VolumeDice(head.cases, len(head.class_names)) for name in ("cam", "pam")}
    for part in read_parts(folder):
        found = {name: torch.zeros_like(part.mask) for name in dice}
        if len(part.labelled):
            stored = StoredPrompts(part.prompts[settings.prompts.grid], head.image_size)
            image = part.image.float() / 255
            slices = PamBatch(image, part.cam, stored.stand_ins(), part.label.float(), part.box)
            refined = refine(stored, slices, settings, chunk, partial(_stored_drops, part, settings.prompts.grid))
            found["cam"][part.labelled], _ = threshold_scores(refined.before, settings.threshold.value)
            found["pam"][part.labelled], _ = threshold_scores(refined.after, settings.threshold.value)
        for name, metric in dice.items():
            metric.update(found[name], part.mask.long(), part.rows)
    return _figures({name: torch.atleast_1d(m.compute()) for name, m in dice.items()}, head.class_names)


def _stored_drops(part: Part, side: int, some: PamBatch, masks: Tensor) -> Tensor:
    assert some.embedding is not None
    return part.drops[side][some.embedding.flatten()]


def _figures(dice: Mapping[str, Tensor], class_names: list[str]) -> dict[str, float]:
    """Names as they are logged: the mean over classes, then each class."""
    figures = {}
    for name, values in dice.items():
        figures[f"val/{name}_dice"] = float(values.nanmean())
        figures |= {f"val/{name}_dice/{c}": float(v) for c, v in zip(class_names, values, strict=True)}
    return figures
