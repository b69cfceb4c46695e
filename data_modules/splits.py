"""Which patients train, validate and test: deterministic, by patient, written to a file."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

from data_modules.case_tables import check_cases, read_pairs
from data_modules.config import Split
from data_modules.tables import show
from weakmedsam.errors import DataError

SPLITS = ("train", "val", "test")


def split_by_hash(patients: Mapping[str, str], settings: Split) -> dict[str, str]:
    """Split cases by a seeded hash of the patient.

    Patients are ranked by the SHA-256 of "<seed>:<patient>" and the ranking is cut: the first are
    test, the next val, the rest train. Numbers are the fractions rounded, but at least one patient for
    every fraction above 0, so that small sets split too.

    Args:
        patients: case -> patient.
        settings: fractions and seed.

    Returns:
        Case -> "train", "val" or "test".

    Raises:
        DataError: fewer patients than splits.
    """
    fractions = settings.fractions
    ranked = sorted(set(patients.values()), key=lambda p: hashlib.sha256(f"{settings.seed}:{p}".encode()).hexdigest())
    wanted = sum(fraction > 0 for fraction in fractions)
    if len(ranked) < wanted:
        raise DataError(
            f"{len(ranked)} patient(s) cannot fill {wanted} splits: train, val or test would be empty. "
            "Add patients, set a fraction of data.split.fractions to 0, or give data.split.file."
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


def read_split(path: Path, cases: Collection[str] | None = None, needed: Collection[str] = ()) -> dict[str, str]:
    """Read a split file: CSV with the columns case and split (train, val or test).

    Args:
        path: of the file.
        cases: names of the cases that are there; None for a file that may name others, as a published one.
        needed: the cases that must have a row.

    Returns:
        Case -> split.

    Raises:
        DataError: unreadable, an unknown split, a case named twice or not there, or one without a row.
    """
    try:
        table, rows = read_pairs(path, "split")
        for line, split in rows.values():
            if split not in SPLITS:
                raise DataError(
                    f"{path}: line {line}, column split: {show(split)} is not train, val or test. Correct it."
                )
        if cases is not None:
            check_cases(table, {case: line for case, (line, _) in rows.items()}, cases, needed)
    except DataError as error:
        raise DataError(f"data.split.file: {error}") from error
    return {case: split for case, (_, split) in rows.items()}


def keep_patients(split: Mapping[str, str], patients: Mapping[str, str], path: Path) -> dict[str, str]:
    """A split file's word on the cases that can be used.

    Args:
        split: case -> split, of all these cases.
        patients: case -> patient.
        path: named in errors.

    Returns:
        Case -> split.

    Raises:
        DataError: a patient is in two splits.
    """
    for _, sentence in find_torn_patients(split, patients):
        raise DataError(f"{path}: {sentence}")
    return {case: split[case] for case in patients}


def find_torn_patients(split: Mapping[str, str], patients: Mapping[str, str]) -> list[tuple[str, str]]:
    """(case, sentence) of each patient who is in two splits; none as it should be.

    Args:
        split: case -> split, of all these cases.
        patients: case -> patient.
    """
    seen: dict[str, tuple[str, str]] = {}
    torn: dict[str, tuple[str, str]] = {}
    for case, patient in patients.items():
        first = seen.setdefault(patient, (split[case], case))
        if first[0] != split[case] and patient not in torn:
            sentence = (
                f"patient {patient} is in both {first[0]} ({first[1]}) and {split[case]} ({case}). "
                "All scans of a patient must be in one split."
            )
            torn[patient] = (case, sentence)
    return list(torn.values())


def split_cases(
    patients: Mapping[str, str],
    there: set[str],
    settings: Split,
    published: Path | None,
) -> tuple[dict[str, str], str]:
    """Split by the given file, else by the published one if all its cases are there, else by hash.

    Args:
        patients: case -> patient, of the cases that can be used.
        there: all cases that are there, those left out as bad included.
        settings: the user's file, or fractions and seed of the hash.
        published: the data set's own file.

    Returns:
        Case -> split, and a short name of where the split comes from.
    """
    if settings.file:
        split_file = Path(settings.file)
        return keep_patients(read_split(split_file, there, patients), patients, split_file), split_file.stem
    if published is not None:
        facts = read_split(published)
        if set(facts) <= there and set(patients) <= set(facts):
            return keep_patients(facts, patients, published), published.stem
    parts = "-".join(f"{fraction:g}" for fraction in settings.fractions)
    return split_by_hash(patients, settings), f"seed{settings.seed}-{parts}"
