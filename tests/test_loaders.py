import os

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from data_modules.loaders import ShareSampler, start_method


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_everything_and_nothing_twice(size, world):
    shares = [ShareSampler(size, rank, world) for rank in range(world)]
    owners = [i for share in shares for i in share]
    assert sorted(set(owners)) == list(range(size))
    # Nothing twice, but for ranks that would have nothing at all.
    assert len(owners) == (max(size, world) if size else 0)
    assert all(len(share) > 0 for share in shares) or not size
    assert [len(list(share)) for share in shares] == [len(share) for share in shares]


def test_lightning_takes_it_for_distributed():
    assert isinstance(ShareSampler(3), DistributedSampler)


def test_beside_communicating_threads_workers_are_not_forked(monkeypatch):
    assert start_method(2) is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert start_method(0) is None
    assert start_method(2) == "forkserver"


class WhereTorchLies(Dataset):
    """In the memory of whoever reads."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return os.getpid(), id(torch)


def test_workers_that_are_not_forked_share_one_import_of_torch(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        method = start_method(2)
    readers = DataLoader(WhereTorchLies(), batch_size=None, num_workers=2, multiprocessing_context=method)
    processes, places = zip(*readers, strict=True)
    assert len({*processes, os.getpid()}) == 3
    assert places[0] == places[1]
