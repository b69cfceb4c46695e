"""Draws images that a promptable network can learn "the thing a point touches" from.

Overlapping, deformed, nested shapes with textures, soft borders, noise and a bias field: what scans
have in common, and nothing taken from any of them. Drawn in batches with torch; every scene follows
from its seed alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Generator, Tensor

SHAPES = 14
"""Shapes drawn per scene: one body, then organs, parts within organs, and small lesions."""

ORGANS, PARTS = 6, 5
SMALLEST_REGION = 40
"""Pixels; a smaller visible region is not asked for."""

VISIBLE = 0.15
"""Least difference of mean intensity, of a range of about 1, between regions that lie side by side."""


class Scenes(NamedTuple):
    """A batch of drawn images.

    Attributes:
        image: (B, 1, S, S) float32 in [0, 1].
        region: (B, S, S) int64, the topmost shape at each pixel, 0 = background.
        parent: (B, SHAPES + 1) int64, the region each region is a part of, 0 = of none.
    """

    image: Tensor
    region: Tensor
    parent: Tensor


class ScenePrompts(NamedTuple):
    """Questions about a batch of scenes, and their answers.

    Attributes:
        image: (B, 1, S, S) float32 in [0, 1].
        points: (B, P, 2) float32, (x, y) pixels.
        masks: (B, P, S, S) float32 in {0, 1}: the connected region under each point.
        pieces: (B, S, S) int64, a number of its own for each connected piece of a visible region, from 1.
    """

    image: Tensor
    points: Tensor
    masks: Tensor
    pieces: Tensor


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _smooth_noise(generator: Generator, batch: int, channels: int, cells: int, size: int) -> Tensor:
    """(B, channels, S, S) standard normal noise whose grain is about ``size / cells`` pixels."""
    coarse = torch.randn(batch, channels, cells, cells, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)


def _layout(generator: Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (B, N, 2), radii (B, N, 2) in half-frames, and parents (B, N + 1) of all shapes."""
    body = _uniform(generator, -0.15, 0.15, batch, 1, 2), _uniform(generator, 0.55, 1.05, batch, 1, 2)
    lesions = SHAPES - 1 - ORGANS - PARTS
    organ_radius = _uniform(generator, 0.12, 0.42, batch, ORGANS, 1) * _uniform(generator, 0.55, 1.2, batch, ORGANS, 2)
    organ_centre = _uniform(generator, -0.75, 0.75, batch, ORGANS, 2)
    owner = torch.randint(0, ORGANS, (batch, PARTS), generator=generator)
    inside = owner[..., None].expand(-1, -1, 2)
    shrink = _uniform(generator, 0.3, 0.8, batch, PARTS, 1)
    # A part shrunk about its organ's own centre leaves a wall around it, as in the heart or the gut.
    offset = _uniform(generator, -0.5, 0.5, batch, PARTS, 2) * (_uniform(generator, 0, 1, batch, PARTS, 1) > 0.4)
    part_radius = organ_radius.gather(1, inside) * shrink
    part_centre = organ_centre.gather(1, inside) + offset * organ_radius.gather(1, inside)
    lesion_radius = _uniform(generator, 0.07, 0.2, batch, lesions, 1) * _uniform(generator, 0.6, 1.2, batch, lesions, 2)
    lesion_centre = _uniform(generator, -0.8, 0.8, batch, lesions, 2)
    centre = torch.cat([body[0], organ_centre, part_centre, lesion_centre], dim=1)
    radius = torch.cat([body[1], organ_radius, part_radius, lesion_radius], dim=1)
    parent = torch.zeros(batch, SHAPES + 1, dtype=torch.int64)
    parent[:, 2 + ORGANS : 2 + ORGANS + PARTS] = owner + 2
    return centre, radius, parent


