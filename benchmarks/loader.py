"""The loader: slices a second from a store of 200,000, and what memory an epoch takes.

The store is 1,000 volumes of 200 slices at 256 x 256 whose files are one file under many names (links), so
that 26 GB of slices take 26 MB of disk. What is read is mapped, copied, scaled, batched by two workers and
handed to this process, as in training; augmentation, which belongs to the device, is done here on the
processor. ``images_per_second`` has all of it.

Memory is counted over the processes together as what they own, anonymous and shared pages: the second half
of an epoch against its first, without the first tenth. ``rss_growth_mib`` is that of the loader; with
augmentation on the processor (``augmented_growth_mib``) the temporaries of this process come and go by
hundreds of MiB, without a trend. Pages of mapped files are the system's cache, which it takes back when
memory is wanted; they are told apart (``mapped_mib``).

The last line is one JSON object: ``images_per_second`` (bar 2,000), ``loader_images_per_second`` (the same
without augmentation), ``rss_growth_mib`` (bar 50), ``augmented_growth_mib``, ``worker_mib`` (what a worker
owns beyond this process before its first epoch), ``mapped_mib`` and ``cpu_ms_per_image``, the profile:
processor time of each part.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler, default_collate

from data_modules.datasets import SliceDataset, SliceTable
from data_modules.loaders import slice_loader
from data_modules.store import SliceReader
from data_modules.transforms import (
    Augmentation,
    apply_geometry,
    apply_intensity,
    augment_batch,
    draw,
    sampling_grid,
)

SIZE, VOLUMES, DEPTH = 256, 1000, 200
WORKERS, BATCH = 2, 24
WARM = 20
"""Batches before the clock starts: workers have started, the first files are open."""

# As in experiments/data/abdomen.yaml.
RANGES = Augmentation(
    rotation=10.0, shrink=0.9, translation=1.0, gamma=0.2, brightness=0.05, contrast=0.1, noise=0.02
)


def write_store(folder: Path) -> SliceTable:
    """A store whose volumes are one file under many names."""
    rng = np.random.default_rng(0)
    names = [f"case{number:05d}" for number in range(VOLUMES)]
    first = folder / names[0] / "image.npy"
    first.parent.mkdir()
    np.save(first, rng.integers(0, 65536, (DEPTH, SIZE, SIZE)).astype(np.uint16))
    for name in names[1:]:
        (folder / name).mkdir()
        os.link(first, folder / name / "image.npy")
    boxes = np.tile(np.array([0, SIZE, 0, SIZE]), (VOLUMES, 1))
    case, number = np.repeat(np.arange(VOLUMES), DEPTH), np.tile(np.arange(DEPTH), VOLUMES)
    labels = rng.integers(0, 2, (len(case), 4)).astype(np.float32)
    return SliceTable(tuple(names), case, number, labels, boxes)


def memory(process: int) -> tuple[float, float]:
    """(owned, mapped) MiB of a process: anonymous and shared pages, pages of files."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    anonymous, shared, files = (int(fields[n].split()[0]) for n in ("RssAnon", "RssShmem", "RssFile"))
    return (anonymous + shared) / 1024, files / 1024


def workers_of(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def all_memory() -> tuple[float, float]:
    """(owned, mapped) MiB of this process and its workers together."""
    found = [memory(process) for process in (os.getpid(), *workers_of(os.getpid()))]
    return sum(own for own, _ in found), sum(mapped for _, mapped in found)


def batches(table: SliceTable, store: Path) -> Iterator[dict[str, Any]]:
    """An epoch as in training: shuffled, by two workers."""
    dataset = SliceDataset(table, SliceReader(store))
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)
    yield from slice_loader(dataset, sampler, BATCH, WORKERS)


