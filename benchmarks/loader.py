"""The loader: slices a second from a store of 200,000, and what memory an epoch takes.

The store is 1,000 volumes of 200 slices at 256 x 256 whose files are one file under many names (links), so
that 26 GB of slices take 26 MB of disk. What is read is mapped, copied, scaled, augmented and batched by two
workers and handed to this process, as in a training on processors. ``images_per_second`` has all of it.

Memory is counted over the processes together as what they own, anonymous and shared pages: the second half
of an epoch against its first, without the first tenth. ``rss_growth_mib`` is that of the loader, with
augmentation it is ``augmented_growth_mib``. Pages of mapped files are the system's cache, which it takes back when
memory is wanted; they are told apart (``mapped_mib``).

The last line is one JSON object: ``images_per_second`` (bar 2,000), ``loader_images_per_second`` (the same
without augmentation), ``rss_growth_mib`` (bar 50), ``augmented_growth_mib``, ``worker_mib`` (what a worker
owns beyond this process before its first epoch), ``mapped_mib`` and the profile: ``cpu_ms_per_image``, processor
time of each part alone, and ``spent_ms_per_image``, what workers and this process spent in the epoch with
augmentation, handing over and threads that wait for each other included.
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

from data_modules.augmentation import (
    Augmentation,
    apply_geometry,
    apply_intensity,
    draw_parameters,
    inside,
    sampling_grid,
)
from data_modules.loaders import Order, training_loader
from data_modules.slice_datasets import SliceDataset, SliceTable
from data_modules.store import SliceReader

SIZE, VOLUMES, DEPTH = 256, 1000, 200
WORKERS, BATCH = 2, 24
WARM = 20
"""Batches before the clock starts: workers have started, the first files are open."""

# As in experiments/data/abdomen.yaml.
RANGES = Augmentation(rotation=10.0, shrink=0.9, translation=1.0, gamma=0.2, brightness=0.05, contrast=0.1, noise=0.02)


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


def spent(process: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def all_spent() -> tuple[float, float]:
    """Seconds of processor time of the workers together, and of this process."""
    return sum(spent(process) for process in workers_of(os.getpid())), spent(os.getpid())


def all_memory() -> tuple[float, float]:
    """(owned, mapped) MiB of this process and its workers together."""
    found = [memory(process) for process in (os.getpid(), *workers_of(os.getpid()))]
    return sum(own for own, _ in found), sum(mapped for _, mapped in found)


def batches(table: SliceTable, store: Path, augment: bool) -> Iterator[dict[str, Any]]:
    """An epoch as in training on processors: shuffled, by two workers, which augment."""
    slices = SliceDataset(table, SliceReader(store))
    yield from training_loader(slices, Order(0), BATCH, WORKERS, RANGES if augment else None)


def run_epoch(table: SliceTable, store: Path, seconds: float, augment: bool) -> dict[str, float]:
    """Images a second, and growth of memory, over an epoch or its first ``seconds``."""
    seen, counted, began, looked = 0, 1, 0.0, 0.0
    owned: list[tuple[float, float]] = []
    mapped = worker = 0.0
    before = after = (0.0, 0.0)
    start = time.perf_counter()
    for number, batch in enumerate(batches(table, store, augment)):
        now = time.perf_counter()
        if number == WARM:
            began, seen, before = now, 0, all_spent()
        seen += len(batch["image"])
        if now - looked > 1.0 and began:
            looked = now
            own, mapped = all_memory()
            owned.append((now - start, own))
            worker = max(memory(process)[0] for process in workers_of(os.getpid()))
            after, counted = all_spent(), seen
        if now - start > seconds:
            break
    elapsed = time.perf_counter() - began
    # Batches in flight make it go up and down by some 25 MiB, so medians.
    last = owned[-1][0]
    first = [own for at, own in owned if last / 10 <= at < last / 2]
    growth = float(np.median([own for at, own in owned if at >= last / 2]) - np.median(first))
    workers, here = (1e3 * (end - begin) / counted for begin, end in zip(before, after, strict=True))
    return {
        "rate": seen / elapsed,
        "seen": seen,
        "growth": growth,
        "mapped": mapped,
        "worker": worker,
        "workers_ms": workers,
        "here_ms": here,
    }


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
    """Milliseconds of processor time an image takes in each part, on one thread of one process."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    dataset = SliceDataset(table, SliceReader(store))
    order = rng.integers(0, len(table), (rounds, BATCH))
    image = torch.from_numpy(rng.random((BATCH, 1, SIZE, SIZE), dtype=np.float32))
    draws = draw_parameters(RANGES, 0, 0, np.arange(BATCH))
    grid, box = sampling_grid(draws, SIZE), torch.tensor([[0, SIZE, 0, SIZE]] * BATCH)
    return {
        "read": cost(lambda n: dataset.__getitems__(order[n].tolist()), rounds, BATCH),
        "draw": cost(lambda n: draw_parameters(RANGES, 0, n, np.arange(BATCH)), rounds, BATCH),
        "grid": cost(lambda n: sampling_grid(draws, SIZE), rounds, BATCH),
        "geometry": cost(lambda n: apply_geometry(image, grid, "bilinear"), rounds, BATCH),
        "scan": cost(lambda n: inside(box, grid), rounds, BATCH),
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
        "spent_ms_per_image": {
            "workers": round(whole["workers_ms"], 3),
            "this_process": round(whole["here_ms"], 3),
        },
    }
    processors = os.cpu_count() or 1
    print(f"{len(table):,} slices of {SIZE} x {SIZE}, {WORKERS} workers, {processors} processors")
    print(f"{'with augmentation':36}{whole['rate']:10.0f} images/s   bar 2,000 ({whole['seen']:,.0f} seen)")
    print(f"{'without augmentation':36}{alone['rate']:10.0f} images/s   ({alone['seen']:,.0f} seen)")
    print(f"{'memory owned, growth over the epoch':36}{alone['growth']:10.1f} MiB        bar 50")
    print(f"{'the same with augmentation':36}{whole['growth']:10.1f} MiB")
    print(f"{'memory owned by a worker':36}{result['worker_mib']:10.1f} MiB        beyond this process, idle")
    print(f"{'pages of mapped files':36}{alone['mapped']:10.0f} MiB        cache, all processes")
    for part, value in parts.items():
        print(f"{part:36}{value:10.3f} ms of processor time an image")
    print(f"{'all parts':36}{total:10.3f} ms: {1e3 * processors / total:.0f} images/s fill all processors")
    print(f"{'spent in the epoch by the workers':36}{whole['workers_ms']:10.3f} ms an image")
    print(f"{'and by this process':36}{whole['here_ms']:10.3f} ms, with what its threads wait for each other")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
