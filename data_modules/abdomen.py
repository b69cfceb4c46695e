"""AbdomenCT-1K: liver, kidneys, spleen and pancreas in 1062 abdominal CTs, 1000 of them with masks.

From 512 x 79 x 31 to 796 x 512 x 1026 voxels, 0.45 to 8 mm. About 20 headers state a false 1 x 1 x 1
mm; they are warned of, as the truth is unknown. Ma et al., IEEE TPAMI 2022, doi
10.1109/TPAMI.2021.3100536. CC BY-NC-SA.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from data_modules.base import SliceDataModule
from data_modules.cases import (
    Case,
    DatasetInfo,
    Intensity,
    case_of,
    require_cases,
    warn_of_left_out,
    warn_of_passed_over,
)
from data_modules.nifti_files import ScanFile, list_nifti, walk
from data_modules.sources import Sources

_log = logging.getLogger(__name__)

SAME_SCAN = {"00928": "00297"}
"""Case -> the case it is the same scan as: one patient, so that they stay in one split."""

NAME = r"Case_(\d+)(_0000)?$"
"""Names without ending: of images with the second part, of masks without."""


class AbdomenCT1K(SliceDataModule):
    """AbdomenCT-1K. Arguments are those of ``SliceDataModule``."""

    info = DatasetInfo(
        name="abdomen",
        classes={"liver": (1,), "kidney": (2,), "spleen": (3,), "pancreas": (4,)},
        default=("liver", "kidney", "spleen", "pancreas"),
        values=(1, 2, 3, 4),
        intensity=Intensity(window=(40.0, 400.0)),
        layout=(
            "  Case_00001_0000.nii.gz ...   images, in any folders below (nested parts, or Images/)\n"
            "  Mask/Case_00001.nii.gz ...   masks (Mask/ or Masks/)"
        ),
        home="https://github.com/JunMa11/AbdomenCT-1K",
        example=("part1/Case_{number:05d}_0000.nii.gz", "Mask/Case_{number:05d}.nii.gz"),
        false_spacing=(1.0, 1.0, 1.0),
    )

    def find_cases(self) -> list[Case]:
        """The cases below a folder that have a mask; 62 images have none and are left out.

        Raises:
            DataError: no case, or an image or mask that is there twice.
        """
        root = Path(self.data_dir)
        images, masks = _by_number(root)
        unlabelled = sum(number not in masks for number in images)
        if unlabelled:
            _log.info("%d of %d images have no mask and are left out", unlabelled, len(images))
        cases = []
        for number, paths in masks.items():
            name, found = f"Case_{number}", images.get(number, [])
            problem = next((file.problem for file in (*found, *paths) if file.problem), None)
            if problem is None and not found:
                problem = f"{paths[0].path}: has no image {name}_0000.nii.gz. Get the image, or remove the mask."
            elif problem is None and (len(found) > 1 or len(paths) > 1):
                problem = f"{[str(f.path) for f in (*found, *paths)]}: {name} is there more than once. Keep one."
            patient = f"Case_{SAME_SCAN.get(number, number)}"
            cases.append(case_of(name, found[0] if found else None, paths[0], problem, patient))
        return require_cases(cases if images else [], self.info, root)

    def sources(self) -> Sources:
        """Images and masks in all folders."""
        return Sources(self.data_dir, pattern=NAME)


def _by_number(root: Path) -> tuple[dict[str, list[ScanFile]], dict[str, list[ScanFile]]]:
    """Images and masks below a folder, by the number in their names."""
    images: dict[str, list[ScanFile]] = {}
    masks: dict[str, list[ScanFile]] = {}
    tree, passed_over = walk(root), []
    warn_of_left_out(tree, root)
    for folder in tree.folders:
        listing = list_nifti(folder)
        for name, file in listing.files.items():
            if match := re.match(NAME, name, re.IGNORECASE):
                (images if match[2] else masks).setdefault(match[1], []).append(file)
            else:
                passed_over.append(file.path)
        passed_over += [path for path in listing.passed_over if path.name.lower().startswith("case_")]
    warn_of_passed_over(passed_over, root, "Case_<number>_0000.nii.gz and Case_<number>.nii.gz, or .nii")
    return images, masks
