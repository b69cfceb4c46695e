"""The slice store: volumes written once as slices that can be read one at a time.

``<store_dir>/<data set>-<key>/`` holds ``index.json``, ``skipped.csv`` and, for each case, a folder:

- ``image.npy`` (D, S, S) uint16: intensity, low..high of the case -> 0..65535, on the working frame;
- ``mask.npy`` (D, S, S) uint8: expert class ids on the working frame, where there is a mask;
- ``mask_native.npz``, key ``mask`` (D, H0, W0) uint8: the same on the scan's own slices, compressed;
- ``entry.json``: what the index says of this case, sizes and checksums of the arrays included.

The key is a hash of everything that changes the content, so changed settings never read old slices.
A case's folder is written beside and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_modules.cases import Case, Intensity, class_ids
from data_modules.resampling import labels_to_frame, make_frame, values_to_frame
from data_modules.store_index import Entry, StoreSpec, movable_of, remove
from data_modules.volumes import lay_on_image, read_classes, read_volume
from data_modules.wholeness import ENTRY, mark_files
from weakmedsam.contracts import Frame
from weakmedsam.errors import DataError
from weakmedsam.system.atomic_io import explaining_full_disk
from weakmedsam.system.commands import command
from weakmedsam.system.json_files import seal

FULL_SCALE = 65535
"""What 1.0 becomes in ``image.npy``."""

EXACT = 2.0**53
"""Whole numbers up to here are exact in float64."""

MOST_BYTES = 2**34
"""What the slices of one volume may take on the working frame."""


@dataclass(frozen=True)
class CaseArrays:
    """A case read into memory, as it is written.

    Attributes:
        image: (D, S, S) uint16 on the working frame.
        mask: (D, S, S) uint8 class ids on the working frame, or None.
        mask_native: (D, H0, W0) uint8 class ids on the scan's own slices, or None.
        entry: what the index says of it.
    """

    image: NDArray[np.uint16]
    mask: NDArray[np.uint8] | None
    mask_native: NDArray[np.uint8] | None
    entry: Entry


def stamp(case: Case, data_dir: str) -> tuple[tuple[str, int, int], ...]:
    """(relative path, bytes, modification time in ns) of a case's image and mask; of several files sum and latest.

    Raises:
        DataError: a file is gone.
    """
    marks = []
    for path, files in ((case.image, case.image_files), (case.mask, case.mask_files)):
        if path is None:
            continue
        try:
            states = [Path(file).stat() for file in files or (path,)]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}). Restore it, or remove its case.") from error
        size, latest = sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)
        marks.append((os.path.relpath(path, data_dir), size, latest))
    return tuple(marks)


def find_window(voxels: NDArray[Any], intensity: Intensity, path: str) -> tuple[float, float, str]:
    """(low, high, rule) of a volume.

    Args:
        voxels: the volume, values of the file.
        intensity: the rule.
        path: named in errors.

    Raises:
        DataError: NaN or infinity, or an image that is constant (within its window).
    """
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise DataError(f"{path}: holds NaN or infinite values. Replace them (for CT by -1024), or leave it out.")
    darkest, brightest = float(voxels.min()), float(voxels.max())
    if voxels.dtype.itemsize == 8 and voxels.dtype.kind in "iu" and max(-darkest, brightest) > EXACT:
        raise DataError(
            f"{path}: holds whole numbers of up to {max(-darkest, brightest):g}, which cannot be told apart above "
            f"{EXACT:g}. Subtract their smallest, or leave it out."
        )
    if not np.isfinite(brightest - darkest):
        raise DataError(
            f"{path}: its values span {darkest:g}..{brightest:g}. Replace those that mean nothing, or leave it out."
        )
    if darkest == brightest:
        raise DataError(f"{path}: is constant ({darkest:g} everywhere). Export it again, or leave it out.")
    if intensity.window is not None:
        level, width = intensity.window
        low, high = level - width / 2, level + width / 2
        if brightest <= low or darkest >= high or (low <= darkest and brightest - darkest < width / 1000):
            raise DataError(
                f"{path}: is constant within its window {low:g}..{high:g} (it holds "
                f"{darkest:g}..{brightest:g}). Is it in HU? Correct the window or the file."
            )
        return low, high, f"level {level:g}, width {width:g}"
    low, high = (float(v) for v in np.percentile(voxels[voxels > darkest], intensity.percentiles, overwrite_input=True))
    if high <= low:  # e.g. a volume of two values
        low, high = darkest, brightest
    lower, upper = intensity.percentiles
    return low, high, f"percentiles {lower:g} and {upper:g} above the minimum"


def scale_slices(
    slices: NDArray[Any], low: float, high: float, size: int
) -> tuple[NDArray[np.uint16], Frame, float, float]:
    """Scale intensities to [0, 1] and bring them to the working frame.

    Args:
        slices: (D, H0, W0) values of the file.
        low: becomes 0, as does everything below.
        high: becomes 1, as does everything above.
        size: side of the working frame, pixels.

    Returns:
        (D, S, S) uint16, the frame, and mean and standard deviation in [0, 1] of the scan's own voxels.
    """
    frame = make_frame(slices.shape[1], slices.shape[2], size)
    framed = np.empty((slices.shape[0], size, size), dtype=np.uint16)
    total = squares = 0.0
    # Slice by slice: a float copy of a whole CT would take gigabytes in each process. In float64: float32 has steps of
    # 64 at 1e9.
    for number, values in enumerate(slices):
        scaled = np.clip((values.astype(np.float64) - low) / (high - low), 0.0, 1.0)
        total += float(scaled.sum())
        squares += float(np.square(scaled).sum())
        framed[number] = np.rint(values_to_frame(scaled, frame).clip(0.0, 1.0) * FULL_SCALE)
    mean = total / slices.size
    return framed, frame, mean, max(squares / slices.size - mean**2, 0.0) ** 0.5


def read_case(case: Case, spec: StoreSpec) -> CaseArrays:
    """Read a case's files, each once, as they go into the store. Unlabelled scans take the same way.

    Raises:
        DataError: something is wrong with a file; the message names it and the mend.
    """
    if case.problem is not None:
        raise DataError(case.problem)
    sources = stamp(case, spec.data_dir)
    voxels, geometry = read_volume(case.image, spec.plane, case.image_files, spec.reading)
    if (needed := 2 * len(voxels) * spec.image_size**2) > MOST_BYTES:
        raise DataError(
            f"{case.image}: has {len(voxels):,} {spec.plane} slices of {voxels.shape[1]} x {voxels.shape[2]} pixels, "
            f"which take {needed / 2**30:.0f} GiB at image_size {spec.image_size}. Choose another plane, or a smaller "
            "image_size."
        )
    low, high, rule = find_window(voxels, spec.intensity, case.image)
    mask_native = counts = mask = None
    if case.mask is not None:
        ids = class_ids(spec.classes)
        mask_native, mask_geometry = read_classes(
            case.mask, spec.plane, ids, spec.values, case.mask_files, spec.reading
        )
        mask_native = lay_on_image(case.mask, mask_native, mask_geometry, case.image, geometry)
        counts = tuple(
            tuple(np.bincount(part.ravel(), minlength=len(spec.classes) + 1)[1:].tolist()) for part in mask_native
        )
    image, frame, mean, deviation = scale_slices(voxels, low, high, spec.image_size)
    if mask_native is not None:
        mask = labels_to_frame(mask_native, frame)
    entry = Entry(case.name, case.patient, sources, geometry, frame, low, high, rule, mean, deviation, counts)
    return CaseArrays(image, mask, mask_native, entry)


def write_case(arrays: CaseArrays, store: Path) -> Entry:
    """Write a case's folder, whole or not at all; what lies there in its place goes.

    Returns:
        The case's entry, which tells its files from damaged ones.

    Raises:
        DiskError: the disk is full.
    """
    name = arrays.entry.name
    part, final = store / f".part-{os.getpid()}-{name}", store / name
    try:
        with explaining_full_disk(final, part, movable_of(store)):
            part.mkdir(parents=True)
            names = ["image.npy"]
            np.save(part / "image.npy", arrays.image)
            if arrays.mask is not None and arrays.mask_native is not None:
                np.save(part / "mask.npy", arrays.mask)
                np.savez_compressed(part / "mask_native.npz", mask=arrays.mask_native)
                names += ["mask.npy", "mask_native.npz"]
            entry = replace(arrays.entry, files=mark_files(part, names))
            # Last: what is written to after it is looked at more closely (``wholeness.find_damage``).
            (part / ENTRY).write_text(json.dumps(seal(entry.to_json())))
            remove(final)  # of a source that has changed, or damaged
            part.rename(final)
            return entry
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _explaining_damage(path: Path) -> Iterator[None]:
    """Turn what numpy raises of a file that is gone or damaged into one error with the mend.

    Raises:
        DataError: it is.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        mend = f"The same command, or `{command('prepare')}`, prepares its volume again."
        raise DataError(f"{path} cannot be read ({error}). {mend}") from error


