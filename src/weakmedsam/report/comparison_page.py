"""The page about several runs: tables, curves over each other, cases of run against run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from weakmedsam.report.charts import SERIES_COLOURS, Chart, Line
from weakmedsam.report.comparison import Contender, Group, differing, spread
from weakmedsam.report.readers import Row
from weakmedsam.report.run_page import templates
from weakmedsam.report.summary import TIPS, number

CURVES = (
    ("classify", "train/loss", "Loss, training", "loss", False),
    ("classify", "val/auroc", "Class AUROC, validation", "AUROC", True),
    ("classify", "val/cam_dice", "CAM Dice, validation", "Dice", True),
    ("classify", "val/pam_dice", "Refined CAM Dice, validation", "Dice", True),
    ("segment", "train/loss", "Loss of the segmentation network, training", "loss", False),
    ("segment", "val/dice", "Dice of the segmentation network, validation", "Dice", True),
    ("segment", "val/agreement", "Agreement with the pseudo-labels, validation", "Dice", True),
)
LOWER_IS_BETTER = ("assd_mm", "hd95_mm")

_SIZE, _LEFT, _BOTTOM, _TOP, _RIGHT = 300, 44, 36, 8, 10


@dataclass(frozen=True)
class Cell:
    """A table's figure: what is shown, what it is sorted by, and whether it is the best of its kind."""

    text: str
    value: float
    best: bool = False


