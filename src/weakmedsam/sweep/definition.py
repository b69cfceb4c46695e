"""Definitions of sweeps: files of ``experiments/sweeps`` in W&B's format, validated. No torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from weakmedsam.config_diff import differences
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.run.overrides import options_for
from weakmedsam.run.request import EXPERIMENTS, Request
from weakmedsam.run.stages import STAGES, pseudo_labelled, stage_configs
from weakmedsam.system.atomic_io import write_whole
from weakmedsam.system.json_files import parse_mapping, read_text
from weakmedsam.system.yaml_files import read_settings_file

SWEEPS = EXPERIMENTS / "sweeps"
DEFINITION = "sweep.yaml"


class Program(NamedTuple):
    """What a run of a sweep is.

    Attributes:
        stage: the stage whose settings it takes.
        target: what has to be up to date before the first run.
        metrics: figures it logs once an epoch (``pam``: once), each also with ``/<class>``.
    """

    stage: str
    target: str
    metrics: tuple[str, ...]


PROGRAMS = {
    "classify": Program(
        "classify",
        "prepare",
        ("val/auroc", "val/ap", "val/cam_dice", "val/pam_dice", "val/loss", "train/loss"),
    ),
    "segment": Program(
        "segment", "pseudo-labels", ("val/score", "val/dice", "val/agreement", "val/loss", "train/loss")
    ),
    "pam": Program("features", "features", ("val/pam_dice", "val/cam_dice")),
}


KEYS = ("program", "method", "metric", "parameters", "early_terminate", "seed", "description")
METHODS = ("bayes", "random", "grid")
GOALS = ("minimize", "maximize")
DISTRIBUTIONS = {
    "constant": {"value"},
    "categorical": {"values"},
    **{kind: {"min", "max"} for kind in ("int_uniform", "uniform", "log_uniform", "log_uniform_values")},
    "q_uniform": {"min", "max", "q"},
}
"""W&B's distributions that Optuna samples too -> what each takes."""

_OCCLUSION = ("model.pam.occlusion.weight", "model.pam.occlusion.share")


class Sweep(NamedTuple):
    """A sweep that is going to run.

    Attributes:
        name: of its file and of its folder.
        definition: W&B's, with the command of a run.
        program: what a run is.
        folder: everything of the sweep lies here.
        words: the command line of a run without what is drawn and without its folder.
    """

    name: str
    definition: dict[str, Any]
    program: Program
    folder: Path
    words: list[str]

    @property
    def metric(self) -> str:
        """Name of the figure that is optimised."""
        return self.definition["metric"]["name"]

    @property
    def features(self) -> Path | None:
        """Where the stored features lie, for a sweep of PAM."""
        return Path(self.words[0]) if self.program.stage == "features" else None


def read_definition(path: Path) -> dict[str, Any]:
    """Read and validate a sweep's file; nested parameters are named by their options.

    Raises:
        ConfigError: the file is missing, a key or distribution is not supported, or nothing logs its metric.
    """
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise ConfigError(f"{path} does not exist; there are: {known}")
    definition = read_settings_file(path)
    if unknown := sorted(definition.keys() - set(KEYS)):
        raise ConfigError(f"{path}: {unknown[0]} is not a key of a sweep; there are {', '.join(KEYS)}")
    for key, choices in {"method": METHODS, "program": tuple(PROGRAMS)}.items():
        if definition.get(key) not in choices:
            raise ConfigError(f"{path}: {key} is {definition.get(key)!r}; choose one of {', '.join(choices)}")
    metric, parameters = definition.get("metric"), definition.get("parameters")
    if not isinstance(metric, Mapping) or metric.get("goal", "minimize") not in GOALS:
        raise ConfigError(f"{path}: metric is {metric!r}; give its name, and as goal {' or '.join(GOALS)}")
    name, logged = str(metric.get("name")), PROGRAMS[definition["program"]].metrics
    if not any(name == other or name.startswith(f"{other}/") for other in logged):
        raise ConfigError(
            f"{path}: metric {name!r} is logged by nothing; {definition['program']} logs {', '.join(logged)}, "
            "and each with /<class>"
        )
    if type(seed := definition.get("seed", 0)) is not int or seed < 0:
        raise ConfigError(f"{path}: seed is {seed!r}; it is a whole number, 0 by default")
    if not isinstance(parameters, Mapping) or not parameters:
        raise ConfigError(f"{path}: parameters is {parameters!r}; name the settings to vary")
    definition["parameters"] = flat_parameters(path, parameters)
    for name, drawn in definition["parameters"].items():
        if said := unsupported(drawn, definition["method"]):
            raise ConfigError(f"{path}: parameters.{name}: {said}")
    if "early_terminate" in definition:
        check_early_terminate(path, definition["early_terminate"])
    if definition["program"] == "pam":
        check_pam(path, definition)
    return definition


