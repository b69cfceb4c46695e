"""The segmentations of a test's cases: scored, drawn, put together over the ranks and written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from weakmedsam.contracts import VolumeBatch
from weakmedsam.figures import draw_contours, most_telling_slice
from weakmedsam.geometry import to_native
from weakmedsam.metrics.case_summary import (
    CaseScores,
    gather_scores,
    score_case,
    summarise,
    take_means,
    write_tables,
)
from weakmedsam.system.atomic_io import write_whole


class Evaluation:
    """What is said of the segmentations of one test.

    Args:
        class_names: in order of their ids.
        folder: where ``pictures/<case>.png``, ``cases.csv`` and ``summary.json`` are written.
    """

    def __init__(self, class_names: Sequence[str], folder: Path) -> None:
        self.class_names = list(class_names)
        self.folder = folder
        self._scores: list[CaseScores] = []

    def add(self, batch: VolumeBatch, prediction: Tensor) -> None:
        """Score a volume on its own slices and draw its picture.

        Args:
            batch: the volume, with ``mask``.
            prediction: (D, H0, W0) uint8 class ids on the scan's own slices.
        """
        frame, spacing, case = batch["frame"], batch["spacing"], batch["case"]
        prediction, truth = prediction.cpu(), batch["mask"].to(prediction.dtype).cpu()
        scores = score_case(case, prediction, truth, spacing, self.class_names)
        self._scores += scores
        z = most_telling_slice(prediction, truth)
        native = to_native(batch["image"][z : z + 1].float(), frame)[0, 0].cpu()
        # A class that is in neither has no Dice.
        dice = ", ".join(f"{s.class_name} {s.volume.dice:.2f}" for s in scores if not math.isnan(s.volume.dice))
        picture = draw_contours(native, prediction[z], truth[z], spacing, f"{case}, slice {z}\nDice {dice or '-'}")
        write_whole(self.folder / "pictures" / f"{case}.png", picture)

    def finish(self, writes: bool) -> dict[str, float]:
        """Put the ranks' cases together; every rank of a distributed run must call it.

        Args:
            writes: this rank writes the tables.

        Returns:
            The means to log, as of ``case_summary.take_means``.
        """
        scores = gather_scores(self._scores, self.class_names)
        summary = summarise(scores, self.class_names)
        if writes:
            write_tables(self.folder, scores, summary)
        return take_means(summary)
