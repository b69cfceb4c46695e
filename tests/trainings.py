"""Whether two trainings have come to the same, bit for bit."""

from pathlib import Path

import torch
from tiny import same_state

from weakmedsam.system.atomic_io import read_table


def assert_same_checkpoint(one: Path, two: Path, nearly: str | None = None) -> None:
    """Weights, buffers, the optimiser's settings and moments, and the schedule of two checkpoint files.

    ``nearly`` names a buffer that may differ by a hundredth.
    """
    ours, theirs = (torch.load(path, weights_only=True) for path in (one, two))
    if nearly is not None:
        pair = [held["state_dict"].pop(nearly) for held in (ours, theirs)]
        assert torch.allclose(*pair, atol=0.01)
    assert same_state(ours["state_dict"], theirs["state_dict"]), f"the networks of {one} and {two} differ"
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    for mine, other in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert mine["param_groups"] == other["param_groups"]
        assert mine["state"].keys() == other["state"].keys()
        for parameter, moments in other["state"].items():
            assert all(torch.equal(mine["state"][parameter][key], value) for key, value in moments.items())


def assert_same_training(one: Path, two: Path) -> None:
    """Last and best checkpoint of two runs' folders, and their curves; seconds may differ."""
    for name in ("last", "best"):
        assert_same_checkpoint(one / f"checkpoints/{name}.ckpt", two / f"checkpoints/{name}.ckpt")
    ours, theirs = ([{**row, "seconds": ""} for row in read_table(run / "history.csv")] for run in (one, two))
    assert ours == theirs
