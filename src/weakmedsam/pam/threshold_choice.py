"""Choose the threshold of refined predictions on validation volumes.

A walk spreads a prediction. How far the threshold has to lie above or below 0.5 to make up for that differs between
data sets, and no test case is looked at to find it. Not in the paper; nnU-Net chooses its postprocessing on validation
cases likewise (Isensee et al., Nature Methods 2021). It takes expert masks: pseudo-labels have a size of their own
(docs/negative_results.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weakmedsam.classification.module import Activation, WeakMedSAM
from weakmedsam.contracts import VolumeBatch
from weakmedsam.geometry import to_native
from weakmedsam.metrics.gathering import gather_shares
from weakmedsam.metrics.overlap_surface import dice_from_counts, overlap_counts
from weakmedsam.pam.config import Refinement
from weakmedsam.pam.thresholding import threshold_scores
from weakmedsam.pam.volumes import refine_prediction
from weakmedsam.system.atomic_io import write_whole

THRESHOLD = "threshold.json"
"""In the folder of the stage; ``threshold`` is the chosen one."""


class ThresholdChoice:
    """Dice of refined predictions at several thresholds, over the volumes of a test; the best one is chosen.

    Args:
        thresholds: T of them, each in (0, 1).
    """

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = tuple(thresholds)
        self._dice: dict[str, Tensor] = {}  # case -> (T, C)

    def add(self, module: WeakMedSAM, activation: Activation, batch: VolumeBatch, settings: Refinement) -> None:
        """Refine what is predicted of a volume, and compare it at each threshold.

        Args:
            module: the network, with a ``start``.
            activation: of all slices.
            batch: the volume, with ``mask``.
            settings: the numbers of PAM.
        """
        truth, classes = batch["mask"], len(module.class_names)
        counts = torch.zeros(len(self.thresholds), len(truth), classes, 3, dtype=torch.int64)
        counts += overlap_counts(torch.zeros_like(truth), truth, classes).cpu()
        for rows, refined in refine_prediction(module, activation, batch, settings):
            scores = to_native(refined.after, batch["frame"])
            for i, threshold in enumerate(self.thresholds):
                ids, _ = threshold_scores(scores, threshold)
                counts[i, rows.cpu()] = overlap_counts(ids, truth[rows], classes).cpu()
        self._dice[batch["case"]] = dice_from_counts(counts.sum(dim=1))

    def choose(self, default: float) -> dict[str, Any]:
        """The threshold of the highest mean Dice; every rank of a distributed run must call it.

        Args:
            default: of several that are equally good the nearest to this one; where no volume has a Dice, itself.

        Returns:
            ``threshold``; ``dice``, the mean over classes of means over volumes at each threshold; ``cases``, how many
            volumes.
        """
        cases = {name: dice for share in gather_shares(self._dice) for name, dice in share.items()}
        dice = torch.stack([cases[name] for name in sorted(cases)]).nanmean(dim=0).nanmean(dim=-1)
        known = {t: value for t, value in zip(self.thresholds, dice.tolist(), strict=True) if value == value}
        best = [t for t, value in known.items() if value >= max(known.values()) - 1e-9]
        return {
            "threshold": min(best, key=lambda t: abs(t - default)) if best else default,
            "dice": {f"{t:g}": value for t, value in known.items()},
            "cases": len(cases),
        }


def write_threshold(folder: Path, chosen: dict[str, Any]) -> None:
    """Write ``threshold.json``."""
    write_whole(folder / THRESHOLD, json.dumps(chosen, indent=1) + "\n")
