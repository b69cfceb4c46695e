"""Your own data: a folder of scans, with masks, or a label table, or both."""

from __future__ import annotations

from typing import Any

from data_modules.base import SliceDataModule
from data_modules.cases import Case
from data_modules.folder_files import INFO, Layout, find_folder_cases
from data_modules.formats.volume import Reading
from data_modules.sources import Sources


class Folder(SliceDataModule):
    """Your own volumes. Arguments beside those of ``SliceDataModule``.

    Args:
        data_dir: the folder, laid out as ``Folder.info.layout``, or as ``images`` and ``masks`` say.
        classes: class name -> mask values; the names are also those of ``labels.csv``. Needed.
        background_values: further mask values that may occur and count as background; any other value
            is an error.
        images: folder of the images in ``data_dir``, with any folders below it, or a pattern of their paths, e.g.
            ``sub-*/anat/*_T1w.nii.gz``: what its ``*`` stand for is the case's name.
        masks: folder or pattern of the masks; the case's name has to be the same.
        series: of DICOM, pattern of modality and description, e.g. ``MR t1*``; null takes all.
        channel: of images with several volumes or with colours which one is taken, from 0; null: they have one.
        spacing: [x, y, z], mm between columns, rows and slices, of files that do not say it (pictures); null takes 1.
    """

    info = INFO

    def __init__(
        self,
        data_dir: str,
        classes: dict[str, list[int]],
        background_values: tuple[int, ...] = (),
        images: str = "images",
        masks: str = "masks",
        series: str | None = None,
        channel: int | None = None,
        spacing: tuple[float, float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir, classes=classes, **kwargs)
        self.background_values = tuple(background_values)
        self.layout = Layout(data_dir, images, masks, series)
        self._reading = Reading(channel, None if spacing is None else (spacing[0], spacing[1], spacing[2]))

    def find_cases(self) -> list[Case]:
        """The cases of the folder, or of the one folder below it that has ``images``; see ``find_folder_cases``.

        Raises:
            DataError: no cases, or a table that cannot be read or does not fit the cases.
        """
        return find_folder_cases(self.layout, self.class_names)

    def sources(self) -> Sources:
        """The files of images and masks, and the two tables."""
        return self.layout.sources

    def variant(self) -> str:
        """Where images and masks lie, if not as usual."""
        said = {key: value for key, value in vars(self.layout).items() if value != getattr(Layout(""), key)}
        return " ".join(f"{key}={value}" for key, value in said.items() if key != "data_dir")

    def reading(self) -> Reading:
        """Channel and size of a voxel."""
        return self._reading

    def other_values(self) -> tuple[int, ...]:
        """Values named as background."""
        return self.background_values
