"""What the user typed after a target: which stage each option concerns, and all that decides a stage's result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weakmedsam.config_diff import DEVICE_KEYS, EXECUTION_KEYS, dotted_keys
from weakmedsam.contracts import in_round, split_round
from weakmedsam.errors import ConfigError
from weakmedsam.run.request import Request, experiment_file, experiment_name
from weakmedsam.run.stages import ANOTHER_ROUND, REFINED, STAGES, THRESHOLD, Stage, stage_configs
from weakmedsam.system.yaml_files import read_settings_file


def parse_options(words: list[str]) -> list[tuple[str, list[str]]]:
    """``--a.b 1 --c=2 --flag`` -> [("a.b", ["1"]), ("c", ["2"]), ("flag", [])].

    Raises:
        ConfigError: a value without an option before it.
    """
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            options.append((key, [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            raise ConfigError(f"ARGS: {word!r} is not an option; options look like --model.sce.sub_classes.number 4")
    return options


def options_for(stage: Stage, options: list[tuple[str, list[str]]]) -> list[str]:
    """The options that concern a stage, as command-line words; those meant for it alone come last and win.

    A stage's name before an option means that stage in every round, ``segment_2`` that of one. What
    ``another_round.yaml`` and ``refined.yaml`` set of PAM is the first round's in other options, because what is walked
    there is of another kind: ``--model.pam.walk.steps`` does not reach ``pseudo_labels_2`` or ``refined``,
    ``--refined.model.pam.walk.steps`` does, and with it ``threshold``, which refines alike.

    Raises:
        ConfigError: an option that concerns no stage.
    """
    # A test follows the settings of the network it tests.
    leader = {"test": "segment", "upper_bound": "segment"}
    leader |= dict.fromkeys(("test_maps", "pseudo_labels", "features", "refined", "threshold"), "classify")
    kind, number = split_round(stage.name)
    lead = leader.get(kind, kind)
    ranks = {lead: 1, in_round(lead, number): 2, kind: 3, stage.name: 4}
    own: list[Path] = []
    if kind in ("refined", "threshold"):
        own = [experiment_file(name) for name in (REFINED, THRESHOLD)[: 1 + (kind == "threshold")]]
        ranks |= {"refined": 4, in_round("refined", number): 5, kind: 6, stage.name: 7}  # alike in every round
    elif number > 1 and kind in ("pseudo_labels", "test_maps"):
        own = [experiment_file(ANOTHER_ROUND)]
        ranks |= {"pseudo_labels": 3, in_round("pseudo_labels", number): 4}  # scored as it is made
    kept = {key for path in own for key in _set_by(path)}
    known = {other.name for other in STAGES} | {group for other in STAGES for group in other.takes}
    found: list[tuple[int, list[str]]] = []
    for key, values in options:
        first, _, rest = key.partition(".")
        if split_round(first)[0] not in known:
            raise ConfigError(
                f"ARGS: --{key} concerns no stage; options begin with {', '.join(sorted(known))}, and in a later round "
                "with segment_2, pseudo_labels_2, ..."
            )
        chosen = rest if first in ranks else key if first in stage.takes else None
        rank = ranks.get(first, 0)
        if chosen is None or (rank < 4 and chosen.replace("init_args.", "") in kept):
            continue
        if not (stage.name == "prepare" and not chosen.startswith("data.")):
            found.append((rank, [f"--{chosen}", *values]))
    found.sort(key=lambda option: option[0])
    words = [word for rank, option in found if rank < 4 for word in option]
    if "--config" in words:  # of a file for all stages: the stage's own has to win over it
        words += [word for path in own for word in ("--config", str(path))]
    return words + [word for rank, option in found if rank >= 4 for word in option]


def _set_by(path: Path) -> set[str]:
    """Options of PAM that a stage does not share with the first round's pseudo-labels: those its own file sets."""
    return {f"model.pam.{key}" for key in dotted_keys(pam_of(path))}


def pam_of(path: Path) -> dict[str, Any]:
    """What a file of ``experiments/`` sets of PAM.

    Raises:
        ConfigError: nothing, or it cannot be read.
    """
    return _under(path, "model", "init_args", "pam", "init_args")


def _under(path: Path, *keys: str) -> dict[str, Any]:
    held = read_settings_file(path)
    for number, key in enumerate(keys, start=1):
        held = held.get(key)  # type: ignore[assignment]
        if not isinstance(held, dict):
            raise ConfigError(f"{path}: holds no settings under {'.'.join(keys[:number])}")
    return held


def check_rounds(options: list[tuple[str, list[str]]], rounds: int) -> None:
    """See that no option is meant for a round that there is not.

    Raises:
        ConfigError: there is one; names it.
    """
    for key, _ in options:
        first = key.partition(".")[0]
        if split_round(first)[1] > rounds:
            raise ConfigError(f"ARGS: --{key} is of round {split_round(first)[1]}, ROUNDS is {rounds}")


def decisive(stage: Stage, trainer: dict[str, Any]) -> dict[str, Any]:
    """What of a trainer file's keys decides the stage's result; precision does, the accelerator does not."""
    idle = {*EXECUTION_KEYS, *(() if stage.trains else DEVICE_KEYS)}
    return {key: value for key, value in trainer.items() if key not in idle}


def wanted_settings(stage: Stage, request: Request) -> dict[str, Any]:
    """All that decides a stage's result, as plain values.

    Raises:
        ConfigError: see ``stage_configs`` and ``read_settings_file``.
    """
    files = stage_configs(stage, request)
    merged = {experiment_name(path): read_settings_file(path) for path in files if path in stage.configs(request)}
    if request.trainer and "trainer" in stage.takes:
        chosen = decisive(stage, _under(files[-1], "trainer"))
        merged |= {"trainer": chosen} if chosen else {}
    return {"configs": merged, "options": options_for(stage, request.options), "data_dir": request.data_dir}
