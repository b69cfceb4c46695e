"""Reading a volume into slices that look right, and putting a result back in the scan's own space.

Slices are (row, column) as a radiologist sees them. Axial: anterior up, the patient's right at the
picture's left, slices from the feet to the head. Coronal: head up, right at the left, from back to
front. Sagittal: head up, anterior at the left, from left to right. Oblique scans are not resampled:
the axis of the file that is nearest to each direction is taken, so every voxel keeps its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_modules.formats.read import READING, read_scan
from data_modules.formats.volume import NO_SPACING, Reading
from weakmedsam.errors import ConfigError, DataError

Plane = Literal["axial", "coronal", "sagittal"]

PLANES: dict[str, tuple[str, str, str]] = {
    "axial": ("S", "P", "L"),
    "coronal": ("A", "I", "L"),
    "sagittal": ("R", "I", "P"),
}
"""Where (slice, row, column) lead to: S superior, P posterior, L left, ..."""

SAME_PLACE = 0.1
"""Image and mask are the same geometry if no corner lies further apart than this part of a voxel:
rounding in headers stays far below it, a wrong header far above."""

WHOLE = 1e-3
"""A mask value this close to a whole number is that number: resampling and scaled headers leave 0.99999994."""


@dataclass(frozen=True)
class Geometry:
    """Where a volume lies.

    Attributes:
        shape: voxels along the file's own three axes.
        affine: (4, 4) voxel of the file -> mm.
        plane: which slices are taken, a key of ``PLANES``.
        unit: of length, as the file states it: "mm", "m", "micron" or "unknown"; "pixel" where it states no size.
        header: of a NIfTI file that lies on it, hexadecimal.
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    plane: str
    unit: str = "mm"
    header: str = ""

    @property
    def _orientation(self) -> NDArray[np.float64]:
        return nib.orientations.io_orientation(np.asarray(self.affine))

    @property
    def slice_axis(self) -> tuple[int, bool]:
        """(the file's axis along which slices are counted, whether they are counted backwards)."""
        wanted = nib.orientations.axcodes2ornt(PLANES[self.plane])
        axis = int(np.flatnonzero(self._orientation[:, 0] == wanted[0, 0])[0])
        return axis, bool(self._orientation[axis, 1] != wanted[0, 1])

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(slice distance, row, column) in mm; lengths along the file's axes where they are sheared."""
        sizes = nib.affines.voxel_sizes(np.asarray(self.affine))
        wanted = nib.orientations.axcodes2ornt(PLANES[self.plane])
        axes = [int(np.flatnonzero(self._orientation[:, 0] == target)[0]) for target in wanted[:, 0]]
        return float(sizes[axes[0]]), float(sizes[axes[1]]), float(sizes[axes[2]])

    @property
    def slices_affine(self) -> NDArray[np.float64]:
        """(4, 4) (slice, row, column) -> mm: the same for two files that store the same voxels in another order."""
        back = nib.orientations.inv_ornt_aff(self._to_slices, self.shape)
        return np.asarray(self.affine) @ back

    @property
    def _to_slices(self) -> NDArray[np.float64]:
        wanted = nib.orientations.axcodes2ornt(PLANES[self.plane])
        return nib.orientations.ornt_transform(self._orientation, wanted)

    def to_slices(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """A view of the file's voxels as (slice, row, column)."""
        return nib.orientations.apply_orientation(voxels, self._to_slices)

    def from_slices(self, slices: NDArray[Any]) -> NDArray[Any]:
        """The inverse of ``to_slices``: (slice, row, column) -> the file's own axes."""
        wanted = nib.orientations.axcodes2ornt(PLANES[self.plane])
        transform = nib.orientations.ornt_transform(wanted, self._orientation)
        return nib.orientations.apply_orientation(slices, transform)


def check_plane(plane: str) -> None:
    """Raise ConfigError if there is no such plane."""
    if plane not in PLANES:
        raise ConfigError(f"plane: {plane!r} is unknown; it is one of {sorted(PLANES)}.")


def read_volume(
    path: str | Path,
    plane: str = "axial",
    files: Sequence[str] = (),
    reading: Reading = READING,
    labels: bool = False,
) -> tuple[NDArray[Any], Geometry]:
    """Read a volume of any format, once.

    Args:
        path: of its file; of several, of their folder.
        plane: which slices are taken, a key of ``PLANES``.
        files: the files of a volume that has several.
        reading: what is taken of files that leave it open.
        labels: it is a mask.

    Returns:
        (D, H0, W0) voxels in the file's values, and the geometry.

    Raises:
        DataError: see ``read_scan``.
    """
    voxels, affine, unit, header = read_scan(path, files, reading, labels)
    shape = (int(voxels.shape[0]), int(voxels.shape[1]), int(voxels.shape[2]))
    rows = tuple(tuple(float(x) for x in row) for row in affine)
    geometry = Geometry(shape, rows, plane, unit, header.hex())
    return geometry.to_slices(voxels), geometry


def lay_on_image(mask: str, slices: NDArray[Any], second: Geometry, image: str, first: Geometry) -> NDArray[Any]:
    """A mask's slices as those of its image, in whatever order either is stored.

    Between 45 degrees the nearest axis is a matter of rounding: the mask follows the image's choice.

    Args:
        mask: path, named in errors.
        slices: (slice, row, column) of the mask.
        second: of the mask.
        image: path, named in errors.
        first: of the image.

    Returns:
        A view of ``slices``, voxel for voxel on the image's slices.

    Raises:
        DataError: the two do not lie on each other.
    """
    turn = nib.orientations.io_orientation(np.linalg.inv(first.slices_affine) @ second.slices_affine)
    laid = nib.orientations.apply_orientation(slices, turn)
    wanted = first.to_slices(np.broadcast_to(0, first.shape)).shape
    if laid.shape != wanted:
        raise DataError(
            f"{mask}: has {second.shape} voxels, its image {image} has {first.shape}. "
            "Resample the mask onto the image's grid (nearest neighbour)."
        )
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.asarray(wanted) - 1
    affine = second.slices_affine @ nib.orientations.inv_ornt_aff(turn, slices.shape)
    apart = np.abs(corners @ (first.slices_affine - affine).T).max()
    if apart > SAME_PLACE * min(first.spacing):
        bare = np.allclose(np.abs(np.asarray(second.affine)[:3, :3]), np.eye(3))
        hint = " If it was saved without a geometry, save it again with the image's affine." if bare else ""
        if second.unit == NO_SPACING != first.unit:
            hint = " A picture has no place: save it as NIfTI or NRRD with the image's."
        elif first.unit != second.unit:
            hint = f" The image's unit is {first.unit}, the mask's {second.unit}: correct the header if one is wrong."
        raise DataError(
            f"{mask}: lies up to {apart:.2f} mm away from its image {image}. "
            f"Resample the mask onto the image's grid (nearest neighbour).{hint}"
        )
    return laid


def read_classes(
    path: str,
    plane: str,
    ids: dict[int, int],
    known: Sequence[int],
    files: Sequence[str] = (),
    reading: Reading = READING,
) -> tuple[NDArray[np.uint8], Geometry]:
    """Read an expert mask as class ids.

    Args:
        path: the mask.
        plane: which slices are taken.
        ids: mask value -> class id.
        known: further values that may occur; they become background.
        files: the files of a mask that has several.
        reading: the size of a voxel where files say nothing of it; a mask has one channel.

    Returns:
        (D, H0, W0) uint8 class ids, and the geometry.

    Raises:
        DataError: unreadable, or holds values that are neither 0 nor known.
    """
    raw, geometry = read_volume(path, plane, files, Reading(spacing=reading.spacing), labels=True)
    # NaN and out-of-range values must not survive the cast to small integers unnoticed.
    with np.errstate(invalid="ignore"):
        whole = np.rint(raw) if raw.dtype.kind == "f" else raw
        strange = ~((np.abs(raw - whole) <= WHOLE) & (whole >= 0) & (whole <= 255))
    if strange.any():
        _refuse_values(path, np.unique(raw[strange]), ids, known)
    values = whole.astype(np.uint8)
    present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    unknown = [int(v) for v in present if v != 0 and v not in ids and v not in known]
    if unknown:
        _refuse_values(path, np.asarray(unknown), ids, known)
    table = np.zeros(256, dtype=np.uint8)
    for value, number in ids.items():
        table[value] = number
    return table[values], geometry


def _refuse_values(path: str, found: NDArray[Any], ids: dict[int, int], known: Sequence[int]) -> None:
    shown = ", ".join(np.format_float_positional(v, trim="-") for v in found[:8])
    values = sorted({0, *ids, *known})
    expected = f"[{', '.join(map(str, values[:20]))}{', ...' if len(values) > 20 else ''}]"
    mend = "Correct the mask, or, for data of your own, name them in data.classes or data.background_values"
    if (found != np.rint(found)).any():
        mend = (
            "Label values are whole numbers: resample masks by the nearest neighbour, and save them as integers with a "
            "header of their own"
        )
    raise DataError(
        f"{path}: holds unknown label values {shown}{', ...' if len(found) > 8 else ''}; expected {expected}. {mend}."
    )