@dataclass(frozen=True)
class Scatter:
    """Dice of the cases that two runs have both scored, of one against the other.

    Attributes:
        title: the two runs.
        across: name of the run on the horizontal axis.
        up: name of the run on the vertical axis.
        points: (case, class, value across, value up).
        classes: class names, in the order of their colours.
        missing: cases and classes that one of the two has not scored.
    """

    title: str
    across: str
    up: str
    points: list[tuple[str, str, float, float]]
    classes: list[str]
    missing: int

    @property
    def lines(self) -> list[Line]:
        """The legend: a colour a class."""
        return [Line(name, (), n % SERIES_COLOURS + 1) for n, name in enumerate(self.classes)]

    @property
    def better(self) -> str:
        """How many points lie above the diagonal, and the mean difference, in words."""
        gains = [y - x for _, _, x, y in self.points]
        above, below = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
        mean = sum(gains) / len(gains)
        return f"{self.up} is better in {above} of {len(gains)}, worse in {below}; mean difference {mean:+.3f}"

    def svg(self) -> str:
        """The drawing, one SVG element; its text is escaped."""
        room = _SIZE - _LEFT - _RIGHT
        height = _SIZE - _TOP - _BOTTOM

        def place(x: float, y: float) -> tuple[float, float]:
            return _LEFT + x * room, _TOP + (1 - y) * height

        (left, bottom), (right, top) = place(0, 0), place(1, 1)
        parts = [
            f'<svg viewBox="0 0 {_SIZE} {_SIZE}" role="img" aria-label="{escape(self.title)}">',
            f'<path class="grid" d="M{left} {bottom}L{right} {top}"/>',
        ]
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            (x, _), (_, y) = place(tick, 0), place(0, tick)
            parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}M{x:.1f} {bottom}V{top}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
            parts.append(f'<text x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
        middle = (left + right) / 2, (top + bottom) / 2
        parts.append(f'<text x="{middle[0]}" y="{_SIZE - 5}" text-anchor="middle">{escape(self.across)}</text>')
        turn = f"translate(11 {middle[1]}) rotate(-90)"
        parts.append(f'<text transform="{turn}" text-anchor="middle">{escape(self.up)}</text>')
        for case, name, x, y in self.points:
            colour = self.classes.index(name) % SERIES_COLOURS + 1
            at = 'cx="{:.1f}" cy="{:.1f}"'.format(*place(x, y))
            told = f"<title>{escape(case)}, {escape(name)}: {x:.3f} and {y:.3f}</title>"
            parts.append(f'<g class="c{colour}"><circle class="hit" {at} r="7"/><circle {at} r="3"/>{told}</g>')
        return "".join([*parts, "</svg>"])


def render_comparison(contenders: Sequence[Contender], groups: Sequence[Group]) -> str:
    """The page, self-contained HTML."""
    titles = {key: figure.title for one in contenders for key, figure in one.figures.items()}
    classes = list(dict.fromkeys(name for one in contenders for name in one.run.classes))
    grouped = {one.name: group for group in groups for one in group.members}
    return templates().get_template("comparison_page.html").render(
        contenders=contenders,
        groups=groups,
        group_of=grouped,
        colours=SERIES_COLOURS,
        titles=titles,
        tips=TIPS,
        classes=classes,
        seeded=any(len(group.members) > 1 for group in groups),
        differing=differing(contenders),
        rows=[[_of_run(one, key) for key in titles] for one in contenders],
        means=_mark_best([[_of_group(group, key, None) for key in titles] for group in groups], list(titles)),
        by_class=[
            (name, _mark_best([[_of_group(group, key, name) for key in titles] for group in groups], list(titles)))
            for name in (classes if len(classes) > 1 else [])
        ],
        curves=[chart for chart in (_chart(c, contenders, grouped) for c in CURVES) if chart is not None],
        scatters=_scatters(contenders),
    )  # fmt: skip


def _digits(key: str) -> int:
    return 2 if key.endswith("_mm") else 3


def _of_run(one: Contender, key: str) -> Cell:
    value = one.figures[key].overall if key in one.figures else math.nan
    return Cell(number(value, _digits(key)), value)


def _of_group(group: Group, key: str, class_name: str | None) -> Cell:
    """Mean and spread over a group's runs, of all classes or of one."""
    figures = [one.figures[key] for one in group.members if key in one.figures]
    values = [f.overall if class_name is None else f.classes.get(class_name, math.nan) for f in figures]
    mean, deviation, count = spread(values)
    text = number(mean, _digits(key))
    if count > 1:
        text += f" \N{PLUS-MINUS SIGN} {deviation:.{_digits(key)}f}"
    if 0 < count < len(group.members):
        text += f" ({count} of {len(group.members)} runs)"
    return Cell(text, mean)


def _mark_best(table: list[list[Cell]], keys: list[str]) -> list[list[Cell]]:
    """The same table with the best of each column marked, where one is better than all others."""
    marked = [list(row) for row in table]
    for column, key in enumerate(keys):
        sign = -1 if key in LOWER_IS_BETTER else 1
        there = sorted((sign * row[column].value, n) for n, row in enumerate(table) if math.isfinite(row[column].value))
        if len(there) > 1 and there[-1][0] > there[-2][0]:
            value, n = there[-1]
            marked[n][column] = Cell(table[n][column].text, sign * value, best=True)
    return marked


def _chart(
    curve: tuple[str, str, str, str, bool], contenders: Sequence[Contender], grouped: dict[str, Group]
) -> Chart | None:
    """One figure of all runs over the epochs of the longest."""
    stage, metric, title, unit, bounded = curve
    epochs = sorted({epoch for one in contenders for epoch in one.run.histories[one.run.latest(stage)].epochs})
    lines = []
    for one in contenders:
        history = one.run.histories[one.run.latest(stage)]
        held = dict(zip(history.epochs, history.series.get(metric, ()), strict=False))
        values = [held.get(epoch, math.nan) for epoch in epochs]
        if any(math.isfinite(value) for value in values):
            group = grouped[one.name]
            later = group.members.index(one) > 0  # seeds of one setting: one colour, the first one drawn through
            lines.append(Line(one.name, values, (group.number - 1) % SERIES_COLOURS + 1, dashed=later))
    return Chart(title, unit, epochs, lines, bounded) if lines else None


def _scatters(contenders: Sequence[Contender]) -> list[Scatter]:
    """The first run against each of the others, where both have scored the same cases."""
    first, *others = contenders
    ours = _dice(first.run.last.cases)
    drawn = []
    for other in others:
        theirs = _dice(other.run.last.cases)
        points = [(*key, ours[key], theirs[key]) for key in ours if key in theirs]
        points = [point for point in points if math.isfinite(point[2]) and math.isfinite(point[3])]
        if points:
            classes = list(dict.fromkeys(point[1] for point in points))
            missing = len(ours.keys() | theirs.keys()) - len(points)
            title = f"{other.name} against {first.name}"
            drawn.append(Scatter(title, first.name, other.name, points, classes, missing))
    return drawn


def _dice(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    return {(str(row["case"]), str(row["class"])): float(row["dice"]) for row in rows}
