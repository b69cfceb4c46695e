"""The figures of a run, stage by stage, as text: what the page and the table at a run's end show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from weakmedsam.contracts import in_round, split_round
from weakmedsam.report.readers import NAN, Row
from weakmedsam.report.run_data import Round, Run
from weakmedsam.system.commands import command

DASH = "\N{EN DASH}"
RANDOM = "weights: none (random numbers)"
"""What is said of a run whose backbone was not pre-trained."""

TITLES = {
    "prepare": "prepare",
    "classify": "classify",
    "pseudo_labels": "pseudo-labels",
    "segment": "segment",
    "test": "test",
    "test_maps": "test of the maps",
    "threshold": "threshold",
    "refined": "test, refined",
    "upper_bound": "upper bound",
}
COMMANDS = {
    **TITLES,
    **dict.fromkeys(("test", "test_maps", "threshold", "refined"), "evaluate"),
    "upper_bound": "upper-bound",
}
"""What runs each stage, of the program and of ``make``."""

TIPS = {
    "auroc": "Area under the ROC curve of the image-level class, over slices: 0.5 is chance, 1 perfect.",
    "ap": "Average precision of the image-level class, over slices; chance is the share that has it.",
    "cam_dice": "Dice of the thresholded class activation map against the expert mask, per volume; "
    "slices that do not have the class by their image-level label stay empty.",
    "pam_dice": "The same after refinement by prompt affinity mining.",
    "test_cam_dice": "As CAM Dice, on the test cases, on the scan's own slices.",
    "test_pam_dice": "The same after refinement by prompt affinity mining.",
    "test_no_image_dice": "Dice of an ellipsoid in the middle of the frame, from the first to the last labelled slice, "
    "with the radius that is best on these cases. No image is looked at: what is no better has learnt nothing.",
    "again_cam_dice": "Dice of what the segmentation network of the round before predicts, on the test cases; slices "
    "that do not have the class by their image-level label stay empty.",
    "again_pam_dice": "The same after refinement by prompt affinity mining: how good this round's pseudo-labels are.",
    "upper_bound": "Dice of the same network trained on the expert masks: what weak labels could reach at best.",
    "val_dice": "Dice of the segmentation network against the expert masks of the validation cases.",
    "agreement": "Dice of the segmentation network with the pseudo-labels: there are no expert masks.",
    "quality": "Mean confidence of the pixels that the class has in a slice, times the stability where that was "
    "measured; no expert mask is used.",
    "stability": "Dice between the pseudo-labels of an image and of its mirror images; no expert mask is used.",
    "dice": "Overlap, 2|A and B| / (|A| + |B|), per case over the whole volume: 0 to 1.",
    "jaccard": "Overlap, |A and B| / |A or B|, per case over the whole volume: 0 to 1.",
    "assd_mm": "Average symmetric surface distance; 0 is perfect. A miss or false alarm has a penalty.",
    "hd95_mm": "95th percentile of surface distances; 0 is perfect. A miss or false alarm has a penalty.",
    "threshold": "Of the thresholds compared on validation cases that of the highest Dice; no test case is looked at.",
    "refined.dice": "Dice of the segmentation network's predictions after refinement by prompt affinity mining; "
    "nothing is known of a test case, the network says which classes its slices have.",
    "found_mm": "As above, without the cases that were missed or are false alarms.",
    "slice_wise": "Mean over the slices that have the class in truth or prediction, as many papers do.",
    "published": "Mean over all slices, an empty one counting as 1: the authors' released code.",
    "missed": "Cases that have the class where nothing of it was found.",
    "false_alarm": "Cases without the class where something was marked.",
}
TIPS = {**{f"refined.{key}": tip for key, tip in TIPS.items()}, **TIPS}
VALIDATED = (
    ("classify", "val/auroc", "Class AUROC", "auroc"),
    ("classify", "val/ap", "Class average precision", "ap"),
    ("classify", "val/cam_dice", "CAM Dice", "cam_dice"),
    ("classify", "val/pam_dice", "Refined CAM (PAM) Dice", "pam_dice"),
    ("segment", "val/dice", "Segmentation Dice", "val_dice"),
    ("segment", "val/agreement", "Agreement with pseudo-labels", "agreement"),
)
TESTED = (("dice", "Dice"), ("jaccard", "Jaccard"), ("assd_mm", "ASSD, mm"), ("hd95_mm", "HD95, mm"))
_COUNTED = (("missed", "Cases missed"), ("false_alarm", "False alarms"))


@dataclass(frozen=True)
class Metric:
    """One line of the table of figures.

    Attributes:
        stage: the stage that measured it.
        key: its name in ``TIPS``.
        title: its name for readers.
        where: on which cases, and at which epoch.
        overall: over all classes, as text.
        by_class: class name -> text.
    """

    stage: str
    key: str
    title: str
    where: str
    overall: str
    by_class: dict[str, str]


def title_of(stage: str) -> str:
    """A stage's name for readers."""
    kind, number = split_round(stage)
    return TITLES[kind] + (f", round {number}" if number > 1 else "")


