"""A run of the default networks that nobody has trained, and a scan for it, for ``benchmarks.predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from numpy.typing import NDArray
from omegaconf import OmegaConf

from weakmedsam.cli_parser import MODE
from weakmedsam.run.request import experiment_file
from weakmedsam.segmentation.module import Segmenter

SHAPE = (240, 240, 155)
"""Of a BraTS scan."""

BALL = 32
"""Radius of the bright ball in it, voxels: 65 of 155 slices have some of it, as of a large tumour."""

NAMES = ["tumour"]


def write_scan(path: Path) -> NDArray[np.bool_]:
    """A head of noise with a bright ball, compressed; zero around it.

    Returns:
        (240, 240, 155) where the ball is.
    """
    rng = np.random.default_rng(0)
    at = np.indices(SHAPE, dtype=np.float32)
    middle = (np.array(SHAPE, np.float32) / 2)[:, None, None, None]
    head = (((at - middle) / (middle * 0.75)) ** 2).sum(0) < 1
    ball = ((at - middle) ** 2).sum(0) < BALL**2
    voxels = head * (400 + 400 * ball + rng.normal(0, 40, SHAPE)).clip(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    return ball


def write_run(run: Path, ball: NDArray[np.bool_]) -> None:
    """The stages ``classify`` and ``segment`` of a run as ``predict`` asks for them, with the settings of BraTS.

    All weights are random but for the last layer of the segmentation network, which is fitted to the ball: how long PAM
    takes depends on the slices in which the network finds something.

    Args:
        run: its folder.
        ball: of ``write_scan``.
    """
    torch.manual_seed(0)
    for stage, after in (("classify", {}), ("segment", {"classify": "1"})):
        files = [experiment_file(f"{stage}.yaml"), experiment_file("data/brats.yaml")]
        if stage == "classify":
            files.append(experiment_file("backbone/pocket.yaml"))
        config: Any = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, files)), resolve=True)
        module = build(config["model"])
        if isinstance(module, Segmenter):
            fit_last_layer(module, ball)
        folder = run / stage
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "stage.json").write_text(json.dumps({"made": "1", "settings": {"after": after}}))
        trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_model_summary=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True)


def build(model: dict[str, Any]) -> LightningModule:
    """The module of a stage's settings, with random weights."""
    parser = ArgumentParser(parser_mode=MODE, exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    given = {**model, "init_args": {**model["init_args"], "class_names": NAMES}}
    module: LightningModule = parser.instantiate_classes(parser.parse_object({"model": given})).model
    return module.eval()


@torch.no_grad()
def fit_last_layer(module: Segmenter, ball: NDArray[np.bool_]) -> None:
    """Least squares of the last layer's channels on the ball, on some slices of a noiseless head."""
    network: Any = module.network
    wanted = torch.from_numpy(ball[..., ::20].transpose(2, 0, 1)[:, :, :].copy())
    image = torch.nn.functional.pad(0.3 + 0.5 * wanted[:, None].float(), (8, 8, 8, 8))
    held: list[torch.Tensor] = []
    hook = network.final_conv.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    network(image)
    hook.remove()
    channels = held[0].movedim(1, -1).flatten(0, -2)
    there = torch.nn.functional.pad(wanted, (8, 8, 8, 8)).flatten().float()
    columns = torch.cat([channels, torch.ones(len(channels), 1)], dim=1).double()
    found = torch.linalg.lstsq(columns, 20 * (there - 0.5).double()[:, None]).solution[:, 0].float()
    network.final_conv.weight.zero_()
    network.final_conv.bias.zero_()
    network.final_conv.weight[1, :, 0, 0], network.final_conv.bias[1] = found[:-1], found[-1]
