import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch.utils.data import DistributedSampler

from data_modules.loaders import ShareSampler, slice_loader, start_method


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


def test_workers_that_are_not_forked_find_torch_imported(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    context = multiprocessing.get_context(start_method(2))
    with ProcessPoolExecutor(1, mp_context=context) as worker:
        assert worker.submit(eval, "'torch' in __import__('sys').modules").result(timeout=60)


@pytest.mark.parametrize(("asked", "workers"), [(0, 0), (1, 1), (3, 3), (200, 3)])
def test_no_more_processes_are_started_than_there_are_batches(asked, workers):
    loader = slice_loader([0] * 5, ShareSampler(5), 2, asked)
    assert loader.num_workers == workers
