"""What a user asks a pipeline for, for tests."""

from weakmedsam.run.overrides import parse_options
from weakmedsam.run.request import Request


def request_for(folder, *words, **changes):
    settings = {
        "dataset": "phantom",
        "experiment": "x",
        "backbone": "pocket",
        "data_dir": None,
        "runs": folder / "runs",
    }
    return Request(**settings | changes, options=parse_options(list(words)))
