"""The data sets of ``experiments/data``: each of its files is one."""

import pkgutil
from pathlib import Path

import yaml

from data_modules.base import SliceDataModule

FOLDER = Path(__file__).parent.parent / "experiments" / "data"
DATA_SETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def settings(name: str) -> dict:
    """What a data set's YAML sets."""
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["data"]


def data_set(name: str) -> type[SliceDataModule]:
    """The data module that a YAML names."""
    return pkgutil.resolve_name(settings(name)["class_path"])
