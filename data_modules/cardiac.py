"""Medical Segmentation Decathlon, Task02_Heart: the left atrium in 20 cardiac MRI volumes.

320 x 320 x 90 to 130 voxels, 1.25 x 1.25 x 1.37 mm; 10 more without masks, which are never used. Antonelli
et al., Nature Communications 2022, doi 10.1038/s41467-022-30695-9. CC BY-SA 4.0.
"""

from __future__ import annotations

from pathlib import Path

from data_modules.base import SliceDataModule
from data_modules.cases import Case, DatasetInfo, Intensity, case_of, require_cases, warn_of_passed_over
from data_modules.nifti_files import find_folder, find_root, list_nifti
from data_modules.sources import Sources


class MSDCardiac(SliceDataModule):
    """MSD Task02_Heart. Arguments are those of ``SliceDataModule``."""

    info = DatasetInfo(
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
        example=(
            "Task02_Heart/imagesTr/la_{number:03d}.nii.gz",
            "Task02_Heart/labelsTr/la_{number:03d}.nii.gz",
        ),
    )

    def find_cases(self) -> list[Case]:
        """The training cases of ``Task02_Heart``, or of a folder above it.

        Raises:
            DataError: no case.
        """
        root = Path(self.data_dir)
        task = find_root(root, "imagesTr", "Task02_Heart")
        places = [find_folder(task, name) for name in ("imagesTr", "labelsTr")]
        images, masks = (list_nifti(place) for place in places)
        warn_of_passed_over(
            [*images.passed_over, *masks.passed_over],
            task,
            ".nii and .nii.gz directly in imagesTr/ and labelsTr/",
        )
        if not images.files:
            return require_cases([], self.info, places[0] if places[0].is_dir() else root)
        cases = []
        for name in {**images.files, **masks.files}:
            image, mask = images.files.get(name), masks.files.get(name)
            problem = None
            if mask is not None and image is None:
                problem = f"{mask.path}: is a mask without its image {task / 'imagesTr' / name}.nii.gz. Get the image."
            elif image is not None and mask is None:
                problem = (
                    f"{image.path}: has no mask {task / 'labelsTr' / name}.nii.gz. Get the mask, or remove the image."
                )
            cases.append(case_of(name, image, mask, problem))
        return require_cases(cases, self.info, root)

    def sources(self) -> Sources:
        """The two folders of the training cases."""
        return Sources(self.data_dir, ("imagesTr", "labelsTr"), "Task02_Heart")
