"""How much slower training is beside other work: ``python -m benchmarks.busy``.

Steps of the default segmentation network on eight slices of 128 pixels, in a process of their own with all
processors: alone, and beside a busy loop on each; with threads that sleep while they wait for each other (as every
command of this project sets it) and with OpenMP's default, that they spin. The four are measured in turn, the
medians of some rounds compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

STEPS = """
import time
import torch
from monai.networks.nets import BasicUNet

torch.manual_seed(0)
network = BasicUNet(spatial_dims=2, in_channels=1, out_channels=3, features=(16, 16, 32, 64, 128, 16))
optimiser, images = torch.optim.AdamW(network.parameters()), torch.rand(8, 1, 128, 128)
times = []
for _ in range({steps} + 1):
    started = time.perf_counter()
    optimiser.zero_grad()
    network(images).square().mean().backward()
    optimiser.step()
    times.append(time.perf_counter() - started)
print(sum(times[1:]) / {steps})
"""
LOOP = "while True: pass"
POLICIES = {"sleep": {"OMP_WAIT_POLICY": "PASSIVE"}, "spin": {}}


def seconds_a_step(policy: str, busy: int, steps: int) -> float:
    """Mean of a process's steps, the first left out.

    Args:
        policy: one of ``POLICIES``.
        busy: how many busy loops run beside it.
        steps: how many.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    with ExitStack() as stack:
        for _ in range(busy):
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", LOOP]))
            stack.callback(loop.kill)
        done = subprocess.run(
            [sys.executable, "-c", STEPS.format(steps=steps)],
            env=clean | POLICIES[policy],
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout)


def main() -> None:
    """Print a line a round and a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more rounds")
    full = parser.parse_args().full
    loops = os.cpu_count() or 1
    found: dict[tuple[str, bool], list[float]] = {(policy, busy): [] for policy in POLICIES for busy in (False, True)}
    for number in range(7 if full else 3):
        for (policy, busy), times in found.items():
            times.append(seconds_a_step(policy, loops if busy else 0, 20))
        shown = ", ".join(
            f"{policy}{', busy' if busy else ''} {times[-1]:.3f} s" for (policy, busy), times in found.items()
        )
        print(f"round {number + 1}: {shown}")
    middle = {key: statistics.median(times) for key, times in found.items()}
    figures = {
        "busy_slowdown": middle["sleep", True] / middle["sleep", False],
        "spinning_slowdown": middle["spin", True] / middle["spin", False],
        "quiet_cost": middle["sleep", False] / middle["spin", False],
    }
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
