"""Drawing of the phantom's volumes: numpy and scipy only, so that it runs without loading torch.

A volume is an abdomen-like MRI: a body with a bright rim of fat, a dark muscle ring, organs of
differing intensity and a spine, all smoothly deformed; then lesions, cysts and the distractor; then
texture, partial volume, a bias field, and Rician noise. Every array is (D, H, W), coordinates are
in mm and in the order (z, y, x) from the volume's centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from weakmedsam.errors import check_range

Array: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]

VERSION = 1
"""Raised whenever the same parameters would draw other volumes."""

LESION, CYST = 1, 2
MODES = ("solid", "rimmed", "mottled", "banded")
"""How a lesion can look inside, one a volume."""

TISSUE = 0.42  # intensity between the organs; fat is about 0.85, muscle 0.25
INTENSITY = 1000.0  # what 1.0 becomes in the file


@dataclass(frozen=True)
class PhantomParameters:
    """What decides a phantom's look; volume number n depends on these and on n alone.

    Attributes:
        slices: slices of a volume, D.
        size: rows and columns of a slice, H = W, pixels.
        spacing: (row, column, slice) distance of voxels, mm.
        contrast: how far the targets' intensity is from the tissue around; 1 is clear, 0 invisible.
        organs: how far the organs' intensity is from the tissue around; 1 makes some as bright as a lesion.
        pattern: how far a lesion's inside departs from its mean, by its appearance; 0 makes all solid.
        noise: standard deviation of the Rician noise, as a part of fat's intensity.
        bias: strength of the bias field; intensities vary by factors up to exp(+-bias).
        co_occurrence: part of the lesion's slices that show the distractor, [0, 1].
        distractor_rate: part of the other slices that show it, [0, 1].
        modes: number of lesion appearances, 1 to 4.
        seed: seed of the set.
    """

    slices: int = 24
    size: int = 128
    spacing: tuple[float, float, float] = (1.5, 1.5, 4.0)
    contrast: float = 1.0
    organs: float = 1.0
    pattern: float = 1.0
    noise: float = 0.05
    bias: float = 0.3
    co_occurrence: float = 0.9
    distractor_rate: float = 0.1
    modes: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be drawn.

        Raises:
            ConfigError: a value out of its range; the message names it.
        """
        check_range("data.phantom.modes", self.modes, 1, len(MODES))
        check_range("data.phantom.slices", self.slices, 8, 4096)
        check_range("data.phantom.size", self.size, 32, 4096)
        check_range("data.phantom.seed", self.seed, 0, 2**32 - 1)
        for distance in self.spacing:
            check_range("data.phantom.spacing", distance, 0, 1000, above=True)
        for name in ("co_occurrence", "distractor_rate"):
            check_range(f"data.phantom.{name}", getattr(self, name), 0, 1)
        for name in ("contrast", "organs", "pattern", "noise", "bias"):
            check_range(f"data.phantom.{name}", getattr(self, name), 0, 100)


@dataclass(frozen=True)
class Drawing:
    """A drawn volume.

    Attributes:
        image: (D, H, W) int16 intensities, 0 to about 1500.
        mask: (D, H, W) uint8: 0 background, 1 lesion, 2 cyst.
        distractor: (D, H, W) bool, where the distractor lies; never in a file.
        mode: how the lesion looks, one of ``MODES``; also set where there is no lesion.
    """

    image: NDArray[np.int16]
    mask: NDArray[np.uint8]
    distractor: Mask
    mode: str


def draw_volume(parameters: PhantomParameters, number: int) -> Drawing:
    """Draws volume ``number`` of the set that ``parameters`` describe.

    Args:
        parameters: the set's parameters.
        number: number of the volume, from 0; the result does not depend on what was drawn before.
    """
    rng = np.random.default_rng([parameters.seed, number])
    canvas = _Canvas(parameters, rng)
    image, body = _draw_anatomy(canvas)
    mode = MODES[int(rng.integers(parameters.modes))]
    mask = _draw_targets(canvas, image, body, mode)
    distractor = _draw_distractor(canvas, image, (mask == 0) & body, (mask == LESION).any(axis=(1, 2)))
    return Drawing(_scan(canvas, image, body), mask, distractor, mode)


