"""What image-level labels can teach, from the labels alone: no image and no mask is looked at.

Each bar has been measured on real data sets (docs/data.md): hippocampus, left atrium, heart and brain tumours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_auroc

from weakmedsam.contracts import SOMEWHERE

COMMON = 0.75
"""Share of the slices from which on a class is in nearly all. ACDC's right ventricle has 0.78, its myocardium 0.97; the
other sets 0.34 to 0.68."""

CASES_WITH = 0.9
"""Share of the patients from which on nearly all have a class; a patient without it shows what it is not."""

RARE = 0.02
"""Share of the slices below which a class is in hardly any: then most batches of 24 slices have none of it."""

FEW = 50
"""Slices with a class, or without, of which there have to be so many: about two batches of 24."""

BY_POSITION = 0.95
"""AUROC of the slice's position from which on it gives the class away. Both ends of the hippocampus, whose activation
lies beside its target, have 0.98; the other sets that were measured 0.63 to 0.92."""

PLACES = 16
"""Parts of a scan's length that positions are counted in: a short-axis scan of the heart has about ten slices."""

PATIENTS = 10
"""Fewest patients whose frequencies by position say anything of another one; and fewest with, and without, a class that
only scans are known to show."""

TOGETHER = 0.9
"""Jaccard index of two classes' slices from which on they nearly always occur together. ACDC's myocardium and left
ventricle have 0.98, its two ventricles 0.82."""

Labels = NDArray[np.float32]


def find_label_faults(
    patients: Sequence[str], positions: NDArray[np.floating], labels: Labels, class_names: Sequence[str]
) -> list[str]:
    """What labels say too little of, a sentence each; none where there is nothing to warn of.

    Args:
        patients: N names: of whom each slice is.
        positions: (N,) where the middle of each slice lies along its scan, between 0 and 1.
        labels: (N, C) image-level labels, 0 or 1, or ``SOMEWHERE``: then patients are counted, not slices.
        class_names: C names.
    """
    if not len(labels):
        return []
    owners = np.unique(np.asarray(patients), return_inverse=True)[1]
    faults: list[str] = []
    for name, label in zip(class_names, labels.T, strict=True):
        if (label == SOMEWHERE).any():
            faults += _scan_faults(name, _by_patient(label, owners))
        else:
            faults += [*_frequency_faults(name, label, owners), *_position_faults(name, label, owners, positions)]
    for pair in combinations(range(len(class_names)), 2):
        some, first, second = labels[:, pair], class_names[pair[0]], class_names[pair[1]]
        by_patient = bool((some == SOMEWHERE).any())
        one, other = (_by_patient(label, owners) if by_patient else label for label in some.T)
        faults += _pair_faults(first, second, one, other, "patients" if by_patient else "slices")
    return faults


def _by_patient(label: Labels, owners: NDArray[np.intp]) -> Labels:
    """(patients,) 1 where a patient shows the class, wherever."""
    shown = np.zeros(owners.max() + 1, np.float32)
    np.maximum.at(shown, owners, (label != 0).astype(np.float32))
    return shown


def _scan_faults(name: str, shown: Labels) -> Iterator[str]:
    """At most one: of a class that too few patients have, or too few have not."""
    having, total = int(shown.sum()), len(shown)
    if having < min(PATIENTS, total - having):
        yield f"only {having} of {total} training patients have {name}, in slices that nobody has named: add some"
    elif total - having < PATIENTS:
        yield (
            f"only {total - having} of {total} training patients are without {name}, and nobody has named its slices "
            "in the others: add patients without it, or label ranges (case,from,to,class)"
        )


def _frequency_faults(name: str, label: Labels, owners: NDArray[np.intp]) -> Iterator[str]:
    """At most one: of a class in nearly all or hardly any slices."""
    count, total = int(label.sum()), len(label)
    share, having = count / total, len(np.unique(owners[label > 0])) / (owners.max() + 1)
    if share >= COMMON and having >= CASES_WITH:
        yield (
            f"the labels say little about {name}: it is in {100 * share:.0f} % of the training slices and in nearly "
            "every patient. Add slices beyond it, or patients without it"
        )
    elif count < min(FEW, total - count):
        yield f"only {count} of {total} training slices have {name}: add patients with it"
    elif total - count < FEW:
        yield f"only {total - count} of {total} training slices are without {name}: add slices or patients without it"
    elif share < RARE:
        yield (
            f"{name} is in {100 * share:.1f} % of the training slices, so that most batches have none of it: leave out "
            "slices or patients without it, or enlarge data.batch_size"
        )


def _position_faults(
    name: str, label: Labels, owners: NDArray[np.intp], positions: NDArray[np.floating]
) -> Iterator[str]:
    """At most one: of a class that the place of a slice in its scan gives away."""
    enough = min(label.sum(), (1 - label).sum()) >= FEW and len(np.unique(owners[label > 0])) >= PATIENTS
    if enough and (value := _auroc(frequency_by_position(owners, positions, label), label)) >= BY_POSITION:
        yield (
            f"the position of a slice alone tells whether it has {name} (AUROC {value:.2f}): the network need not look "
            "at it. Look at the report's pictures; scans that are not cropped around it vary more"
        )


def _pair_faults(first: str, second: str, one: Labels, other: Labels, unit: str) -> Iterator[str]:
    """At most one: of two classes that the labels do not tell apart."""
    both, either = float((one * other).sum()), int(np.maximum(one, other).sum())
    if either and both / either >= TOGETHER:
        yield (
            f"the labels hardly tell {first} from {second}: of the training {unit} with either, "
            f"{100 * both / either:.0f} % have both. Make them one class, or add {unit} with one of them"
        )


def frequency_by_position(
    owners: NDArray[np.intp], positions: NDArray[np.floating], label: Labels
) -> NDArray[np.float64]:
    """How often a class is where each slice lies, among the other patients.

    Args:
        owners: (N,) numbers of the patients, from 0.
        positions: (N,) between 0 and 1.
        label: (N,) 0 or 1.

    Returns:
        (N,) frequencies; a place that no other patient has slices at gets the frequency of all places.
    """
    place = np.minimum((positions * PLACES).astype(np.intp), PLACES - 1)
    slices, positive = (np.zeros((owners.max() + 1, PLACES)) for _ in range(2))
    np.add.at(slices, (owners, place), 1)
    np.add.at(positive, (owners, place), label)
    others, found = slices.sum(axis=0) - slices, positive.sum(axis=0) - positive
    overall = found.sum(axis=1, keepdims=True) / np.maximum(others.sum(axis=1, keepdims=True), 1)
    # As if there were one more slice of the overall frequency: ties of hardly seen places go to the likelier one.
    return ((found + overall) / (others + 1))[owners, place]


def _auroc(scores: NDArray[np.floating], truths: Labels) -> float:
    return float(binary_auroc(torch.from_numpy(scores), torch.from_numpy(truths > 0).int()))
