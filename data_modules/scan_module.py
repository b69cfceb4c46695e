"""Scans that are only segmented: read as the data a network has learnt from, with no label and no mask."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from data_modules.base import SliceDataModule
from data_modules.cases import Case
from data_modules.loaders import volume_loader
from data_modules.prepare import prepare
from data_modules.scan_io import (
    WITH_SEG,
    find_scans,
    find_unsegmented,
    is_dicom_case,
    mark_of,
    scores_path,
    segmentation_path,
    write_scores,
    write_seg_beside,
    write_segmentation,
)
from data_modules.slice_datasets import VolumeDataset
from data_modules.store import SliceReader
from data_modules.store_index import SCAN_SLICES, Entry, StoreSpec, read_index
from weakmedsam.errors import DataError


class UnseenScans(LightningDataModule):
    """Unlabelled scans, for prediction alone; ``make predict`` sets it up.

    Frames, plane and intensities are those of ``like``, so a scan looks as the training scans did. What has been
    segmented is not read again.

    Args:
        scans: folder of scans of any format, or one file.
        out: folder for ``<scan>.nii.gz``, and ``<scan>.dcm`` of a DICOM series.
        like: the data that the network has learnt from; its scans are not touched.
        made_by: names network and settings: segmentations by others are made again.
        scores: write the scores behind them, too, ``scores/<scan>_<id>_<class>.nii.gz``.
        series: see ``find_scans``.

    Attributes:
        class_names: names of the classes, id 1 first.
        batch_size: of ``like``.
        num_workers: of ``like``.
        augment: of ``like``.
    """

    def __init__(
        self, scans: str, out: str, like: SliceDataModule, made_by: str, scores: bool = False, series: str | None = None
    ) -> None:
        super().__init__()
        self.scans = scans
        self.out = out
        self.like = like
        self.made_by = made_by
        self.scores = scores
        self.series = series
        self.class_names = list(like.class_names)
        self.batch_size = like.batch_size
        self.num_workers = like.num_workers
        self.augment = like.augment
        self._entries: dict[str, Entry] = {}
        self._dicom: dict[str, Case] = {}

    @property
    def spec(self) -> StoreSpec:
        """How the scans are stored for the time being."""
        path = Path(self.scans).resolve()
        return replace(self.like.spec, data_set="scans", data_dir=str(path.parent if path.is_file() else path))

    @property
    def store(self) -> Path:
        """Where they are stored; it can be removed when all are segmented."""
        return self.spec.folder(slices_folder(self.out))

    def prepare_data(self) -> None:
        """Read the scans that are not segmented yet.

        Raises:
            DataError: no scans, or some that cannot be used; where those are left out, none that can, and nothing
                segmented earlier either.
        """
        cases = find_scans(Path(self.scans), self.series)
        todo = find_unsegmented(cases, Path(self.out), self.made_by)
        place, like = slices_folder(self.out), self.like
        if not todo:
            shutil.rmtree(place, ignore_errors=True)  # of a call that was killed: nothing of it is left to do
            return
        try:
            prepare(todo, self.spec, place, like.prepare.workers, like.prepare.on_bad_case)
        except DataError:
            index = read_index(self.store)
            if index is None or index.entries or like.prepare.on_bad_case == "raise" or len(todo) == len(cases):
                raise

    def setup(self, stage: str) -> None:
        """Take the scans that were found when they were read: meanwhile another process may have finished some."""
        index = read_index(self.store)
        self._entries = {} if index is None else dict(index.entries)
        cases = find_scans(Path(self.scans), self.series) if self._entries else []
        self._dicom = {case.name: case for case in cases if case.name in self._entries and is_dicom_case(case)}

    def predict_dataloader(self) -> DataLoader[Any]:
        """Whole volumes without ``label``."""
        dataset = VolumeDataset(
            list(self._entries.values()),
            SliceReader(self.store),
            self.like.slices.min_pixels,
            with_label=False,
        )
        place = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return volume_loader(dataset, *place, self.num_workers)

    def save_scores(self, case: str, scores: NDArray[np.float32]) -> None:
        """Write a scan's scores, one file a class, in the scan's own space.

        Args:
            case: the scan.
            scores: (D, C, H0, W0) in [0, 1] on its own slices.
        """
        geometry = self._entries[case].geometry
        for number, name in enumerate(self.class_names, start=1):
            write_scores(scores_path(Path(self.out), case, number, name), scores[:, number - 1], geometry)

    def save_segmentation(self, case: str, ids: NDArray[np.uint8]) -> None:
        """Write a scan's segmentation, ``<scan>.nii.gz``, in the scan's own space; of a DICOM series first its SEG.

        Args:
            case: the scan.
            ids: (D, H0, W0) class ids on its own slices.
        """
        entry = self._entries[case]
        # Of the file that was read: one that has taken its place since is still to be segmented.
        mark, out = mark_of(entry.sources, self.made_by), Path(self.out)
        found = self._dicom.get(case)
        with_seg = found is not None and write_seg_beside(out, found, ids, (entry, self.spec), self.class_names, mark)
        # The last one: a scan whose file is there is not looked at again.
        write_segmentation(segmentation_path(out, case), ids, entry.geometry, mark + WITH_SEG * with_seg)


def slices_folder(out: str | Path) -> Path:
    """Where slices of scans lie until all are segmented."""
    return Path(out) / SCAN_SLICES
