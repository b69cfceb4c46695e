"""Medical Segmentation Decathlon, Task02_Heart: the left atrium in 20 cardiac MRI volumes.

320 x 320 x 90 to 130 voxels, 1.25 x 1.25 x 1.37 mm; 10 more without masks, which are never used. Antonelli
et al., Nature Communications 2022, doi 10.1038/s41467-022-30695-9. CC BY-SA 4.0.
"""

from __future__ import annotations

from pathlib import Path

from data_modules.base import SliceDataModule
from data_modules.cases import Case, DataSet, Intensity, list_nifti, require_cases

FACTS = DataSet(
    name="cardiac",
    classes={"left_atrium": (1,)},
    default=("left_atrium",),
    values=(1,),
    intensity=Intensity(percentiles=(0.5, 99.5)),
    layout=(
        "  Task02_Heart/\n"
        "    imagesTr/la_003.nii.gz ...\n"
        "    labelsTr/la_003.nii.gz ...\n"
        "    imagesTs/                  not used: no labels"
    ),
    home="http://medicaldecathlon.com",
)


def find_cases(root: Path) -> list[Case]:
    """The training cases of ``Task02_Heart``, or of the folder above it.

    Raises:
        DataError: no case.
    """
    task = root / "Task02_Heart" if (root / "Task02_Heart").is_dir() else root
    images, masks = list_nifti(task / "imagesTr"), list_nifti(task / "labelsTr")
    cases = []
    for name in sorted({*images, *masks}):
        image, mask = images.get(name), masks.get(name)
        problem = None
        if image is None:
            problem = f"{mask}: is a mask without its image {task / 'imagesTr' / name}.nii.gz. Get the image."
        elif mask is None:
            problem = (
                f"{image}: has no mask {task / 'labelsTr' / name}.nii.gz. Get the mask, or remove the image."
            )
        cases.append(Case(name, name, str(image or ""), str(mask) if mask else None, problem=problem))
    return require_cases(cases if images else [], FACTS, root)


class MSDCardiac(SliceDataModule):
    """MSD Task02_Heart. Arguments are those of ``SliceDataModule``."""

    facts = FACTS

    def find_cases(self) -> list[Case]:
        """The cases; see the module's ``find_cases``."""
        return find_cases(Path(self.data_dir))
