"""How well slices are classified: AUROC and average precision of their image-level labels, and operating points."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import CatMetric
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

SENSITIVITY = 0.98
"""Share of the slices with a class that an operating point has to find."""


SPECIFICITY = 0.99
"""Share of the slices of scans without a class that have to lie below its operating point, with labels of scans."""


def specific_points(scores: Tensor, truths: Tensor) -> Tensor:
    """The probability from which on a slice is said to have a class, where only scans have labels.

    Which slices of a scan show it is not known, and so no sensitivity; of a scan without it every slice is known.

    Args:
        scores: (N, C) probabilities.
        truths: (N, C) 1 where the slice's scan shows the class.

    Returns:
        (C,) float32; 0.5 where every scan shows the class.
    """
    points = []
    for score, truth in zip(scores.float().T, truths.T, strict=True):
        without = score[truth == 0].sort().values
        points.append(without[int(SPECIFICITY * len(without))] if len(without) else score.new_tensor(0.5))
    return torch.stack(points)


def operating_points(scores: Tensor, truths: Tensor, sensitivity: float = SENSITIVITY) -> Tensor:
    """The probability from which on a slice is said to have a class: the highest of that sensitivity, at most 0.5.

    Where slices are told apart well, nearly all without the class lie below it; where they are not, few do, and it
    decides little.

    Args:
        scores: (N, C) probabilities.
        truths: (N, C) image-level labels.
        sensitivity: share of the slices with a class that reach it, (0, 1].

    Returns:
        (C,) float32; 0 where no slice has the class, or a score is NaN.
    """
    points = []
    for score, truth in zip(scores.float().T, truths.T, strict=True):
        found = score[truth > 0].sort().values
        known = len(found) and not score.isnan().any()
        points.append(found[int((1 - sensitivity) * len(found))].clamp(max=0.5) if known else score.new_zeros(()))
    return torch.stack(points)


def stratified_sample(labels: Tensor, size: int) -> Tensor:
    """Slices that stand for all: of each class the same number, evenly from the first to the last that has it.

    Args:
        labels: (N, C) image-level labels, in the order of cases and slices.
        size: of the sample, slices; each class has its share of it, rounded up.

    Returns:
        (N,) bool; what two classes choose counts once.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    share = -(-size // labels.shape[1])
    for label in labels.T:
        there = label.nonzero().flatten()
        count = min(share, len(there))
        chosen[there[((torch.arange(count) + 0.5) * len(there) / max(count, 1)).long()]] = True
    return chosen


class LabelScores(nn.Module):
    """Collects predictions over batches and ranks, in memory by their number: C floats a slice.

    Args:
        class_names: C names, in the order of the label's columns.

    Attributes:
        points: (C,) ``operating_points`` of the slices last finished; 0 before.
    """

    points: Tensor

    def __init__(self, class_names: list[str]) -> None:
        super().__init__()
        self.class_names = class_names
        # Kept as they are: torchmetrics would drop a NaN, and scores would no longer stand beside their truths.
        self.scores, self.truths = CatMetric("disable"), CatMetric("disable")
        self.register_buffer("points", torch.zeros(len(class_names)), persistent=False)

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add the (B, C) logits and labels of some slices."""
        self.scores.update(logits.float().sigmoid().flatten())
        self.truths.update(label.flatten())

    def reset(self) -> None:
        """Begin anew."""
        self.scores.reset()
        self.truths.reset()

    def finish(self) -> dict[str, Tensor]:
        """The figures of all slices on all ranks; begins anew.

        Returns:
            ``auroc/<class>``, ``auroc`` (their mean), and ``ap`` alike. Neither is defined where every slice has
            the class, or none, or where a logit was NaN: NaN then, left out of the mean.
        """
        # Of a single value torchmetrics drops the dimension.
        scores = self.scores.compute().reshape(-1, len(self.class_names))
        truths = self.truths.compute().reshape(-1, len(self.class_names)).long()
        self.reset()
        self.points = operating_points(scores, truths)
        figures: dict[str, Tensor] = {}
        for name, metric in (("auroc", binary_auroc), ("ap", binary_average_precision)):
            values = []
            for c, class_name in enumerate(self.class_names):
                # torchmetrics says 0 where it is not defined.
                defined = 0 < truths[:, c].sum() < len(truths) and not scores[:, c].isnan().any()
                values.append(metric(scores[:, c], truths[:, c]) if defined else scores.new_tensor(torch.nan))
                figures[f"{name}/{class_name}"] = values[-1]
            figures[name] = torch.stack(values).nanmean()
        return figures
