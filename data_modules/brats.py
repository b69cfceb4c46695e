"""BraTS 2019: brain tumours in MRI, 259 high-grade and 76 low-grade patients.

240 x 240 x 155 voxels of 1 mm, skull removed, four modalities. Mask values: 1 necrotic core, 2 oedema,
4 enhancing tumour; whole tumour is all three. Menze et al., IEEE TMI 2015, doi
10.1109/TMI.2014.2377694; Bakas et al., Scientific Data 2017, doi 10.1038/sdata.2017.117.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
from data_modules.nifti_files import ScanFile, list_nifti, only_one, walk
from data_modules.sources import Sources

Modality = Literal["flair", "t1", "t1ce", "t2"]

PARTS = ("flair", "t1", "t1ce", "t2", "seg")


class BraTS2019(SliceDataModule):
    """BraTS 2019. Arguments beside those of ``SliceDataModule``.

    Args:
        data_dir: the folder of the data set, or one above it.
        modality: which of the four MRI volumes is the image. Published: flair.
    """

    info = DatasetInfo(
        name="brats",
        classes={"tumour": (1, 2, 4), "necrosis": (1,), "oedema": (2,), "enhancing": (4,)},
        default=("tumour",),
        values=(1, 2, 4),
        intensity=Intensity(percentiles=(0.5, 99.5)),
        layout=(
            "  MICCAI_BraTS_2019_Data_Training/\n"
            "    HGG/BraTS19_<site>_<id>_1/BraTS19_<site>_<id>_1_{flair,t1,t1ce,t2,seg}.nii.gz   (or .nii)\n"
            "    LGG/..."
        ),
        home="https://www.med.upenn.edu/cbica/brats2019/data.html (registration needed)",
        example=(
            "HGG/BraTS19_SITE_{number}_1/BraTS19_SITE_{number}_1_flair.nii.gz",
            "HGG/BraTS19_SITE_{number}_1/BraTS19_SITE_{number}_1_seg.nii.gz",
        ),
        published_split=Path(__file__).with_name("brats2019_authors.csv"),
    )

    def __init__(self, data_dir: str, modality: Modality = "flair", **kwargs: Any) -> None:
        super().__init__(data_dir, **kwargs)
        self.modality = modality

    def find_cases(self) -> list[Case]:
        """The cases below a folder: the data set's own, the one above it, or a copy with a doubled root.

        Of the modalities only the chosen one has to be there.

        Raises:
            DataError: no case, or a case that is there twice.
        """
        root = Path(self.data_dir)
        cases = []
        tree, passed_over = walk(root), []
        warn_of_left_out(tree, root)
        for folder in tree.folders:
            listing, name = list_nifti(folder), folder.name
            passed_over += listing.passed_over if name.lower().startswith("brats19_") else []
            if not _is_case(folder):
                passed_over += [file.path for file in listing.files.values()]
                continue
            named: dict[str, list[ScanFile]] = {}
            for stem, file in listing.files.items():
                named.setdefault(stem.lower(), []).append(file)
            found = {part: named.pop(f"{name}_{part}".lower(), []) for part in PARTS}
            own = {part: only_one(files) if files else None for part, files in found.items()}
            passed_over += [file.path for files in named.values() for file in files]
            missing = [part for part in (self.modality, "seg") if own[part] is None]
            problem = None
            if missing:
                other = "leave the case out" if missing[0] == "seg" else "choose another modality"
                problem = f"{folder}: lacks {name}_{missing[0]}.nii.gz. Get it, or {other}."
            cases.append(case_of(name, own[self.modality], own["seg"], problem))
        warn_of_passed_over(passed_over, root, "HGG/<case>/<case>_<part>.nii.gz, or .nii, and LGG/...")
        return require_cases(cases, self.info, root)

    def sources(self) -> Sources:
        """The modality and the masks in all folders."""
        return Sources(self.data_dir, pattern=rf"BraTS19_.*_({self.modality}|seg)$")

    def variant(self) -> str:
        """The modality."""
        return self.modality


def _is_case(folder: Path) -> bool:
    above = folder.absolute().parent.name  # the data's own folder may be given as "."
    return folder.name.lower().startswith("brats19_") and above.lower() in ("hgg", "lgg")
