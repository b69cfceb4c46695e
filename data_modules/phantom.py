"""Phantom: abdomen-like volumes drawn by the program, so that everything runs without a download.

Two targets, ``lesion`` and ``cyst``, and a distractor: a bright ring-shaped vessel that appears in most
slices with a lesion and in few others, and is in no mask. Image-level labels alone hardly tell it from
the lesion; sub-classes are meant to, because it is missing in some of the lesion's slices. How far they do:
docs/results.md.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from data_modules.base import SliceDataModule
from data_modules.cases import Case, DatasetInfo, Intensity, case_of, require_cases
from data_modules.config import Split
from data_modules.nifti_files import list_nifti
from data_modules.phantom_drawing import CYST, LESION, VERSION, Drawing, PhantomParameters, draw_volume
from data_modules.sources import Sources
from weakmedsam.errors import check_range
from weakmedsam.system.atomic_io import SCANS, explaining_full_disk
from weakmedsam.system.commands import command
from weakmedsam.system.progress import tracked

DEFAULT = PhantomParameters()
DEFAULT_SPLIT = Split(fractions=(0.6, 0.2, 0.2))
"""80/10/10 of 30 volumes would test on three."""


def phantom_folder(data_dir: str | Path, parameters: PhantomParameters, num_volumes: int) -> Path:
    """Folder of one set: its name ends in a key of all that decides the set, so sets never mix."""
    key = hashlib.sha256(_describe(parameters, num_volumes).encode()).hexdigest()[:8]
    return Path(data_dir) / f"phantom-{key}"


def write_phantom(data_dir: str | Path, parameters: PhantomParameters, num_volumes: int) -> Path:
    """Draw a set, or what is missing of it; quick when all is there.

    A volume appears whole or not at all: the mask first, then the image, each renamed into place.
    A killed call is continued by the next one and ends with the same files.

    Args:
        data_dir: where the set's own folder goes.
        parameters: how the volumes look.
        num_volumes: how many.

    Returns:
        The set's folder: ``images``, ``masks`` and ``phantom.json``.
    """
    root = phantom_folder(data_dir, parameters, num_volumes)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        names = [f"phantom_{number:03d}.nii.gz" for number in range(num_volumes)]
        missing = [n for n, name in enumerate(names) if not _is_there(root, name)]
        for number in tracked(missing, len(missing), "drawing", kept=False):
            write_volume(root, names[number], draw_volume(parameters, number), parameters.spacing)
        description = root / "phantom.json"
        if not description.exists():
            part = root / ".part-phantom.json"
            with explaining_full_disk(description, part, SCANS):
                part.write_text(_describe(parameters, num_volumes) + "\n", encoding="utf-8")
                part.replace(description)
    return root


def write_volume(root: Path, name: str, drawing: Drawing, spacing: tuple[float, float, float]) -> None:
    """Write a drawn volume into ``images`` and ``masks`` of a folder, the mask first."""
    for folder, slices in (("masks", drawing.mask), ("images", drawing.image)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        _write_nifti(root / folder / name, slices, spacing)


class Phantom(SliceDataModule):
    """Drawn volumes; takes what ``SliceDataModule`` takes, and what follows.

    Args:
        data_dir: where the drawn set goes, in a folder of its own that is named by its parameters.
        num_volumes: how many volumes are drawn, each a patient; at least 3: one for each split.
        phantom: how they look and how hard they are.
        image_size: side of the square working frame, pixels, 8 to 4,096.
        split: which volumes train, validate and test.

    Raises:
        ConfigError: a parameter out of its range.
    """

    info = DatasetInfo(
        name="phantom",
        classes={"lesion": (LESION,), "cyst": (CYST,)},
        default=("lesion", "cyst"),
        values=(LESION, CYST),
        intensity=Intensity(percentiles=(0.5, 99.5)),
        layout=(
            "phantom-<key>/\n  phantom.json\n  images/phantom_000.nii.gz\n  masks/phantom_000.nii.gz   1 lesion, 2 cyst"
        ),
        home=f"nowhere: the program draws it, `{command('prepare', dataset='phantom')}`",
    )

    def __init__(
        self,
        data_dir: str = "data/scans",
        num_volumes: int = 30,
        phantom: PhantomParameters = DEFAULT,
        image_size: int = 128,
        split: Split = DEFAULT_SPLIT,
        **kwargs: Any,
    ) -> None:
        check_range("data.num_volumes", num_volumes, 3, 1_000_000)  # one for each split
        folder = phantom_folder(data_dir, phantom, num_volumes)
        super().__init__(str(folder), image_size, split=split, **kwargs)
        self.num_volumes = num_volumes
        self.phantom = phantom

    def draw_scans(self) -> None:
        """Draw the volumes that are missing; they are then prepared as any others."""
        write_phantom(Path(self.data_dir).parent, self.phantom, self.num_volumes)

    def find_cases(self) -> list[Case]:
        """Cases of the drawn set, sorted by name; each volume is a patient of its own.

        Raises:
            DataError: none found; the message shows the layout.
        """
        root = Path(self.data_dir)
        masks = list_nifti(root / "masks").files
        images = list_nifti(root / "images").files
        cases = [case_of(name, image, masks[name]) for name, image in images.items() if name in masks]
        return require_cases(cases, self.info, root)

    def sources(self) -> Sources:
        """The two folders of the drawn set."""
        return Sources(self.data_dir, ("images", "masks"))


def _describe(parameters: PhantomParameters, num_volumes: int) -> str:
    facts = {"version": VERSION, "num_volumes": num_volumes, **asdict(parameters)}
    return json.dumps(facts, indent=2, sort_keys=True)


def _is_there(root: Path, name: str) -> bool:
    return (root / "images" / name).exists() and (root / "masks" / name).exists()


def _write_nifti(path: Path, slices: NDArray[np.generic], spacing: tuple[float, float, float]) -> None:
    """Write (D, H, W) slices, rows from front to back, columns from right to left, feet first.

    The file's axes run left, front, up (LAS), with the centre at 0 mm, as scanners commonly write them:
    reading it without regard to its affine turns it upside down.
    """
    voxels = np.ascontiguousarray(slices[:, ::-1].transpose(2, 1, 0))
    row, column, distance = spacing
    affine = np.diag([-column, row, distance, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(voxels.shape) - 1) / 2)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    part = path.with_name(f".part-{path.name}")  # keeps .nii.gz, by which nibabel chooses the format
    try:
        with explaining_full_disk(path, part, SCANS):
            nib.save(image, part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