class SliceReader:
    """Reads slices of a store. Files are mapped when first needed, the latest ones kept open.

    It pickles, and may be forked: each process opens its own maps.

    Args:
        store: the store's folder.
        max_open: how many files are kept mapped; each costs address space, neither memory nor a file
            descriptor, and opening one takes ten times as long as reading a slice.
    """

    def __init__(self, store: Path, max_open: int = 1024) -> None:
        self.store = store
        self.max_open = max_open
        self._maps: OrderedDict[tuple[str, str], NDArray[Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "max_open": self.max_open, "_maps": OrderedDict()}

    def image(self, case: str) -> NDArray[np.uint16]:
        """(D, S, S) uint16, mapped, not read."""
        return self._map(case, "image.npy")

    def mask(self, case: str) -> NDArray[np.uint8]:
        """(D, S, S) uint8 expert class ids on the working frame, mapped, not read."""
        return self._map(case, "mask.npy")

    def mask_native(self, case: str) -> NDArray[np.uint8]:
        """(D, H0, W0) uint8 expert class ids on the scan's own slices, read whole."""
        path = self.store / case / "mask_native.npz"
        with _explaining_damage(path), np.load(path) as arrays:
            return arrays["mask"]

    def _map(self, case: str, name: str) -> NDArray[Any]:
        key = (case, name)
        if key in self._maps:
            self._maps.move_to_end(key)
        else:
            path = self.store / case / name
            with _explaining_damage(path):
                self._maps[key] = np.load(path, mmap_mode="r")
            if len(self._maps) > self.max_open:
                self._maps.popitem(last=False)
        return self._maps[key]