def command_of(run: Run, stage: str) -> str:
    """What runs a stage of a run, or with ``train`` all that are left."""
    kind, number = ("train", len(run.rounds)) if stage == "train" else split_round(stage)
    rounds = {"rounds": str(number)} if number > 1 else {}
    return command(COMMANDS.get(kind, kind), dataset=run.dataset, experiment=run.experiment, **rounds)


def number(value: float, digits: int = 3) -> str:
    """A figure with fixed decimals; a dash for NaN."""
    return f"{value:.{digits}f}" if math.isfinite(value) else DASH


def duration(seconds: float) -> str:
    """Seconds in the two units that matter; a dash for NaN."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def cell(value: str | float, column: str) -> str:
    """A table's cell as text, by its column."""
    if isinstance(value, str):
        return value or DASH
    if column == "seconds" or column.endswith("_mm"):
        return number(value, 2)
    if column.endswith("_ml"):
        return number(value, 1)
    return (
        f"{value:.0f}"
        if value.is_integer() and column not in dict(TESTED) | {"quality": "", "stability": ""}
        else number(value)
    )


def figures(run: Run) -> list[Metric]:
    """What was measured, stage by stage, for all classes and for each."""
    found = _validated(run)
    for one in run.rounds:
        found += [*_labelled(one), *_maps_tested(one), *_tested(one.cases, in_round("test", one.number))]
        found += [*_other_protocols(one), *_refined(one)]
    found += _upper_bound(run)
    order = list(run.stages)
    return sorted(found, key=lambda figure: order.index(figure.stage))


def _labelled(one: Round) -> list[Metric]:
    found = []
    cases = len({row["case"] for row in one.quality})
    for column in ("quality", "stability"):
        values = by_class_of(one.quality, column)
        if values:
            stage, where = in_round("pseudo_labels", one.number), f"{cases} training cases"
            texts = {name: _spread(numbers, 3) for name, numbers in values.items()}
            overall = number(mean_of_means(values))
            found.append(Metric(stage, column, column.capitalize(), where, overall, texts))
    return found


def _validated(run: Run) -> list[Metric]:
    found = []
    rows = [(stage, *row[1:]) for stage in run.histories for row in VALIDATED if row[0] == split_round(stage)[0]]
    for stage, metric, title, key in rows:
        history = run.histories[stage]
        epoch = kept_epoch(run, stage)
        value, measured = history.at(metric, epoch)
        names = [name for name in run.classes if f"{metric}/{name}" in history.series]
        by_class = {name: number(history.at(f"{metric}/{name}", epoch)[0]) for name in names}
        if math.isnan(value) and by_class:
            value = mean_of([history.at(f"{metric}/{name}", epoch)[0] for name in names])
        if metric in history.series or by_class:
            where = "validation" + (f", epoch {measured:g}" if math.isfinite(measured) else "")
            found.append(Metric(stage, key, title, where, number(value), by_class))
    return found


def _tested(rows: Sequence[Row], stage: str) -> list[Metric]:
    where = f"{len({row['case'] for row in rows})} test cases"
    found = []
    for column, title in TESTED:
        values = by_class_of(rows, column)
        digits = 2 if column.endswith("_mm") else 3
        if values:
            texts = {name: _spread(numbers, digits) for name, numbers in values.items()}
            found.append(Metric(stage, column, title, where, number(mean_of_means(values), digits), texts))
        kept = [row for row in rows if not any(row.get(name) == 1 for name, _ in _COUNTED)]
        if values and digits == 2 and len(kept) < len(rows):
            values = by_class_of(kept, column)
            texts = {name: _spread(numbers, digits) for name, numbers in values.items()}
            overall = number(mean_of_means(values), digits)
            found.append(Metric(stage, "found_mm", f"{title}, where found", where, overall, texts))
    for column, title in _COUNTED:
        counts = {name: sum(v for v in values if v == v) for name, values in by_class_of(rows, column).items()}
        if counts:
            texts = {name: f"{count:g}" for name, count in counts.items()}
            found.append(Metric(stage, column, title, where, f"{sum(counts.values()):g}", texts))
    return found


