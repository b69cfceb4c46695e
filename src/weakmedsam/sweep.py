"""Sweeps over settings: ``python -m weakmedsam.sweep sce --dataset abdomen [--local]``.

A sweep is a file of ``experiments/sweeps`` in W&B's own format. With an account it is registered there
and an agent is started; with ``--local`` the same file is drawn from by W&B's sweep library and run here
(``sweep_local``). Either way the stages before it are brought up to date first, and every run of the sweep
has a folder of its own under ``runs/<dataset>/sweeps/<name>/``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from weakmedsam.config_diff import differences
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.run.overrides import options_for, parse_options
from weakmedsam.run.pipeline import run
from weakmedsam.run.stages import (
    EXPERIMENTS,
    STAGES,
    Request,
    pseudo_labelled,
    stage_configs,
)
from weakmedsam.system.atomic_io import write_whole
from weakmedsam.system.file_lock import alone
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


_ERASED = ("model.pam.occlusion.weight", "model.pam.occlusion.share")


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
    """A sweep's file, nested parameters by their options, once it has passed W&B's validator and ours.

    Raises:
        ConfigError: it is not there, W&B would refuse it, or its metric is one that nothing logs.
    """
    from weakmedsam.sweep_ledger import library

    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise ConfigError(f"{path} does not exist; there are: {known}")
    definition = read_settings_file(path)
    try:
        found = library().config.schema_violations_from_proposed_config(definition)
    except ValueError as error:
        found = [str(error)]
    if found:
        raise ConfigError(f"{path}: W&B does not take it: {'; '.join(found)}")
    definition["parameters"] = flat_parameters(path, definition["parameters"])
    program = PROGRAMS.get(str(definition.get("program", "")))
    if program is None:
        raise ConfigError(
            f"{path}: program is {definition.get('program')!r}; choose one of {', '.join(PROGRAMS)}"
        )
    metric = definition.get("metric", {}).get("name", "")
    if not any(metric == name or metric.startswith(f"{name}/") for name in program.metrics):
        raise ConfigError(
            f"{path}: metric {metric!r} is logged by nothing; {definition['program']} logs "
            f"{', '.join(program.metrics)}, and each with /<class>"
        )
    if program.stage == "features":
        check_pam(path, definition)
    return definition


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
        raise ConfigError(
            f"{path}: {wrong[0]} cannot be swept on stored features; there are {', '.join(known)}"
        )
    if "early_terminate" in definition:
        raise ConfigError(f"{path}: a run of PAM has no epochs, so early_terminate never acts; remove it")


def fit_to_store(sweep: Sweep) -> Sweep:
    """Leave out what a run of PAM without erasing cannot answer, and see that masks of every grid are stored.

    Whether a run erases is its backbone's affair (``experiments/backbone/samus.yaml`` does not), so one sweep
    serves both.

    Raises:
        ConfigError: masks of a grid are missing; names it and how they get there. Or nothing is left to sweep.
    """
    from weakmedsam.pam.feature_cache import read_head

    features = sweep.features
    if features is None:
        return sweep
    head, parameters = read_head(features), sweep.definition["parameters"]
    unanswered = [name for name in _ERASED if name in parameters]
    if unanswered and not head.settings.get("occlusion.weight"):
        parameters = {name: drawn for name, drawn in parameters.items() if name not in unanswered}
        if not parameters:
            raise ConfigError(
                f"{SWEEPS / sweep.name}.yaml sweeps erasing alone, but {features} was written with "
                "model.pam.occlusion.weight 0 and does not hold what erasing takes: write it with a value above 0"
            )
        print(
            f"not swept: {', '.join(unanswered)}; what is stored was written with model.pam.occlusion.weight 0"
        )
        sweep = sweep._replace(definition=sweep.definition | {"parameters": parameters})
    _check_grids(sweep, head.grids)
    return sweep


def _check_grids(sweep: Sweep, held: list[int]) -> None:
    drawn = sweep.definition["parameters"].get("model.pam.prompts.grid")
    if drawn is None:
        return
    wanted = drawn.get("values", [drawn["value"]] if "value" in drawn else None)
    if wanted is None:
        wanted = range(int(drawn["min"]), int(drawn["max"]) + 1)
    missing = sorted(set(wanted) - set(held))
    if missing:
        raise ConfigError(
            f"{SWEEPS / sweep.name}.yaml: model.pam.prompts.grid {missing} is not among the grids {held} whose prompt "
            f"masks are stored; add it to KeepFeatures's grids in {EXPERIMENTS / 'features.yaml'}"
        )


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
    command = [sys.executable, "-m", "weakmedsam.sweep_run", str(folder), *words, "${args}"]
    definition |= {"name": f"{request.dataset}/{title}", "project": "weakmedsam", "command": command}
    return Sweep(title, definition, program, folder, words)


def check_parameters(sweep: Sweep) -> None:
    """See that the command line takes what is drawn, before anything is trained.

    Raises:
        ConfigError: it refuses a parameter or a value; the message is its own.
    """
    if sweep.features is not None:
        return
    from weakmedsam.sweep_ledger import draw, words_of

    words = [*sweep.words, *words_of(draw(sweep.definition, [], seed=0) or {}), "--print_config"]
    done = subprocess.run(
        [sys.executable, "-m", "weakmedsam", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("weakmedsam: ")]
        raise ConfigError(
            f"{sweep.name}: {said[0].removeprefix('weakmedsam: ') if said else done.stderr[-500:]}"
        )


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
        found = list(differences(held, json.loads(json.dumps(sweep.definition))))
        if found:
            raise ConfigError(
                f"{sweep.folder} holds a sweep of other settings ({'; '.join(found[:5])}): choose another "
                "NAME, or remove that folder"
            )
    write_whole(path, yaml.safe_dump(sweep.definition, sort_keys=False))


def register(sweep: Sweep, count: int) -> None:
    """Hand the sweep to W&B's server and start an agent here.

    Raises:
        ConfigError: no account.
    """
    import wandb

    from weakmedsam.cli import use_wandb_offline_unless_asked

    use_wandb_offline_unless_asked()
    if os.environ.get("WANDB_MODE") == "offline":
        raise ConfigError(
            "nobody is logged in to W&B: `wandb login`, or run the sweep here: make sweep LOCAL=1"
        )
    number = wandb.sweep(sweep.definition, project="weakmedsam")
    subprocess.run(
        [sys.executable, "-m", "wandb", "agent", "--project", "weakmedsam", "--count", str(count), number],
        check=True,
    )


def start(sweep: Sweep, request: Request, count: int, local: bool, jobs: int | None) -> None:
    """Bring up to date what the sweep builds on, then run it.

    Raises:
        WeakMedSAMError: a setting or file that is wrong.
    """
    check_parameters(sweep)
    run(sweep.program.target, request)
    sweep = fit_to_store(sweep)
    with alone(sweep.folder) as lock:
        claim(sweep)
        if local:
            from weakmedsam.sweep_local import run_local

            run_local(sweep, count, jobs, [lock])
        else:
            register(sweep, count)


def main(words: list[str] | None = None) -> None:
    """Parse the command line and run the sweep."""
    words = sys.argv[1:] if words is None else words
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m weakmedsam.sweep", description="Sweep over settings.")
    parser.add_argument("sweep", help="experiments/sweeps/<SWEEP>.yaml")
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--experiment", default="default", help="the run whose earlier stages it builds on")
    parser.add_argument("--backbone", default="pocket")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--trainer", default=None)
    parser.add_argument("--name", default=None, help="of the sweep's folder; SWEEP by default")
    parser.add_argument("--count", type=int, default=20, help="runs, those of earlier calls included")
    parser.add_argument("--local", action="store_true", help="run here, without an account")
    parser.add_argument("--jobs", type=int, default=None, help="runs at once; one a GPU by default")
    args = parser.parse_args(words[:split])
    with ending_in_a_message("where it was", vars(args)):
        options = parse_options(words[split + 1 :])
        request = Request(
            args.dataset, args.experiment, args.backbone, args.data_dir, args.runs, options, args.trainer
        )
        start(plan(args.sweep, request, args.name), request, args.count, args.local, args.jobs)


if __name__ == "__main__":
    main()
