"""What every reader of a format gives, and what they share: bounded reading, checks of the geometry, channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from weakmedsam.errors import DataError, MemoryShortError, check_range

VOXEL_SIZES = (1e-5, 1e5)
"""Voxel sizes that are believed, mm: from 10 nm to 100 m."""

PADDING = 2**20
"""Bytes of zeros behind the voxels that are believed to be padding."""

READ_BYTES = 2**24
"""Bytes that are read at once; so much of a file that turns out to be cut is read in vain."""

NO_SPACING = "pixel"
"""Unit of a scan whose file says nothing of the size of a voxel: 1 mm is taken."""

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM, NRRD and MetaImage count to the left, posterior and superior; NIfTI to the right, anterior and superior."""

LONGEST_AXIS = 32767
"""Voxels along an axis that a header of NIfTI-1 can state."""


class Volume(NamedTuple):
    """What a scan holds.

    Attributes:
        voxels: (X, Y, Z) along the file's own axes, values as scaled by the header.
        affine: (4, 4) float64, voxel -> mm, to the right, anterior and superior.
        unit: of length, as stated: "mm", "m", "micron", "unknown"; ``NO_SPACING`` where there is no size of a voxel.
        header: a NIfTI header's bytes, to write a file that lies on this scan.
    """

    voxels: NDArray[Any]
    affine: NDArray[np.float64]
    unit: str
    header: bytes


class Place(NamedTuple):
    """Where a scan lies, by its header alone.

    Attributes:
        shape: voxels along the file's own three axes.
        affine: (4, 4) float64, voxel -> mm, as of ``Volume``.
        unit: as of ``Volume``.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    unit: str


@dataclass(frozen=True)
class Reading:
    """What is taken of files that leave it open.

    Attributes:
        channel: which volume of a file with several, or which channel of colour, from 0; None: files have one.
        spacing: (x, y, z) mm, between columns, rows and slices, of files that say nothing of it; None takes 1.
    """

    channel: int | None = None
    spacing: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.channel is not None:
            check_range("data.channel", self.channel, 0, 2**31)
        for size in self.spacing or ():
            check_range("data.spacing", size, *VOXEL_SIZES)

    @property
    def stated(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def unreadable(path: str | Path, reason: str, kind: str) -> DataError:
    """The error of a file that is damaged or of another kind."""
    return DataError(f"{path}: cannot be read ({reason}). It is truncated, damaged or no {kind} file: get it again.")


def not_given(path: str | Path, error: Exception, kind: str) -> DataError:
    """Of a file that the system does not give, or whose compressed stream is damaged."""
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{path}: cannot be read ({error.strerror}). Look at its rights and its disk.")
    return unreadable(path, str(error).partition("\n")[0][:200] or type(error).__name__, kind)


def read_exactly(
    stream: BinaryIO, needed: int, path: str | Path, shape: Sequence[int], kind: str, ends: bool = True
) -> NDArray[np.uint8]:
    """The bytes of voxels; a stream that holds less or more is refused before it takes more memory.

    Args:
        stream: at the first of them.
        needed: how many.
        path: for messages.
        shape: of the volume, for messages.
        kind: of file, for messages.
        ends: the stream is read to its end, which compares the checksum of a compressed one.

    Raises:
        DataError: too few bytes, or more than padding behind them.
        MemoryShortError: there is too little memory for them.
    """
    shape = tuple(shape)
    try:
        # Not touched before it is filled: of a header that states too much, only what the file holds takes memory.
        content = np.empty(needed, np.uint8)
    except MemoryError as error:
        raise MemoryShortError(
            f"{path}: its {shape} voxels take {needed / 2**30:.1f} GiB, more memory than there is. Lower "
            "data.prepare.workers, or leave it out."
        ) from error
    view, filled = content.data, 0
    while filled < needed and (count := stream.readinto(view[filled : filled + READ_BYTES])):  # type: ignore[attr-defined]
        filled += count
    if filled < needed:
        raise unreadable(path, f"it ends after {filled:,} of {needed:,} bytes of voxels", kind)
    surplus = 0
    while ends and (part := stream.read(READ_BYTES)):
        surplus += len(part)
        # Padding is harmless; bytes that were inserted push voxels out.
        if surplus > PADDING or part.count(0) < len(part):
            raise DataError(
                f"{path}: {surplus:,} bytes or more follow the {shape} voxels that its header states. If the voxels "
                "are right, open the file and save it again; else get it again."
            )
    return content


def check_affine(affine: NDArray[np.float64], path: str | Path) -> NDArray[np.float64]:
    """See that voxels of some size lie somewhere.

    Returns:
        ``affine``.

    Raises:
        DataError: NaN or infinity, sizes that cannot be, or parallel axes.
    """
    if not np.isfinite(affine).all():
        raise useless(path, "it holds NaN or infinity")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not ((sizes >= VOXEL_SIZES[0]) & (sizes <= VOXEL_SIZES[1])).all():
        raise useless(path, f"voxels of {', '.join(f'{size:g}' for size in sizes)} mm")
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise useless(path, "two of its axes are parallel")
    return affine


def useless(path: str | Path, reason: str) -> DataError:
    """The error of a file that cannot be placed."""
    return DataError(f"{path}: its header has no usable geometry ({reason}). Export it again.")


def make_volume(voxels: NDArray[Any], affine: NDArray[np.float64], path: str | Path, unit: str = "mm") -> Volume:
    """A volume of another format, with the NIfTI header of what will be written onto it.

    Args:
        voxels: (X, Y, Z).
        affine: (4, 4) voxel -> mm, RAS.
        path: for messages.
        unit: as of ``Volume``.

    Raises:
        DataError: as of ``check_affine``.
    """
    check_affine(affine, path)
    header = (nib.Nifti2Header if max(voxels.shape) > LONGEST_AXIS else nib.Nifti1Header)()
    header.set_data_shape(voxels.shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, 1)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    sheared = np.abs(axes.T @ axes - np.eye(3)).max() > 1e-4
    header.set_qform(affine, 0 if sheared else 1)  # a quaternion knows no shear
    return Volume(voxels, affine, unit, header.binaryblock)


def place_picture(sizes: tuple[float, float, float]) -> NDArray[np.float64]:
    """(4, 4) of pictures without a place: columns lead to the patient's left, rows to the back, slices up."""
    return LPS_TO_RAS @ np.diag([*sizes, 1.0])


def take_channel(voxels: NDArray[Any], channel: int | None, path: str | Path, what: str = "volumes") -> NDArray[Any]:
    """One of the last axis, which goes.

    Args:
        voxels: (..., N).
        channel: which; None: there has to be one, or N equal ones, as of grey saved as colour.
        path: for messages.
        what: N of what it has.

    Raises:
        DataError: it is not clear which, or there is none of that number.
    """
    count = voxels.shape[-1]
    if channel is None:
        first = voxels[..., :1]
        if count > 1 and not (voxels == first).all():
            raise DataError(
                f"{path}: has {count} {what}. Say which one is taken, data.channel: 0 to {count - 1}; a mask has one."
            )
        return np.ascontiguousarray(first[..., 0])
    if channel >= count:
        raise DataError(
            f"{path}: has {count} {what}, so that data.channel: {channel} is not there. Lower it, or leave the file "
            "out."
        )
    return np.ascontiguousarray(voxels[..., channel])
