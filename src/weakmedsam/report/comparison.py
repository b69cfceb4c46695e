"""Several runs beside each other: settings that differ, groups by seed, metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from weakmedsam.config_diff import LOCATION_KEYS
from weakmedsam.contracts import split_round
from weakmedsam.errors import ConfigError
from weakmedsam.report.readers import NAN
from weakmedsam.report.run_data import Run, read_run
from weakmedsam.report.run_page import flat
from weakmedsam.report.summary import TESTED, VALIDATED, by_class_of, kept_epoch, mean_of_means
from weakmedsam.system.json_files import parse_mapping

SEED = "seed_everything"
"""What may differ within a group."""


@dataclass(frozen=True)
class ComparedMetric:
    """One figure of one run.

    Attributes:
        key: its name among the page's tips.
        title: its name for readers.
        overall: over all classes; NaN where it was not measured.
        classes: class name -> value.
    """

    key: str
    title: str
    overall: float
    classes: dict[str, float]


@dataclass(frozen=True)
class Contender:
    """A run among others.

    Attributes:
        name: ``<dataset>/<experiment>``.
        run: what was read.
        settings: option -> value as text, of both trainings, without places.
        figures: key -> figure.
    """

    name: str
    run: Run
    settings: dict[str, str]
    figures: dict[str, ComparedMetric]

    @property
    def seed(self) -> str:
        """Of the trainings; those of the two may differ."""
        found = {value for key, value in self.settings.items() if key.endswith(SEED)}
        return ", ".join(sorted(found))


@dataclass(frozen=True)
class Group:
    """Runs of one setting.

    Attributes:
        label: the runs' names, or their beginning and how many there are.
        number: from 1; its colour.
        members: the runs.
    """

    label: str
    number: int
    members: list[Contender]


def read_contenders(names: Sequence[str], runs: Path) -> list[Contender]:
    """Read the runs to compare.

    Args:
        names: ``<dataset>/<experiment>`` under ``runs``, or paths of run folders.
        runs: folder of all runs.

    Raises:
        ConfigError: fewer than two, or one of them twice.
        DataError: no such run, or a damaged file in it.
    """
    folders = [runs / name if (runs / name).is_dir() else Path(name) for name in names]
    if len(folders) < 2:
        raise ConfigError("COMPARE needs two runs or more, e.g. COMPARE='phantom/default phantom/k4'")
    for number, folder in enumerate(folders):
        if folder.resolve() in {other.resolve() for other in folders[:number]}:
            raise ConfigError(f"COMPARE names {names[number]} twice")
    found = [read_run(folder) for folder in folders]
    return [Contender(f"{run.dataset}/{run.experiment}", run, compared_settings(run), numbers(run)) for run in found]


def compared_settings(run: Run) -> dict[str, str]:
    """What both trainings were set to and how many rounds there were, flat, as text.

    Of pseudo-labels, refined predictions and later rounds, what they set otherwise. Places and the command line's own
    keys are left out.
    """
    settings = {
        f"{stage}.{key}": value for stage in ("classify", "segment") for key, value in _settings_of(run, stage).items()
    }
    for stage in run.configs:
        kind, number = split_round(stage)
        if number <= run.last.number and stage not in ("classify", "segment"):
            first = "classify" if kind in ("pseudo_labels", "refined") else kind
            for key, value in _settings_of(run, stage).items():
                decides = key.startswith("model.pam.") or kind == "segment"
                if decides and settings.get(f"{first}.{key}") != value:
                    settings[f"{stage}.{key}"] = value
    return settings | {"ROUNDS": str(run.last.number)} if settings else {}


def _settings_of(run: Run, stage: str) -> dict[str, str]:
    text = run.configs.get(stage)
    nested = parse_mapping(run.folder / stage / "config.yaml", text) if text else run.stages[stage].settings
    found = flat(_listed(nested))
    return {
        key.replace("init_args.", ""): value
        for key, value in found.items()
        if key.rsplit(".", 1)[-1] not in LOCATION_KEYS
    }


def _listed(value: Any) -> Any:
    """Lists of mappings (callbacks) as mappings by their position, so that a key of one can differ alone."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    return {str(key): _listed(item) for key, item in value.items()} if isinstance(value, dict) else value


def numbers(run: Run) -> dict[str, ComparedMetric]:
    """What was measured, as numbers: validation at the epoch that is kept, maps and network on test cases."""
    tables = [(name, f"{title}, test", run.last.cases, name) for name, title in TESTED]
    tables.append(("refined.dice", "Refined prediction Dice, test", run.last.refined, "dice"))
    tables += [
        (f"test_{name}", f"{title}, test", run.rounds[0].map_cases, name)
        for name, title in (("cam_dice", "CAM Dice"), ("pam_dice", "Refined CAM Dice"))
    ]
    found = []
    for key, title, rows, column in tables:
        values = by_class_of(rows, column)
        means = {name: mean_of_means({name: some}) for name, some in values.items()}
        found.append(ComparedMetric(key, title, mean_of_means(values), means))
    for stage, metric, title, key in VALIDATED:
        stage = run.latest(stage)
        history, epoch = run.histories[stage], kept_epoch(run, stage)
        classes = {name: history.at(f"{metric}/{name}", epoch)[0] for name in run.classes}
        found.append(ComparedMetric(key, f"{title}, validation", history.at(metric, epoch)[0], classes))
    return {figure.key: figure for figure in found if math.isfinite(figure.overall)}


def group_by_seed(contenders: Sequence[Contender]) -> list[Group]:
    """Runs that differ in the seed alone, together; in the order in which they were named.

    A run without any settings on disk stands alone: nothing says that it is like another.
    """
    groups: dict[object, list[Contender]] = {}
    for contender in contenders:
        same = frozenset((k, v) for k, v in contender.settings.items() if not k.endswith(SEED))
        groups.setdefault(same or contender.name, []).append(contender)
    return [
        Group(_label([one.name for one in members]), number, members)
        for number, members in enumerate(groups.values(), start=1)
    ]


def _label(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def differing(contenders: Sequence[Contender]) -> dict[str, list[str]]:
    """Options that are not the same in all runs -> their value in each, a dash where there is none."""
    names = dict.fromkeys(name for one in contenders for name in one.settings)
    values = {name: [one.settings.get(name, "\N{EN DASH}") for one in contenders] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def spread(values: Sequence[float]) -> tuple[float, float, int]:
    """(mean, standard deviation, how many) of the values that are there; NaN where there are too few."""
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return NAN, NAN, 0
    return fmean(found), stdev(found) if len(found) > 1 else NAN, len(found)
