"""PAM walks what the segmentation network predicts in place of the activation: another round, refined predictions.

Not in the paper. One pseudo-label is as wrong as its activation, but the errors of many patients differ, and the
network that learnt from all of them draws what they have in common; PAM then fits that to each scan's own borders.
Pseudo-labels from a network's own predictions: Lee, ICML Workshop on Challenges in Representation Learning, 2013; gated
by image-level labels, as the target of the next segmentation network: Wei et al., "STC", TPAMI 2017. On test cases,
where no label is given, the same walk fits the network's own prediction to the scan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from weakmedsam.backbones.checkpoints import read_checkpoint
from weakmedsam.config_diff import RUN_KEY, KnownData, check_version, data_digest, say_digest
from weakmedsam.errors import CheckpointError
from weakmedsam.pam.affinity import onto_map
from weakmedsam.segmentation.module import SIGNATURE, Segmenter
from weakmedsam.system.fingerprints import check_checkpoint

MIN_PROBABILITY = 0.01
"""Probability that a class has to reach somewhere in a slice: PAM scales maps by their maximum, and below it there is
nothing but noise to scale. What lies inside another class is scaled up no less, hence the share."""

PRESENT = 0.5
"""What a class's map has to reach somewhere in a slice that is said to have the class: there it is likelier than all
else together."""

SMALL = 0.01
"""Share of the frame up to which what a segmentation network finds in a slice may be a few stray pixels."""
SIZE_EXPONENT = 2.0
"""A region n times as large counts as odds of n to the power of this. Chosen on validation (docs/results.md)."""


def load_segmenter(path: Path, class_names: list[str], image_size: int) -> tuple[Segmenter, dict[str, Any] | None]:
    """A trained segmentation network, frozen, from its checkpoint alone.

    Args:
        path: of a checkpoint of the segmentation stage.
        class_names: the classes that it has to know, id 1 first.
        image_size: side of the frames it will see, pixels.

    Returns:
        The network, and ``config_diff.data_digest`` of what it learnt from (None: its checkpoint does not say).

    Raises:
        CheckpointError: no such file, or one of another stage, an earlier version, other classes or frames of another
            size, or damaged.
        ConfigError: its network's class is not installed here.
    """
    if not path.is_file():
        raise CheckpointError(
            f"model.pam.start.checkpoint: {path} does not exist; give the best.ckpt of a segmentation stage"
        )
    check_checkpoint(path, "model.pam.start.checkpoint:")
    held = read_checkpoint(path)
    check_version(held, f"model.pam.start.checkpoint: {path}")
    said = held.get(SIGNATURE) if isinstance(held, dict) else None
    if not isinstance(said, dict) or "made_by" not in said:
        raise CheckpointError(
            f"model.pam.start.checkpoint: {path} does not say which segmentation network it holds: it is of "
            f"another stage, or of an earlier version (then remove {path.parent.parent}, and the same command "
            "trains it anew)"
        )
    names = list(said["class_names"])
    if names != class_names:
        raise CheckpointError(
            f"model.pam.start.checkpoint: {path} is of the classes {names}, this run's are {class_names}"
        )
    if said.get("image_size") not in (None, image_size):
        raise CheckpointError(
            f"model.pam.start.checkpoint: {path} was trained on frames of {said['image_size']} pixels, the "
            f"classifier's have {image_size}; give --data.image_size to all stages"
        )
    segmenter = Segmenter(said["made_by"]["class_path"], names, said["made_by"]["arguments"])
    weights = {
        key.removeprefix("network."): value
        for key, value in held.get("state_dict", {}).items()
        if key.startswith("network.")
    }
    try:
        segmenter.network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"model.pam.start.checkpoint: {path} does not fit {said['network']} ({reason})"
        ) from error
    return segmenter.eval().requires_grad_(False), held.get(RUN_KEY, {}).get("data")


class SegmentedStart:
    """What a segmentation network says of slices, as maps for PAM.

    No ``nn.Module``, so that the network is in nobody's parameters.

    Args:
        path: checkpoint of the segmentation network.
        class_names: as of ``load_segmenter``.
        image_size: as of ``load_segmenter``.
        cells: side of the maps; PAM's ``map_size``, beyond which nothing is gained.

    Raises:
        CheckpointError: as ``load_segmenter``.
    """

    def __init__(self, path: Path, class_names: list[str], image_size: int, cells: int) -> None:
        self.network, self._learnt_from = load_segmenter(path, class_names, image_size)
        self.cells = cells
        self._path = path

    def compare_data(self, data: KnownData) -> None:
        """Warn where the network has learnt from other data than a run's: what it says there may mean little.

        No error: a network of one hospital may be tried on another's scans.

        Args:
            data: the run's data module, set up.
        """
        held, ours = self._learnt_from, data_digest(data)
        if held is not None and held != ours:
            rank_zero_warn(
                f"model.pam.start.checkpoint: {self._path} was trained on other data ({say_digest(held)}) than this "
                f"run's ({say_digest(ours)}): other scans, another split, or other intensities. If that is not "
                "wanted, give options of --data.slices and --data.split to all stages, not to one"
            )

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """What the network says of slices.

        Args:
            image: (B, 1, S, S) in [0, 1].

        Returns:
            (B, C, cells, cells) in [0, 1]: the class's probability p_c times its share p_c / sum p of all classes but
            background; 0 where p_c is below ``MIN_PROBABILITY`` in all of a slice. With one class: the probability.
        """
        self.network.to(image.device)
        # In float32 but for autocast: a trainer of true half precision converts its own module, not this one.
        maps = onto_map(self.network(image.float()).float().softmax(1)[:, 1:], self.cells)
        share = maps / maps.sum(dim=1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        seen = maps.amax((-2, -1), keepdim=True) >= MIN_PROBABILITY
        return torch.where(seen, maps * share, 0)


def find_present(maps: Tensor, classified: Tensor) -> Tensor:
    """Which classes slices have, by what both networks say of them.

    A few stray pixels make a segmentation network say "there", and the classification network has learnt just that
    question: it has a veto. The larger a region, the less likely it is to be stray, and the surer the classification
    network has to be: ``classified + SIZE_EXPONENT * log(area / SMALL)`` must not lie below 0, the logarithm 0 up to
    that area.

    Args:
        maps: (B, C, h, w) of ``SegmentedStart``.
        classified: (B, C) log-odds of presence by the classification network, 0 at its operating point.

    Returns:
        (B, C) of the maps' type, 0 or 1, as image-level labels are.
    """
    reached = maps >= PRESENT
    larger = (reached.flatten(2).float().mean(dim=2) / SMALL).clamp_min(1)
    said = classified + SIZE_EXPONENT * larger.log() >= 0
    return (reached.flatten(2).any(dim=2) & said).to(maps.dtype)
