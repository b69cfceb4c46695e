"""Self-training: PAM walks what the segmentation network predicts, in place of the class activation.

Not in the paper. One pseudo-label is as wrong as its activation, but the errors of many patients differ, and the
network that learnt from all of them draws what they have in common; PAM then fits that to each scan's own borders.
Self-training on such predictions is as old as pseudo-labels (Lee, ICML Workshop on Challenges in Representation
Learning, 2013); in place of an activation map it is used since Wei et al., "STC", TPAMI 2017.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from weakmedsam.affinity import onto_map
from weakmedsam.backbones.checkpoints import read_checkpoint
from weakmedsam.contracts import CheckpointError
from weakmedsam.segment import SIGNATURE, Segmenter


def load_segmenter(path: Path, class_names: list[str]) -> Segmenter:
    """A trained segmentation network, frozen, from its checkpoint alone.

    Args:
        path: of a checkpoint of the segmentation stage.
        class_names: the classes that it has to know, id 1 first.

    Raises:
        CheckpointError: no such file, not of a segmentation network, of an earlier version or of other classes.
    """
    if not path.is_file():
        raise CheckpointError(
            f"model.pam.start: {path} does not exist; give the best.ckpt of a segmentation stage"
        )
    held = read_checkpoint(path)
    said = held.get(SIGNATURE) if isinstance(held, dict) else None
    if said is None or "made_by" not in said:
        raise CheckpointError(
            f"model.pam.start: {path} does not say which segmentation network it holds (it is of another stage, or "
            "of an earlier version); give the best.ckpt of a segmentation stage, trained anew where it is older"
        )
    names = list(said["class_names"])
    if names != class_names:
        raise CheckpointError(
            f"model.pam.start: {path} is of the classes {names}, this run's are {class_names}"
        )
    made_by = said["made_by"]
    segmenter = Segmenter(made_by["class_path"], names, made_by["arguments"])
    segmenter.network.load_state_dict(
        {
            key.removeprefix("network."): value
            for key, value in held["state_dict"].items()
            if key.startswith("network.")
        }
    )
    return segmenter.eval().requires_grad_(False)


class SegmentedStart:
    """What a segmentation network says of slices, as maps for PAM.

    No ``nn.Module``, so that the network is in nobody's parameters.

    Args:
        path: checkpoint of the segmentation network.
        class_names: as of ``load_segmenter``.
        cells: side of the maps; PAM's ``map_size``, beyond which nothing is gained.

    Raises:
        CheckpointError: as ``load_segmenter``.
    """

    def __init__(self, path: Path, class_names: list[str], cells: int) -> None:
        self.network = load_segmenter(path, class_names)
        self.cells = cells

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """(B, 1, S, S) in [0, 1] -> (B, C, cells, cells) probabilities, background left out."""
        self.network.to(image.device)
        return onto_map(self.network(image).float().softmax(1)[:, 1:], self.cells)
