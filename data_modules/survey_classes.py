"""Classes of scans that nobody has described: from the columns of a label table, or the values of masks."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_modules.cases import Case, CaseLabels, ScanLabels, SliceRanges
from data_modules.folder_files import TABLES
from data_modules.label_tables import NONE, RANGES, SCANS, columns_of_kind
from data_modules.nifti_files import find_table
from data_modules.survey_layout import Guess
from data_modules.tables import name_first, open_table, read_columns
from data_modules.volumes import Geometry
from weakmedsam.errors import DataError

MOST_CLASSES = 32
"""Mask values that can be classes; more are numbers of lesions, or grey values."""


class Look(NamedTuple):
    """What a scan holds.

    Attributes:
        case: of the scan.
        geometry: of its image.
        low: its lowest value.
        high: its highest value.
        whole: whether its values are whole numbers.
        channels: whether one of several had to be taken.
        presence: mask value -> pixels of it in each slice along the file's third axis.
    """

    case: Case
    geometry: Geometry
    low: float
    high: float
    whole: bool
    channels: bool
    presence: Mapping[int, NDArray[np.int64]]


def classes_of_table(root: Path) -> tuple[list[str], str]:
    """Classes of ``labels.csv``, and what kind of table it is; none, and empty, where there is no table.

    Raises:
        DataError: it cannot be read, or has no column of labels.
    """
    path = find_table([root], TABLES[0])
    if path is None:
        return [], ""
    columns = read_columns(path)
    kind = columns_of_kind(columns)
    if kind in (RANGES, SCANS):
        labels = [row.cells[-1] for row in open_table(path, kind).rows]
        return list(dict.fromkeys(label for label in labels if label != NONE)), ",".join(kind)
    if "slice" not in columns:
        return [], ",".join(columns[:6])
    names = [name for name in columns if name not in ("case", "slice", "")]
    deque(open_table(path, ("case", "slice")).rows, maxlen=0)  # faults of its form
    classes = [name for name in names if _holds_labels(path, name)]
    if not classes:
        raise DataError(
            f"{path}: has no column of 0 and 1 beside case and slice: {name_first(columns)}. Add the classes."
        )
    return classes, "case,slice,..."


def _holds_labels(path: Path, name: str) -> bool:
    """Whether most cells of a column are 0 or 1; a mistyped one is told by whoever reads the table."""
    cells: Counter[bool] = Counter()
    with contextlib.suppress(DataError):
        for row in open_table(path, (name,)).rows:
            cells[row.cells[0] in ("0", "1")] += 1
    return cells[True] > cells[False]


def guess_classes(root: Path, looks: Sequence[Look], names: Sequence[str], table: str = "") -> Guess:
    """Class name -> mask values.

    Args:
        root: the data's own folder.
        looks: scans that were read, with their masks.
        names: of the table's classes.
        table: what kind it is.
    """
    values = sorted({value for look in looks for value in look.presence})
    if names:
        if not values:
            said = f"{_named_by(table)}; mask values count once there are masks"
            return Guess({name: [number] for number, name in enumerate(names, 1)}, said)
        return _match(looks, names, values, table)
    if not values:
        return Guess({"target": [1]}, "no masks and no labels.csv: name what labels.csv will say is present")
    if len(values) > MOST_CLASSES:
        return Guess({"target": values}, f"masks hold {len(values)} values or more: numbers of objects? Name classes")
    known = _named_values(root)
    single = ["target"] if len(values) == 1 else []
    chosen = {known.get(value, (single or [f"class_{value}"])[0]): [value] for value in values}
    return Guess(chosen, "mask values, " + ("named by dataset.json" if known else "to be named: nothing names them"))


def _match(looks: Sequence[Look], names: Sequence[str], values: Sequence[int], kind: str) -> Guess:
    """Which mask value is which class of the table: by the slices, or scans, in which they are present."""
    agree = np.zeros((len(names), len(values)))
    compared = 0
    for look in looks:
        table = look.case.table
        if table is None or not look.presence:
            continue
        said, seen = _said_and_seen(table, look, values)
        agree += (said.T[:, None] == seen.T[None]).sum(axis=2)
        compared += len(said)
    chosen: dict[str, list[int]] = {}
    left = set(range(len(values)))
    for number, name in enumerate(names):
        best = max(left, key=lambda place: (agree[number, place], -place), default=None)
        if best is not None:
            left.discard(best)
            chosen[name] = [values[best]]
    if len(chosen) < len(names):
        free = (value for value in range(1, 256) if value not in values)
        chosen |= {name: [next(free)] for name in names if name not in chosen}
    shares = [agree[number, list(values).index(chosen[name][0])] / max(compared, 1) for number, name in enumerate(names)
              if chosen[name][0] in values]  # fmt: skip
    units = "scans" if kind == ",".join(SCANS) else "slices"
    said_of = f"masks and labels.csv agree in {100 * min(shares):.0f} % of {units}" if compared else "in order"
    return Guess(chosen, f"{_named_by(kind)} -> mask values: {said_of}; check")


def _named_by(table: str) -> str:
    """Where classes have their names from."""
    return "labels.csv, which scans show them" if table == ",".join(SCANS) else "columns of labels.csv"


def _said_and_seen(table: CaseLabels, look: Look, values: Sequence[int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(n, classes) by the table and (n, values) by the mask, of n slices; of a labelled scan n is 1, of others 0."""
    depth = look.geometry.shape[2]
    pixels = np.array([look.presence.get(value, np.zeros(depth, np.int64)) for value in values])
    seen: NDArray[np.bool_] = np.asarray(pixels.T > 0)
    if isinstance(table, ScanLabels):
        return np.array([table.present], bool), np.asarray(seen.any(axis=0))[None]
    rows = table.by_slice(depth) if isinstance(table, SliceRanges) else table
    there = set(rows) == set(range(depth))
    said = np.array([rows[number] for number in range(depth)], bool) if there else np.zeros((0, 1), bool)
    return said, seen[: len(said)]


def _named_values(root: Path) -> dict[int, str]:
    """Names of mask values in ``dataset.json``, of the Decathlon or of nnU-Net."""
    try:
        labels = json.loads((root / "dataset.json").read_text(encoding="utf-8"))["labels"]
        pairs = [(key, value) if str(key).isdigit() else (value, key) for key, value in labels.items()]
        return {int(value): re.sub(r"[\s/\\]+", "_", str(name).strip()) for value, name in pairs if int(value) > 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
