"""A finished run as files, small and seeded, for tests of the report."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from weakmedsam.report.run_data import REPORTED_STAGES

CLASSES = ("liver", "kidney")
CASES = tuple(f"case_{n:02d}" for n in range(7))
NASTY = "<b>x</b>&'\"<script>alert(1)</script>"
SECTIONS = ("headline", "figures", "refined", "test", "slices", "pseudo-labels", "curves", "stages", "settings",
            "environment")  # fmt: skip
"""In the order of the page."""


def draw_picture(path: Path, columns: tuple[str, ...], rows: int, rng: np.random.Generator) -> None:
    """A grid of noisy tiles with titles, as the stages draw them."""
    size = 48
    picture = Image.new("RGB", (columns and len(columns) * (size + 6), rows * (size + 6) + 16), "white")
    pen = ImageDraw.Draw(picture)
    for column, title in enumerate(columns):
        pen.text((column * (size + 6) + 4, 2), title, fill="black")
        for row in range(rows):
            y, x = np.mgrid[:size, :size]
            centre = rng.uniform(0.35, 0.65, 2) * size
            blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 300)
            grey = np.clip(90 * blob + 60 + rng.normal(0, 12, blob.shape), 0, 255)
            tile = np.stack([grey, grey, grey * (1 - 0.6 * (column == 1))], axis=-1).astype(np.uint8)
            picture.paste(Image.fromarray(tile), (column * (size + 6), 16 + row * (size + 6)))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_stage(run: Path, stage: str, seconds: float) -> None:
    facts = {
        "stage": stage,
        "settings": {
            "model": {"sce": {"sub_classes": {"number": 8, "weight": 0.5}}},
            "data": {"spacing": [1.0, 1.0]},
        },
        "command": f"python -m weakmedsam fit --config experiments/{stage}.yaml --trainer.devices 1",
        "seconds": seconds,
        "finished": "2025-03-04T05:06:07+00:00",
        "versions": {"torch": "2.10.0", "lightning": "2.6.6", "python": "3.11.7"},
        "git": "0123456789abcdef",
    }
    path = run / stage / "stage.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))


def write_classify(run: Path, rng: np.random.Generator) -> None:
    rows: list[dict[str, object]] = []
    for epoch in range(8):
        row: dict[str, object] = {
            "epoch": epoch,
            "train/loss": 0.9 * 0.8**epoch + 0.1,
            "val/loss": 0.8 * 0.85**epoch + 0.15,
        }
        row |= {
            "train/class_loss": 0.5 * 0.8**epoch,
            "train/subclass_loss": 0.8 * 0.8**epoch,
            "seconds": 31 + epoch % 3,
        }
        for metric, start in (
            ("val/auroc", 0.7),
            ("val/ap", 0.5),
            ("val/cam_dice", 0.2),
            ("val/pam_dice", 0.3),
        ):
            values = [start + 0.03 * epoch + rng.normal(0, 0.01) for _ in CLASSES]
            measured = epoch % 2 == 1 or "dice" not in metric
            row |= {f"{metric}/{c}": v if measured else "" for c, v in zip(CLASSES, values, strict=True)}
            row[metric] = sum(values) / 2 if measured else ""
        row |= {f"sce/kept/{c}": "" if epoch == 0 else 0.9 + 0.01 * epoch for c in CLASSES}
        rows.append(row)
    write_csv(run / "classify" / "history.csv", rows)
    config = {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val/auroc", "mode": "max"}}]}}  # fmt: skip # noqa: E501
    (run / "classify" / "config.yaml").write_text("# YAML is a superset of JSON\n" + json.dumps(config, indent=2))
    columns = ("image", "CAM", "affinity", "refined CAM", "pseudo-label", "mask")
    for epoch in (0, 3, 7):
        draw_picture(run / "classify" / "pictures" / f"epoch_{epoch:03d}.png", columns, 4, rng)


def draw_run(run: Path) -> Path:
    rng = np.random.default_rng(0)
    for number_, stage in enumerate(REPORTED_STAGES):
        write_stage(run, stage, 4.2 + 97 * number_)
    write_classify(run, rng)
    history = [
        {"epoch": e, "train/loss": 0.6 * 0.9**e, "val/loss": 0.5 * 0.9**e + 0.1, "val/dice": 0.5 + 0.02 * e}
        | {f"val/dice/{c}": 0.5 + 0.02 * e + 0.05 * n for n, c in enumerate(CLASSES)}
        for e in range(10)
    ]
    write_csv(run / "segment" / "history.csv", history)
    (run / "segment" / "config.yaml").write_text("model: {learning_rate: 0.0001}\n")
    quality, cases = [], []
    for n, case in enumerate((*CASES[:-1], NASTY)):
        for c in CLASSES:
            quality.append({"case": case, "class": c, "slices": 24, "quality": 0.5 + 0.05 * n, "seconds": 1.234})
            missed = n == 2 and c == "kidney"
            dice = 0.0 if missed else float(rng.uniform(0.5, 0.9))
            cases.append(
                {
                    "case": case,
                    "class": c,
                    "dice": dice,
                    "jaccard": dice / (2 - dice),
                    "assd_mm": 2.5,
                    "hd95_mm": 9.0,
                }
                | {
                    "missed": missed,
                    "false_alarm": False,
                    "true_ml": 120.5,
                    "predicted_ml": "" if missed else 110.25,
                }
            )
        if case != NASTY:
            for stage, columns in (
                ("pseudo_labels", ("image", "CAM", "affinity", "refined CAM", "pseudo-label")),
                ("test", ("image", "image", "image")),
                ("refined", ("image", "image", "image")),
            ):
                draw_picture(run / stage / "pictures" / f"{case}.png", columns, 1, rng)
    cases.append(dict.fromkeys(cases[0], "") | {"case": "empty", "class": "liver"})
    write_csv(run / "pseudo_labels" / "quality.csv", quality)
    write_csv(run / "test" / "cases.csv", cases)
    # Refined, everything is found, by as much again as was lacking.
    refined = [row | {"missed": False, "dice": (1 + row["dice"]) / 2 if row["dice"] != "" else ""} for row in cases]
    write_csv(run / "refined" / "cases.csv", refined)
    chosen = {"threshold": 0.45, "dice": {"0.45": 0.8}, "cases": 3}
    (run / "threshold" / "threshold.json").write_text(json.dumps(chosen))
    (run / "test" / "summary.json").write_text(json.dumps({"volume": {"dice": {"liver": 0.75}, "cases": 7}}))
    return run