def kind_of(drawn: Mapping[str, Any]) -> str:
    """A parameter's distribution, as W&B infers it where none is named."""
    if "distribution" in drawn or "value" in drawn or "values" in drawn:
        return str(drawn.get("distribution", "constant" if "value" in drawn else "categorical"))
    return "int_uniform" if all(type(drawn.get(key)) is int for key in ("min", "max")) else "uniform"


def unsupported(drawn: Any, method: str) -> str | None:
    """Why a parameter cannot be sampled; None where it can."""
    kind = kind_of(drawn) if isinstance(drawn, Mapping) else ""
    if kind not in DISTRIBUTIONS:
        return (
            f"cannot sample {drawn!r}; give value, values, or min and max with one of the distributions "
            f"{', '.join(DISTRIBUTIONS)}"
        )
    needed = DISTRIBUTIONS[kind]
    if drawn.keys() - {"distribution"} != needed:
        return f"{kind} takes {', '.join(sorted(needed))}, not {dict(drawn)!r}"
    if "values" in needed and not (isinstance(drawn["values"], list) and drawn["values"]):
        return f"values is {drawn['values']!r}; list one value or more"
    types = (int,) if kind == "int_uniform" else (int, float)
    if any(type(drawn[key]) not in types for key in needed & {"min", "max", "q"}):
        return f"{dict(drawn)!r} are not {'whole ' if len(types) == 1 else ''}numbers"
    if "min" in needed and not drawn["min"] < drawn["max"]:
        return f"min {drawn['min']} is not less than max {drawn['max']}"
    if "q" in needed and drawn["q"] > 0 and len(grid_values(drawn) or []) < 2:
        return f"fewer than two multiples of q {drawn['q']} lie between min and max"
    if (kind == "log_uniform_values" and drawn["min"] <= 0) or drawn.get("q", 1) <= 0:
        return f"{'q' if 'q' in drawn else 'min'} has to be above 0"
    if method == "grid" and grid_values(drawn) is None:
        return f"a grid cannot go through {kind}; list values, or choose random or bayes"
    return None


def grid_values(drawn: Mapping[str, Any]) -> list[Any] | None:
    """All values of a parameter, in order; None where it is continuous."""
    kind = kind_of(drawn)
    if kind in ("constant", "categorical"):
        return list(drawn.get("values", [drawn.get("value")]))
    if kind not in ("int_uniform", "q_uniform"):
        return None
    step = drawn.get("q", 1)  # multiples of it, as W&B's
    first, last = math.ceil(drawn["min"] / step - 1e-9), math.floor(drawn["max"] / step + 1e-9)
    return [round(number * step, 9) for number in range(first, last + 1)]


def check_early_terminate(path: Path, early: Any) -> None:
    """See that an early end is W&B's Hyperband: ``min_iter``, or ``max_iter`` and ``s``.

    Raises:
        ConfigError: it is not.
    """
    given = dict(early) if isinstance(early, Mapping) else {}
    numbers = {key: value for key, value in given.items() if key != "type"}
    known = numbers.keys() - {"eta"} in ({"min_iter"}, {"max_iter", "s"})
    whole = all(type(value) is int and value >= (2 if key == "eta" else 1) for key, value in numbers.items())
    if given.get("type") != "hyperband" or not known or not whole:
        raise ConfigError(
            f"{path}: early_terminate is {early!r}; it takes type: hyperband, and either min_iter or max_iter and s, "
            "and eta, whole numbers from 1 (eta from 2)"
        )


def flat_parameters(path: Path, parameters: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """W&B's nested parameters by their options: ``{"model": {"parameters": {"a": ...}}}`` -> ``{"model.a": ...}``.

    W&B's agent would hand a group of them to a run as one option, ``--model={'a': 1}``, which takes the place of all
    other settings of the model.

    Raises:
        ConfigError: an option stands twice, or a group is empty.
    """
    found: dict[str, Any] = {}
    for name, drawn in parameters.items():
        key = f"{above}{name}"
        nested = isinstance(drawn, Mapping) and "parameters" in drawn
        parts = flat_parameters(path, drawn["parameters"] or {}, f"{key}.") if nested else {key: drawn}
        if not parts:
            raise ConfigError(f"{path}: parameters.{key} has no parameters below it; name some, or remove it")
        for option, value in parts.items():
            if option in found:
                raise ConfigError(f"{path}: the parameter {option} stands twice, once nested; keep one")
            found[option] = value
    return found


def check_pam(path: Path, definition: Mapping[str, Any]) -> None:
    """See that a sweep of PAM varies what can be varied on stored features.

    Raises:
        ConfigError: a parameter that is not PAM's or decides what is stored, or an early end.
    """
    from weakmedsam.pam.config import SETTINGS
    from weakmedsam.pam.feature_cache import STORED

    known = [f"model.pam.{name}" for name in SETTINGS if name not in STORED]
    wrong = [name for name in definition["parameters"] if name not in known]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]} cannot be swept on stored features; there are {', '.join(known)}")
    if "early_terminate" in definition:
        raise ConfigError(f"{path}: a run of PAM has no epochs, so early_terminate never acts; remove it")


