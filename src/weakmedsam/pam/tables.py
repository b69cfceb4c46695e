"""The tables PAM leaves behind: Dice of activation maps per test case, quality of pseudo-labels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from weakmedsam.contracts import PseudoLabelKeys
from weakmedsam.metrics.gathering import gather_shares
from weakmedsam.pam.pseudo_label_io import read_quality
from weakmedsam.system.atomic_io import write_table


class CaseDice(NamedTuple):
    """Dice of one class in one test volume, NaN where it is in neither map nor mask.

    Attributes:
        case: the case's name.
        class_name: the class's name.
        cam_dice: of the thresholded class activation map.
        pam_dice: of the refined one.
        no_image_dice: of ellipsoids that no image was looked at for, by ``metrics.no_image.RADII``.
    """

    case: str
    class_name: str
    cam_dice: float
    pam_dice: float
    no_image_dice: tuple[float, ...]


def gather_cases(cases: list[CaseDice]) -> list[CaseDice]:
    """Those of all ranks, sorted, one of each; every rank of a distributed run must call it."""
    unique = {(case.case, case.class_name): case for share in gather_shares(cases) for case in share}
    return [unique[key] for key in sorted(unique)]


def best_ellipsoids(cases: list[CaseDice]) -> list[float]:
    """Dice of the ellipsoid of each case, with the radius whose mean over the cases of its class is highest."""
    best: dict[str, int] = {}
    for name in {case.class_name for case in cases}:
        means = torch.tensor([case.no_image_dice for case in cases if case.class_name == name]).nanmean(dim=0)
        best[name] = int(means.nan_to_num(-1).argmax())
    return [case.no_image_dice[best[case.class_name]] for case in cases]


def write_cases(path: Path, cases: list[CaseDice], no_image: list[float]) -> None:
    """Write ``cam_cases.csv``; ``no_image`` is of ``best_ellipsoids``."""
    columns = ("case", "class", "cam_dice", "pam_dice", "no_image_dice")
    rows = [(*case[:-1], dice) for case, dice in zip(cases, no_image, strict=True)]
    write_table(path, columns, [dict(zip(columns, row, strict=True)) for row in rows])


def write_quality(folder: Path, class_names: list[str]) -> None:
    """Write ``quality.csv`` from the pseudo-label files of a folder: means per case and class.

    ``stability`` is there if it was measured in some file.
    """
    rows: list[dict[str, object]] = []
    for path in sorted(folder.glob("*.safetensors")):
        quality = torch.from_numpy(read_quality(path))
        stability = torch.from_numpy(read_quality(path, PseudoLabelKeys.stability))
        for c, name in enumerate(class_names):
            slices = int((~quality[:, c].isnan()).sum())
            row = {"case": path.stem, "class": name, "slices": slices}
            row["quality"] = float(quality[:, c].nanmean())
            rows.append(row | {"stability": float(stability[:, c].nanmean())})
    columns = ["case", "class", "slices", "quality"]
    if any(row["stability"] == row["stability"] for row in rows):  # NaN is not itself
        columns.append("stability")
    write_table(folder / "quality.csv", columns, [{name: row[name] for name in columns} for row in rows])
