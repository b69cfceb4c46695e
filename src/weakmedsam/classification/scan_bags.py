"""Labels of whole scans: multiple-instance learning, in which a volume is a bag and its slices are the instances.

Where a label is ``SOMEWHERE``, some slices of the scan show the class and nobody has said which. A scan without the
class has it in none of its slices, which so have labels of their own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import CatMetric

from weakmedsam.contracts import SOMEWHERE
from weakmedsam.metrics.image_labels import specific_points


def pool_bags(logits: Tensor, bag: Tensor) -> Tensor:
    """The logit of each slice's bag: log(mean(exp(logit))) over the slices of the bag that are there.

    Their mean odds: the likelier a slice is to show the class, the more of the gradient it gets, and none is left out
    while nothing is known. There is no number to choose, where the mean of the upper slices needs their share and finds
    the slices no more precisely (docs/results.md). Not in the paper.

    Args:
        logits: (..., B, C) of slices.
        bag: (B,) which bag each belongs to.

    Returns:
        (..., B, C), the same for all slices of a bag.
    """
    same = bag[:, None] == bag
    among = logits.float()[..., None, :, :].masked_fill(~same[..., None], -torch.inf)
    return among.logsumexp(dim=-2) - same.sum(dim=1)[:, None].log()


def bag_loss(logits: Tensor, label: Tensor, bag: Tensor) -> Tensor:
    """Binary cross-entropy of slices that have labels of their own, and of bags where only their scan has one.

    Args:
        logits: (..., B, C) of slices.
        label: (B, C) in {0, 1, SOMEWHERE}.
        bag: (B,) which bag each belongs to.

    Returns:
        A scalar, the mean over slices and classes; a bag counts as often as it has slices. Without ``SOMEWHERE`` it is
        the cross-entropy of the slices.
    """
    own = F.binary_cross_entropy_with_logits(logits, label.clamp_min(0).expand_as(logits), reduction="none")
    return torch.where(label == SOMEWHERE, F.softplus(-pool_bags(logits, bag)), own).mean()


def infer_presence(logits: Tensor, label: Tensor, points: Tensor, case: Tensor | None = None) -> Tensor:
    """Labels of slices where only the scan is known to show a class: by the classifier, and at least one a scan.

    Args:
        logits: (N, C) of all slices of some scans.
        label: (N, C) in {0, 1, SOMEWHERE}.
        points: (C,) probability from which on a slice of a scan with a class is taken to show it.
        case: (N,) number of each slice's scan, from 0; None: all are of one.

    Returns:
        (N, C) in {0, 1}; what was known stays.
    """
    case = torch.zeros(len(label), dtype=torch.int64, device=label.device) if case is None else case
    scans = int(case.max()) + 1 if len(case) else 0
    best = _highest(logits.float(), case, scans)[case]
    found = (logits.float().sigmoid() >= points) | (logits >= best)
    return torch.where(label == SOMEWHERE, found.to(label), label)


def _highest(values: Tensor, case: Tensor, scans: int) -> Tensor:
    """(N, C) -> (scans, C), the highest value of each scan."""
    lowest = values.new_full((scans, values.shape[1]), -math.inf)
    return lowest.scatter_reduce(0, case[:, None].expand_as(values), values, "amax")


class ScanFigures(NamedTuple):
    """What a validation says of V scans.

    Attributes:
        loss: scalar, cross-entropy of the scans' pooled logits.
        highest: (V, C) highest logit of a scan's slices.
        label: (V, C) 1 where the scan shows the class.
        points: (C,) operating points, of slices of scans without a class.
        open: whether of some scan only that is known; otherwise each slice has a label.
    """

    loss: Tensor
    highest: Tensor
    label: Tensor
    points: Tensor
    open: bool


class ScanScores(nn.Module):
    """Collects the logits of slices over batches and ranks, and scores them as scans.

    The loss that chooses the network is that of scans, even where expert masks know more: they choose none.

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.logits, self.labels, self.bags = (CatMetric("disable") for _ in range(3))

    def update(self, logits: Tensor, label: Tensor, bag: Tensor) -> None:
        """Add the (B, C) logits and labels, and the (B,) scans, of some slices."""
        self.logits.update(logits.float().flatten())
        self.labels.update(label.flatten())
        self.bags.update(bag)

    def finish(self) -> ScanFigures:
        """The figures of all scans on all ranks; begins anew."""
        device = self.logits.compute().device
        # On the processor, where sums by scan have one order.
        logits, labels = (part.compute().cpu().reshape(-1, self.classes) for part in (self.logits, self.labels))
        case = self.bags.compute().cpu().long().reshape(-1).unique(return_inverse=True)[1]
        for part in (self.logits, self.labels, self.bags):
            part.reset()
        scans = int(case.max()) + 1
        highest = _highest(logits, case, scans)
        shown = _highest((labels != 0).float(), case, scans)
        total = torch.zeros_like(highest).index_add_(0, case, (logits - highest[case]).exp())
        pooled = highest + (total / case.bincount()[:, None]).log()
        loss = F.binary_cross_entropy_with_logits(pooled, shown)
        points = specific_points(logits.sigmoid(), shown[case])
        is_open = bool((labels == SOMEWHERE).any())
        return ScanFigures(loss.to(device), highest.to(device), shown.to(device), points.to(device), is_open)