def _refined(one: Round) -> list[Metric]:
    """What became of the predictions on test cases: the same figures under names of their own; and their threshold."""
    found = _tested(one.refined, in_round("refined", one.number))
    return [*_threshold(one), *(replace(figure, key=f"refined.{figure.key}") for figure in found)]


def _threshold(one: Round) -> list[Metric]:
    """The threshold of refined predictions, and what has chosen it."""
    value, cases = (_inner(one.threshold, key) for key in ("threshold", "cases"))
    if not math.isfinite(value):
        return []
    where = f"{cases:g} validation cases"
    return [Metric(in_round("threshold", one.number), "threshold", "Threshold of refined predictions", where,
                   number(value, 2), {})]  # fmt: skip


def _maps_tested(one: Round) -> list[Metric]:
    """Dice of what PAM started from and of what it made of it on the test cases, where that was measured."""
    where = f"{len({row['case'] for row in one.map_cases})} test cases"
    stage = "classify" if one.number == 1 else in_round("test_maps", one.number)
    found = []
    for column, title in (
        ("cam_dice", "CAM Dice" if one.number == 1 else "Prediction Dice, labels given"),
        ("pam_dice", "Refined CAM (PAM) Dice" if one.number == 1 else "Refined prediction (PAM) Dice"),
        ("no_image_dice", "No image: centred ellipsoid, labels given"),
    ):
        values = by_class_of(one.map_cases, column)
        if values:
            texts = {name: _spread(numbers, 3) for name, numbers in values.items()}
            overall = number(mean_of_means(values))
            again = one.number > 1 and column != "no_image_dice"
            key = f"again_{column}" if again else f"test_{column}"
            found.append(Metric(stage, key, title, where, overall, texts))
    return found


def _upper_bound(run: Run) -> list[Metric]:
    """Dice of the network that was trained on expert masks, where that was done."""
    values = by_class_of(run.upper_bound, "dice")
    if not values:
        return []
    where = f"{len({row['case'] for row in run.upper_bound})} test cases"
    texts = {name: _spread(numbers, 3) for name, numbers in values.items()}
    overall = number(mean_of_means(values))
    return [Metric("test", "upper_bound", "Dice, trained on EXPERT masks", where, overall, texts)]


def _other_protocols(one: Round) -> list[Metric]:
    """Dice by slices, from test/summary.json: beside the volume's Dice, under other names."""
    found = []
    for protocol, title in (
        ("slice_wise", "Slice-wise Dice"),
        ("published", "Dice as in the published code"),
    ):
        classes = one.summary.get("classes")
        values = {
            name: _inner(facts, protocol, "dice", "mean")
            for name, facts in (classes.items() if isinstance(classes, dict) else ())
        }
        if any(math.isfinite(value) for value in values.values()):
            texts = {name: number(value) for name, value in values.items()}
            overall = number(_inner(one.summary, "mean", protocol, "dice"))
            found.append(Metric(in_round("test", one.number), protocol, title, "all test slices", overall, texts))
    return found


def _inner(nested: Any, *keys: str) -> float:
    """A number deep in nested objects; NaN where it is not there."""
    for key in keys:
        nested = nested.get(key) if isinstance(nested, dict) else None
    return float(nested) if isinstance(nested, int | float) else NAN


def kept_epoch(run: Run, stage: str) -> float:
    """The epoch that the checkpoint's metric chooses, else the last one; NaN without epochs."""
    history, monitor = run.histories[stage], run.monitors.get(stage)
    kept = monitor.kept_epoch(history) if monitor else NAN
    return history.epochs[-1] if math.isnan(kept) and history.epochs else kept


def by_class_of(rows: Sequence[Row], column: str) -> dict[str, list[float]]:
    """Values of a table's column, by the class of the row; NaN stays."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = row.get(column)
        if isinstance(value, float):
            values.setdefault(str(row["class"]), []).append(value)
    return values


def mean_of(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN where there is none."""
    found = [value for value in values if math.isfinite(value)]
    return fmean(found) if found else NAN


def mean_of_means(by_class: Mapping[str, Sequence[float]]) -> float:
    """Mean over classes of the mean over cases, NaN left out; NaN where nothing is left."""
    return mean_of([mean_of(values) for values in by_class.values()])


def _spread(values: Sequence[float], digits: int) -> str:
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return DASH
    spread = f" \N{PLUS-MINUS SIGN} {stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):.{digits}f}{spread}"
