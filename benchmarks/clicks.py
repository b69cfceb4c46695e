"""What clicks cost and what they bring: ``python -m benchmarks.clicks [--run runs/phantom/default]``.

Without a run: how long a click takes that goes on into as many slices as it may, from embeddings that are there, at 256
pixels; the bar is 300 ms on two cores. With one: clicks that the expert masks of its cases set, one after another into
the middle of the largest error of the volume, and the mean Dice of the corrected pseudo-labels by their number. The
masks are of patients whose pseudo-labels are made without them; only the simulated clicks see them. ``--keep N`` writes
N clicks of each volume into the run's review, as a person would, so that ``make train`` learns from them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks._pam_slice import CLOCK
from weakmedsam.backbones.base import Backbone
from weakmedsam.backbones.pocket import Pocket
from weakmedsam.backbones.samus import SAMUS
from weakmedsam.review.correction import REACH, apply_click
from weakmedsam.review.session import Session
from weakmedsam.review.simulation import next_click
from weakmedsam.run.clicks import REVIEW, Click
from weakmedsam.system.file_lock import alone

BAR_MS = 300.0
SIZE = 256
NUMBERS = (0, 1, 3, 5, 10)
"""Clicks a volume."""


@torch.inference_mode()
def time_clicks(backbone: Backbone, repeats: int) -> list[float]:
    """Milliseconds of clicks into an empty label, each with all the slices that it may go on into."""
    depth = 2 * REACH + 1
    embedding = backbone.embed(torch.rand(1, 1, SIZE, SIZE)).expand(depth, -1, -1, -1)
    same = np.full((SIZE, SIZE), -1.0, np.float32)
    same[64:128, 64:128] = 1

    def answer(z: int, x: int, y: int) -> NDArray[np.float32]:
        points = torch.tensor([[x + 0.5, y + 0.5]])
        logits = backbone.masks_at_points(embedding[z : z + 1], points).float()
        F.interpolate(logits, size=(SIZE, SIZE), mode="bilinear").numpy()
        return same  # whatever random weights say, the click goes on

    label, present = np.zeros((depth, SIZE, SIZE), np.uint8), np.ones((depth, 1), bool)
    times = []
    for number in range(repeats + 1):
        click = Click("", REACH, 64 + number, 90, 1, "a")
        start = CLOCK[0]()
        assert len(apply_click(label, click, ["a"], present, answer)) == depth
        times.append(1000 * (CLOCK[0]() - start))
    return times[1:]  # the first one warms up


def mean_dice(label: NDArray[np.uint8], mask: NDArray[np.uint8], classes: int) -> float:
    """Of the classes that the volume has, on the working frame; NaN without one."""
    found = []
    for class_id in range(1, classes + 1):
        a, b = label == class_id, mask == class_id
        if b.any():
            found.append(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))
    return float(np.mean(found)) if found else float("nan")


def dice_by_clicks(session: Session, name: str) -> tuple[list[float], list[float]]:
    """Mean Dice of a case after ``NUMBERS`` clicks, and milliseconds of each click."""
    case, classes = session.cases[name], len(session.class_names)
    label, mask = session.volume(name).original.label.copy(), np.array(session.reader.mask(name))
    session.networks.look_ahead(case.entry, case.rows)
    dice = [mean_dice(label, mask, classes)]
    times: list[float] = []

    def answer(z: int, x: int, y: int) -> NDArray[np.float32]:
        return session.networks.answer(case.entry, z, x, y)

    for _ in range(max(NUMBERS)):
        click = next_click(label, mask, case.present, session.class_names)
        if click is not None:
            start = CLOCK[0]()
            for z, ids in apply_click(label, click, session.class_names, case.present, answer).items():
                label[z] = ids
            times.append(1000 * (CLOCK[0]() - start))
        dice.append(mean_dice(label, mask, classes))
    return [dice[number] for number in NUMBERS], times


def measure_run(run: Path, most: int | None) -> dict[str, object]:
    """The curve of a run's cases that have masks."""
    session = Session(run)
    names = [name for name, case in session.cases.items() if case.entry.has_mask and case.rows][:most]
    rows: list[list[float]] = []
    times: list[float] = []
    for name in names:
        dice, spent = dice_by_clicks(session, name)
        rows.append(dice)
        times += spent
    means = np.nanmean(rows, axis=0)
    table = Table("clicks a volume", "mean Dice", "least", title=f"{run}: {len(names)} volumes")
    for number, mean, low in zip(NUMBERS, means, np.nanmin(rows, axis=0), strict=True):
        table.add_row(str(number), f"{mean:.3f}", f"{low:.3f}")
    Console().print(table)
    curve = dict(zip(map(str, NUMBERS), means.round(4).tolist(), strict=True))
    return {"dice": curve, "median_ms": round(statistics.median(times), 1), "volumes": len(names)}


def keep_clicks(run: Path, most: int | None, clicks: int) -> dict[str, object]:
    """Click into the least sure cases of a run; the clicks stand in its review, behind those that are there."""
    with alone(run / REVIEW):
        session = Session(run)
        names = [name for name, case in session.cases.items() if case.entry.has_mask and case.rows][:most]
        for name in names:
            mask, present = np.array(session.reader.mask(name)), session.cases[name].present
            for _ in range(clicks):
                click = next_click(session.volume(name).label, mask, present, session.class_names)
                if click is not None:
                    session.click(name, click)
    return {"kept": clicks, "volumes": len(names)}


def main() -> None:
    """Print tables and a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clicks", description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a finished run whose cases have masks")
    parser.add_argument("--cases", type=int, help="at most so many, the least sure first")
    parser.add_argument("--keep", type=int, metavar="N", help="write N clicks a volume into the review, and end")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time: beside other work")
    parser.add_argument("--full", action="store_true", help="more repeats")
    arguments = parser.parse_args()
    if arguments.keep is not None and arguments.run is not None:
        print(json.dumps(keep_clicks(arguments.run, arguments.cases, arguments.keep)))
        return
    if arguments.cpu_time:
        torch.set_num_threads(1)
        CLOCK[0] = time.process_time
    repeats = 30 if arguments.full else 8
    figures: dict[str, dict[str, float]] = {}
    table = Table("backbone", "median, ms", "slowest, ms", title=f"a click, {2 * REACH + 1} slices")
    makers: dict[str, Callable[[], Backbone]] = {
        "pocket": lambda: Pocket(SIZE),
        "samus": lambda: SAMUS(SIZE, "vit_b", "none"),
    }
    for name, make in makers.items():
        times = time_clicks(make().eval(), repeats)
        figures[name] = {"median_ms": round(statistics.median(times), 1), "slowest_ms": round(max(times), 1)}
        table.add_row(name, *(f"{value:.0f}" for value in figures[name].values()))
    Console().print(table)
    fast = all(held["median_ms"] < BAR_MS for held in figures.values())
    print(f"under {BAR_MS:.0f} ms: {'yes' if fast else 'NO'}")
    found = {} if arguments.run is None else measure_run(arguments.run, arguments.cases)
    print(json.dumps({"clicks": figures, "fast": fast, **found}))


if __name__ == "__main__":
    main()