def _inside(generator: Generator, centre: Tensor, radius: Tensor, size: int) -> Tensor:
    """(B, N, S, S) bool: star-shaped outlines with random harmonics on a smoothly warped plane."""
    batch, shapes = centre.shape[:2]
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))
    warp = _smooth_noise(generator, batch, 2, 6, size) * _uniform(generator, 0.0, 0.09, batch, 1, 1, 1)
    local = (plane + warp)[:, None] - centre[..., None, None]
    angle = _uniform(generator, 0, 2 * torch.pi, batch, shapes, 1, 1)
    cos, sin = angle.cos(), angle.sin()
    x = (cos * local[:, :, 0] + sin * local[:, :, 1]) / radius[..., 0, None, None]
    y = (cos * local[:, :, 1] - sin * local[:, :, 0]) / radius[..., 1, None, None]
    rho = (x * x + y * y).sqrt().clamp_min(1e-6)
    unit = torch.complex(x / rho, y / rho)
    outline, power = torch.ones_like(rho), unit
    for harmonic in range(2, 6):
        power = power * unit
        weight = torch.randn(batch, shapes, 1, 1, 2, generator=generator) * 0.16 / harmonic
        outline = outline + power.real * weight[..., 0] + power.imag * weight[..., 1]
    return rho < outline


def _paint(generator: Generator, inside: Tensor, parent: Tensor) -> Tensor:
    """(B, S, S) topmost region; a part stays within its organ; some shapes are left out at random."""
    batch, shapes = inside.shape[:2]
    kept = torch.rand(batch, shapes, generator=generator) < torch.tensor([0.8] + [0.75] * (shapes - 1))
    region = torch.zeros(inside.shape[0], *inside.shape[2:], dtype=torch.int64)
    for shape in range(shapes):
        here = inside[:, shape] & kept[:, shape, None, None]
        if shape > ORGANS and shape <= ORGANS + PARTS:
            here &= region == parent[:, shape + 1, None, None]
        region = torch.where(here, shape + 1, region)
    return region


def _touching(region: Tensor) -> Tensor:
    """(B, SHAPES + 1, SHAPES + 1) bool: which regions lie side by side somewhere (4-neighbours)."""
    batch, kinds = region.shape[0], SHAPES + 1
    of = torch.arange(batch)[:, None, None] * kinds
    pairs = torch.cat([
        ((of + region[:, :, 1:]) * kinds + region[:, :, :-1]).flatten(),
        ((of + region[:, 1:]) * kinds + region[:, :-1]).flatten(),
    ])  # fmt: skip
    met = torch.bincount(pairs, minlength=batch * kinds * kinds).view(batch, kinds, kinds) > 0
    return met | met.transpose(1, 2)


def choose_intensities(generator: Generator, region: Tensor) -> Tensor:
    """(B, SHAPES + 1) mean intensity of each region, visibly another than that of any region beside it.

    A border between equal intensities cannot be seen: what a point there touches would have no answer.
    """
    batch = region.shape[0]
    touching = _touching(region)
    value = torch.zeros(batch, SHAPES + 1)
    value[:, 0] = torch.rand(batch, generator=generator)
    value[:, 0] *= (torch.rand(batch, generator=generator) < 0.4).float()
    for shape in range(1, SHAPES + 1):
        candidates = torch.rand(batch, 12, generator=generator)
        apart = (candidates[:, :, None] - value[:, None, :shape]).abs()
        nearest = apart.masked_fill(~touching[:, shape, None, :shape], 1.0).amin(dim=-1)
        # The first that is far enough from all of them; where none is, the farthest.
        farthest = nearest.argmax(dim=1, keepdim=True)
        far_enough = nearest >= VISIBLE
        first = far_enough.float().argmax(dim=1, keepdim=True)
        chosen = torch.where(far_enough.any(dim=1, keepdim=True), first, farthest)
        value[:, shape] = candidates.gather(1, chosen).squeeze(1)
    return value


def _blur(image: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))


def _some(generator: Generator, share: float, changed: Tensor, image: Tensor) -> Tensor:
    """``changed`` for a random share of the images, ``image`` for the others."""
    return torch.where(torch.rand(image.shape[0], 1, 1, 1, generator=generator) < share, changed, image)


