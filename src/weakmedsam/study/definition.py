"""What a study is: ``experiments/study/<name>.yaml``, read and checked, and the runs that it stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weakmedsam.errors import ConfigError
from weakmedsam.run.overrides import check_rounds, options_for, wanted_settings
from weakmedsam.run.request import Request, experiment_file
from weakmedsam.run.stages import STAGES, Stage, chosen_stages
from weakmedsam.system.yaml_files import read_settings_file

SEED = "seed_everything"
_KEYS = ("seeds", "upper_bound", "sets", "variants")
_SET_KEYS = ("dataset", "data_dir", "options")

Options = list[tuple[str, list[str]]]
"""(key, values) in order, as of ``parse_options``."""


@dataclass(frozen=True)
class StudySet:
    """A data set of a study.

    Attributes:
        name: of the set in the study.
        dataset: of ``experiments/data/<dataset>.yaml``.
        data_dir: its folder below ``DATA_DIR``; None = the data set's own default.
        options: of every run on it.
    """

    name: str
    dataset: str
    data_dir: str | None
    options: Options


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Attributes:
        path: of the file.
        seeds: of each set and variant.
        upper_bound: train the fully supervised upper bound, too: once per set and seed, with the first variant.
        sets: in the order of the file.
        variants: name -> options, in the order of the file; others are compared with the first.
    """

    path: Path
    seeds: tuple[int, ...]
    upper_bound: bool
    sets: tuple[StudySet, ...]
    variants: dict[str, Options]


@dataclass(frozen=True)
class StudyRun:
    """A run of a study.

    Attributes:
        set_name: of the set.
        variant: of the variant.
        seed: of the trainings.
        request: what the pipeline is asked for.
        upper_bound: the upper bound is trained beside it.
    """

    set_name: str
    variant: str
    seed: int
    request: Request
    upper_bound: bool

    @property
    def name(self) -> str:
        """``<dataset>/<experiment>``, as reports name it."""
        return f"{self.request.dataset}/{self.request.experiment}"

    @property
    def targets(self) -> tuple[str, ...]:
        """Of the pipeline; the upper bound first, so that the report at the end of ``train`` shows it."""
        return ("upper-bound", "train") if self.upper_bound else ("train",)

    def stages(self, target: str) -> list[Stage]:
        """The stages of one of its targets."""
        return chosen_stages(target, self.request.rounds)


@dataclass(frozen=True)
class Plan:
    """The runs of a study whose scans are there.

    Attributes:
        name: of the study; its page lies in ``runs/studies/<name>``.
        folder: that folder.
        study: what its file says.
        runs: set by set, variant by variant, seed by seed.
        left_out: sentences, one for each set whose folder is not there.
    """

    name: str
    folder: Path
    study: Study
    runs: tuple[StudyRun, ...]
    left_out: tuple[str, ...] = field(default=())


def read_study(name: str) -> Study:
    """Read ``experiments/study/<name>.yaml``.

    Raises:
        ConfigError: it is not there, or a key is missing, unknown or of the wrong kind; names file and key.
    """
    path = experiment_file(f"study/{name}.yaml")
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path} does not exist; there are: {known}")
    held = read_settings_file(path)
    _check_keys(path, "", held, _KEYS)
    bound = held.get("upper_bound", False)
    if not isinstance(bound, bool):
        raise ConfigError(f"{path}: upper_bound is {bound!r}; it must be true or false")
    variants = {
        variant: _options(path, f"variants.{variant}", options)
        for variant, options in _named(path, "variants", held, {"default": {}}).items()
    }
    sets = tuple(_read_set(path, one, content) for one, content in _named(path, "sets", held, None).items())
    return Study(path, _seeds(path, held.get("seeds", [0])), bound, sets, variants)


