"""The scores of all test cases put together: ``cases.csv``, ``summary.json`` and the means to log."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from weakmedsam.metrics.gathering import gather_shares
from weakmedsam.metrics.overlap_surface import (
    SliceScores,
    Spacing,
    VolumeScores,
    slice_metrics,
    volume_metrics,
)
from weakmedsam.system.atomic_io import write_whole

VOLUME_METRICS = ("dice", "jaccard", "assd_mm", "hd95_mm")
"""What is scored per volume, and logged."""


@dataclass(frozen=True)
class CaseScores:
    """Both protocols for one class of one case: a row of ``cases.csv``."""

    case: str
    class_name: str
    volume: VolumeScores
    slice_wise: SliceScores

    def row(self) -> dict[str, Any]:
        """Column -> value."""
        names = {"case": self.case, "class": self.class_name}
        return names | asdict(self.volume) | asdict(self.slice_wise)


def score_case(
    case: str, prediction: Tensor, truth: Tensor, spacing: Spacing, class_names: Sequence[str]
) -> list[CaseScores]:
    """Score one patient volume by both protocols.

    Args:
        case: its name.
        prediction: (D, H, W) class ids on the scan's own grid.
        truth: (D, H, W) class ids; ``IGNORE`` is left out.
        spacing: (slice distance, row, column), mm.
        class_names: in order of their ids.

    Returns:
        One per class.

    Raises:
        ValueError: the shapes differ.
    """
    volumes = volume_metrics(prediction, truth, spacing, len(class_names))
    slices = slice_metrics(prediction, truth, spacing, len(class_names))
    return [CaseScores(case, *both) for both in zip(class_names, volumes, slices, strict=True)]


def gather_scores(scores: Sequence[CaseScores], class_names: Sequence[str]) -> list[CaseScores]:
    """Put the ranks' scores together; every rank of a distributed run must call it.

    Args:
        scores: this rank's.
        class_names: in order of their ids.

    Returns:
        Those of all ranks by case, then class; one of each, though a sampler that pads scores a case twice.
    """
    shared = (score for share in gather_shares(scores) for score in share)
    unique = {(score.case, class_names.index(score.class_name)): score for score in shared}
    return [unique[key] for key in sorted(unique)]


def summarise(scores: Sequence[CaseScores], class_names: Sequence[str]) -> dict[str, Any]:
    """Sum up the test cases; the content of ``summary.json``.

    Args:
        scores: one per case and class.
        class_names: in order of their ids.

    Returns:
        ``cases`` (how many), ``classes`` (name -> its summary) and ``mean`` (over the classes' means);
        None where there is no number. ``docs/metrics.md`` lists the names.
    """
    classes = {name: _summarise_class([s for s in scores if s.class_name == name]) for name in class_names}
    mean = {
        protocol: {
            metric: _spread(_nan(c[protocol][metric]["mean"]) for c in classes.values())["mean"]
            for metric in next(iter(classes.values()))[protocol]
        }
        for protocol in ("volume", "slice_wise", "published")
    }
    return {"cases": len({s.case for s in scores}), "classes": classes, "mean": mean}


def take_means(summary: Mapping[str, Any]) -> dict[str, float]:
    """The means per volume of a summary, to be logged.

    Args:
        summary: what ``summarise`` returns.

    Returns:
        ``<metric>`` over the classes and ``<metric>_<class>``; NaN where there is no number.
    """
    figures = {}
    for metric in VOLUME_METRICS:
        figures[metric] = _nan(summary["mean"]["volume"][metric])
        for name, of_class in summary["classes"].items():
            figures[f"{metric}_{name}"] = _nan(of_class["volume"][metric]["mean"])
    return figures


def format_cases(scores: Sequence[CaseScores]) -> bytes:
    """The content of ``cases.csv``: a row per case and class; a figure that does not exist is empty."""
    rows = [score.row() for score in scores]
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return text.getvalue().encode()


def write_tables(folder: Path, scores: Sequence[CaseScores], summary: Mapping[str, Any]) -> None:
    """Write ``cases.csv`` and ``summary.json`` into a folder."""
    write_whole(folder / "cases.csv", format_cases(scores))
    write_whole(folder / "summary.json", json.dumps(summary, indent=2))


def _summarise_class(scores: Sequence[CaseScores]) -> dict[str, Any]:
    rows = [s.row() for s in scores]
    found = [row for row in rows if not row["missed"] and not row["false_alarm"]]
    volume = {m: _spread(row[m] for row in rows) for m in VOLUME_METRICS}
    volume |= {f"{m}_found": _spread(row[m] for row in found) for m in ("assd_mm", "hd95_mm")}
    weights = {"dice": "slices_occupied", "jaccard": "slices_occupied"}
    weights |= {"assd_mm": "slices_matched", "hd95_mm": "slices_matched"}
    return {
        "volume": volume,
        "present": sum(row["true_ml"] > 0 for row in rows),
        "missed": sum(row["missed"] for row in rows),
        "false_alarms": sum(row["false_alarm"] for row in rows),
        "slice_wise": {m: _pooled(rows, f"slice_{m}", n) for m, n in weights.items()},
        "published": {m: _pooled(rows, f"published_{m}", "slices") for m in ("dice", "jaccard")},
    }


def _spread(values: Iterable[float]) -> dict[str, float | int | None]:
    numbers = np.array([value for value in values if not math.isnan(value)])
    some, several = len(numbers) > 0, len(numbers) > 1
    return {
        "mean": float(numbers.mean()) if some else None,
        "std": float(numbers.std(ddof=1)) if several else None,
        "median": float(np.median(numbers)) if some else None,
        "n": len(numbers),
    }


def _pooled(rows: Sequence[Mapping[str, Any]], metric: str, weight: str) -> dict[str, float | int | None]:
    """Mean over all slices of all cases, from each case's mean and number of slices."""
    total = sum(row[weight] for row in rows)
    # A case without such slices has a NaN mean, which times 0 would still be NaN.
    summed = sum(row[metric] * row[weight] for row in rows if row[weight])
    return {"mean": summed / total if total else None, "n": total}


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
