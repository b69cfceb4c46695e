"""Small seeded volumes in the layouts of the public data sets. Bright boxes are the targets."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_modules.cases import DatasetInfo

SHAPE = (20, 16, 6)
RAS = np.diag([1.5, 2.0, 3.0, 1.0])


def draw_scan(
    seed: int, values: tuple[int, ...] = (1,), shape: tuple[int, int, int] = SHAPE
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """A volume of noise with one bright box per mask value, which misses the first and last slice."""
    rng = np.random.default_rng(seed)
    image = rng.integers(1, 200, shape).astype(np.int16)
    image[0] = 0  # air: the minimum
    mask = np.zeros(shape, dtype=np.uint8)
    room = shape[0] // len(values)
    for place, value in enumerate(values):
        box = (slice(place * room + 1, (place + 1) * room), slice(3, 10), slice(1, shape[2] - 1))
        mask[box] = value
        image[box] += 600 + 100 * place
    return image, mask


def save_nifti(path: Path, voxels: NDArray, affine: NDArray[np.float64] = RAS) -> Path:
    """Write a volume, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def draw_data_set(root: Path, info: DatasetInfo, cases: int = 6) -> Path:
    """Scans with masks where a data set says that its own lie (``info.example``); returns ``root``."""
    assert info.example is not None
    for number in range(1, cases + 1):
        for path, voxels in zip(info.example, draw_scan(number, info.values or (1,)), strict=True):
            save_nifti(root / path.format(number=number), voxels)
    return root


def fake_folder(root: Path, cases: int = 5, table: bool = False, masks: bool = True) -> Path:
    """Folder layout with the class "tumour": [1]; returns its root."""
    rows = []
    for number in range(cases):
        image, mask = draw_scan(number)
        save_nifti(root / "images" / f"scan{number}.nii.gz", image)
        if masks:
            save_nifti(root / "masks" / f"scan{number}.nii.gz", mask)
        rows += [(f"scan{number}", k, int(mask[:, :, k].any())) for k in range(SHAPE[2])]
    if table:
        write_table(root, rows)
    return root


def write_table(root: Path, rows: list[tuple[str, int, int]]) -> None:
    """``labels.csv`` with the class "tumour"."""
    with (root / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("case", "slice", "tumour"), *rows])


def fake_brats(root: Path, cases: int = 4, ending: str = ".nii.gz", doubled: bool = False) -> Path:
    """BraTS 2019 with FLAIR, T1ce and masks; returns the folder above the data set's own."""
    top = root / "MICCAI_BraTS_2019_Data_Training"
    data = top / "MICCAI_BraTS_2019_Data_Training" if doubled else top
    for number in range(cases):
        name = f"BraTS19_FAKE_{number}_1"
        folder = data / ("HGG" if number % 2 else "LGG") / name
        image, mask = draw_scan(number, (1, 2, 4))
        for part, voxels in (("flair", image), ("t1ce", image[::-1].copy()), ("seg", mask)):
            save_nifti(folder / f"{name}_{part}{ending}", voxels, np.diag([-1.0, -1.0, 1.0, 1.0]))
            (folder / f"._{name}_{part}{ending}").write_bytes(b"Mac OS X")
    return root


def fake_abdomen(root: Path, numbers: tuple[int, ...] = (1, 2, 297, 928), unlabelled: int = 1) -> Path:
    """AbdomenCT-1K with nested parts and ``Mask``; some images have no mask."""
    part = root / "AbdomenCT-1K-ImagePart1" / "AbdomenCT-1K-ImagePart1"
    for number in (*numbers, *range(1001, 1001 + unlabelled)):
        image, mask = draw_scan(number, (1, 2, 3, 4))
        save_nifti(part / f"Case_{number:05d}_0000.nii.gz", (image - 400).astype(np.int16))
        (part / f"._Case_{number:05d}_0000.nii.gz").write_bytes(b"Mac OS X")
        if number in numbers:
            save_nifti(root / "Mask" / f"Case_{number:05d}.nii.gz", mask)
    return root


def fake_cardiac(root: Path, cases: int = 4) -> Path:
    """MSD Task02_Heart with a test image and macOS's ``._`` files; returns the folder above it."""
    task = root / "Task02_Heart"
    for number in range(3, 3 + cases):
        image, mask = draw_scan(number)
        save_nifti(task / "imagesTr" / f"la_{number:03d}.nii.gz", image)
        save_nifti(task / "labelsTr" / f"la_{number:03d}.nii.gz", mask)
        (task / "imagesTr" / f"._la_{number:03d}.nii.gz").write_bytes(b"Mac OS X")
        (task / "labelsTr" / f"._la_{number:03d}.nii.gz").write_bytes(b"Mac OS X")
    save_nifti(task / "imagesTs" / "la_001.nii.gz", draw_scan(1)[0])
    return root


def write_checkpoint(path: Path, content: bytes = b"weights") -> Path:
    """A file that is whole as torch's checkpoints are, without torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(f"{path.stem}/data.pkl", content)
    return path


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root
