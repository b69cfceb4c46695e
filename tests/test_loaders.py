import pytest
from torch.utils.data import DistributedSampler

from data_modules.loaders import ShareSampler


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_everything_and_nothing_twice(size, world):
    shares = [ShareSampler(size, rank, world) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(size))
    assert [len(list(share)) for share in shares] == [len(share) for share in shares]


def test_lightning_takes_it_for_distributed():
    assert isinstance(ShareSampler(3), DistributedSampler)
