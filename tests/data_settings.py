"""Settings of data modules by short names: ``data_settings(split__seed=1)`` for ``{"split": Split(seed=1)}``."""

from dataclasses import replace
from typing import Any

from data_modules.config import Labels, Preparation, Slices, Split

GROUPS = {"slices": Slices(), "split": Split(), "labels": Labels(), "prepare": Preparation()}


def data_settings(**settings: Any) -> dict[str, Any]:
    """Arguments of a data module; those of a group by its name, two underscores and theirs."""
    groups: dict[str, dict[str, Any]] = {}
    flat = {}
    for name, value in settings.items():
        group, grouped, key = name.partition("__")
        if grouped:
            groups.setdefault(group, {})[key] = value
        else:
            flat[name] = value
    return flat | {group: replace(GROUPS[group], **values) for group, values in groups.items()}
