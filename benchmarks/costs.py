"""What every backbone costs: ``python -m benchmarks.costs`` prints the table and writes ``docs/costs.md``.

Parameters, floating-point operations, seconds and peak memory of three stages: encoding an image without
gradient, 16 prompts for an image whose embedding is known, and a training step with the policy
``published``. Weights are random: they change no cost. Each stage runs in a fresh process, so that no
stage's peak hides in that of another. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from weakmedsam.backbones.base import Backbone
from weakmedsam.system.atomic_io import write_whole

ROOT = Path(__file__).parent.parent
PROMPTS = 16
CLASSES = 2
MIB = 2**20

Arguments = dict[str, Any]


class Candidate(NamedTuple):
    """A backbone's class, by its dotted name, and what it is built with."""

    path: str
    arguments: Arguments


VARIANTS: dict[str, tuple[str, Arguments]] = {
    "sam_vit_b_1024": ("sam_vit_b", {"encode_size": 1024}),
    "samus_vit_l": ("samus", {"size": "vit_l"}),
    "samus_vit_h": ("samus", {"size": "vit_h"}),
}
"""Published sizes beside those of experiments/backbone/*.yaml: of which one, and what differs."""

LARGE = ("vit_l", "vit_h")
"""Sizes that are measured on demand only."""


def candidates() -> dict[str, Candidate]:
    """Every backbone of experiments/backbone/*.yaml, and ``VARIANTS``, with random weights.

    The input frame has the encoder's own size where the YAML sets one, else the default of the class.
    """
    found = {}
    for file in sorted((ROOT / "experiments/backbone").glob("*.yaml")):
        backbone = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["init_args"]["backbone"]
        arguments = backbone["init_args"] | ({"weights": "none"} if "weights" in backbone["init_args"] else {})
        found[file.stem] = Candidate(backbone["class_path"], arguments)
    for name, (base, changes) in VARIANTS.items():
        found[name] = Candidate(found[base].path, found[base].arguments | changes)
    for path, arguments in found.values():
        default = inspect.signature(class_at(path)).parameters["image_size"].default
        arguments["image_size"] = arguments.get("encode_size", default)
    return found


