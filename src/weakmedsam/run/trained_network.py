"""Which network of a run segments unlabelled scans, and what it is told apart by. Without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from weakmedsam.config_diff import DEVICE_KEYS, NEUTRAL_KEYS, deciding
from weakmedsam.contracts import in_round
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.run.overrides import pam_of, parse_options
from weakmedsam.run.request import experiment_file
from weakmedsam.run.stage_state import is_current, result_name
from weakmedsam.run.stages import REFINED, chosen_threshold
from weakmedsam.system.commands import command
from weakmedsam.system.json_files import parse_mapping, read_text

CONFIGURED = ("model.init_args", "data.init_args", "trainer")
"""What is read of a stage's configuration."""


class Network(NamedTuple):
    """What segments.

    Attributes:
        config: of the stage whose model it is, nested.
        checkpoint: with its weights.
        made: what its parts are known by; those of another training have others.
        said: which it is, for the terminal.
    """

    config: dict[str, Any]
    checkpoint: Path
    made: list[Any]
    said: str


def last_round(run: Path) -> int:
    """Number of the run's last round whose segmentation network follows from the rounds before it as they are now.

    Raises:
        ConfigError: it has no network.
    """
    if result_name(run / "segment") is None:
        raise ConfigError(
            f"{run} has no trained segmentation network: name data set and experiment of a run, or make it first "
            f"({command('train')})"
        )
    number = 1
    while is_current(run, in_round("segment", number + 1)):
        number += 1
    return number


def find_network(run: Path, plain: bool) -> Network:
    """The run's last segmentation network, refined by PAM or not.

    Args:
        run: its folder.
        plain: the network's own segmentations; otherwise PAM walks what it predicts, with the settings of the round's
            stage ``refined``, or, where there is none of this network (no test case had a mask, say), default ones and
            the threshold that validation cases have chosen.

    Raises:
        ConfigError: the run has no network, was trained without PAM or is being trained, or files of it are gone.
    """
    number = last_round(run)
    segment, refined = (run / in_round(name, number) for name in ("segment", "refined"))
    checkpoint = segment / "checkpoints/best.ckpt"
    made = [result_name(segment)]
    if plain:
        return Network(
            network_settings(segment / "config.yaml", *CONFIGURED), checkpoint, made, f"{segment}, not refined"
        )
    unrefined = command("predict", plain=True)
    settings = refined if is_current(run, refined.name) else run / "classify"
    config = network_settings(settings / "config.yaml", *CONFIGURED)
    said = str(settings)
    pam = config["model"]["init_args"].get("pam")
    if pam is None:
        raise ConfigError(f"{settings} was trained without PAM (model.pam: null): {unrefined} does without")
    if settings != refined:
        default = experiment_file(REFINED)
        if not default.is_file():
            raise ConfigError(f"{default}: there is no such file here; run the command in the repository's folder")
        pam["init_args"] = _merged(pam["init_args"], pam_of(default))
        said = str(default)
        if is_current(run, in_round("threshold", number)) and (value := chosen_threshold(run, number)) is not None:
            pam["init_args"] = _merged(pam["init_args"], {"threshold": {"value": value}})
    pam["init_args"] = _merged(pam["init_args"], {"start": {"checkpoint": str(checkpoint)}})
    classified = result_name(run / "classify")
    if classified is None:
        raise ConfigError(f"{run / 'classify'} is not finished: finish it ({command('train')}), or {unrefined}")
    made.append(classified)
    said = f"{segment}, refined by PAM with the settings of {said}"
    return Network(config, run / "classify/checkpoints/best.ckpt", made, said)


def _merged(settings: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with others over them."""
    return settings | {
        key: _merged(settings[key], value)
        if isinstance(value, Mapping) and isinstance(settings.get(key), dict)
        else value
        for key, value in others.items()
    }


def network_settings(path: Path, *needed: str) -> dict[str, Any]:
    """A YAML or JSON file of a run.

    Args:
        path: the file.
        needed: keys that it has to have, ``a.b`` of nested ones; there, mappings.

    Raises:
        ConfigError: it is gone, or damaged.
    """
    mend = f"`{command('train')}` of the run makes it anew"
    if not path.exists():
        raise ConfigError(f"{path} is gone: {mend}")
    try:
        found = parse_mapping(path, read_text(path))
    except DataError as error:
        raise ConfigError(str(error)) from error
    for key in needed:
        held: Any = found
        for part in key.split("."):
            held = held.get(part) if isinstance(held, dict) else None
        if not isinstance(held, dict | list):
            raise ConfigError(f"{path} is damaged, it has no {key}: {mend}")
    return found


def class_names(run: Path, network: Network) -> list[str]:
    """Names of the classes, id 1 first: as the network's own settings say, or its data set.

    Raises:
        ConfigError: neither does.
    """
    own = network.config["data"]["init_args"].get("classes")
    return list(network_settings(run / "prepare/data.json", "classes")["classes"] if own is None else own)


def name_maker(network: Network, options: list[str]) -> str:
    """A short text that differs where segmentations can: by weights, by settings, by what was typed.

    Not by where the run lies, which may be moved, nor by devices.
    """
    held = deciding(network.config)
    held["data"]["init_args"].pop("data_dir", None)
    pam = held["model"]["init_args"].get("pam")
    if pam is not None:
        pam["init_args"].get("start", {}).pop("checkpoint", None)
    typed = [o for o in parse_options(options) if not {*o[0].split(".")} & {*NEUTRAL_KEYS, *DEVICE_KEYS}]
    parts = [network.made, held["model"], held["data"], held["trainer"].get("precision"), typed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
