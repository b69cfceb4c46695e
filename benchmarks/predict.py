"""A scan of 240 x 240 x 155 voxels, segmented by the command ``predict`` with the default networks.

The run is made here, untrained (``_made_run``): local encoder, pocket backbone and segmentation network with the
settings of BraTS, frames of 256 pixels. The scan is compressed NIfTI. Each command is started as a user does: start,
reading, network, way back to the scan's own grid, picture and files are in its time.

The last line is one JSON object: ``seconds`` of the default, refined by PAM (bar 20 on two cores; PAM refines the
slices in which the untrained network finds something, about half of them), ``plain_seconds`` of the network alone,
``processor_seconds`` and ``plain_processor_seconds`` of the same (user and system, all processes: what to compare where
other work runs beside), ``peak_gib`` (bar 2), the largest of a process, and ``overhead_ratio`` (bar 1.3): processor
time of ``load_run().predict``, from file to class ids on the scan's grid, by that of the bare forward passes of the
same network on the same batches, one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._made_run import NAMES, SHAPE, write_run, write_scan
from weakmedsam.inference.trained_run import load_run
from weakmedsam.system.fast_import import keep_freed_memory


def run_command(folder: Path, *options: str) -> tuple[float, float, float]:
    """Segment the scan by the command.

    Returns:
        Seconds by the wall, of processors, and GiB of the largest process so far.
    """
    words = [sys.executable, "-m", "weakmedsam", "predict", "--dataset", "brats", "--runs", str(folder / "runs")]
    words += ["--scans", str(folder / "scans"), "--out", str(folder / f"out{len(options)}"), *options]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*words, "--", "--trainer.accelerator", "cpu"], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, spent, after.ru_maxrss / 2**20


def processor_seconds(work: Callable[[], object], repeats: int) -> float:
    """Least of some repeats, user and system, all threads."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


@torch.no_grad()
def overhead(folder: Path, repeats: int) -> float:
    """Of prediction from file to class ids, by bare forward passes."""
    torch.set_num_threads(1)  # threads that wait for each other count as busy
    run = load_run(folder / "runs/brats/default", refined=False, device="cpu")
    module: Any = run.module
    frames = torch.rand(SHAPE[2], 1, run.image_size, run.image_size)

    def bare() -> None:
        for batch in frames.split(module.slices_per_step):
            module.network(batch)

    bare()
    return processor_seconds(lambda: run.predict(folder / "scans/head.nii.gz"), repeats) / processor_seconds(
        bare, repeats
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--full", action="store_true", help="repeat the measurement in one process")
    repeats = 3 if parser.parse_args().full else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder / "runs/brats/default", write_scan(folder / "scans/head.nii.gz"))
        plain = run_command(folder, "--plain")
        refined = run_command(folder)
        ratio = overhead(folder, repeats)
    result = {
        "seconds": round(refined[0], 1),
        "plain_seconds": round(plain[0], 1),
        "processor_seconds": round(refined[1], 1),
        "plain_processor_seconds": round(plain[1], 1),
        "overhead_ratio": round(ratio, 2),
        "peak_gib": round(refined[2], 2),
    }
    print(f"a scan of {' x '.join(map(str, SHAPE))} voxels, {len(NAMES)} class, frames of 256 pixels")
    print(f"{'refined by PAM (the default)':34}{refined[0]:8.1f} s   {refined[1]:6.1f} s of processors   bar 20 s")
    print(f"{'the network alone (--plain)':34}{plain[0]:8.1f} s   {plain[1]:6.1f} s of processors")
    print(f"{'from file to ids / bare passes':34}{ratio:8.2f}     bar 1.3")
    print(f"{'largest process':34}{refined[2]:8.2f} GiB bar 2")
    print(json.dumps(result))


if __name__ == "__main__":
    keep_freed_memory()
    main()