class _Canvas:
    """The voxel grid of one volume with its smooth deformation and its random numbers."""

    def __init__(self, parameters: PhantomParameters, rng: np.random.Generator) -> None:
        self.parameters = parameters
        self.rng = rng
        self.shape = (parameters.slices, parameters.size, parameters.size)
        row, column, slice_ = parameters.spacing
        step = (slice_, row, column)
        self.extent = tuple(n * s / 2 for n, s in zip(self.shape, step, strict=True))  # half, mm
        axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(self.shape, step, strict=True)]
        grid = np.meshgrid(*(a.astype(np.float32) for a in axes), indexing="ij", sparse=True)
        # Three sectors of the body, so that lesion, cyst and distractor seldom touch.
        self.sectors = rng.uniform(0, 2 * np.pi) + rng.permutation(3) * 2 * np.pi / 3
        bend = 0.055 * min(self.extent[1:])
        self.z = np.broadcast_to(grid[0], self.shape)
        self.y: Array = grid[1] + bend * self.smooth_noise((4, 4, 4))
        self.x: Array = grid[2] + bend * self.smooth_noise((4, 4, 4))

    def smooth_noise(self, cells: tuple[int, int, int]) -> Array:
        """Low-frequency noise (D, H, W) of mean 0 and about unit deviation, with so many cells an axis."""
        noise = self.rng.standard_normal(cells).astype(np.float32)
        for count, length in zip(cells, self.shape, strict=True):
            # The first axis becomes the last, at full length; after three turns all are in order again.
            noise = np.tensordot(noise, _spline_weights(count, length), axes=(0, 1))
        return noise

    def texture(self, sigma: float) -> Array:
        """Noise (D, H, W) of unit deviation with a grain of ``sigma`` pixels within the slice."""
        noise = self.rng.standard_normal(self.shape, dtype=np.float32)
        noise = ndimage.gaussian_filter(noise, (0, sigma, sigma), truncate=3)
        return noise / noise.std()

    def depth(
        self,
        centre: tuple[float, float, float],
        semi_axes: tuple[float, float, float],
        power: float = 2,
        bumps: float = 0.0,
    ) -> Array:
        """How deep each voxel lies in a superellipsoid: 1 at its centre, 0 on its surface, negative outside.

        Args:
            centre: (z, y, x), mm.
            semi_axes: (z, y, x), mm.
            power: exponent along z; above 2 the shape keeps its width along more slices.
            bumps: deviation of the surface, as a part of the radius.
        """
        z = np.abs(self.z - np.float32(centre[0])) / np.float32(semi_axes[0])
        y = (self.y - np.float32(centre[1])) / np.float32(semi_axes[1])
        x = (self.x - np.float32(centre[2])) / np.float32(semi_axes[2])
        radius = np.sqrt(y * y + x * x + z**power)
        if bumps:
            radius = radius * (1 + np.float32(bumps) * self.smooth_noise((5, 9, 9)))
        return 1 - radius


@cache
def _spline_weights(cells: int, length: int) -> Array:
    """Weights (length, cells) that bring ``cells`` values to ``length`` by quadratic splines.

    Axis by axis with these is 20 times as fast as ``ndimage.zoom`` of the whole array.
    """
    unit = np.eye(cells, dtype=np.float32)
    return ndimage.zoom(unit, (length / cells, 1), order=2, grid_mode=True, mode="nearest")


