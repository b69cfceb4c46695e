"""Reading a volume into slices that look right, and putting a result back in the scan's own space.

Slices are (row, column) as a radiologist sees them. Axial: anterior up, the patient's right at the
picture's left, slices from the feet to the head. Coronal: head up, right at the left, from back to
front. Sagittal: head up, anterior at the left, from left to right. Oblique scans are not resampled:
the axis of the file that is nearest to each direction is taken, so every voxel keeps its value.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from weakmedsam.contracts import ConfigError, DataError

Plane = Literal["axial", "coronal", "sagittal"]

PLANES: dict[str, tuple[str, str, str]] = {
    "axial": ("S", "P", "L"),
    "coronal": ("A", "I", "L"),
    "sagittal": ("R", "I", "P"),
}
"""Where (slice, row, column) lead to: S superior, P posterior, L left, ..."""

UNREADABLE = (
    *(OSError, EOFError, ValueError, OverflowError, zlib.error),
    *(nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError),
)
"""What nibabel raises on a file that is damaged or no NIfTI file."""

SAME_PLACE = 0.1
"""Image and mask are the same geometry if no corner lies further apart than this part of a voxel:
rounding in headers stays far below it, a wrong header far above."""


@dataclass(frozen=True)
class Geometry:
    """Where a volume lies.

    Attributes:
        shape: voxels along the file's own three axes.
        affine: (4, 4) voxel of the file -> mm, as in the file.
        plane: which slices are taken, a key of ``PLANES``.
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    plane: str

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

    def to_slices(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """A view of the file's voxels as (slice, row, column)."""
        wanted = nib.orientations.axcodes2ornt(PLANES[self.plane])
        transform = nib.orientations.ornt_transform(self._orientation, wanted)
        return nib.orientations.apply_orientation(voxels, transform)

    def from_slices(self, slices: NDArray[Any]) -> NDArray[Any]:
        """The inverse of ``to_slices``: (slice, row, column) -> the file's own axes."""
        wanted = nib.orientations.axcodes2ornt(PLANES[self.plane])
        transform = nib.orientations.ornt_transform(wanted, self._orientation)
        return nib.orientations.apply_orientation(slices, transform)


def to_scan(slices: NDArray[Any], geometry: Geometry) -> nib.Nifti1Image:
    """A result on the scan's own slices as an image in the scan's own space.

    Args:
        slices: (D, H0, W0), e.g. class ids uint8.
        geometry: of the scan.

    Returns:
        NIfTI image with the scan's shape, axes and affine: voxel for voxel beside the scan.

    Raises:
        DataError: the slices are not of this scan's shape.
    """
    voxels = np.ascontiguousarray(geometry.from_slices(slices))
    if voxels.shape != geometry.shape:
        raise DataError(f"A result of {voxels.shape} voxels is not of this scan, which has {geometry.shape}.")
    image = nib.Nifti1Image(voxels, np.asarray(geometry.affine))
    image.header.set_xyzt_units("mm")
    return image


def check_plane(plane: str) -> None:
    """Raise ConfigError if there is no such plane."""
    if plane not in PLANES:
        raise ConfigError(f"plane: {plane!r} is unknown; it is one of {sorted(PLANES)}.")


def read_volume(path: str | Path, plane: str = "axial") -> tuple[NDArray[Any], Geometry]:
    """Read a NIfTI volume, once.

    Args:
        path: .nii or .nii.gz.
        plane: which slices are taken, a key of ``PLANES``.

    Returns:
        (D, H0, W0) voxels in the file's values (float32 at most), and the geometry.

    Raises:
        DataError: unreadable, not three-dimensional, no numbers, or a header without geometry.
    """
    try:
        image: Any = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
        affine = np.asarray(image.affine, dtype=np.float64)
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read ({error}). It is truncated, damaged or no NIfTI file: get it again."
        ) from error
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3:
        raise DataError(
            f"{path}: has {voxels.ndim} axes {voxels.shape}, not 3. Split it into one file a volume."
        )
    if voxels.dtype.kind not in "iufb":
        raise DataError(f"{path}: holds {voxels.dtype}, not one number a voxel. Export it as greyscale.")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(
            f"{path}: its header has no usable geometry (affine {affine.tolist()}). Export it again."
        )
    if voxels.dtype.kind == "f":
        voxels = voxels.astype(np.float32, copy=False)
    shape = (int(voxels.shape[0]), int(voxels.shape[1]), int(voxels.shape[2]))
    geometry = Geometry(shape, tuple(tuple(float(x) for x in row) for row in affine), plane)
    return geometry.to_slices(voxels), geometry


def check_same_geometry(image: str, first: Geometry, mask: str, second: Geometry) -> None:
    """Raise DataError unless mask and image lie on the same voxels."""
    if first.shape != second.shape:
        raise DataError(
            f"{mask}: has {second.shape} voxels, its image {image} has {first.shape}. "
            "Resample the mask onto the image's grid (nearest neighbour)."
        )
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.asarray(first.shape) - 1
    apart = np.abs(corners @ (np.asarray(first.affine) - np.asarray(second.affine)).T).max()
    if apart > SAME_PLACE * min(first.spacing):
        raise DataError(
            f"{mask}: lies up to {apart:.2f} mm away from its image {image}. Resample the mask "
            "onto the image's grid; if its voxels do belong to the image's, copy the image's header to it."
        )


def read_classes(
    path: str, plane: str, ids: dict[int, int], known: Sequence[int]
) -> tuple[NDArray[np.uint8], Geometry]:
    """Read an expert mask as class ids.

    Args:
        path: the mask.
        plane: which slices are taken.
        ids: mask value -> class id.
        known: further values that may occur; they become background.

    Returns:
        (D, H0, W0) uint8 class ids, and the geometry.

    Raises:
        DataError: unreadable, or holds values that are neither 0 nor known.
    """
    raw, geometry = read_volume(path, plane)
    # NaN and out-of-range values must not survive the cast to small integers unnoticed.
    with np.errstate(invalid="ignore"):
        values = raw.astype(np.uint8)
    strange = values != raw
    if strange.any():
        _refuse_values(path, np.unique(raw[strange]), ids, known)
    present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    unknown = [int(v) for v in present if v != 0 and v not in ids and v not in known]
    if unknown:
        _refuse_values(path, np.asarray(unknown), ids, known)
    table = np.zeros(256, dtype=np.uint8)
    for value, number in ids.items():
        table[value] = number
    return table[values], geometry


def _refuse_values(path: str, found: NDArray[Any], ids: dict[int, int], known: Sequence[int]) -> None:
    shown = ", ".join(f"{v:g}" for v in found[:8].tolist()) + (", ..." if len(found) > 8 else "")
    expected = sorted({0, *ids, *known})
    raise DataError(
        f"{path}: holds unknown label values {shown}; expected {expected}. "
        "Correct the mask, or name the values in the configuration."
    )
