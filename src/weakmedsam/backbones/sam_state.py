"""Checkpoints of SAM and of networks derived from it: identified, resized to another grid, loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from weakmedsam.backbones.checkpoints import check_fit
from weakmedsam.backbones.sam_parts import SAM_SIZES


def name_network(state: Mapping[str, Tensor]) -> str:
    """Name of the network that a checkpoint belongs to, for an error message."""
    kernel = state.get("image_encoder.patch_embed.proj.weight")
    if kernel is None or kernel.dim() != 4:
        return "another network"
    family = "SAMUS" if any(key.startswith("image_encoder.cnn_embed.") for key in state) else "SAM"
    blocks = {key.split(".")[2] for key in state if key.startswith("image_encoder.blocks.")}
    width, depth = kernel.shape[0], len(blocks)
    for name, size in SAM_SIZES.items():
        if (size.width, size.depth) == (width, depth):
            return f"{family} {name}"
    return f"a {family}-like network of width {width} with {depth} blocks"


def fit_positions(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], global_blocks: Collection[int]
) -> dict[str, Tensor]:
    """Resize position tables to the grid of the network that takes them.

    Relative tables of global blocks (2n - 1, d) are resized along their distances (linear), the absolute
    table (1, n, n, D) bicubically; tables that fit, and windows, stay as they are.

    Args:
        state: a checkpoint's tensors.
        own: the network's own, of the shapes that are wanted.
        global_blocks: indices of the blocks with global attention.
    """
    relative = {f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in global_blocks for axis in "hw"}
    fitted = dict(state)
    for key in relative | {"image_encoder.pos_embed"}:
        if key not in state or key not in own or state[key].shape == own[key].shape:
            continue
        table, wanted = state[key].float(), own[key].shape
        if table.dim() != len(wanted) or table.shape[-1] != wanted[-1]:
            continue  # another network's: the comparison that follows names it
        if key in relative:
            fitted[key] = F.interpolate(table.T[None], size=wanted[0], mode="linear")[0].T
        else:
            side = (wanted[1], wanted[2])
            fitted[key] = F.interpolate(table.permute(0, 3, 1, 2), size=side, mode="bicubic").permute(0, 2, 3, 1)
    return fitted


def load_matching(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, ours: str) -> None:
    """Copy a checkpoint that holds exactly the wanted tensors; otherwise nothing is copied.

    Args:
        wanted: a network's own tensors by name, written in place.
        state: what the checkpoint holds.
        source: where it is from, for the message.
        ours: what the network is called, for the message.

    Raises:
        CheckpointError: a key is missing, superfluous or of another shape; names both networks and the
            first differing keys.
    """
    check_fit(wanted, state, source, ours, name_network(state))
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(state[key])
