"""What a study leaves beside its runs: ``study.html``, ``study.md``, ``study.csv`` and ``study.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from weakmedsam.report.final_dice import final_result
from weakmedsam.report.images import RULE, Album, Picture
from weakmedsam.report.run_data import read_run
from weakmedsam.report.run_page import extreme_pictures, templates
from weakmedsam.report.summary import DASH, number
from weakmedsam.run.stage_state import DONE
from weakmedsam.study.definition import Plan
from weakmedsam.study.results import METHODS, RunResult, Spread, StudyRow, study_rows
from weakmedsam.system.atomic_io import write_table, write_whole
from weakmedsam.system.commands import command

PAGE = "study.html"
COLUMNS = ("set", "variant", "seed", "class", "method", "dice", "run")
"""Of ``study.csv``."""
HOW_TO_READ = (
    "Dice of whole volumes, mean of the test cases: mean over the seeds, in brackets largest minus smallest. A row b "
    "\N{MINUS SIGN} a has the differences of variant b to variant a, over the seeds that both have. No image, CAM and "
    "PAM are given image-level labels, network and refined are not. The percentage is of the final Dice (refined, else "
    "network, else PAM) and of the first variant's upper bound, over the seeds that have both. A dash: not measured."
)
"""Stands above the page's tables and below the documentation's."""


@dataclass(frozen=True)
class Shown:
    """A row of the table as text.

    Attributes:
        row: what it shows.
        variant: its name, with ``- <first variant>`` where it shows differences.
        cells: method -> mean and spread.
        share: of the upper bound, percent.
    """

    row: StudyRow
    variant: str
    cells: dict[str, str]
    share: str


@dataclass(frozen=True)
class SetSection:
    """A set on the page.

    Attributes:
        name: of the set.
        variants: variant, or difference -> rows of its table.
        results: of its runs.
        pictured: name of the run of the pictures; empty where there are none.
        pictures: of the best, median and worst test case.
    """

    name: str
    variants: dict[str, list[Shown]]
    results: list[RunResult]
    pictured: str
    pictures: list[Picture]


def write_study(plan: Plan, results: Sequence[RunResult]) -> list[Shown]:
    """Write the page, the table for the documentation and every number, each file whole or not at all.

    Args:
        plan: of the study.
        results: of its runs.

    Returns:
        The rows of the table.
    """
    rows = study_rows(plan, results)
    shown = [_show(row) for row in rows]
    values = _values(results)
    write_table(plan.folder / "study.csv", COLUMNS, values)
    runs = [
        {"run": one.run.name, "set": one.run.set_name, "variant": one.run.variant, "seed": one.run.seed}
        | {"state": one.state}
        for one in results
    ]
    held = {"study": plan.name, "left_out": plan.left_out, "runs": runs, "values": values}
    text = json.dumps(_without_nan(held | {"rows": [asdict(row) for row in rows]}), indent=1, ensure_ascii=False)
    write_whole(plan.folder / "study.json", text + "\n")
    write_whole(plan.folder / "study.md", _markdown(plan, results, shown))
    write_whole(plan.folder / PAGE, _render(plan, results, shown))
    return shown


def _values(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    return [
        {"set": one.run.set_name, "variant": one.run.variant, "seed": one.run.seed, "class": name, "method": method}
        | {"dice": "" if math.isnan(value) else value, "run": one.run.name}
        for one in results
        for method, by_class in one.values.items()
        for name, value in by_class.items()
    ]


def _without_nan(value: Any) -> Any:
    """As JSON has it: null for a number that is none."""
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if value == "" or (isinstance(value, float) and not math.isfinite(value)) else value


def _show(row: StudyRow) -> Shown:
    cells = {method: spread_text(cell, row) for method, cell in row.cells.items()}
    variant = f"{row.variant} \N{MINUS SIGN} {row.against}" if row.against else row.variant
    return Shown(row, variant, cells, number(row.share, 0))


def spread_text(cell: Spread, row: StudyRow) -> str:
    """``0.603 (0.071)``: mean and spread; of differences with their sign; of other seeds than the row's, how many."""
    if not cell.seeds:
        return DASH
    beside = [f"{cell.width:.3f}"] if cell.seeds > 1 else []
    if cell.seeds != row.seeds:
        beside.append(f"{cell.seeds} seed{'s' if cell.seeds > 1 else ''}")
    mean = f"{cell.mean:+.3f}" if row.against else f"{cell.mean:.3f}"
    return f"{mean} ({'; '.join(beside)})" if beside else mean


def _markdown(plan: Plan, results: Sequence[RunResult], shown: Sequence[Shown]) -> str:
    """A table that can be pasted into a page of the documentation."""
    head = ["set", "variant", "class", *METHODS, "% of upper bound", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in shown:
        cells = [one.row.set_name, one.variant, one.row.name, *one.cells.values(), one.share, str(one.row.seeds)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    undone: dict[str, list[str]] = {}
    for result in results:
        if result.state != DONE:
            undone.setdefault(result.state, []).append(result.run.name)
    said = [*plan.left_out, *(f"{state}: {', '.join(names)}" for state, names in undone.items())]
    return "\n".join([*lines, "", HOW_TO_READ, *(["", *(f"- {line}" for line in said)] if said else [])]) + "\n"


def _render(plan: Plan, results: Sequence[RunResult], shown: Sequence[Shown]) -> str:
    """The page, self-contained HTML."""
    album = Album()
    first = next(iter(plan.study.variants))
    sections = []
    for name in dict.fromkeys(run.set_name for run in plan.runs):
        own = [one for one in results if one.run.set_name == name]
        pictured, pictures = _pictures([one for one in own if one.run.variant == first], album)
        variants: dict[str, list[Shown]] = {}
        for row in shown:
            if row.row.set_name == name:
                variants.setdefault(row.variant, []).append(row)
        sections.append(SetSection(name, variants, own, pictured, pictures))
    answer = {section.name: section.variants[first] for section in sections if first in section.variants}
    return (
        templates()
        .get_template("study_page.html")
        .render(
            plan=plan,
            report=command("report", dataset="...", experiment="..."),
            sections=sections,
            answer=answer,
            unlearnt=any(not one.row.convincing for rows in answer.values() for one in rows),
            first=first,
            methods=METHODS,
            done=sum(one.state == DONE for one in results),
            failed=[one for one in results if one.failed],
            dash=DASH,
            how=HOW_TO_READ,
            rule=RULE,
            album=album,
        )
    )


def _pictures(results: Sequence[RunResult], album: Album) -> tuple[str, list[Picture]]:
    """Of the first seed that has results: its run's name and the pictures that open its report."""
    for one in results:
        if one.final:
            run = read_run(one.run.request.folder)
            result = final_result(run)
            return one.run.name, extreme_pictures(run, result, album) if result else []
    return "", []