def _render(generator: Generator, region: Tensor, value: Tensor) -> Tensor:
    """(B, 1, S, S): textures, partial volume, bias field, noise, random contrast."""
    batch, size = region.shape[0], region.shape[-1]
    image = value.gather(1, region.flatten(1)).view_as(region)[:, None]
    grain = torch.cat([_smooth_noise(generator, batch, 1, cells, size) for cells in (8, 24, 64)], dim=1)
    amplitude = _uniform(generator, 0, 1, batch, 3, SHAPES + 1) ** 3 * 0.16
    amplitude[:, :, 0] *= (value[:, 0:1] > 0).float()
    local = amplitude.gather(2, region.flatten(1)[:, None].expand(-1, 3, -1)).view_as(grain)
    image = image + (local * grain).sum(dim=1, keepdim=True)
    half = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="bilinear", align_corners=False)
    image = _some(generator, 0.35, half, image)
    image = _some(generator, 0.7, _blur(image), image)
    image = _some(generator, 0.3, _blur(image), image)
    bias = (_smooth_noise(generator, batch, 1, 3, size) * _uniform(generator, 0, 0.25, batch, 1, 1, 1)).exp()
    image = image * bias
    noise = torch.randn(image.shape, generator=generator)
    noise = _some(generator, 0.4, 1.8 * _blur(noise), noise)
    image = image + noise * _uniform(generator, 0, 0.07, batch, 1, 1, 1)
    low, high = image.flatten(1).aminmax(dim=1)
    image = (image - low.view(-1, 1, 1, 1)) / (high - low).clamp_min(1e-3).view(-1, 1, 1, 1)
    gamma = _uniform(generator, -0.5, 0.5, batch, 1, 1, 1).exp()
    return image.clamp(0, 1) ** gamma


def draw_scenes(batch: int, seed: int, size: int = 128) -> Scenes:
    """Draw ``batch`` scenes of ``size`` x ``size`` pixels; the same seed gives the same scenes."""
    generator = Generator().manual_seed(seed)
    centre, radius, parent = _layout(generator, batch)
    region = _paint(generator, _inside(generator, centre, radius, size), parent)
    image = _render(generator, region, choose_intensities(generator, region))
    return Scenes(image, region, parent)


def turn_scenes(scenes: Scenes, way: int) -> Scenes:
    """Mirror left-right (bit 0), up-down (bit 1) and at the diagonal (bit 2): the 8 symmetries of a square."""

    def turn(maps: Tensor) -> Tensor:
        maps = maps.flip([axis for bit, axis in ((1, -1), (2, -2)) if way & bit])
        return (maps.transpose(-1, -2) if way & 4 else maps).contiguous()

    return Scenes(turn(scenes.image), turn(scenes.region), scenes.parent)


def draw_prompts(scenes: Scenes, prompts: int, seed: int, whole: float = 0.25) -> ScenePrompts:
    """Choose points in regions of the scenes, regions (not pixels) being equally likely.

    Args:
        scenes: of ``draw_scenes``.
        prompts: P, points per scene.
        seed: of the choice.
        whole: share of the questions whose answer is an organ with its parts, where the point's
            region has or is a part; the others ask for the visible region alone.

    Returns:
        Each answer is the connected part of its region (4-neighbours) that holds the point.
    """
    rng = np.random.default_rng(seed)
    batch, _, size, _ = scenes.image.shape
    points = np.zeros((batch, prompts, 2), np.float32)
    masks = np.zeros((batch, prompts, size, size), np.float32)
    for b, (region, parent) in enumerate(zip(scenes.region.numpy(), scenes.parent.numpy(), strict=True)):
        counts = np.bincount(region.ravel(), minlength=SHAPES + 1)
        choices = np.flatnonzero(counts >= SMALLEST_REGION)
        for p in range(prompts):
            chosen = rng.choice(choices)
            top = parent[chosen] or chosen
            as_whole = chosen > 0 and rng.random() < whole
            mask = (region == top) | ((parent[region] == top) & (region > 0)) if as_whole else region == chosen
            pieces, _ = ndimage.label(mask)
            y, x = divmod(int(rng.choice(np.flatnonzero(region.ravel() == chosen))), size)
            if (pieces == pieces[y, x]).sum() < SMALLEST_REGION:
                largest = np.bincount(pieces[mask]).argmax()
                y, x = divmod(int(rng.choice(np.flatnonzero(pieces.ravel() == largest))), size)
            points[b, p] = x + 0.5, y + 0.5
            masks[b, p] = pieces == pieces[y, x]
    pieces = np.stack([_number_pieces(region) for region in scenes.region.numpy()])
    return ScenePrompts(scenes.image, torch.from_numpy(points), torch.from_numpy(masks), torch.from_numpy(pieces))


def _number_pieces(region: NDArray[np.int64]) -> NDArray[np.int64]:
    """(S, S) topmost shape -> (S, S) number of the connected piece (4-neighbours)."""
    numbers, highest = np.zeros_like(region), 0
    for shape in np.unique(region):
        pieces, count = ndimage.label(region == shape)
        numbers += np.where(pieces > 0, pieces + highest, 0)
        highest += count
    return numbers