def _draw_anatomy(canvas: _Canvas) -> tuple[Array, Mask]:
    """Body, fat, muscle, organs and spine: image (D, H, W) in about [0, 1], and the body's mask."""
    rng, (half_z, half_y, half_x) = canvas.rng, canvas.extent
    tall, wide = half_y * rng.uniform(0.7, 0.8), half_x * rng.uniform(0.82, 0.9)
    outline = canvas.depth((0, 0, 0), (4 * half_z, tall, wide))
    fat = rng.uniform(0.05, 0.09)
    image = np.zeros(canvas.shape, np.float32)
    image[outline > 0] = rng.uniform(0.8, 0.9)
    image[outline > fat] = rng.uniform(0.2, 0.3)
    image[outline > fat + 0.06] = TISSUE
    inner = outline > fat + 0.06
    for y, x, size, intensity in (
        (-0.20, -0.42, 0.40, 0.54),  # a large one, as the liver
        (-0.25, 0.50, 0.24, 0.36),  # its smaller counterpart
        (0.42, -0.42, 0.17, 0.60),  # a pair, as the kidneys
        (0.42, 0.42, 0.17, 0.60),
        (-0.45, 0.05, 0.20, 0.32),
    ):
        centre = (half_z * rng.uniform(-0.4, 0.4), y * tall, x * wide)
        radius = size * wide * rng.uniform(0.8, 1.15)
        organ = canvas.depth(centre, (half_z * rng.uniform(0.7, 1.3), radius * rng.uniform(0.7, 1), radius), 3, 0.08)
        drawn = intensity + rng.uniform(-0.05, 0.05)
        image[(organ > 0) & inner] = TISSUE + canvas.parameters.organs * (drawn - TISSUE)
    spine = canvas.depth((0, 0.66 * tall, 0), (6 * half_z, 0.15 * tall, 0.15 * tall))
    image[spine > 0] = rng.uniform(0.15, 0.22)
    image[spine > 0.25] = rng.uniform(0.5, 0.6)
    image *= 1 + 0.05 * canvas.texture(2.5) + 0.04 * canvas.smooth_noise((6, 16, 16))
    return image, inner


def _draw_targets(canvas: _Canvas, image: Array, body: Mask, mode: str) -> NDArray[np.uint8]:
    """Draws lesion and cyst into ``image``, in place, and returns their mask (D, H, W)."""
    rng, contrast = canvas.rng, canvas.parameters.contrast
    mask = np.zeros(canvas.shape, np.uint8)
    if rng.random() < 0.85:
        z_range = _draw_z_range(canvas)
        depth = _blob(canvas, 0, z_range, radius=rng.uniform(0.23, 0.34), bumps=0.1)
        if rng.random() < 0.4:
            depth = np.maximum(depth, _blob(canvas, 0, z_range, radius=rng.uniform(0.12, 0.2), bumps=0.1))
        inside = (depth > 0) & body
        look = TISSUE + 0.26 + canvas.parameters.pattern * _lesion_pattern(canvas, depth, mode)
        image[inside] += contrast * (look - image)[inside]
        mask[inside] = LESION
    if rng.random() < 0.75:
        depth = _blob(canvas, 1, _draw_z_range(canvas), radius=rng.uniform(0.21, 0.3), bumps=0.04)
        inside = (depth > 0) & body & (mask == 0)
        look = TISSUE - 0.23 + 0.02 * canvas.texture(4)
        image[inside] += contrast * (look - image)[inside]
        mask[inside] = CYST
    return mask


def _draw_z_range(canvas: _Canvas) -> tuple[float, float]:
    """Centre and half-length along z, mm; two fifths of the volume on average."""
    half_z = canvas.extent[0]
    half_length = half_z * canvas.rng.uniform(0.28, 0.52)
    return canvas.rng.uniform(-1, 1) * (0.95 * half_z - half_length), half_length


def _sector_centre(canvas: _Canvas, sector: int) -> tuple[float, float]:
    """A place (y, x), mm, in one of the body's three sectors: lesion 0, cyst 1, distractor 2."""
    angle = canvas.sectors[sector] + canvas.rng.uniform(-0.25, 0.25)
    reach = canvas.rng.uniform(0.4, 0.5)
    return reach * 0.8 * canvas.extent[1] * np.sin(angle), reach * 0.95 * canvas.extent[2] * np.cos(angle)


