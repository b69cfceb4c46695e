"""Tables of all ranks of a distributed run, put together."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Share = TypeVar("Share")


def gather_shares(share: Share) -> list[Share]:
    """What each rank holds, in order of the ranks, on every rank; every rank must call it.

    A sampler that pads lets two ranks score one case: keep one of each.

    Args:
        share: this rank's, small: it is pickled.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [share]
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, share)
    return shares
