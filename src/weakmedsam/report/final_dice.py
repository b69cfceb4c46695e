"""The final Dice of a run by class: what a report opens with, and what it is to be compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from weakmedsam.contracts import in_round
from weakmedsam.report.readers import Row
from weakmedsam.report.run_data import Run
from weakmedsam.report.summary import DASH, by_class_of, figures, mean_of, mean_of_means, number

MEAN = "mean"
"""What the row below the classes is called."""

Values = Mapping[str, Sequence[float]]
"""Class name -> value of each case."""


@dataclass(frozen=True)
class FinalResult:
    """What the last stage that was scored says of the test cases.

    Attributes:
        stage: its name, that of the folder with ``pictures/``.
        what: what was scored, in words.
        rows: of its table, one a case and class.
        column: of the table.
    """

    stage: str
    what: str
    rows: list[Row]
    column: str

    @property
    def cases(self) -> int:
        """How many test cases."""
        return len({row["case"] for row in self.rows})


@dataclass(frozen=True)
class FinalRow:
    """A class, or the mean of the classes; figures as text, a dash where there is none.

    Attributes:
        name: of the class.
        dice: final Dice.
        upper_bound: Dice of the same network trained on expert masks.
        share: how much of the upper bound is reached, percent.
        no_image: Dice without an image.
        convincing: the final Dice beats the one without an image, as far as both were measured.
    """

    name: str
    dice: str
    upper_bound: str
    share: str
    no_image: str
    convincing: bool = True


def final_result(run: Run) -> FinalResult | None:
    """Of the last stage that was scored: refined predictions, else the network, else pseudo-labels; None of none."""
    last = run.last
    known = (
        ("refined", "predictions of the segmentation network, refined by PAM; no labels given", last.refined, "dice"),
        ("test", "predictions of the segmentation network; no labels given", last.cases, "dice"),
        ("test_maps", "pseudo-labels (PAM), image-level labels given", last.map_cases, "pam_dice"),
    )
    for kind, what, rows, column in known:
        if by_class_of(rows, column):
            return FinalResult(in_round(kind, last.number), what, rows, column)
    return None


def final_rows(run: Run) -> list[FinalRow]:
    """A row a class, with several the mean below; none where no test case was scored."""
    result = final_result(run)
    if result is None:
        return []
    final, bound = by_class_of(result.rows, result.column), by_class_of(run.upper_bound, "dice")
    blind, beaten = no_image_dice(run), _not_beating(run)
    names = [name for name in run.classes if name in final] or list(final)
    rows = [_row(name, *({name: values.get(name, ())} for values in (final, bound, blind))) for name in names]
    rows = [replace(row, convincing=row.name not in beaten) for row in rows]
    return rows if len(rows) == 1 else [*rows, _row(MEAN, final, bound, blind)]


def _row(name: str, final: Values, bound: Values, blind: Values) -> FinalRow:
    reached, possible, without = (mean_of_means(values) for values in (final, bound, blind))
    both = bound.keys() >= final.keys() and possible > 0  # a share of the same classes
    share = number(100 * reached / possible, 0) if both else DASH
    return FinalRow(name, number(reached, 2), number(possible, 2), share, number(without, 2))


def no_image_dice(run: Run) -> dict[str, list[float]]:
    """Dice of the ellipsoid for which no image is looked at: class -> value of each test case."""
    return by_class_of(run.rounds[0].map_cases, "no_image_dice")


def _not_beating(run: Run) -> dict[str, tuple[float, float]]:
    """Class -> final Dice and Dice without an image, where the first is no better."""
    result = final_result(run)
    final = by_class_of(result.rows, result.column) if result else {}
    blind = {name: mean_of(values) for name, values in no_image_dice(run).items() if name in final}
    pairs = {name: (mean_of(final[name]), without) for name, without in blind.items() if math.isfinite(without)}
    return {name: pair for name, pair in pairs.items() if not pair[0] > pair[1]}


def unconvincing(run: Run) -> list[str]:
    """A sentence for each class whose final Dice on test cases is no better than without any image."""
    return [
        f"{name}: the final Dice of {number(final)} is no better than the {number(without)} of an ellipsoid in the "
        "middle of the frame, for which no image is looked at. This class has not been learnt"
        for name, (final, without) in _not_beating(run).items()
    ]


def known_without_masks(run: Run) -> list[str]:
    """What is measured where no test case is scored, as text: of the pseudo-labels, and of the network beside them."""
    labels, network = in_round("pseudo_labels", run.last.number), in_round("segment", run.last.number)
    known = (
        (labels, "quality", "quality of the pseudo-labels"),
        (network, "agreement", "agreement of the network with them"),
    )
    overall = {(figure.stage, figure.key): figure.overall for figure in figures(run)}
    return [f"{name} {overall[stage, key]}" for stage, key, name in known if (stage, key) in overall]
