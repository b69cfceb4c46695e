"""Curves of a run as inline SVG: axes, ticks, tooltips; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from weakmedsam.contracts import split_round
from weakmedsam.report.readers import EpochTable

SERIES_COLOURS = 6
"""Line colours in the style sheet, ``c1`` to ``c6``, repeated beyond; ``c0`` is the ink, for means."""

Placing = Callable[[float], float]
"""From a value to its place along an axis, in SVG units."""

_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 36


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, a value for each epoch, a colour (0 = ink), dashed or not."""

    label: str
    values: Sequence[float]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over epochs, drawn together.

    Attributes:
        title: what is shown.
        unit: of the vertical axis.
        epochs: (E,) horizontal positions.
        lines: the curves, each (E,).
        bounded: values lie within 0 to 1.
    """

    title: str
    unit: str
    epochs: Sequence[float]
    lines: Sequence[Line]
    bounded: bool = False

    def svg(self) -> str:
        """The drawing, one SVG element; its text is escaped."""
        low, high, step = _span(self)
        first, last = min(self.epochs), max(self.epochs)

        def place(epoch: float, value: float) -> tuple[float, float]:
            across = 0.5 if last == first else (epoch - first) / (last - first)
            up = (value - low) / (high - low)
            return (
                _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
                _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
            )

        parts = [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(self.title)} by epoch">',
            *_horizontal_axis(self.epochs, lambda epoch: place(epoch, low)[0]),
            *_vertical_axis(ticks(low, high, step), self.unit, lambda value: place(first, value)[1]),
        ]
        for line in self.lines:
            points = [(e, v, *place(e, v)) for e, v in zip(self.epochs, line.values, strict=True) if math.isfinite(v)]
            parts += _curve(line, points)
        return "".join([*parts, "</svg>"])


# Stage -> charts: title, unit, bounded, and curves: metric (with its "/<class>" columns), label, dashed.
_PANELS: dict[str, tuple[tuple[str, str, bool, tuple[tuple[str, str, bool], ...]], ...]] = {
    "classify": (
        ("Loss", "loss", False, (
            ("train/loss", "training", False),
            ("val/loss", "validation", True),
            ("train/class_loss", "training, class", False),
            ("train/subclass_loss", "training, sub-class", False),
        )),
        ("Class AUROC, validation", "AUROC", True, (("val/auroc", "", False),)),
        ("Class average precision, validation", "AP", True, (("val/ap", "", False),)),
        ("Dice of CAM and refined CAM, validation", "Dice", True, (
            ("val/pam_dice", "refined", False),
            ("val/cam_dice", "CAM", True),
        )),
        ("Sub-class ids kept since the last clustering", "share", True, (("sce/kept", "", False),)),
        ("Sub-class and case, adjusted mutual information", "AMI", True, (("sce/case_information", "", False),)),
    ),
    "segment": (
        ("Loss", "loss", False, (("train/loss", "training", False), ("val/loss", "validation", True))),
        ("Dice, validation", "Dice", True, (("val/dice", "", False),)),
        ("Agreement with the pseudo-labels, validation", "Dice", True, (("val/agreement", "", False),)),
    ),
}  # fmt: skip


def charts(stage: str, history: EpochTable, classes: Sequence[str]) -> tuple[list[Chart], list[Chart]]:
    """A training stage's curves: the ones that are expected, then one chart for each further metric.

    Args:
        stage: "classify", "segment" or that of a later round.
        history: metrics by epoch.
        classes: class names; with several, each has its colour and the mean is drawn in ink.
    """
    if not history.epochs:
        return [], []
    used: set[str] = set()
    main = []
    for title, unit, bounded, families in _PANELS[split_round(stage)[0]]:
        lines = _lines(history, classes, families, used)
        if lines:
            main.append(Chart(title, unit, history.epochs, lines, bounded))
    further = []
    for column in history.series:
        stem, _, last = column.rpartition("/")
        name = stem if last in classes else column
        if column not in used:
            lines = _lines(history, classes, ((name, "", False),), used)
            if lines:
                further.append(Chart(name, "s" if name == "seconds" else "", history.epochs, lines))
    return main, further


def _lines(
    history: EpochTable, classes: Sequence[str], families: Sequence[tuple[str, str, bool]], used: set[str]
) -> list[Line]:
    """Curves of metrics and of their classes; ``used`` takes the columns seen."""
    lines = []
    for number, (metric, label, dashed) in enumerate(families):
        columns = {f"{metric}/{name}": name for name in classes}
        used.update((metric, *columns))
        drawn = [column for column in columns if _has(history, column)]
        if _has(history, metric):
            # With one class the mean is the class: one curve for both.
            drawn = drawn if len(drawn) > 1 else []
            name = ", ".join(part for part in ("mean" if drawn else "", label) if part)
            lines.append(Line(name or metric, history.series[metric], 0 if drawn else number + 1, dashed))
        for column in drawn:
            name = ", ".join(part for part in (columns[column], label) if part)
            colour = classes.index(columns[column]) % SERIES_COLOURS + 1
            lines.append(Line(name, history.series[column], colour, dashed))
    return lines


def _has(history: EpochTable, metric: str) -> bool:
    return any(math.isfinite(value) for value in history.series.get(metric, ()))


def _span(chart: Chart) -> tuple[float, float, float]:
    """Lowest and highest value of the vertical axis, both at ticks, and the step between ticks."""
    values = [value for line in chart.lines for value in line.values if math.isfinite(value)]
    low, high = min(values), max(values)
    # A narrow range is widened, so that noise does not look like a trend.
    least = 0.2 if chart.bounded else max(1e-6, 0.1 * max(abs(low), abs(high)))
    missing = max(0.0, least - (high - low)) / 2
    low, high = low - missing, high + missing
    if chart.bounded:
        low, high = max(0.0, min(low, 1 - least)), min(1.0, max(high, least))
    elif min(values) >= 0:
        low = 0.0
    step = _step(low, high, 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def _step(low: float, high: float, count: int) -> float:
    """A step of 1, 2 or 5 times a power of ten that gives about ``count`` intervals."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= raw * 0.999)


def ticks(low: float, high: float, step: float) -> list[float]:
    """Multiples of ``step`` from ``low`` to ``high``, both included where they are multiples."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _horizontal_axis(epochs: Sequence[float], place: Placing) -> Iterable[str]:
    step = max(1, round(_step(0, max(1.0, max(epochs) - min(epochs)), 6)))
    bottom = _HEIGHT - _BOTTOM
    for epoch in epochs:
        if epoch % step == 0 or len(epochs) == 1:
            yield f'<text x="{place(epoch):.1f}" y="{bottom + 15}" text-anchor="middle">{epoch:g}</text>'
    yield f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">epoch</text>'


def _vertical_axis(values: Sequence[float], unit: str, place: Placing) -> Iterable[str]:
    for value in values:
        y = place(value)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>'
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    yield f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>'


def _curve(line: Line, points: Sequence[tuple[float, float, float, float]]) -> Iterable[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for _, _, x, y in points)
    style = f"c{line.colour}{' dashed' if line.dashed else ''}"
    yield f'<g class="{style}"><polyline points="{path}"/>'
    for epoch, value, x, y in points:
        title = f"<title>{escape(line.label)}, epoch {epoch:g}: {value:.4g}</title>"
        place = f'cx="{x:.1f}" cy="{y:.1f}"'
        # The wide unseen circle is what the pointer meets.
        yield f'<g><circle class="hit" {place} r="7"/><circle {place} r="2"/>{title}</g>'
    yield "</g>"
