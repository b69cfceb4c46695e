"""Class activation maps: where the class head looks.

Source: Zhou et al., CVPR 2016, in the form of WeakMedSAM (arXiv 2503.04106): the head's weights applied
to every feature cell, scaled by minimum and maximum, no ReLU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weakmedsam.errors import check_choice, check_range
from weakmedsam.geometry import min_max

POOLINGS = ("average", "top_k", "log_sum_exp")


@dataclass(frozen=True)
class Pooling:
    """How a class's evidence over the cells becomes its logit.

    Attributes:
        kind: ``average``, global average pooling: every cell has to speak for the class, or enough of them for the
            rest (paper) | ``top_k``, the mean over the strongest cells (paper: -) | ``log_sum_exp``, between mean and
            maximum (Pinheiro and Collobert, CVPR 2015, eq. 5): log(mean(exp(r e))) / r, in which every cell takes part,
            weighted by how sure it is (paper: -).
        top_share: share of all cells that ``top_k`` takes, (0, 1]; at least one cell.
        sharpness: r of ``log_sum_exp``, above 0 and at most 10,000: towards 0 the mean, towards infinity the maximum.

    Raises:
        ConfigError: an unknown kind, or a number out of its range.
    """

    kind: str = "average"
    top_share: float = 0.05
    sharpness: float = 8.0

    def __post_init__(self) -> None:
        check_choice("model.pooling.kind", self.kind, POOLINGS)
        check_range("model.pooling.top_share", self.top_share, 0, 1, above=True)
        check_range("model.pooling.sharpness", self.sharpness, 0, 10_000, above=True)


def pool_evidence(evidence: Tensor, inside: Tensor, pooling: Pooling) -> Tensor:
    """How much a map speaks for its class: one logit from the evidence of its cells.

    Args:
        evidence: (B, C, h, w) of classes or sub-classes, by the head, before any pooling.
        inside: (B, 1, h, w) bool, the cells that count; where there is none, all do.
        pooling: how.

    Returns:
        (B, C) logits, float32.
    """
    cells = evidence.float().flatten(2)
    counts = inside.flatten(2)
    counts = counts | ~counts.any(dim=-1, keepdim=True)
    number = counts.sum(dim=-1)
    if pooling.kind == "average":
        return (cells * counts).sum(dim=-1) / number
    if pooling.kind == "log_sum_exp":
        among = (pooling.sharpness * cells).masked_fill(~counts, -torch.inf)
        return (among.logsumexp(dim=-1) - number.log()) / pooling.sharpness
    take = max(1, round(pooling.top_share * cells.shape[-1]))
    strongest = cells.masked_fill(~counts, -torch.inf).topk(take, dim=-1).values
    # Where fewer cells than that are inside, all of them.
    there = strongest.isfinite()
    return strongest.where(there, 0).sum(dim=-1) / there.sum(dim=-1)


def mean_inside(features: Tensor, inside: Tensor, stripes: int = 16) -> Tensor:
    """The mean of each feature over the cells that count: global average pooling, padding left out.

    A product of matrices, because it needs no copy of the features as float32, which took as long as all
    of SCE. A bfloat16 sum is rounded at its end: it is taken in stripes, which are added as float32.

    Args:
        features: (B, D, h, w).
        inside: (B, 1, h, w) bool, the cells that count; where there is none, all do.
        stripes: parts that are summed apart.

    Returns:
        (B, D) float32.
    """
    cells = features.flatten(2)
    if cells.dtype == torch.float16:
        cells = cells.float()  # sums could exceed its range
    counts = inside.flatten(1)
    counts = counts | ~counts.any(dim=1, keepdim=True)
    stripe = torch.arange(counts.shape[1], device=counts.device) % stripes
    weights = counts[:, :, None] & (stripe[:, None] == torch.arange(stripes, device=counts.device))
    with torch.autocast(features.device.type, enabled=False):
        sums = torch.bmm(cells, weights.to(cells.dtype))
    return sums.float().sum(dim=-1) / counts.sum(dim=1, keepdim=True)


def class_activation_map(features: Tensor, weight: Tensor) -> Tensor:
    """The class head's evidence at every cell, each map scaled to [0, 1].

    The scaling makes a map say *where*, never *whether*: a class that is absent also reaches 1
    somewhere. Multiply by the image-level label before a threshold.

    Args:
        features: (B, D, h, w), of any precision and scale.
        weight: (C, D) of the class head (a 1 x 1 convolution without bias).

    Returns:
        (B, C, h, w) float32 in [0, 1].
    """
    # In float32 under autocast too: bf16 moves a map by a hundredth.
    with torch.autocast(features.device.type, enabled=False):
        return min_max(torch.einsum("bdhw,cd->bchw", features.float(), weight.float()))


def mirror_axes(columns: bool, rows: bool) -> list[tuple[int, ...]]:
    """Axes along which each view of an image is mirrored, the plain view first: 1, 2 or 4 views.

    A cell may speak for its neighbour, always to the same side (docs/results.md). In a mirror image that is
    the other side; the mean of the views, each mirrored back, lies in the middle. It takes a network
    that has been trained on mirror images.

    Args:
        columns: with left-right mirrors.
        rows: with up-down mirrors.
    """
    single = [(-1,)] * columns + [(-2,)] * rows
    return [(), *single] + [(-2, -1)] * (columns and rows)
