"""Which patients train, validate and test: deterministic, by patient, written to a file."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from weakmedsam.contracts import ConfigError, DataError

SPLITS = ("train", "val", "test")


def check_fractions(fractions: Sequence[float]) -> None:
    """See that parts for train, val and test are given.

    Raises:
        ConfigError: they are not three, one is negative or no number, or they do not sum to 1.
    """
    # Written so that NaN fits nothing.
    if len(fractions) != 3 or not all(part >= 0 for part in fractions) or not abs(sum(fractions) - 1) <= 1e-6:
        raise ConfigError(
            f"data.split_fractions: {fractions} are not three parts (train, val, test) that sum to 1."
        )


def split_by_hash(
    patients: Mapping[str, str], fractions: tuple[float, float, float], seed: int
) -> dict[str, str]:
    """Split cases by a seeded hash of the patient.

    Patients are ranked by the SHA-256 of "<seed>:<patient>" and the ranking is cut: the first are
    test, the next val, the rest train. Numbers are the fractions rounded, but at least one patient for
    every fraction above 0, so that small sets split too.

    Args:
        patients: case -> patient.
        fractions: of train, val, test; they sum to 1.
        seed: another seed, another split.

    Returns:
        Case -> "train", "val" or "test".

    Raises:
        ConfigError: fractions that are negative or do not sum to 1.
        DataError: fewer patients than splits.
    """
    check_fractions(fractions)
    ranked = sorted(set(patients.values()), key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).hexdigest())
    wanted = sum(fraction > 0 for fraction in fractions)
    if len(ranked) < wanted:
        raise DataError(
            f"{len(ranked)} patient(s) cannot fill {wanted} splits: train, val or test would be empty. "
            "Add patients, set a fraction of split_fractions to 0, or give a split_file."
        )
    numbers = {
        split: max(1, round(fraction * len(ranked))) if fraction > 0 else 0
        for split, fraction in zip(SPLITS, fractions, strict=True)
    }
    if fractions[0] > 0:  # rounding up must not leave train empty
        while numbers["val"] + numbers["test"] >= len(ranked):
            numbers[max(("val", "test"), key=lambda split: numbers[split])] -= 1
        bounds = (numbers["test"], numbers["test"] + numbers["val"])
    else:
        bounds = (numbers["test"], len(ranked))
    where = {
        patient: "test" if rank < bounds[0] else "val" if rank < bounds[1] else "train"
        for rank, patient in enumerate(ranked)
    }
    return {case: where[patient] for case, patient in patients.items()}


def read_split(path: Path) -> dict[str, str]:
    """Read a split file: CSV with the columns case and split (train, val or test).

    Raises:
        DataError: no file, wrong columns, an unknown split, or a case named twice.
    """
    try:
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise DataError(f"{path}: the split file cannot be read ({error}). Correct split_file.") from error
    split: dict[str, str] = {}
    for line, row in enumerate(rows, start=2):
        case, name = row.get("case"), row.get("split")
        if not case or name not in SPLITS:
            raise DataError(f"{path}: line {line} is not 'case,split' with split one of {SPLITS}.")
        if split.get(case, name) != name:
            raise DataError(f"{path}: case {case} is in both {split[case]} and {name}. Keep one.")
        split[case] = name
    return split


def apply_split(split: Mapping[str, str], patients: Mapping[str, str], path: Path) -> dict[str, str]:
    """A split file's word on the cases that are there.

    Args:
        split: case -> split, as read.
        patients: case -> patient, of the cases that are there.
        path: named in errors.

    Returns:
        Case -> split.

    Raises:
        DataError: a case is not in the file, or a patient is in two splits.
    """
    missing = sorted(set(patients) - set(split))
    if missing:
        raise DataError(
            f"{path}: does not say where {len(missing)} case(s) belong: {missing[:10]}. Add them."
        )
    seen: dict[str, tuple[str, str]] = {}
    for case, patient in patients.items():
        first = seen.setdefault(patient, (split[case], case))
        if first[0] != split[case]:
            raise DataError(
                f"{path}: patient {patient} is in both {first[0]} ({first[1]}) and {split[case]} ({case}). "
                "All scans of a patient must be in one split."
            )
    return {case: split[case] for case in patients}


def split_cases(
    patients: Mapping[str, str],
    there: set[str],
    split_file: Path | None,
    published: Path | None,
    fractions: tuple[float, float, float],
    seed: int,
) -> tuple[dict[str, str], str]:
    """Split by the given file, else by the published one if all its cases are there, else by hash.

    Args:
        patients: case -> patient, of the cases that can be used.
        there: all cases that are there, those left out as bad included.
        split_file: the user's file.
        published: the data set's own file.
        fractions: of train, val, test, for the hash.
        seed: for the hash.

    Returns:
        Case -> split, and a short name of where the split comes from.
    """
    if split_file is not None:
        return apply_split(read_split(split_file), patients, split_file), split_file.stem
    if published is not None:
        facts = read_split(published)
        if set(facts) <= there and set(patients) <= set(facts):
            return apply_split(facts, patients, published), published.stem
    return split_by_hash(patients, fractions, seed), f"seed{seed}-" + "-".join(f"{f:g}" for f in fractions)
