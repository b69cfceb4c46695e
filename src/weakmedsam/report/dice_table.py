"""The table at the end of a run: test Dice by class, of what each stage makes."""

from __future__ import annotations

import math

from rich.markup import escape
from rich.table import Table

from weakmedsam.report.final_dice import known_without_masks
from weakmedsam.report.run_data import Run
from weakmedsam.report.summary import RANDOM, by_class_of, duration, figures, mean_of, mean_of_means, number, title_of

_WIDTH = 79
"""Letters of a line: the table fits a terminal of 80, and long names of classes give way."""


def dice_columns(run: Run) -> dict[str, dict[str, list[float]]]:
    """Test Dice of each case: heading -> class -> values; a heading for each kind that was measured.

    Of a run of several rounds the activation map is the first round's, all else the last one's.
    """
    found = {
        "CAM": by_class_of(run.rounds[0].map_cases, "cam_dice"),
        "PAM": by_class_of(run.last.map_cases, "pam_dice"),
        "network": by_class_of(run.last.cases, "dice"),
        "refined": by_class_of(run.last.refined, "dice"),
        "upper bound": by_class_of(run.upper_bound, "dice"),
        "no image": by_class_of(run.rounds[0].map_cases, "no_image_dice"),
    }
    return {name: values for name, values in found.items() if values}


def table_title(run: Run) -> str:
    """What the table shows, of which run."""
    cases = {row["case"] for row in (run.last.cases or run.rounds[0].map_cases or run.upper_bound)}
    last = f", round {run.last.number}" if run.last.number > 1 else ""
    scored = f": Dice on {len(cases)} test case{'s' if len(cases) > 1 else ''}{last}" if cases else last
    return f"{run.dataset} / {run.experiment}{scored}"


def dice_table(run: Run) -> Table | None:
    """A row a class, the mean of the classes below; None where no test case was scored."""
    columns = dice_columns(run)
    if not columns:
        return None
    table = Table(show_footer=True)
    room = _WIDTH - 4 - sum(max(len(name), 5) + 3 for name in columns)  # without edges, lines and blanks
    table.add_column("class", "mean", max_width=room, overflow="ellipsis", no_wrap=True)
    for name, values in columns.items():
        table.add_column(name, number(mean_of_means(values)), justify="right", no_wrap=True)
    for name in run.classes:
        table.add_row(escape(name), *(number(mean_of(values.get(name, ()))) for values in columns.values()))
    return table


def remarks(run: Run) -> list[str]:
    """What the table does not say, a sentence each: surface distances, misses, what is not measured or not done."""
    by_stage = {(figure.stage, figure.key): figure.overall for figure in figures(run)}
    said = []
    for stage, prefix, name in (("test", "", "network"), ("refined", "refined.", "refined")):
        held = [by_stage.get((run.latest(stage), prefix + key)) for key in ("hd95_mm", "missed", "false_alarm")]
        if held[0] is not None:
            said.append(f"{name}: HD95 {held[0]} mm, missed {held[1]}, false alarms {held[2]}")
    if not dice_columns(run):
        said.append("; ".join(["no test case is scored", *known_without_masks(run)]))
    if run.random:
        said.append(RANDOM)
    if run.expert:
        said.append("the network was trained on EXPERT masks")
    left = [f"{title_of(stage.name)} ({stage.state})" for stage in run.waiting]
    if left:
        said.append(f"not done: {', '.join(left)}")
    seconds = [stage.seconds for stage in run.stages.values() if math.isfinite(stage.seconds)]
    if seconds:
        said.append(f"time of all stages: {duration(sum(seconds))}")
    return said
