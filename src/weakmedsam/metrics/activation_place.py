"""Whether a class's activation lies elsewhere in every slice or always at one place, and how large it is; no masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

SIDE = 16
"""Places a side that activations are counted in, whatever the size of their maps; the local encoder's own cells."""

THRESHOLD = 0.5
"""From which on a cell is active; that of the CAM Dice (arXiv 2503.04106)."""


class ActivationPlaces(Metric):
    """Sums over slices, batches and ranks of where the activation of each class lies.

    Args:
        class_names: C names, in the order of the label's columns.

    Attributes:
        place: (C, SIDE^2) sums over slices of the activation's place, a distribution that sums to 1 in each slice.
        entropy: (C,) sums of the entropies of these distributions, nats.
        area: (C,) sums of the share of the scan that is active.
        slices: (C,) how many slices.
    """

    full_state_update = False
    place: Tensor
    entropy: Tensor
    area: Tensor
    slices: Tensor

    def __init__(self, class_names: list[str]) -> None:
        super().__init__()
        self.class_names = class_names
        classes = len(class_names)
        self.add_state("place", torch.zeros(classes, SIDE**2), dist_reduce_fx="sum")
        for name in ("entropy", "area", "slices"):
            self.add_state(name, torch.zeros(classes), dist_reduce_fx="sum")

    def update(self, cam: Tensor, inside: Tensor, label: Tensor) -> None:
        """Add slices; of each those classes that it is labelled with.

        Args:
            cam: (B, C, h, w) in [0, 1] on the scan, 0 around it.
            inside: (B, 1, h, w) bool, the cells on the scan.
            label: (B, C) image-level labels.
        """
        active = (cam >= THRESHOLD).float()
        area = active.sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp_min(1)
        place = F.adaptive_avg_pool2d(active, SIDE).flatten(2)
        total = place.sum(dim=2)
        counts = (label > 0) & (total > 0)
        place = place / total.clamp_min(torch.finfo(total.dtype).tiny)[..., None] * counts[..., None]
        self.place += place.sum(dim=0)
        self.entropy += torch.special.entr(place).sum(dim=(0, 2))
        self.area += (area * counts).sum(dim=0)
        self.slices += counts.sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        """The figures of all slices on all ranks.

        Returns:
            ``cam_divergence/<class>``, 0 where the activation is the same in every slice, 1 where each has a single
            place of its own: the generalised Jensen-Shannon divergence of the slices' distributions as a share of the
            entropy of their mean; ``cam_area/<class>``, the mean share of the scan that is active; and the means of
            both over classes. A class without an active slice has NaN, left out of the mean.
        """
        mean = self.place / self.slices[:, None]  # 0 / 0 is NaN
        whole = torch.special.entr(mean).sum(dim=1)
        # One place in all slices: nothing differs.
        divergence = torch.where(whole > 0, (1 - self.entropy / self.slices / whole).clamp_min(0), 0 * whole)
        figures: dict[str, Tensor] = {}
        for name, values in (("cam_divergence", divergence), ("cam_area", self.area / self.slices)):
            figures |= {f"{name}/{c}": value for c, value in zip(self.class_names, values, strict=True)}
            figures[name] = values.nanmean()
        return figures