def plan_study(study: Study, name: str, data_dir: Path, asked: Request) -> Plan:
    """The runs of a study.

    Args:
        study: what its file says.
        name: of the study's folder and the beginning of its runs' names.
        data_dir: folder below which the sets' folders lie.
        asked: what all runs share: backbone, runs, options, trainer, logger, launcher and rounds.

    Raises:
        ConfigError: the name is none of a folder, no set's folder is there, or a run's settings are wrong.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"NAME={name}: a study's name has letters, digits, '_', '-' and '.' only")
    if any(key.endswith(SEED) for key, _ in asked.options):
        raise ConfigError(f"ARGS: --{SEED} is set by the study for each run; change `seeds` in {study.path}")
    there, left_out = [], []
    for one in study.sets:
        folder = None if one.data_dir is None else data_dir / one.data_dir
        if folder is None or folder.is_dir():
            there.append((one, folder))
        else:
            left_out.append(f"{one.name} is left out: {folder} is not there")
    if not there:
        raise ConfigError(
            f"{study.path}: no set has a folder ({'; '.join(left_out)}). Set DATA_DIR to the folder that holds them, "
            "or correct data_dir of the sets"
        )
    first = next(iter(study.variants))
    runs = []
    for one, folder in there:
        for variant, options in study.variants.items():
            for seed in study.seeds:
                request = asked._replace(
                    dataset=one.dataset,
                    experiment=f"{name}-{one.name}-{variant}-{seed}",
                    data_dir=None if folder is None else str(folder),
                    options=[*one.options, *options, *asked.options, (SEED, [str(seed)])],
                )
                runs.append(StudyRun(one.name, variant, seed, request, study.upper_bound and variant == first))
    plan = Plan(name, asked.runs / "studies" / name, study, tuple(runs), tuple(left_out))
    _check_runs(plan)
    return plan


def _check_runs(plan: Plan) -> None:
    """See that the pipeline takes every run's settings, before the first one starts."""
    for run in plan.runs:
        stages = [stage for target in run.targets for stage in run.stages(target)]
        check_rounds(run.request.options, run.request.rounds)
        try:
            for stage in stages:
                wanted_settings(stage, run.request)
        except ConfigError as error:
            raise ConfigError(f"{plan.study.path}: sets.{run.set_name}, variants.{run.variant}: {error}") from error


def _read_set(path: Path, name: str, content: Any) -> StudySet:
    place = f"sets.{name}"
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {place} holds no settings; it needs at least `dataset: folder` or another data set")
    _check_keys(path, f"{place}.", content, _SET_KEYS)
    dataset, data_dir = content.get("dataset"), content.get("data_dir")
    if not (isinstance(dataset, str) and re.fullmatch(r"\w[\w.-]*", dataset)):
        raise ConfigError(f"{path}: {place}.dataset is {dataset!r}; it must name a file of experiments/data/")
    if not (data_dir is None or (isinstance(data_dir, str) and data_dir)):
        raise ConfigError(f"{path}: {place}.data_dir is {data_dir!r}; it must be a folder below DATA_DIR")
    return StudySet(name, dataset, data_dir, _options(path, f"{place}.options", content.get("options")))


def _options(path: Path, place: str, held: Any) -> Options:
    """Options of a mapping ``data.image_size: 128``; a value is YAML, and a text stays as it is."""
    if held is None:
        return []
    if not isinstance(held, dict):
        raise ConfigError(f"{path}: {place} is {held!r}; options are lines like `data.image_size: 128`")
    for key in held:
        if key.endswith(SEED):
            raise ConfigError(f"{path}: {place}.{key} is set by the study for each run; change `seeds`")
    found = [(key.removeprefix("--"), [_word(value)]) for key, value in held.items()]
    try:
        options_for(STAGES[0], found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {place}: {str(error).removeprefix('ARGS: ')}") from error
    return found


def _word(value: Any) -> str:
    """A value as a word of the command line, which reads it as YAML."""
    if isinstance(value, str):
        named = value.removeprefix("experiments/")
        return value if named == value else str(experiment_file(named))  # outside a checkout it is the package's
    return json.dumps(value, ensure_ascii=False, default=str)


def _named(path: Path, key: str, held: dict[str, Any], default: dict[str, Any] | None) -> dict[str, Any]:
    """A mapping of names that can be parts of a run's name; a dash would make two of them one."""
    found = held.get(key, default)
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path}: {key} is {found!r}; it must have at least one name with its settings")
    for name in found:
        if not re.fullmatch(r"\w+", name):
            raise ConfigError(f"{path}: {key}.{name}: a name has letters, digits and '_' only")
    return found


def _seeds(path: Path, held: Any) -> tuple[int, ...]:
    plain = isinstance(held, list) and held and all(type(seed) is int and 0 <= seed < 2**32 for seed in held)
    if not plain or len(set(held)) < len(held):
        raise ConfigError(f"{path}: seeds is {held!r}; it must be a list of different whole numbers, 0 or more")
    return tuple(held)


def _check_keys(path: Path, stem: str, held: dict[str, Any], known: Sequence[str]) -> None:
    for key in held:
        if key not in known:
            raise ConfigError(f"{path}: {stem}{key} is unknown; there are: {', '.join(known)}")
