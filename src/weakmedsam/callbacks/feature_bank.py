"""Features by the slice's index: each process keeps its own, rank 0 gathers them."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from lightning.pytorch.strategies import Strategy
from numpy.typing import NDArray
from torch import Tensor

GATHERED_ROWS = 8192
"""Rows of each rank that are gathered at once: bounds what lies on a device beside the bank."""


class FeatureBank:
    """The pooled features of slices that this process has looked at, on the device they come from.

    A process holds its own share of an epoch only, about N / number of processes rows, and adding to
    it neither copies nor waits for the device.
    """

    def __init__(self) -> None:
        self._index: list[Tensor] = []
        self._features: list[Tensor] = []

    def add(self, index: Tensor, features: Tensor) -> None:
        """Keep the features (B, D) of the slices ``index`` (B,)."""
        self._index.append(index)
        self._features.append(features)

    def clear(self) -> None:
        """Forget all."""
        self._index.clear()
        self._features.clear()

    def gather(
        self, slices: int, dimension: int, strategy: Strategy, device: torch.device
    ) -> tuple[NDArray[np.float32] | None, bool]:
        """All ranks' features on rank 0; every rank has to call it.

        Ranks may hold different numbers of slices, or none. A slice that several have seen, because a
        sampler pads, gets the mean.

        Args:
            slices: N, of all ranks together.
            dimension: D.
            strategy: of the trainer.
            device: where collectives take place.

        Returns:
            (N, D) float32 in the host's memory, on rank 0 only; and, on every rank, whether each slice was
            seen by some rank.
        """
        index = torch.cat([*self._index, torch.zeros(0, dtype=torch.int64, device=device)])
        features = torch.cat([*map(Tensor.float, self._features), torch.zeros(0, dimension, device=device)])
        most = int(cast(Tensor, strategy.reduce(torch.tensor(len(index), device=device), reduce_op="max")))
        first = strategy.is_global_zero
        total = torch.zeros(slices if first else 0, dimension)
        seen = torch.zeros(slices if first else 0)
        for begin in range(0, most, GATHERED_ROWS):
            rows = min(GATHERED_ROWS, most - begin)
            ids = index.new_full((rows,), -1)  # ranks send equally much: -1 marks what is filled up
            values = features.new_zeros(rows, dimension)
            part = index[begin : begin + rows]
            ids[: len(part)], values[: len(part)] = part, features[begin : begin + rows]
            ids = strategy.all_gather(ids).reshape(-1).cpu()
            values = strategy.all_gather(values).reshape(-1, dimension).cpu()
            if first:
                real = ids >= 0
                total.index_add_(0, ids[real], values[real])
                seen.index_add_(0, ids[real], torch.ones(int(real.sum())))
        complete = bool(strategy.broadcast(bool((seen > 0).all())))
        return (total.div_(seen[:, None]).numpy() if first else None), complete