def fit_to_store(sweep: Sweep) -> Sweep:
    """Leave out what a run of PAM without occlusion cannot answer, and see that masks of every grid are stored.

    Whether a run occludes is its backbone's affair (``experiments/backbone/samus.yaml`` does not), so one sweep
    serves both.

    Raises:
        ConfigError: masks of a grid are missing; names it and how they get there. Or nothing is left to sweep.
    """
    from weakmedsam.pam.feature_cache import read_head

    features = sweep.features
    if features is None:
        return sweep
    head, parameters = read_head(features), sweep.definition["parameters"]
    unanswered = [name for name in _OCCLUSION if name in parameters]
    if unanswered and not head.settings.get("occlusion.weight"):
        parameters = {name: drawn for name, drawn in parameters.items() if name not in unanswered}
        if not parameters:
            raise ConfigError(
                f"{SWEEPS / sweep.name}.yaml sweeps occlusion alone, but {features} was written with "
                "model.pam.occlusion.weight 0 and does not hold what occlusion takes: write it with a value above 0"
            )
        print(f"not swept: {', '.join(unanswered)}; what is stored was written with model.pam.occlusion.weight 0")
        sweep = sweep._replace(definition=sweep.definition | {"parameters": parameters})
    grids = grid_values(parameters.get("model.pam.prompts.grid", {"values": []})) or []
    if missing := sorted(set(grids) - set(head.grids)):
        raise ConfigError(
            f"{SWEEPS / sweep.name}.yaml: model.pam.prompts.grid {missing} is not among the grids {head.grids} whose "
            f"prompt masks are stored; add it to KeepFeatures's grids in {EXPERIMENTS / 'features.yaml'}"
        )
    return sweep


def plan(name: str, request: Request, title: str | None = None) -> Sweep:
    """Put a sweep together.

    Args:
        name: of ``experiments/sweeps/<name>.yaml``.
        request: data set, backbone, the run it builds on, and options for every run.
        title: name of the sweep's folder; ``name`` by default.

    Raises:
        ConfigError: see ``read_definition`` and ``stage_configs``.
    """
    definition = read_definition(SWEEPS / f"{name}.yaml")
    program = PROGRAMS[definition["program"]]
    stage = next(stage for stage in STAGES if stage.name == program.stage)
    words = ["fit"]
    words += [word for path in stage_configs(stage, request) for word in ("--config", str(path))]
    words += ["--data.data_dir", request.data_dir] if request.data_dir is not None else []
    words += options_for(stage, request.options)
    words += pseudo_labelled(request) if program.stage == "segment" else []
    if program.stage == "features":
        words = [str(request.folder / "features")]
    title = title or name
    folder = request.runs / request.dataset / "sweeps" / title
    command = [sys.executable, "-m", "weakmedsam.sweep.agent", str(folder), *words, "${args}"]
    definition |= {"name": f"{request.dataset}/{title}", "project": "weakmedsam", "command": command}
    return Sweep(title, definition, program, folder, words)


def claim(sweep: Sweep) -> None:
    """Take the sweep's folder, or go on in it.

    Raises:
        ConfigError: a sweep of this name and other settings lies there; the message shows what differs.
    """
    path = sweep.folder / DEFINITION
    if path.is_file():
        try:
            held = parse_mapping(path, read_text(path))
        except DataError as error:
            raise ConfigError(
                f"{path} is damaged: remove it if the sweep is still defined as it was, and the same command goes on"
            ) from error
        wanted = json.loads(json.dumps(sweep.definition))
        for definition in (held, wanted):  # another machine may have its Python elsewhere
            definition["command"] = definition.get("command", [])[1:]
        found = list(differences(held, wanted))
        if found:
            raise ConfigError(
                f"{sweep.folder} holds a sweep of other settings ({'; '.join(found[:5])}): choose another "
                "NAME, or remove that folder"
            )
    write_whole(path, yaml.safe_dump(sweep.definition, sort_keys=False))
