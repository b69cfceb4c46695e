"""BraTS 2019: brain tumours in MRI, 259 high-grade and 76 low-grade patients.

240 x 240 x 155 voxels of 1 mm, skull removed, four modalities. Mask values: 1 necrotic core, 2 oedema,
4 enhancing tumour; whole tumour is all three. Menze et al., IEEE TMI 2015, doi
10.1109/TMI.2014.2377694; Bakas et al., Scientific Data 2017, doi 10.1038/sdata.2017.117.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from data_modules.augmentation import Augmentation
from data_modules.base import SliceDataModule, Supervision
from data_modules.cases import (
    Case,
    DataSet,
    Intensity,
    first_problem,
    require_cases,
    warn_of_left_out,
    warn_of_passed_over,
)
from data_modules.nifti_files import NiftiFile, list_nifti, only_one, walk
from data_modules.prepare import OnBadCase
from data_modules.sources import Sources
from data_modules.volumes import Plane

Modality = Literal["flair", "t1", "t1ce", "t2"]

FACTS = DataSet(
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
    published_split=Path(__file__).with_name("brats2019_authors.csv"),
)


PARTS = ("flair", "t1", "t1ce", "t2", "seg")


def find_cases(root: Path, modality: str = "flair") -> list[Case]:
    """The cases below a folder: the data set's own, the one above it, or a copy with a doubled root.

    Args:
        root: the folder.
        modality: flair, t1, t1ce or t2; the others need not be there.

    Raises:
        DataError: no case, or a case that is there twice.
    """
    cases = []
    tree, passed_over = walk(root), []
    warn_of_left_out(tree, root)
    for folder in tree.folders:
        listing, name = list_nifti(folder), folder.name
        passed_over += listing.passed_over if name.lower().startswith("brats19_") else []
        if not _is_case(folder):
            passed_over += [file.path for file in listing.files.values()]
            continue
        named: dict[str, list[NiftiFile]] = {}
        for stem, file in listing.files.items():
            named.setdefault(stem.lower(), []).append(file)
        found = {part: named.pop(f"{name}_{part}".lower(), []) for part in PARTS}
        own = {part: only_one(files) if files else None for part, files in found.items()}
        passed_over += [file.path for files in named.values() for file in files]
        image, mask = own[modality], own["seg"]
        missing = [part for part in (modality, "seg") if own[part] is None]
        problem = first_problem(image, mask)
        if problem is None and missing:
            other = "leave the case out" if missing[0] == "seg" else "choose another modality"
            problem = f"{folder}: lacks {name}_{missing[0]}.nii.gz. Get it, or {other}."
        cases.append(
            Case(
                name,
                name,
                str(image.path) if image else "",
                str(mask.path) if mask else None,
                problem=problem,
            )
        )
    warn_of_passed_over(passed_over, root, "HGG/<case>/<case>_<part>.nii.gz, or .nii, and LGG/...")
    return require_cases(cases, FACTS, root)


def _is_case(folder: Path) -> bool:
    above = folder.absolute().parent.name  # the data's own folder may be given as "."
    return folder.name.lower().startswith("brats19_") and above.lower() in ("hgg", "lgg")


class BraTS2019(SliceDataModule):
    """BraTS 2019. Arguments beside those of ``SliceDataModule``.

    Args:
        data_dir: the folder of the data set, or one above it.
        modality: which of the four MRI volumes is the image. Published: flair.
    """

    facts = FACTS

    def __init__(
        self,
        data_dir: str,
        modality: Modality = "flair",
        store_dir: str = "data",
        image_size: int = 256,
        plane: Plane = "axial",
        classes: dict[str, list[int]] | None = None,
        min_pixels: int = 10,
        window: tuple[float, float] | None = None,
        percentiles: tuple[float, float] | None = None,
        split_file: str | None = None,
        split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        on_bad_case: OnBadCase = "raise",
        supervision: Supervision = "image",
        pseudo_labels_dir: str | None = None,
        only_positive: bool = False,
        augment: Augmentation | None = None,
        batch_size: int = 24,
        num_workers: int = 2,
        prepare_workers: int | None = None,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            store_dir=store_dir,
            image_size=image_size,
            plane=plane,
            classes=classes,
            min_pixels=min_pixels,
            window=window,
            percentiles=percentiles,
            split_file=split_file,
            split_fractions=split_fractions,
            seed=seed,
            on_bad_case=on_bad_case,
            supervision=supervision,
            pseudo_labels_dir=pseudo_labels_dir,
            only_positive=only_positive,
            augment=augment,
            batch_size=batch_size,
            num_workers=num_workers,
            prepare_workers=prepare_workers,
        )
        self.modality = modality

    def find_cases(self) -> list[Case]:
        """The cases; see the module's ``find_cases``."""
        return find_cases(Path(self.data_dir), self.modality)

    def sources(self) -> Sources:
        """The modality and the masks in all folders."""
        return Sources(self.data_dir, pattern=rf"BraTS19_.*_({self.modality}|seg)$")

    def variant(self) -> str:
        """The modality."""
        return self.modality
