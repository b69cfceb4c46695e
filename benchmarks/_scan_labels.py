"""Draw the sets that compare labels of whole scans with labels of slices; docs/results.md has what became of them.

``python -m benchmarks._scan_labels FOLDER`` writes two folders of the same volumes, as drawn by the phantom's default
setting: ``slices``, with masks that say what is in each slice, and ``scans``, with a ``labels.csv`` of scans beside.
A quarter of the volumes shows neither class, a quarter each one of them, a quarter both. Of the phantom's own volumes
one in 27 shows neither. ``--score RUN`` instead compares the pseudo-labels of a run with the masks of its store.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file

from data_modules.phantom import write_volume
from data_modules.phantom_drawing import Drawing, PhantomParameters, draw_volume
from data_modules.store_index import write_rows
from weakmedsam.run.request import experiment_file
from weakmedsam.system.json_files import read_object

NAMES = ("lesion", "cyst")
WANTED = {(0, 0): 12, (1, 0): 12, (0, 1): 13, (1, 1): 13}
"""(lesion, cyst) shown -> volumes."""

LEAST_PIXELS = 10
"""Of a class in its largest slice, as of ``slices.min_pixels``: volumes with fewer are not taken."""


def chosen_volumes(parameters: PhantomParameters) -> Iterator[tuple[Drawing, tuple[int, ...]]]:
    """Drawn volumes in order of their number, as far as they are wanted, and which classes each shows."""
    left, number = dict(WANTED), 0
    while any(left.values()):
        drawing = draw_volume(parameters, number)
        number += 1
        largest = [int((drawing.mask == value).sum(axis=(1, 2)).max()) for value in (1, 2)]
        shown = (int(largest[0] > 0), int(largest[1] > 0))
        if left[shown] and all(not 0 < pixels < LEAST_PIXELS for pixels in largest):
            left[shown] -= 1
            yield drawing, shown


def main() -> None:
    """Draw the sets, or score a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the sets go; with --score, of a run")
    parser.add_argument("--score", action="store_true")
    args = parser.parse_args()
    if args.score:
        score(args.folder)
    else:
        draw(args.folder)


def draw(folder: Path) -> None:
    """Draw the sets and write them."""
    settings = yaml.safe_load(experiment_file("data/phantom.yaml").read_text(encoding="utf-8"))
    held = settings["data"]["init_args"]["phantom"]
    parameters = PhantomParameters(**{**held, "spacing": tuple(held["spacing"])})
    rows: list[tuple[str, str]] = []
    for number, (drawing, shown) in enumerate(chosen_volumes(parameters)):
        name = f"scan{number:02d}"
        for kind in ("slices", "scans"):
            write_volume(folder / kind, f"{name}.nii.gz", drawing, parameters.spacing)
        rows += [(name, label) for label, there in zip(NAMES, shown, strict=True) if there] or [(name, "none")]
    write_rows(folder / "scans/labels.csv", ("case", "class"), rows)
    print(f"{sum(WANTED.values())} volumes in {folder}/slices and {folder}/scans")


def score(run: Path) -> None:
    """Dice of pseudo-labels, mean over volumes with the class; recall and precision of the slices they lie in."""
    store = Path(read_object(run / "prepare/data.json")["store"])
    for c, name in enumerate(NAMES, start=1):
        dice, counts = [], np.zeros(3, int)
        for path in sorted((run / "pseudo_labels").glob("*.safetensors")):
            made, truth = load_file(path), np.load(store / path.stem / "mask.npy") == c
            label, said = made["label"] == c, np.isfinite(made["quality"][:, c - 1])
            there = truth.sum(axis=(1, 2)) >= LEAST_PIXELS
            counts += (said & there).sum(), there.sum(), said.sum()
            if truth.any():
                dice.append(2 * (label & truth).sum() / (label.sum() + truth.sum()))
        recall, precision = counts[0] / counts[1:]
        print(f"{name}: Dice {np.mean(dice):.3f} of {len(dice)}, recall {recall:.3f}, precision {precision:.3f}")


if __name__ == "__main__":
    main()