def _blob(canvas: _Canvas, sector: int, z_range: tuple[float, float], radius: float, bumps: float) -> Array:
    """Depth (D, H, W) of a bumpy ellipsoid in a sector; ``radius`` is a part of half a slice's side."""
    y, x = _sector_centre(canvas, sector)
    mean = radius * canvas.extent[2]
    stretch = canvas.rng.uniform(0.85, 1.18)
    return canvas.depth((z_range[0], y, x), (z_range[1], mean * stretch, mean / stretch), power=6, bumps=bumps)


def _lesion_pattern(canvas: _Canvas, depth: Array, mode: str) -> Array:
    """What a lesion's intensity adds to its mean, by mode, (D, H, W)."""
    grain = 0.02 * canvas.texture(1.2)
    if mode == "rimmed":
        return grain + np.where(depth < 0.28, 0.1, -0.16).astype(np.float32)
    if mode == "mottled":
        return grain + 0.13 * canvas.texture(2.0)
    if mode == "banded":
        slope, period = canvas.rng.uniform(-1, 1), 0.03 * canvas.extent[2]
        return grain + 0.1 * np.sin((canvas.x + slope * canvas.y) / period).astype(np.float32)
    return grain


def _draw_distractor(canvas: _Canvas, image: Array, free: Mask, with_lesion: NDArray[np.bool_]) -> Mask:
    """Draws the ring-shaped vessel into ``image``, in place, and returns where it lies (D, H, W).

    Args:
        canvas: the volume's grid.
        image: (D, H, W).
        free: (D, H, W) where it may be drawn.
        with_lesion: (D,) slices with a lesion.
    """
    parameters = canvas.parameters
    present = np.zeros(canvas.shape[0], bool)
    for slices, rate in (
        (np.flatnonzero(with_lesion), parameters.co_occurrence),
        (np.flatnonzero(~with_lesion), parameters.distractor_rate),
    ):
        present[_draw_run(canvas.rng, slices, rate)] = True
    y, x = _sector_centre(canvas, 2)
    drift = canvas.rng.uniform(-0.15, 0.15, 2)  # mm sideways per mm along z
    radius = canvas.extent[2] * canvas.rng.uniform(0.11, 0.15)
    distance = np.hypot(canvas.y - y - drift[0] * canvas.z, canvas.x - x - drift[1] * canvas.z) / radius
    where = (distance < 1) & free & present[:, None, None]
    wall = where & (distance > 0.55)
    image[where] = 0.18
    image[wall] = 1.0
    return where


def _draw_run(rng: np.random.Generator, slices: NDArray[np.intp], rate: float) -> NDArray[np.intp]:
    """A run of neighbours among ``slices``, cyclic, holding a part ``rate`` of them on average."""
    length = int(rate * len(slices) + rng.random())  # rounds up or down so that the mean is exact
    start = int(rng.integers(max(len(slices), 1)))
    return np.roll(slices, -start)[:length]


def _scan(canvas: _Canvas, image: Array, body: Mask) -> NDArray[np.int16]:
    """Blur, bias field, gain and Rician noise: the int16 intensities of the file, (D, H, W)."""
    parameters, rng = canvas.parameters, canvas.rng
    image = ndimage.gaussian_filter(np.maximum(image, 0), (0, 0.7, 0.7), truncate=3)
    field = canvas.smooth_noise((3, 3, 3))
    image = image * np.exp(parameters.bias * field / max(float(np.abs(field[body]).max()), 1e-6))
    real, imaginary = parameters.noise * 0.85 * rng.standard_normal((2, *canvas.shape), dtype=np.float32)
    gain = INTENSITY * rng.uniform(0.7, 1.3)  # MRI has no unit
    scanned = gain * np.hypot(image + real, imaginary)
    return np.clip(np.rint(scanned), 0, np.iinfo(np.int16).max).astype(np.int16)
