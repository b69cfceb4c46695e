"""Loaders of slices and of volumes, and a rank's share of them."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler

from data_modules.augmentation import Augmentation
from data_modules.slice_datasets import AugmentedSlices, Bags, SliceDataset, VolumeDataset

BAGS = 2
"""A batch: one would give it a single label, many leave too few slices of each."""


class ShareSampler(DistributedSampler[int]):
    """A rank's share of a dataset in order: ranks may differ in length by one.

    torch's DistributedSampler repeats samples to make ranks equal, which counts cases twice in a
    score. Here a sample is repeated only for a rank that would have none: Lightning skips such a rank's
    epoch, and the others would wait for it for ever. Tables keep one of each case, whoever scored it; an
    AUROC over volumes then counts the repeated one twice. It is a DistributedSampler so that Lightning
    leaves it in place.

    Args:
        size: length of the dataset.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, size: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(range(size), num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self._share = range(rank, size, world) or range(rank % size, rank % size + 1) if size else range(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self._share)

    def __len__(self) -> int:
        return len(self._share)


class EpochSampler(DistributedSampler[Any]):
    """As its base, shuffled, but of (epoch, index): for ``AugmentedSlices``."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


class Order(NamedTuple):
    """What the order of training slices follows from.

    Attributes:
        seed: of the order, and of augmentation.
        epoch: number of the first epoch; the sampler is told of each later one.
        rank: of this process.
        world: number of processes.
    """

    seed: int
    epoch: int = 0
    rank: int = 0
    world: int = 1


class BagSampler(DistributedSampler[Any]):
    """Bags of slices that are spread over one volume each, for labels of whole scans.

    A volume is cut into runs of neighbours, as many runs as a bag may have slices; each bag takes one slice of each run
    at random. So a class in twice as many neighbours as a run has is in every bag of its volume; one in fewer is missed
    by some, which all the same are said to show it. Each slice is in one bag an epoch.

    Args:
        case: (N,) number of each slice's volume.
        most: slices of a bag.
        order: seed, epoch and share.
        augmented: give (epoch, index), for ``AugmentedSlices``, in place of the index.
    """

    def __init__(self, case: NDArray[np.int64], most: int, order: Order, augmented: bool) -> None:
        self._volumes = [np.flatnonzero(case == number) for number in np.unique(case)]
        self._most, self._augmented = most, augmented
        bags = sum(math.ceil(len(volume) / most) for volume in self._volumes)
        super().__init__(range(bags), order.world, order.rank, shuffle=True, seed=order.seed)  # type: ignore[arg-type]
        self.set_epoch(order.epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        bags = [bag for volume in self._volumes for bag in draw_bags(volume, self._most, rng)]
        for number in super().__iter__():
            yield [(self.epoch, index) if self._augmented else index for index in bags[number]]


def draw_bags(slices: NDArray[np.int64], most: int, rng: np.random.Generator) -> list[list[int]]:
    """Share the slices of a volume, in their order, out to bags: one of each run of neighbours to each bag."""
    count = math.ceil(len(slices) / most)
    runs = [rng.permutation(slices[first : first + count]) for first in range(0, len(slices), count)]
    return [[int(run[number]) for run in runs if number < len(run)] for number in range(count)]


def as_is(batch: Any) -> Any:
    """What the datasets give, a batch of slices or a volume, is a batch already: nothing to collate."""
    return batch


def start_method(num_workers: int) -> str | None:
    """How the processes that read are started; None leaves it to torch, which forks on Linux.

    Among several training processes torch runs threads that communicate. A fork beside them can hang for
    ever: Python 3.11.7 was seen to wait, in the child, for a lock that such a thread had held. There, workers come
    from a server process without threads. It imports torch once, some two seconds before the first; without that
    each worker would, at every start of a loader.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not num_workers or not together or os.name != "posix":
        return None
    multiprocessing.set_forkserver_preload(["__main__", __name__])  # of no effect once the server is there
    return "forkserver"


def slice_loader(
    dataset: SliceDataset | AugmentedSlices | Bags,
    sampler: DistributedSampler[Any],
    batch_size: int,
    num_workers: int,
    persistent: bool = True,
) -> DataLoader[Any]:
    """Batches of slices, ``SliceBatch``.

    Args:
        dataset: the slices.
        sampler: their order and this rank's share.
        batch_size: slices, or bags, a batch.
        num_workers: processes that read, no more than there are batches; 0 reads in this one.
        persistent: keep them from epoch to epoch.
    """
    num_workers = min(num_workers, math.ceil(len(sampler) / batch_size))
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=as_is,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=start_method(num_workers),
    )


def training_loader(
    slices: SliceDataset,
    order: Order,
    batch_size: int,
    num_workers: int,
    augment: Augmentation | None = None,
) -> DataLoader[Any]:
    """Batches of slices in an order of their own each epoch; with labels of scans, of bags: see ``BagSampler``.

    Args:
        slices: the slices.
        order: seed, epoch and share.
        batch_size: slices a batch.
        num_workers: processes that read.
        augment: ranges of augmentation by these processes; None leaves it to whoever gets the batches.
    """
    kind: type[DistributedSampler[Any]] = DistributedSampler
    dataset: SliceDataset | AugmentedSlices = slices
    if augment is not None:
        kind, dataset = EpochSampler, AugmentedSlices(slices, augment, order.seed)
    if slices.table.by_scan and slices.pseudo is None and not slices.expert_target:
        most = max(1, batch_size // BAGS)
        bags = BagSampler(slices.table.case, most, order, augmented=augment is not None)
        return slice_loader(Bags(dataset), bags, BAGS, num_workers)
    sampler = kind(slices, num_replicas=order.world, rank=order.rank, shuffle=True, seed=order.seed)
    sampler.set_epoch(order.epoch)
    return slice_loader(dataset, sampler, batch_size, num_workers)


def volume_loader(dataset: VolumeDataset, rank: int, world: int, num_workers: int) -> DataLoader[Any]:
    """A rank's share of volumes, one a batch, ``VolumeBatch``.

    Args:
        dataset: the volumes.
        rank: of this process.
        world: number of processes.
        num_workers: more than 0 reads one volume ahead; a large CT takes gigabytes, so it is never more.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=ShareSampler(len(dataset), rank, world),
        collate_fn=as_is,
        num_workers=min(num_workers, 1),
        prefetch_factor=1 if num_workers > 0 else None,
        multiprocessing_context=start_method(num_workers),
    )
