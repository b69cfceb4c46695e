"""What decides a run's result, settings and data, as plain values, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from weakmedsam import __version__
from weakmedsam.errors import CheckpointError

EXECUTION_KEYS = (
    *("accelerator", "strategy", "plugins", "logger", "profiler", "log_every_n_steps"),
    *("enable_progress_bar", "enable_model_summary", "default_root_dir"),
)
"""Keys of a trainer that say how it runs, not what comes out; so do the keys in ``DEVICE_KEYS`` where nothing
is trained: each rank does its share, and the files are the same."""


DEVICE_KEYS = ("devices", "num_nodes")
"""Keys of a trainer that decide nothing where nothing is trained: each rank does its share."""

LOCATION_KEYS = (
    *("default_root_dir", "dirpath", "save_dir", "store_dir", "pseudo_labels_dir", "ckpt_path", "checkpoint"),
)
"""Keys that say where a run lies or reads: they differ between any two runs and decide nothing."""

RUN_KEY = "weakmedsam_run"
"""Of a checkpoint: configuration and data fingerprint of its run."""

NEUTRAL_KEYS = frozenset(
    {
        *EXECUTION_KEYS,
        *("callbacks", "slices_per_step", "pictures"),
        *("prepare", "pseudo_labels_dir", "num_workers"),
    }
)
"""Keys of a training's configuration that say where and how it runs, not what comes out."""


class KnownCase(Protocol):
    """What tells a case's slices from another's.

    Attributes:
        mean: of its intensities, in [0, 1].
        deviation: of its intensities.
    """

    mean: float
    deviation: float


class KnownData(Protocol):
    """What tells a data set from another: what ``data_digest`` asks of the data module.

    Attributes:
        entries: case name -> the case.
        split: case name -> train, val or test.
    """

    entries: Mapping[str, KnownCase]
    split: Mapping[str, str]


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result of a training: its seed, model, data and trainer, without what does not.

    Args:
        config: of ``fit``, nested mappings.
    """
    chosen = {key: config.get(key) for key in ("seed_everything", "model", "data", "trainer")}
    return _without_free(json.loads(json.dumps(chosen, default=str)))


def _without_free(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_free(part) for key, part in value.items() if key not in NEUTRAL_KEYS}


def dotted_keys(settings: Mapping[str, Any]) -> list[str]:
    """Keys of nested settings, dotted: ``{"walk": {"steps": 8}}`` -> ``["walk.steps"]``."""
    return [
        ".".join([key, *rest])
        for key, value in settings.items()
        for rest in ([[name] for name in dotted_keys(value)] if isinstance(value, Mapping) else [[]])
    ]


def shared(one: Any, other: Any) -> Any:
    """What of nested settings has a key in others too: a later version's new settings do not count."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one
    return {key: shared(value, other[key]) for key, value in one.items() if key in other}


def differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """What differs between two nested settings, one text a key: ``a.b: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            short = name if name.endswith(".yaml") or not key.endswith(".yaml") else f" {name}"
            yield from differences(old.get(name), new.get(name), f"{key}.{short}" if key and name else name)
    elif old != new and not key.startswith("after"):
        yield f"{key.removeprefix('configs.')}: {old} -> {new}"


def data_digest(data: KnownData) -> dict[str, Any]:
    """How many cases, and a short hash of their names, splits and intensities; no path is in it."""
    cases = sorted((name, data.split.get(name), e.mean, e.deviation) for name, e in data.entries.items())
    return {"cases": len(cases), "digest": hashlib.sha256(repr(cases).encode()).hexdigest()[:16]}


def say_digest(digest: Mapping[str, Any]) -> str:
    """For messages."""
    return f"{digest['cases']} cases, {digest['digest']}"


def check_version(checkpoint: Mapping[str, Any], path: str) -> None:
    """See that a checkpoint is not of version 0.1, whose settings had other names.

    Raises:
        CheckpointError: it is.
    """
    if RUN_KEY in checkpoint and "version" not in checkpoint[RUN_KEY]:
        raise CheckpointError(
            f"{path} was made by weakmedsam 0.1, this is {__version__}, whose settings have other names: train anew, "
            "in another folder (there is no conversion)"
        )