def class_at(path: str) -> type[Backbone]:
    """The class of a dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


STAGES = ("encode", "prompts", "train")


class Job(NamedTuple):
    """What a child process measures; it gets it as JSON."""

    stage: str
    path: str
    arguments: Arguments
    batch: int
    repeats: int
    device: str
    bf16: bool
    embedding: list[int]


def peak_bytes(device: str) -> int:
    """Highest memory use of this process so far: the GPU's, or resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    # ru_maxrss of a started process also covers its parent on Linux; VmHWM is its own.
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_of(run: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of ``repeats`` calls, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions; a multiply-add counts as two."""
    # Torch counts no fused attention on a CPU: it is taken apart into its products here.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def stage_of(job: Job, backbone: Backbone) -> Callable[[], object]:
    """One run of the stage, without arguments."""
    size = backbone.image_size
    image = torch.rand(job.batch, 1, size, size, device=job.device)
    if job.stage == "encode":
        return torch.no_grad()(lambda: backbone.encode(image))
    if job.stage == "prompts":
        embedding = torch.randn(job.embedding, device=job.device)
        points = torch.rand(PROMPTS, 2, device=job.device) * size
        return torch.no_grad()(lambda: backbone.masks_at_points(embedding, points))
    head = torch.nn.Conv2d(backbone.feature_dim, CLASSES, 1, bias=False).to(job.device)
    target = torch.ones(job.batch, CLASSES, device=job.device)
    trained = [p for p in (*backbone.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step() -> None:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.bf16):
            logits = head(backbone.features(image)).mean(dim=(-2, -1))
        loss = F.binary_cross_entropy_with_logits(logits.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure(job: Job) -> dict[str, Any]:
    """Build the backbone in this process and measure one stage of it."""
    make = class_at(job.path)
    torch.manual_seed(0)
    before = peak_bytes(job.device)
    backbone = make(**job.arguments).to(job.device)
    backbone.set_trainable("published")
    backbone.train(job.stage == "train")
    run = stage_of(job, backbone)
    with torch.autocast(job.device, torch.bfloat16, enabled=job.bf16 and job.stage != "train"):
        seconds = seconds_of(run, job.repeats, job.device) / job.batch
        peak = peak_bytes(job.device) - before
        found: dict[str, Any] = {"seconds": seconds, "peak_mib": peak / MIB}
        if job.stage != "train":
            found["flops"] = flops_of(run) / job.batch
    if job.stage == "encode":
        with torch.no_grad():
            image = torch.zeros(job.batch, 1, backbone.image_size, backbone.image_size, device=job.device)
            found["embedding"] = list(backbone.encode(image).embedding.shape)
        found["pixels"] = backbone.image_size
        found["parameters"] = sum(p.numel() for p in backbone.parameters())
        found["trained"] = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    return found


def in_child(job: Job) -> dict[str, Any]:
    """``measure`` in a fresh process.

    Raises:
        RuntimeError: it failed; carries the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.costs", "--child", json.dumps(job._asdict())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(said[-1] if said else f"killed, status {done.returncode} (out of memory?)")
    return json.loads(done.stdout.splitlines()[-1])


def cost_of(candidate: Candidate, batch: int, repeats: int, device: str, bf16: bool) -> dict[str, Any]:
    """All stages of one backbone: each stage's findings by its name."""
    costs: dict[str, Any] = {}
    embedding: list[int] = []
    for stage in STAGES:
        job = Job(stage, candidate.path, candidate.arguments, batch, repeats, device, bf16, embedding)
        costs[stage] = in_child(job)
        embedding = costs["encode"]["embedding"]
    return costs


COLUMNS = (
    "backbone",
    "pixels",
    "parameters, M",
    "trained, M",
    "encode, GFLOP",
    "encode, s",
    "encode, MiB",
    "16 prompts, GFLOP",
    "16 prompts, s",
    "16 prompts, MiB",
    "training step, s",
    "training step, MiB",
)


def row_of(name: str, costs: dict[str, Any]) -> list[str]:
    """One row under ``COLUMNS``."""
    encode, prompts, train = (costs[stage] for stage in STAGES)
    return [
        name,
        str(encode["pixels"]),
        f"{encode['parameters'] / 1e6:.1f}",
        f"{encode['trained'] / 1e6:.1f}",
        f"{encode['flops'] / 1e9:.1f}",
        f"{encode['seconds']:.3f}",
        f"{encode['peak_mib']:.0f}",
        f"{prompts['flops'] / 1e9:.1f}",
        f"{prompts['seconds']:.3f}",
        f"{prompts['peak_mib']:.0f}",
        f"{train['seconds']:.3f}",
        f"{train['peak_mib']:.0f}",
    ]


def page_of(rows: list[list[str]], batch: int, device: str, bf16: bool) -> str:
    """The table as a Markdown page that says how it was made."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    lines = [
        "# Costs of the backbones",
        "",
        "Made by `python -m benchmarks.costs`, with random weights. An image is one slice at the size given",
        "(resized inside where the backbone has a size of its own). FLOP: of matrix products and convolutions,",
        "a multiply-add counts as two. Seconds: per image, median. MiB: peak of the stage with its weights,",
        "each stage in a fresh process. Prompts are 16 points on an image whose embedding is known. The training",
        "step is forward, backward and AdamW with the policy `published`.",
        "",
        f"Measured on: {where}, threads: {torch.get_num_threads()}, torch {torch.__version__.split('+')[0]}, "
        f"{'bf16 autocast' if bf16 else 'float32'}, batch {batch}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "--:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__)
    parser.add_argument("--full", action="store_true", help="also ViT-L and ViT-H")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rather than all")
    parser.add_argument("--size", help="in place of every backbone's size, where it has one; tiny: dry run")
    parser.add_argument("--image-size", type=int, help="pixels, in place of every backbone's own")
    parser.add_argument("--batch", type=int, default=1, help="images a call; default 1")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median counts")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast instead of float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/costs.md", help="the page to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Measure, print and write; a backbone that fails is named and left out. Returns the exit status."""
    options = parse(words)
    if options.child:
        print(json.dumps(measure(Job(**json.loads(options.child)))))
        return 0
    known = candidates()
    if unknown := sorted(set(options.only or ()) - set(known)):
        print(f"error: {', '.join(unknown)} is unknown; there are {', '.join(known)}", file=sys.stderr)
        return 2
    names = options.only or [name for name in known if options.full or known[name].arguments.get("size") not in LARGE]
    costs, console = {}, Console(stderr=True)
    for name in names:
        side = options.image_size
        changes = {"size": options.size, "image_size": side, "encode_size": side}
        arguments = known[name].arguments
        arguments = arguments | {k: v for k, v in changes.items() if v is not None and k in arguments}
        candidate = Candidate(known[name].path, arguments)
        try:
            costs[name] = cost_of(candidate, options.batch, options.repeats, options.device, options.bf16)
        except RuntimeError as error:
            console.print(f"{name}: {error}", markup=False)
    rows = [row_of(name, found) for name, found in costs.items()]
    # A backbone a column: twelve columns do not fit into a terminal.
    table = Table(title=f"batch {options.batch}, {options.device}, {os.cpu_count()} processors")
    for heading in (COLUMNS[0], *costs):
        table.add_column(heading)
    for measured in list(zip(COLUMNS, *rows, strict=True))[1:]:
        table.add_row(*measured)
    Console().print(table)
    write_whole(options.out, page_of(rows, options.batch, options.device, options.bf16))
    print(json.dumps(costs))
    return 0 if len(costs) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
