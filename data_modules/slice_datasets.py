"""Datasets over a slice store: slices for training and validation, whole volumes for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from data_modules.augmentation import Augmentation, augment_batch
from data_modules.pseudo_labels import CERTAIN, PseudoLabelReader
from data_modules.resampling import frame_box
from data_modules.store import FULL_SCALE, SliceReader
from data_modules.store_index import Entry
from weakmedsam.contracts import SOMEWHERE, Frame, SliceBatch, VolumeBatch
from weakmedsam.errors import DataError


@dataclass(frozen=True)
class SliceTable:
    """The slices of a split, in order; a slice's row is its ``index``.

    Attributes:
        cases: names of the cases.
        case: (N,) int64, position in ``cases``.
        slice: (N,) int64, the slice's number within its volume.
        labels: (N, C) float32, as of ``slice_labels``.
        boxes: (cases, 4) int64, where each case's scan lies in the working frame: see ``frame_box``.
        by_scan: whether of some classes a table says only which scans show them.
    """

    cases: tuple[str, ...]
    case: NDArray[np.int64]
    slice: NDArray[np.int64]
    labels: NDArray[np.float32]
    boxes: NDArray[np.int64]
    by_scan: bool = False

    def __len__(self) -> int:
        return len(self.slice)


def slice_labels(entry: Entry, min_pixels: int, scored: bool = False) -> NDArray[np.float32]:
    """Image-level labels of a case's slices: by its table, else by the pixels of its mask.

    Args:
        entry: the case.
        min_pixels: a class is present in a slice if its mask has at least so many pixels of it,
            counted on the scan's own slice.
        scored: for validation and test: where a table of scans leaves open in which slices a class is, the mask says
            it, if there is one. Training never asks it.

    Returns:
        (D, C) float32, 0 or 1; ``SOMEWHERE`` where only the scan is known to show the class.

    Raises:
        DataError: neither table nor mask.
    """
    if entry.table is None and entry.counts is None:
        raise DataError(f"{entry.sources[0][0]}: has neither a mask nor rows in labels.csv. Add one.")
    if entry.table is None:
        return (np.asarray(entry.counts) >= min_pixels).astype(np.float32)
    labels = np.asarray(entry.table, dtype=np.float32)
    if scored and entry.counts is not None:
        labels = np.where(labels == SOMEWHERE, np.asarray(entry.counts) >= min_pixels, labels).astype(np.float32)
    return labels


def tabulate(
    entries: Sequence[Entry], min_pixels: int, only_positive: bool = False, scored: bool = False
) -> SliceTable:
    """All slices of some cases.

    Args:
        entries: the cases, in order.
        min_pixels: see ``slice_labels``.
        only_positive: keep only slices in which some class is, or may be, present.
        scored: see ``slice_labels``.

    Returns:
        The slices, ordered by case and by number.
    """
    labels = [slice_labels(entry, min_pixels, scored) for entry in entries]
    keep = [np.flatnonzero(part.any(axis=1)) if only_positive else np.arange(len(part)) for part in labels]
    return SliceTable(
        cases=tuple(entry.name for entry in entries),
        case=np.repeat(np.arange(len(entries)), [len(part) for part in keep]),
        slice=np.concatenate(keep),
        labels=np.concatenate([part[rows] for part, rows in zip(labels, keep, strict=True)]),
        boxes=np.array([frame_box(entry.frame) for entry in entries], dtype=np.int64),
        by_scan=any(SOMEWHERE in row for entry in entries for row in entry.table or ()),
    )


def check_positives(table: SliceTable, class_names: Sequence[str], where: str) -> None:
    """Raise DataError if some class is present in no slice, or every scan is only known to show it; names both."""
    never = [name for number, name in enumerate(class_names) if not table.labels[:, number].any()]
    if never:
        raise DataError(
            f"No training slice of {where} shows {', '.join(never)}: it cannot be learnt. "
            "Leave it out of classes, lower min_pixels, or change the split."
        )
    always = [name for name, label in zip(class_names, table.labels.T, strict=True) if (label == SOMEWHERE).all()]
    if always:
        raise DataError(
            f"Every training scan of {where} shows {', '.join(always)}, in slices that nobody has named: nothing says "
            "what it is not. Add scans without it, or say in which slices it is (case,from,to,class)."
        )


class SliceDataset(Dataset[dict[str, Any]]):
    """Slices; the keys are those of ``SliceBatch``.

    Args:
        table: which slices.
        reader: of the store.
        with_mask: add ``mask``, the expert mask: for validation only.
        pseudo: add ``target``, ``confidence`` and ``quality`` from these pseudo-labels, and ``trusted`` where they have
            corrections.
        expert_target: add ``target`` from the expert mask, with confidence and quality 1: for the upper bound
            only.
    """

    def __init__(
        self,
        table: SliceTable,
        reader: SliceReader,
        with_mask: bool = False,
        pseudo: PseudoLabelReader | None = None,
        expert_target: bool = False,
    ) -> None:
        self.table = table
        self.reader = reader
        self.with_mask = with_mask
        self.pseudo = pseudo
        self.expert_target = expert_target

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch: dict[str, Any] = {**self.__getitems__([index])}
        return {key: values[0] for key, values in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> SliceBatch:
        """A whole batch, which torch's loaders ask for where it can be had.

        Slices are stacked as they are stored and scaled together: less copying than collating them one by one.
        """
        table, rows = self.table, np.asarray(indices, dtype=np.int64)
        cases = [table.cases[case] for case in table.case[rows]]
        numbers = table.slice[rows].tolist()
        places = list(zip(cases, numbers, strict=True))
        images = np.stack([self.reader.image(case)[number] for case, number in places])
        batch = SliceBatch(
            image=torch.from_numpy(images.astype(np.float32)).div_(FULL_SCALE)[:, None],
            label=torch.from_numpy(table.labels[rows]),
            index=torch.from_numpy(rows),
            case=cases,
            slice=torch.from_numpy(table.slice[rows]),
            box=torch.from_numpy(table.boxes[table.case[rows]]),
        )
        if table.by_scan:
            batch["bag"] = torch.from_numpy(table.case[rows])
        if self.with_mask:
            batch["mask"] = self._masks(places)
        if self.pseudo is not None:
            label, confidence, quality, trusted = zip(*(self.pseudo.read(*place) for place in places), strict=True)
            batch["target"] = torch.from_numpy(np.stack(label).astype(np.int64))
            batch["confidence"] = torch.from_numpy(np.stack(confidence).astype(np.float32)).div_(CERTAIN)
            batch["quality"] = torch.tensor(quality)
            if self.pseudo.corrected is not None:
                batch["trusted"] = torch.tensor(trusted)
        elif self.expert_target:
            batch["target"] = self._masks(places)
            batch["confidence"] = torch.ones(batch["target"].shape)
            batch["quality"] = torch.ones(len(places))
        return batch

    def _masks(self, places: Sequence[tuple[str, int]]) -> Tensor:
        return torch.from_numpy(np.stack([self.reader.mask(case)[number] for case, number in places]).astype(np.int64))


TOGETHER = 4
"""Slices that are read and augmented at once: what is computed on the way then stays in the processor's cache."""


