"""The slice store: how long a random slice takes, and how often a volume is read while preparing.

The last line is one JSON object: ``slice_read_ms`` (target below 0.5), ``slice_read_p99_ms``,
``whole_volume_ms`` (what a slice costs without a store: reading its compressed volume) and
``reads_per_volume`` (target 1).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np

from data_modules.cases import Case, Intensity
from data_modules.formats import nifti
from data_modules.prepare import prepare
from data_modules.store import SliceReader
from data_modules.store_index import StoreSpec

IMAGE_SIZE = 256
ROUNDS, DRAWS = 20, 4000
COUNTED = 3
"""Volumes prepared in this process, where reads can be counted; the rest by all processors."""


def write_scans(folder: Path, number: int, slices: int) -> list[Case]:
    """Volumes of noise with a box, 256 x 256, image and mask: each is drawn from one pool of noise."""
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 1000, (IMAGE_SIZE, IMAGE_SIZE, slices + number)).astype(np.int16)
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE, slices), np.uint8)
    mask[60:120, 80:160, slices // 4 : slices // 2] = 1
    cases = []
    for n in range(number):
        image, target = folder / f"i{n}.nii", folder / f"m{n}.nii"
        nib.save(nib.Nifti1Image(pool[:, :, n : n + slices], np.eye(4)), image)
        nib.save(nib.Nifti1Image(mask, np.eye(4)), target)
        cases.append(Case(f"case{n}", f"case{n}", str(image), str(target)))
    return cases


def count_reads(cases: list[Case], spec: StoreSpec, store_dir: Path) -> float:
    """Prepare in this process, and count how often files are opened: reads per file."""
    with mock.patch.object(nifti, "_open", side_effect=nifti._open) as counter:
        prepare(cases, spec, store_dir, workers=1)
    return counter.call_count / (2 * len(cases))


def time_slices(store: Path, cases: list[Case], slices: int, draws: int) -> np.ndarray:
    """Milliseconds of each of ``draws`` random slices; the first of a volume opens its file."""
    rng = np.random.default_rng(1)
    reader = SliceReader(store)
    taken = np.empty(draws)
    for n in range(draws):
        case, number = cases[rng.integers(len(cases))].name, rng.integers(slices)
        start = time.perf_counter()
        reader.image(case)[number].astype(np.float32)
        taken[n] = 1e3 * (time.perf_counter() - start)
    return taken


def time_volume(folder: Path, slices: int) -> float:
    """Milliseconds of a slice without a store: its compressed volume is read for it."""
    rng = np.random.default_rng(2)
    path = folder / "whole.nii.gz"
    voxels = rng.integers(0, 1000, (IMAGE_SIZE, IMAGE_SIZE, slices)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    start = time.perf_counter()
    image: Any = nib.load(path)
    np.asanyarray(image.dataobj)[:, :, slices // 2].astype(np.float32)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="200 volumes instead of 40")
    number, slices = (200 if parser.parse_args().full else 40), 100
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = write_scans(folder, number, slices)
        spec = StoreSpec("bench", name, "", IMAGE_SIZE, "axial", Intensity(), {"box": (1,)}, ())
        reads = count_reads(cases[:COUNTED], spec, folder)
        start = time.perf_counter()
        prepare(cases, spec, folder)
        prepared = time.perf_counter() - start
        taken = time_slices(spec.folder(folder), cases, slices, DRAWS)
        whole = time_volume(folder, slices)
    result = {
        # The median of rounds' means: opening files counts, a moment of another program's does not.
        "slice_read_ms": round(float(np.median(taken.reshape(ROUNDS, -1).mean(axis=1))), 4),
        "slice_read_p99_ms": round(float(np.percentile(taken, 99)), 4),
        "whole_volume_ms": round(whole, 1),
        "reads_per_volume": reads,
    }
    print(f"{number} volumes x {slices} slices x {IMAGE_SIZE} x {IMAGE_SIZE}, prepared in {prepared:.1f} s")
    print(f"{'random slice, mean':32}{result['slice_read_ms']:10.4f} ms   target < 0.5")
    print(f"{'random slice, 99th percentile':32}{result['slice_read_p99_ms']:10.4f} ms")
    print(f"{'without a store (.nii.gz)':32}{result['whole_volume_ms']:10.1f} ms")
    print(f"{'reads of a volume, preparing':32}{reads:10.2f}      target 1")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
