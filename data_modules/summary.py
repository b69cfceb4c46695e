"""What can be said of a prepared data set: counts, intensities, entries known to be wrong."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_modules.cases import DatasetInfo
from data_modules.label_check import find_label_faults
from data_modules.slice_datasets import slice_labels, tabulate
from data_modules.store_index import Entry
from data_modules.wholeness import find_wrong_size
from weakmedsam.contracts import SOMEWHERE
from weakmedsam.errors import DataError
from weakmedsam.system.commands import command

_log = logging.getLogger(__name__)


def count_splits(
    entries: Mapping[str, Entry], split: Mapping[str, str], class_names: Sequence[str], min_pixels: int
) -> dict[str, Any]:
    """Cases, those of them with an expert mask, slices and positive slices of each class, by split.

    Where only scans are known to show a class, positive scans of each class, too.

    Args:
        entries: case name -> what the index says of it.
        split: case name -> "train", "val" or "test".
        class_names: names of the classes, id 1 first.
        min_pixels: of a class, from which on it counts as present.
    """
    counts: dict[str, Any] = {}
    for name in ("train", "val", "test"):
        chosen = [entry for case, entry in entries.items() if split[case] == name]
        scored = name != "train"
        labels = tabulate(chosen, min_pixels, scored=scored).labels if chosen else np.zeros((0, len(class_names)))
        positive = dict(zip(class_names, (labels > 0).sum(axis=0).tolist(), strict=True))
        counts[name] = {
            "cases": len(chosen),
            "masked": sum(entry.has_mask for entry in chosen),
            "slices": len(labels),
            "positive_slices": positive,
        }
        if (labels == SOMEWHERE).any():
            shown = np.array([slice_labels(entry, min_pixels, scored).any(axis=0) for entry in chosen])
            counts[name]["positive_scans"] = dict(zip(class_names, shown.sum(axis=0).tolist(), strict=True))
    return counts


def warn_of_labels(
    train: Sequence[Entry], class_names: Sequence[str], min_pixels: int, only_positive: bool = False
) -> list[str]:
    """What the labels of the training slices say too little of, a sentence each; see ``label_check``.

    Args:
        train: the training cases.
        class_names: names of the classes, id 1 first.
        min_pixels: of a class, from which on it counts as present.
        only_positive: training takes only slices in which some class is present.
    """
    if not train:
        return []
    table = tabulate(train, min_pixels, only_positive)
    patients = [train[case].patient for case in table.case]
    depths = np.array([entry.depth for entry in train])[table.case]
    return find_label_faults(patients, (table.slice + 0.5) / depths, table.labels, class_names)


def digest_of(*values: object) -> str:
    """Sixteen hexadecimal digits of the hash of plain values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def digest_content(entries: Mapping[str, Entry], split: Mapping[str, str]) -> str:
    """Short hash of all that is learnt from: arrays, geometry, labels and splits; not when and from which file.

    Args:
        entries: case name -> what the index says of it.
        split: case name -> "train", "val" or "test".
    """
    aside = {"sources": None, "patient": None}
    cases = [
        (split[name], {**entry.to_json(), **aside, "geometry": replace(entry.geometry, header="")})
        for name, entry in entries.items()
    ]
    return digest_of(cases)


def check_sizes(store: Path, entries: Mapping[str, Entry]) -> None:
    """See that the arrays of all cases are there and as long as they were written.

    Raises:
        DataError: one is not; names it and the mend.
    """
    for name, entry in entries.items():
        wrong = find_wrong_size(store / name, entry.files)
        if wrong is not None:
            raise DataError(f"{wrong[0]} {wrong[1]}. `{command('prepare')}` prepares its volume again.")


def describe_intensity(train: Sequence[Entry], rule: str) -> str:
    """One line on how intensities were scaled, and their mean and deviation over training scans.

    Args:
        train: the training cases.
        rule: what to call the scaling where there are none.
    """
    mean = float(np.mean([entry.mean for entry in train])) if train else float("nan")
    deviation = float(np.mean([entry.deviation for entry in train])) if train else float("nan")
    rule = train[0].window_rule if train else rule
    return f"{rule} -> [0, 1]; mean {mean:.3f}, deviation {deviation:.3f} (averages over training scans)"


def warn_of_false_spacing(entries: Mapping[str, Entry], info: DatasetInfo) -> None:
    """Name the cases whose voxel size is an entry known to be wrong: their distances are not in mm."""
    if info.false_spacing is None:
        return
    wrong = sorted(info.false_spacing)
    false = [entry.name for entry in entries.values() if np.allclose(sorted(entry.geometry.spacing), wrong, atol=1e-4)]
    if false:
        _log.warning(
            "%d case(s) state a voxel of %s mm, known to be a wrong entry of %s; "
            "their distances in mm are not to be trusted: %s",
            len(false),
            info.false_spacing,
            info.name,
            ", ".join(false),
        )


def warn_of_undefined(labels: NDArray[np.float32], class_names: Sequence[str]) -> None:
    """Name the classes that every validation slice has, or none: their AUROC is undefined.

    Args:
        labels: (N, C) of the validation slices; of a class that only scans are known to show, the AUROC is of scans.
        class_names: C names.

    Raises:
        DataError: it is undefined for every class, so that nothing could choose the best network.
    """
    share = (labels != 0).mean(axis=0)
    undefined = [name for name, part in zip(class_names, share, strict=True) if part in (0.0, 1.0)]
    if len(undefined) == len(class_names):
        raise DataError(
            f"in the validation split every slice or none has {', '.join(undefined)}: no AUROC is defined, which "
            "chooses the best network. Change data.split"
        )
    if undefined:
        _log.warning(
            "in the validation split every slice or none has %s: its AUROC is undefined and chooses nothing",
            ", ".join(undefined),
        )
