"""Random augmentation of whole batches, on their device: drawing apart from applying.

The geometry never moves a pixel of the frame out of the frame, so an image-level label stays true.
What is drawn for a slice depends on (seed, epoch, index) only: not on the batch, worker or a resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from weakmedsam.contracts import IGNORE, SliceBatch
from weakmedsam.errors import check_range


@dataclass(frozen=True)
class Augmentation:
    """Ranges of random augmentation; the defaults change nothing.

    Attributes:
        flip_columns: probability of a left-right mirror, 0 to 1. Where left and right differ (liver,
            heart), 0.
        flip_rows: probability of an up-down mirror, 0 to 1.
        rotation: largest angle either way, degrees, 0 to 180. The image shrinks so that its corners stay inside.
        shrink: smallest scale, beyond what the rotation takes; 1 for none. Never enlarges: that would
            push the border, and with it perhaps the target, out.
        translation: largest shift either way, as part of the room that rotation and shrinking leave.
        gamma: largest |log2| of the exponent of intensities, 0 to 10.
        brightness: largest addition either way, intensities being in [0, 1]; 0 to 1.
        contrast: largest relative change of the distance from the slice's mean, 0 to 1.
        noise: largest standard deviation of Gaussian noise, 0 to 1.

    Raises:
        ConfigError: a value out of its range.
    """

    flip_columns: float = 0.0
    flip_rows: float = 0.0
    rotation: float = 0.0
    shrink: float = 1.0
    translation: float = 0.0
    gamma: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip_columns", "flip_rows", "translation", "brightness", "contrast", "noise"):
            check_range(f"data.augment.{name}", getattr(self, name), 0, 1)
        check_range("data.augment.rotation", self.rotation, 0, 180)
        check_range("data.augment.gamma", self.gamma, 0, 10)
        check_range("data.augment.shrink", self.shrink, 0, 1, above=True)


@dataclass(frozen=True)
class Draws:
    """What was drawn for each of B slices.

    Attributes:
        to_source: (B, 2, 3) float32, place in the result -> place in the slice, both (x, y) in [-1, 1]
            over the frame's pixel edges: the form that ``affine_grid`` takes.
        gamma: (B,) exponent.
        brightness: (B,) addition.
        contrast: (B,) factor.
        noise: (B,) standard deviation.
        noise_seeds: B seeds of the noise.
    """

    to_source: Tensor
    gamma: Tensor
    brightness: Tensor
    contrast: Tensor
    noise: Tensor
    noise_seeds: tuple[int, ...]


def draw_parameters(ranges: Augmentation, seed: int, epoch: int, indices: NDArray[np.int64]) -> Draws:
    """Draw the parameters of some slices.

    Args:
        ranges: what is possible.
        seed: of the run.
        epoch: number of the epoch.
        indices: (B,) the slices' ``index``.

    Returns:
        One draw per slice; the same for the same (seed, epoch, index).
    """
    streams = [np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, int(i))))) for i in indices]
    unit = np.stack([stream.random(10) for stream in streams])
    noise_seeds = tuple(int(stream.integers(2**62)) for stream in streams)
    either_way = 2 * unit - 1
    flips = np.where(unit[:, :2] < (ranges.flip_columns, ranges.flip_rows), -1.0, 1.0)
    angle = np.deg2rad(ranges.rotation) * either_way[:, 2]
    # A unit square turned by the angle reaches this far along each axis:
    reach = np.abs(np.cos(angle)) + np.abs(np.sin(angle))
    scale = (ranges.shrink + (1 - ranges.shrink) * unit[:, 3]) / reach
    room = 1 - scale * reach
    shift = ranges.translation * room[:, None] * either_way[:, 4:6]
    return Draws(
        to_source=torch.from_numpy(_invert(flips, angle, scale, shift).astype(np.float32)),
        gamma=torch.from_numpy(2 ** (ranges.gamma * either_way[:, 6])).float(),
        brightness=torch.from_numpy(ranges.brightness * either_way[:, 7]).float(),
        contrast=torch.from_numpy(1 + ranges.contrast * either_way[:, 8]).float(),
        noise=torch.from_numpy(ranges.noise * unit[:, 9]).float(),
        noise_seeds=noise_seeds,
    )


def _invert(
    flips: NDArray[np.float64],
    angle: NDArray[np.float64],
    scale: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(B, 2, 3) inverse of place -> scale * rotation @ (flips * place) + shift."""
    cosine, sine = np.cos(angle), np.sin(angle)
    turn_back = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], 1)
    linear = flips[:, :, None] * turn_back / scale[:, None, None]
    return np.concatenate([linear, -linear @ shift[:, :, None]], axis=2)


