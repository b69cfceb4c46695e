"""A check's headers: how long those of 1,000 scans take, and what finding the scans takes before.

The last line is one JSON object: ``headers_s`` (image and mask of each scan, target below 10) and ``find_s``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from data_modules.cases import Intensity
from data_modules.findings import find_header_faults
from data_modules.folder_files import Layout, find_folder_cases
from data_modules.store_index import StoreSpec

SHAPE = (64, 64, 20)


def write_scans(folder: Path, number: int) -> None:
    """Compressed images and masks, all of one content: a header is read without its voxels."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 1000, SHAPE).astype(np.int16)
    for name, voxels in (("images", image), ("masks", (image > 900).astype(np.uint8))):
        (folder / name).mkdir()
        first = folder / name / "scan0.nii.gz"
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), first)
        for n in range(1, number):
            first.with_name(f"scan{n}.nii.gz").write_bytes(first.read_bytes())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="5,000 scans instead of 1,000")
    number = 5000 if parser.parse_args().full else 1000
    with tempfile.TemporaryDirectory() as name:
        write_scans(Path(name), number)
        spec = StoreSpec("bench", name, "", 64, "axial", Intensity(), {"box": (1,)}, ())
        start = time.perf_counter()
        cases = find_folder_cases(Layout(name), ["box"])
        found = time.perf_counter()
        faults = find_header_faults(cases, spec)
        read = time.perf_counter()
    assert not faults
    assert len(cases) == number
    result = {"headers_s": round(read - found, 2), "find_s": round(found - start, 2)}
    print(f"{number} scans, image and mask of {' x '.join(map(str, SHAPE))}, compressed")
    print(f"{'finding them':32}{result['find_s']:10.2f} s")
    print(f"{'reading their headers':32}{result['headers_s']:10.2f} s    target < 10 for 1,000")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