def run_epoch(table: SliceTable, store: Path, seconds: float, augment: bool) -> dict[str, float]:
    """Images a second, and growth of memory, over an epoch or its first ``seconds``."""
    seen, began, looked = 0, 0.0, 0.0
    owned: list[tuple[float, float]] = []
    mapped = worker = 0.0
    start = time.perf_counter()
    for number, batch in enumerate(batches(table, store)):
        if augment:
            augment_batch(batch, RANGES, 0, 0)  # type: ignore[arg-type]
        now = time.perf_counter()
        if number == WARM:
            began, seen = now, 0
        seen += len(batch["image"])
        if now - looked > 1.0 and began:
            looked = now
            own, mapped = all_memory()
            owned.append((now - start, own))
            worker = max(memory(process)[0] for process in workers_of(os.getpid()))
        if now - start > seconds:
            break
    spent = time.perf_counter() - began
    # Batches in flight make it go up and down by some 25 MiB, so medians.
    end = owned[-1][0]
    first = [own for at, own in owned if end / 10 <= at < end / 2]
    growth = float(np.median([own for at, own in owned if at >= end / 2]) - np.median(first))
    return {"rate": seen / spent, "seen": seen, "growth": growth, "mapped": mapped, "worker": worker}


def cost(work: Callable[[int], object], rounds: int, images: int) -> float:
    """Milliseconds of processor time an image takes, of ``rounds`` calls for ``images`` each.

    Processor time, of all threads: other programs on the machine do not count.
    """
    work(0)
    start = time.process_time()
    for number in range(rounds):
        work(number)
    return 1e3 * (time.process_time() - start) / (rounds * images)


def profile(table: SliceTable, store: Path, rounds: int = 20) -> dict[str, float]:
    """Milliseconds of processor time an image takes in each part, in one process."""
    rng = np.random.default_rng(1)
    dataset = SliceDataset(table, SliceReader(store))
    order = rng.integers(0, len(table), (rounds, BATCH))
    items = [dataset[int(index)] for index in order[0]]
    image = torch.from_numpy(rng.random((BATCH, 1, SIZE, SIZE), dtype=np.float32))
    draws = draw(RANGES, 0, 0, np.arange(BATCH))
    return {
        "read": cost(lambda n: [dataset[int(index)] for index in order[n]], rounds, BATCH),
        "collate": cost(lambda n: default_collate(items), rounds, BATCH),
        "draw": cost(lambda n: draw(RANGES, 0, n, np.arange(BATCH)), rounds, BATCH),
        "geometry": cost(
            lambda n: apply_geometry(image, sampling_grid(draws, SIZE), "bilinear"), rounds, BATCH
        ),
        "intensity": cost(lambda n: apply_intensity(image, draws), rounds, BATCH),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="a whole epoch of 200,000 instead of 20 seconds")
    seconds = float("inf") if parser.parse_args().full else 20.0
    with tempfile.TemporaryDirectory() as name:
        store = Path(name)
        table = write_store(store)
        idle = memory(os.getpid())[0]
        alone = run_epoch(table, store, seconds, augment=False)
        whole = run_epoch(table, store, seconds, augment=True)
        parts = profile(table, store)
    total = sum(parts.values())
    result = {
        "images_per_second": round(whole["rate"]),
        "loader_images_per_second": round(alone["rate"]),
        "rss_growth_mib": round(alone["growth"], 1),
        "augmented_growth_mib": round(whole["growth"], 1),
        "worker_mib": round(max(0.0, alone["worker"] - idle), 1),
        "mapped_mib": round(alone["mapped"]),
        "cpu_ms_per_image": {part: round(value, 3) for part, value in parts.items()},
    }
    processors = os.cpu_count() or 1
    print(f"{len(table):,} slices of {SIZE} x {SIZE}, {WORKERS} workers, {processors} processors")
    print(f"{'with augmentation':36}{whole['rate']:10.0f} images/s   bar 2,000 ({whole['seen']:,.0f} seen)")
    print(f"{'without augmentation':36}{alone['rate']:10.0f} images/s   ({alone['seen']:,.0f} seen)")
    print(f"{'memory owned, growth over the epoch':36}{alone['growth']:10.1f} MiB        bar 50")
    print(f"{'the same with augmentation':36}{whole['growth']:10.1f} MiB        it comes and goes")
    print(f"{'memory owned by a worker':36}{result['worker_mib']:10.1f} MiB        beyond this process, idle")
    print(f"{'pages of mapped files':36}{alone['mapped']:10.0f} MiB        cache, all processes")
    for part, value in parts.items():
        print(f"{part:36}{value:10.3f} ms of processor time an image")
    print(f"{'all parts':36}{total:10.3f} ms: {1e3 * processors / total:.0f} images/s fill all processors")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