class AugmentedSlices(Dataset[SliceBatch]):
    """Training slices, augmented where they are read: in the processes of the loader.

    Args:
        slices: that are read.
        ranges: of augmentation.
        seed: of augmentation.
    """

    def __init__(self, slices: SliceDataset, ranges: Augmentation, seed: int) -> None:
        self.slices, self.ranges, self.seed = slices, ranges, seed

    def __len__(self) -> int:
        return len(self.slices)

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> SliceBatch:
        """A whole batch of (epoch, index): the processes outlive an epoch, so each batch says of which it is."""
        indices, epoch = [index for _, index in places], places[0][0]
        parts = [
            augment_batch(self.slices.__getitems__(indices[at : at + TOGETHER]), self.ranges, self.seed, epoch)
            for at in range(0, len(indices), TOGETHER)
        ]
        # In a worker default_collate joins them in the memory that the training process shares: no further copy.
        joined = {
            key: default_collate(list(chain.from_iterable(part[key] for part in parts)))  # type: ignore[literal-required]
            for key in parts[0]
        }
        return SliceBatch(**joined)  # type: ignore[typeddict-item]


class Bags(Dataset[SliceBatch]):
    """Batches of some bags of slices, each a list of what ``slices`` is asked for."""

    def __init__(self, slices: SliceDataset | AugmentedSlices) -> None:
        self.slices = slices

    def __len__(self) -> int:
        return len(self.slices)

    def __getitems__(self, bags: Sequence[Sequence[Any]]) -> SliceBatch:
        """The slices of the bags, one bag after another."""
        return self.slices.__getitems__([place for bag in bags for place in bag])


def make_volume_batch(
    image: NDArray[np.uint16], case: str, frame: Frame, spacing: tuple[float, float, float]
) -> VolumeBatch:
    """A volume of nothing but its slices.

    Args:
        image: (D, S, S) of a slice store, or as ``store.scale_slices`` gives it.
        case: its name.
        frame: how the slices lie on the scan's own.
        spacing: (slice distance, row, column), mm.
    """
    slices = torch.from_numpy(image.astype(np.float32)).div_(FULL_SCALE)[:, None]
    return VolumeBatch(image=slices, case=case, frame=frame, spacing=spacing, box=torch.tensor(frame_box(frame)))


class VolumeDataset(Dataset[VolumeBatch]):
    """Whole volumes, one at a time, as ``VolumeBatch``.

    Args:
        entries: the cases, in order.
        reader: of the store.
        min_pixels: see ``slice_labels``.
        with_mask: add ``mask``, the expert mask on the scan's own slices: for the test only.
        with_label: add ``label``; unlabelled scans have none.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        reader: SliceReader,
        min_pixels: int,
        with_mask: bool = False,
        with_label: bool = True,
    ) -> None:
        self.entries = tuple(entries)
        self.reader = reader
        self.min_pixels = min_pixels
        self.with_mask = with_mask
        self.with_label = with_label

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> VolumeBatch:
        entry = self.entries[index]
        volume = make_volume_batch(self.reader.image(entry.name), entry.name, entry.frame, entry.geometry.spacing)
        volume["index"] = index
        if self.with_label:
            volume["label"] = torch.from_numpy(slice_labels(entry, self.min_pixels, self.with_mask))
        if self.with_mask:
            volume["mask"] = torch.from_numpy(self.reader.mask_native(entry.name).astype(np.int64))
        return volume
