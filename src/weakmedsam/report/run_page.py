"""The report as one HTML page: a run's data put into words, tables and charts for the template."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from weakmedsam.report.charts import charts
from weakmedsam.report.final_dice import FinalResult, final_result, final_rows, known_without_masks, unconvincing
from weakmedsam.report.images import RULE, Album, Picture, chosen_pictures, latest_epoch, mean_by_case
from weakmedsam.report.page_mark import page_mark
from weakmedsam.report.readers import Row
from weakmedsam.report.run_data import Run
from weakmedsam.report.summary import (
    DASH,
    RANDOM,
    TIPS,
    cell,
    command_of,
    duration,
    figures,
    kept_epoch,
    title_of,
)


def render_run(run: Run) -> str:
    """The page of a run, self-contained HTML."""
    album = Album()
    result = final_result(run)
    extremes = extreme_pictures(run, result, album) if result else []
    grid = latest_epoch(run.folder / "classify" / "pictures")
    caption = f"{grid.name}: slices of validation cases" if grid else ""
    tables = {
        run.latest("pseudo_labels"): (run.last.quality, "quality"),
        run.latest("test"): (_without_slices(run.last.cases), "dice"),
        run.latest("refined"): (_without_slices(run.last.refined), "dice"),
    }
    scores = {stage: mean_by_case(rows, column) for stage, (rows, column) in tables.items()}
    return (
        templates()
        .get_template("run_page.html")
        .render(
            run=run,
            mark=page_mark(run.folder),
            result=result,
            rows=final_rows(run),
            extremes=extremes,
            known=known_without_masks(run),
            dash=DASH,
            stages=list(run.stages.values()),
            titles={name: title_of(name) for name in run.stages},
            tips=TIPS,
            rule=RULE,
            random=RANDOM,
            figures=figures(run),
            unconvincing=unconvincing(run),
            choices=[_choice(run, stage) for stage in run.histories if run.histories[stage].epochs],
            grid=album.add(grid, caption, width=1800),
            curves={stage: charts(stage, history, run.classes) for stage, history in run.histories.items()},
            tables=tables,
            unscored={stage: sum(v != v for v in values.values()) for stage, values in scores.items()},
            pictures={
                stage: chosen_pictures(run.folder / stage / "pictures", values, tables[stage][1], album)
                for stage, values in scores.items()
                if not (result and stage == result.stage)
            },
            album=album,
            settings={stage.name: flat(stage.settings) for stage in run.stages.values() if stage.settings},
            summary=flat(run.last.summary),
            versions=_versions(run),
        )
    )


def extreme_pictures(run: Run, result: FinalResult, album: Album) -> list[Picture]:
    """Pictures of the best, median and worst test case by the final Dice; none of a stage that draws none."""
    folder = run.folder / result.stage / "pictures"
    return chosen_pictures(folder, mean_by_case(result.rows, result.column), "Dice", album) if folder.is_dir() else []


def templates() -> Environment:
    """What fills the pages' templates: autoescaped, and a name that is not filled is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "cell": cell}
    environment.globals["command_of"] = command_of
    return environment


def _without_slices(rows: Sequence[Row]) -> list[Row]:
    """Rows of the volume's protocol; the columns of the other protocols would treble the width."""
    return [{k: v for k, v in row.items() if not k.startswith(("slice_", "slices_", "published_"))} for row in rows]


def _choice(run: Run, stage: str) -> str:
    """How the epoch whose figures are shown was chosen, in a sentence."""
    epoch, last = kept_epoch(run, stage), run.histories[stage].epochs[-1]
    monitor = run.monitors.get(stage)
    if monitor is None or math.isnan(monitor.kept_epoch(run.histories[stage])):
        return f"{title_of(stage)}: figures of the last epoch, {last:g}."
    best = f"{'lowest' if monitor.mode == 'min' else 'highest'} {monitor.metric}"
    span = f"epoch {epoch:g} of 0 to {last:g}"
    return f"{title_of(stage)}: figures of {span}, the one kept: {best} on validation cases."


def _versions(run: Run) -> dict[str, dict[str, list[str]]]:
    """Package -> version -> stages that used it; one version for all stages is the rule."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage in run.stages.values():
        for package, version in stage.versions.items():
            found.setdefault(package, {}).setdefault(str(version), []).append(title_of(stage.name))
    return found


def flat(nested: Mapping[str, Any], stem: str = "") -> dict[str, str]:
    """Nested options as "a.b.c" -> text."""
    found: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{stem}{key}.")
        elif isinstance(value, float):
            found[f"{stem}{key}"] = f"{value:.6g}" if math.isfinite(value) else DASH
        else:
            found[f"{stem}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found