def sampling_grid(draws: Draws, size: int, device: torch.device | None = None) -> Tensor:
    """Where in the slice each pixel of the result comes from, as ``grid_sample`` takes it.

    ``affine_grid`` multiplies a matrix with every place, and that was more than half of the geometry's time on a
    processor. Rows and columns enter an affine map apart: one sum is enough.

    Args:
        draws: B draws.
        size: S, side of the frame, pixels.
        device: where to; the processor by default.

    Returns:
        (B, S, S, 2) float32, (x, y) in [-1, 1] over the frame's pixel edges. All x lie together in memory, then
        all y.
    """
    matrix = draws.to_source.to(device or torch.device("cpu"))
    centres = torch.linspace(-1, 1, size, device=matrix.device) * ((size - 1) / size)
    of_x, of_y, shift = matrix[..., None].unbind(dim=2)  # each (B, 2, 1)
    columns, rows = of_x * centres + shift, of_y * centres  # (B, 2, S)
    return (columns[:, :, None] + rows[..., None]).permute(0, 2, 3, 1)


def apply_geometry(values: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Move slices as drawn; 0 where nothing of the slice lies.

    Args:
        values: (B, N, S, S) float32.
        grid: (B, S, S, 2) of ``sampling_grid``.
        mode: "bilinear" or "nearest".
    """
    return F.grid_sample(values, grid, mode=mode, padding_mode="zeros", align_corners=False)


def inside(box: Tensor, grid: Tensor) -> Tensor:
    """(B, 1, S, S) bool, which pixels of the result come from within each slice's box (B, 4)."""
    top, bottom, left, right = (box.float() * (2 / grid.shape[1]) - 1)[:, None, :, None, None].unbind(dim=2)
    x, y = grid[:, None].unbind(dim=-1)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def apply_intensity(image: Tensor, draws: Draws) -> Tensor:
    """Change intensities as drawn.

    Args:
        image: (B, 1, H, W) float32 in [0, 1].
        draws: B draws.

    Returns:
        (B, 1, H, W) float32 in [0, 1].
    """
    gamma, brightness, contrast = (
        part.to(image.device)[:, None, None, None] for part in (draws.gamma, draws.brightness, draws.contrast)
    )
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    # In place: on processors each further array of the batch costs as much as the sum itself.
    changed = (image * contrast).add_(mean - mean * contrast + brightness).clamp_(0, 1)
    changed.log2_().mul_(gamma).exp2_()  # ``** gamma``, twice as fast; 0 stays 0
    if bool((draws.noise > 0).any()):
        changed += _noise(changed, draws)
    return changed.clamp_(0, 1)


def _noise(like: Tensor, draws: Draws) -> Tensor:
    # One generator a slice: from one for the batch, the noise would depend on the slice's neighbours.
    noise = torch.empty_like(like)
    for field, deviation, seed in zip(noise, draws.noise.tolist(), draws.noise_seeds, strict=True):
        field.normal_(0, deviation, generator=torch.Generator(device=like.device).manual_seed(seed))
    return noise


def augment_batch(batch: SliceBatch, ranges: Augmentation, seed: int, epoch: int) -> SliceBatch:
    """Augment a training batch; its target and confidence move with the image.

    Args:
        batch: with ``image`` and ``index``, and perhaps ``target`` and ``confidence``.
        ranges: what is possible.
        seed: of the run.
        epoch: number of the epoch.

    Returns:
        A new batch with ``scan``. Where nothing of the slice lies, ``target`` is ``IGNORE`` and
        ``confidence`` 0.
    """
    draws = draw_parameters(ranges, seed, epoch, batch["index"].cpu().numpy())
    image = batch["image"]
    grid = sampling_grid(draws, image.shape[-1], image.device)
    changed = SliceBatch(**batch)
    changed["image"] = apply_intensity(apply_geometry(image, grid, "bilinear"), draws)
    if "box" in batch:
        changed["scan"] = inside(batch["box"].to(image.device), grid)
    if "target" in batch:
        # Ids are raised by one, so that the 0 from outside is told from background.
        both = torch.stack([(batch["target"] + 1).float(), batch["confidence"]], dim=1)
        raised, confidence = apply_geometry(both, grid, "nearest").unbind(dim=1)
        raised = raised.round().long()
        changed["target"] = torch.where(raised == 0, IGNORE, raised - 1)
        changed["confidence"] = confidence
    return changed
