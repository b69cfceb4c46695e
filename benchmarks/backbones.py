"""Speed and memory of the paper's backbone as it is run here, against plain ways to run it, in one run.

SAMUS ViT-B at 256 pixels with random weights. "Plain" is the same model in float32 with explicit attention.
The published way to answer prompts, written here anew, encodes the image again for each of them. The last
line is one JSON object: ``train_speedup``, ``forward_speedup``, ``prompts_speedup``,
``checkpointing_memory_ratio``, ``efficient_sam_ti_speedup`` (EfficientSAM-Ti at 512 pixels, 32 x 32 cells as
well, against SAMUS, both as run here).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.costs import peak_bytes, seconds_of
from weakmedsam.backbones.base import Backbone
from weakmedsam.backbones.efficient_sam import EfficientSAM
from weakmedsam.backbones.samus import SAMUS
from weakmedsam.pam.affinity import grid_points

SIZE, GRID = 256, 4
MIB = 2**20


def make_samus(size: str, attention: str, gradient_checkpointing: bool = False) -> SAMUS:
    """The same random numbers every time."""
    torch.manual_seed(0)
    made = SAMUS(SIZE, size, "none", attention=attention, gradient_checkpointing=gradient_checkpointing)
    made.set_trainable("published")
    return made


def training_step(backbone: Backbone, image: Tensor, bf16: bool) -> Callable[[], None]:
    """Forward, backward and AdamW over what is published to be trained, with a class head."""
    head = nn.Conv2d(backbone.feature_dim, 1, 1, bias=False).to(image.device)
    trained = [p for p in (*backbone.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def step() -> None:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            logits = head(backbone.features(image)).mean(dim=(-2, -1))
        loss = F.binary_cross_entropy_with_logits(logits.float(), torch.ones_like(logits, dtype=torch.float32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def forward(backbone: Backbone, image: Tensor, bf16: bool) -> Callable[[], object]:
    """Features and embedding, without gradient."""

    def run() -> object:
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            return backbone.encode(image)

    return run


def peak_in_child(size: str, batch: int, device: str, gradient_checkpointing: bool) -> int:
    """Bytes of a fresh process that makes two bf16 training steps, weights and optimiser included.

    glibc is told to give freed memory back at once, so that the peak is of what is in use; its own habit of
    keeping freed blocks adds 0.5 to 1 GiB to either side.
    """
    words = ["--child", "--size", size, "--batch", str(batch), "--device", device]
    words += ["--checkpointing"] if gradient_checkpointing else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.backbones", *words],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


def child(options: argparse.Namespace) -> None:
    """What ``peak_in_child`` starts: prints the bytes."""
    before = peak_bytes(options.device)
    backbone = make_samus(options.size, "auto", options.checkpointing).to(options.device)
    step = training_step(backbone, torch.rand(options.batch, 1, SIZE, SIZE, device=options.device), bf16=True)
    for _ in range(2):  # the optimiser's state is there from the second step on
        step()
    print(peak_bytes(options.device) - before)


def measure_prompts(ours: SAMUS, plain: SAMUS, image: Tensor, repeats: int, asked: int) -> tuple[float, float]:
    """Seconds for all prompts of a grid: the published way (``asked`` of them, scaled up) and here."""
    points = grid_points(GRID, SIZE).to(image.device)
    device = image.device.type

    @torch.no_grad()
    def again() -> None:
        for point in points[:asked]:
            plain.masks_at_points(plain.encode(image).embedding, point[None])

    embedding = forward(ours, image, bf16=True)().embedding  # type: ignore[attr-defined]

    def once() -> object:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return ours.masks_at_points(embedding, points)

    published = seconds_of(again, 1, device) * len(points) / asked
    return published, seconds_of(once, 3 * repeats, device)


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backbones", description=__doc__)
    parser.add_argument("--full", action="store_true", help="batch 4, all 16 prompts, more repeats")
    parser.add_argument("--size", default="vit_b", help="of SAMUS; tiny: a dry run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4, help="of the memory measurement")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure, print a table and one line of JSON."""
    options = parse(words)
    logging.getLogger("weakmedsam").setLevel(logging.ERROR)  # random weights are meant here
    if options.child:
        child(options)
        return
    device, repeats = options.device, 3 if options.full else 1
    batch = 4 if options.full else 2
    image = torch.rand(batch, 1, SIZE, SIZE, device=device)
    plain, ours = (make_samus(options.size, kind).to(device) for kind in ("explicit", "auto"))
    efficient = EfficientSAM(SIZE, "ti" if options.size != "tiny" else "tiny", "none").to(device)
    rows = {
        "forward": tuple(
            seconds_of(forward(model, image, bf16), count, device)
            for model, bf16, count in ((plain, False, repeats), (ours, True, 2 * repeats))
        ),
        "16 prompts of an image": measure_prompts(ours, plain, image[:1], repeats, 16 if options.full else 2),
        "training step": tuple(
            seconds_of(training_step(model, image, bf16), count, device)
            for model, bf16, count in ((plain, False, repeats), (ours, True, 2 * repeats))
        ),
    }
    light = seconds_of(forward(efficient, image, bf16=True), 2 * repeats, device)
    memory = [peak_in_child(options.size, options.batch, device, kept) for kept in (False, True)]
    table = Table("what", "plain", "here", "ratio", title=f"SAMUS {options.size}, batch {batch}, {device}")
    for name, (theirs, mine) in rows.items():
        table.add_row(name, f"{theirs:.2f} s", f"{mine:.3f} s", f"{theirs / mine:.1f} times")
    table.add_row(
        f"peak memory of a bf16 step, batch {options.batch}, without and with checkpointing",
        *(f"{value / MIB:,.0f} MiB" for value in memory),
        f"{memory[1] / memory[0]:.2f}",
    )
    table.add_row(
        "forward: SAMUS, and EfficientSAM-Ti at 512 pixels, bf16",
        f"{rows['forward'][1]:.3f} s", f"{light:.3f} s", f"{rows['forward'][1] / light:.1f} times",
    )  # fmt: skip
    Console().print(table)
    ratios = {
        "train_speedup": rows["training step"],
        "forward_speedup": rows["forward"],
        "prompts_speedup": rows["16 prompts of an image"],
        "efficient_sam_ti_speedup": (rows["forward"][1], light),
    }
    found = {name: theirs / mine for name, (theirs, mine) in ratios.items()}
    print(json.dumps(found | {"checkpointing_memory_ratio": memory[1] / memory[0]}))


if __name__ == "__main__":
    main()
