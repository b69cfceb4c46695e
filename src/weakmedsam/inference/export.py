"""The segmentation network of a run for other programs: ONNX, and a side file that says what goes in and comes out.

``weakmedsam export --dataset heart --output heart.onnx`` writes ``heart.onnx`` and ``heart.json``; with
``--output heart.pt2`` a program of ``torch.export``. PAM is not in it: it is the network by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from data_modules.volumes import PLANES
from weakmedsam import __version__
from weakmedsam.errors import ConfigError
from weakmedsam.inference.trained_run import TrainedRun, load_run
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.segmentation.module import Segmenter
from weakmedsam.system.atomic_io import write_whole

ENDINGS = (".onnx", ".pt2")
NEEDED = ("onnx", "onnxscript")
"""Packages that write ONNX."""
OPSET = 18


class Probabilities(nn.Module):
    """The network with its softmax: (N, 1, S, S) in [0, 1] -> (N, C + 1, S, S), background first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:  # noqa: D102
        return cast(Tensor, self.network(image)).float().softmax(1)


def to_words(plane: str) -> str:
    """Where slices, rows and columns of a plane lead, in words."""
    sides = {"L": "left", "R": "right", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
    return ", ".join(sides[code] for code in PLANES[plane])


def describe(run: TrainedRun) -> dict[str, Any]:
    """What the side file says: input and output, and the steps before and after, those of ``weakmedsam predict``."""
    size = run.image_size
    intensity = {key: value for key, value in asdict(run.intensity).items() if value is not None}
    return {
        "made_by": f"weakmedsam {__version__}",
        "input": {
            "name": "image",
            "shape": ["N", 1, run.image_size, run.image_size],
            "type": "float32",
            "range": [0, 1],
        },
        "output": {
            "name": "probabilities",
            "shape": ["N", len(run.class_names) + 1, size, size],
            "type": "float32",
            "classes": ["background", *run.class_names],
        },
        "plane": run.plane,
        "intensity": intensity,
        "before": [
            f"turn the voxels so that their axes lead to {to_words(run.plane)}: {run.plane} slices (D, H, W)",
            "scale values linearly so that low becomes 0 and high 1, and clip: by intensity.window (level, width) low "
            "is level - width / 2 and high level + width / 2; by intensity.percentiles they are these percentiles of "
            "the volume's values above its minimum",
            "pad each slice with 0 to a square of side max(H, W), the slice centred, offset (side - H) // 2",
            "resize the square to the input's size: bilinear, anti-aliased, pixel centres at integer + 0.5",
        ],
        "after": [
            "resize probabilities to the square's side in the same way, and crop the padding",
            "the class of a pixel is the largest probability",
        ],
    }


def export(run: TrainedRun, path: Path) -> Path:
    """Write the network and its side file.

    Args:
        run: of ``load_run(..., refined=False, device="cpu")``.
        path: ``.onnx`` or ``.pt2``.

    Returns:
        The side file, ``.json`` beside it.

    Raises:
        ConfigError: another ending, a refined run, or a package that is missing.
    """
    if path.suffix not in ENDINGS:
        raise ConfigError(f"--output {path}: its ending says the format, one of {', '.join(ENDINGS)}")
    if not isinstance(run.module, Segmenter):
        raise ConfigError("export: PAM cannot be exported; load the run with refined=False")
    for package in NEEDED if path.suffix == ".onnx" else ():
        if find_spec(package) is None:
            raise ConfigError(f"ONNX needs {package}: pip install 'weakmedsam[export]'")
    network = Probabilities(run.module.network).eval()
    example = torch.rand(2, 1, run.image_size, run.image_size)
    slices = {"image": {0: torch.export.Dim("slices", min=1)}}
    with _quiet():
        content = (_program if path.suffix == ".pt2" else _onnx)(network, example, slices)
    write_whole(path, content)
    side = path.with_suffix(".json")
    write_whole(side, json.dumps(describe(run), indent=2) + "\n")
    return side


def _program(network: nn.Module, example: Tensor, slices: dict[str, Any]) -> bytes:
    held = io.BytesIO()
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=slices), held)
    return held.getvalue()


def _onnx(network: nn.Module, example: Tensor, slices: dict[str, Any]) -> bytes:
    program = torch.onnx.export(
        network,
        (example,),
        input_names=["image"],
        output_names=["probabilities"],
        dynamic_shapes=slices,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    return cast(bytes, program.model_proto.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its own steps, and warns of what is meant to be so."""
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        yield
    logging.getLogger("torch.onnx").setLevel(level)


def main(words: list[str] | None = None) -> None:
    """Parse the command line and export; see ``export``."""
    parser = argparse.ArgumentParser(
        prog="weakmedsam export", description="Write the segmentation network of a run as ONNX or torch.export."
    )
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--experiment", default="default")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, help=".onnx or .pt2; default: network.onnx in the run's folder")
    args = parser.parse_args(words)
    folder = args.runs / args.dataset / args.experiment
    path = args.output or folder / "network.onnx"
    with ending_in_a_message("from the start", vars(args)):
        run = load_run(folder, refined=False, device="cpu")
        side = export(run, path)
    print(f"{path}\n{side}")
