"""The results of a study's runs: Dice by class, of what each stage makes, as each run's own report has it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from weakmedsam.contracts import split_round
from weakmedsam.errors import DataError
from weakmedsam.report.cli import REPORT
from weakmedsam.report.dice_table import dice_columns
from weakmedsam.report.final_dice import MEAN, final_result
from weakmedsam.report.page_mark import is_up_to_date
from weakmedsam.report.readers import NAN
from weakmedsam.report.run_data import read_run
from weakmedsam.report.summary import mean_of, mean_of_means
from weakmedsam.run.stage_state import DONE, NOT_NEEDED, StageState, states_of
from weakmedsam.study.definition import Plan, StudyRun

BOUND = "upper bound"
METHODS = ("no image", "CAM", "PAM", "network", "refined", BOUND)
"""Headings of ``dice_columns``, in the order of the study's tables."""
_FINAL = {"test_maps": "PAM", "test": "network", "refined": "refined"}
"""Stage of ``final_result`` -> its heading."""


@dataclass(frozen=True)
class RunResult:
    """What a run of a study has come to.

    Attributes:
        run: which one.
        waiting: the first stage that is to be run, and its state, or which file is damaged; empty where all is done.
        failed: how it ended in this call, where it failed.
        values: method -> class -> Dice, mean over the test cases; of finished results only.
        final: the method of the final Dice; empty where none is measured.
    """

    run: StudyRun
    waiting: str = ""
    failed: str = ""
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    final: str = ""

    @property
    def state(self) -> str:
        """In words."""
        return f"failed ({self.failed})" if self.failed else self.waiting or DONE

    @property
    def classes(self) -> list[str]:
        """Class names, ``MEAN`` behind those of several."""
        return list(dict.fromkeys(name for values in self.values.values() for name in values))


@dataclass(frozen=True)
class Spread:
    """A value over seeds.

    Attributes:
        mean: over the seeds that have it; NaN where none has.
        width: largest minus smallest; NaN with fewer than two.
        seeds: how many have it.
    """

    mean: float = NAN
    width: float = NAN
    seeds: int = 0


@dataclass(frozen=True)
class StudyRow:
    """A class of a variant, or its difference to the first variant, over seeds.

    Attributes:
        set_name: of the data set.
        variant: of the variant.
        against: the variant that its values are compared with, seed by seed; empty where they are its own.
        name: of the class, or ``MEAN``.
        cells: method -> value.
        final: the method of the final Dice.
        share: final Dice as a percentage of the upper bound, over the seeds that have both; NaN of differences.
        seeds: how many have a final Dice; where none has, how many have anything.
    """

    set_name: str
    variant: str
    against: str
    name: str
    cells: Mapping[str, Spread]
    final: str
    share: float
    seeds: int

    @property
    def convincing(self) -> bool:
        """The final Dice beats that without an image, as far as both are known."""
        blind = self.cells["no image"].mean
        return bool(self.against) or not self.final or math.isnan(blind) or self.cells[self.final].mean > blind


def read_result(run: StudyRun, failed: str = "") -> RunResult:
    """What a run has come to, under the settings that the study has now.

    Args:
        run: which one.
        failed: how it has just ended, where it failed.

    Returns:
        Its results; of a run with a damaged file none, and what is wrong with it.
    """
    if not run.request.folder.is_dir():
        return RunResult(run, "not run", failed)
    waits = {target: _first_waiting(states_of(run.stages(target), run.request)) for target in run.targets}
    waiting = next((said for said in waits.values() if said), "")
    if all(waits.values()):
        return RunResult(run, waiting, failed)
    try:
        held = read_run(run.request.folder)
    except DataError as error:  # one run does not keep up the others
        return RunResult(run, str(error), failed)
    result = final_result(held)
    final = _FINAL[split_round(result.stage)[0]] if result and not waits["train"] else ""
    values = {}
    for method, by_class in dice_columns(held).items():
        if not waits.get("upper-bound" if method == BOUND else "train", "not asked for"):
            names = [name for name in dict.fromkeys((*held.classes, *by_class)) if name in by_class]
            means = {name: mean_of(by_class[name]) for name in names}
            values[method] = means | ({MEAN: mean_of_means(by_class)} if len(means) > 1 else {})
    return RunResult(run, waiting, failed, values, final)


def is_finished(result: RunResult) -> bool:
    """Whether a run has nothing to do: all its stages are up to date, and so is its report."""
    return not result.waiting and is_up_to_date(result.run.request.folder / REPORT)


def _first_waiting(states: Mapping[str, StageState]) -> str:
    waiting = (f"{name} {state.state}" for name, state in states.items() if state.state not in (DONE, NOT_NEEDED))
    return next(waiting, "")


def study_rows(plan: Plan, results: Iterable[RunResult]) -> list[StudyRow]:
    """The table: set by set the classes of each variant, and of each but the first its differences to the first.

    Args:
        plan: of the study.
        results: of its runs.
    """
    held: dict[tuple[str, str], list[RunResult]] = {}
    for result in results:
        if result.values:
            held.setdefault((result.run.set_name, result.run.variant), []).append(result)
    first = next(iter(plan.study.variants))
    rows = []
    for set_name in dict.fromkeys(run.set_name for run in plan.runs):
        base = held.get((set_name, first), [])
        for variant in plan.study.variants:
            members = held.get((set_name, variant), [])
            names = list(dict.fromkeys(name for one in members for name in one.classes))
            rows += [_own(name, members, base) for name in names]
            if variant != first:
                rows += [row for name in names if (row := _paired(name, members, base)) is not None]
    return rows


def _own(name: str, members: Sequence[RunResult], base: Sequence[RunResult]) -> StudyRow:
    values = {method: _by_seed(members, method, name) for method in METHODS}
    final = next((one.final for one in members if one.final), "")
    reached, bound = values.get(final, {}), _by_seed(base, BOUND, name)
    both = [seed for seed in reached if seed in bound]
    possible = fmean(bound[seed] for seed in both) if both else 0.0
    share = 100 * fmean(reached[seed] for seed in both) / possible if possible > 0 else NAN
    cells = {method: _spread(found.values()) for method, found in values.items()}
    one = members[0].run
    return StudyRow(one.set_name, one.variant, "", name, cells, final, share, _count(cells, final))


def _paired(name: str, members: Sequence[RunResult], base: Sequence[RunResult]) -> StudyRow | None:
    """Differences to the first variant over the same seeds; None where no seed has both."""
    cells = {}
    for method in METHODS:
        ours, theirs = _by_seed(members, method, name), _by_seed(base, method, name)
        cells[method] = _spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    final = next((one.final for one in members if one.final), "")
    seeds = _count(cells, final)
    if not seeds:
        return None
    one = members[0].run
    return StudyRow(one.set_name, one.variant, base[0].run.variant, name, cells, final, NAN, seeds)


def _count(cells: Mapping[str, Spread], final: str) -> int:
    """Seeds of a row: those with a final Dice; where no run has one, those with anything."""
    return cells[final].seeds if final else max(cell.seeds for cell in cells.values())


def _by_seed(members: Iterable[RunResult], method: str, name: str) -> dict[int, float]:
    found = {one.run.seed: one.values.get(method, {}).get(name, NAN) for one in members}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def _spread(values: Iterable[float]) -> Spread:
    found = list(values)
    if not found:
        return Spread()
    return Spread(fmean(found), max(found) - min(found) if len(found) > 1 else NAN, len(found))
