"""SAMUS: SAM at 256 pixels with a convolutional branch and adapters, the paper's backbone.

Source: SAMUS (Lin et al., arXiv 2309.06824), as WeakMedSAM (arXiv 2503.04106) uses it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from weakmedsam.backbones import checkpoints
from weakmedsam.backbones.attention import Attention, check_kind
from weakmedsam.backbones.base import Backbone, Encoded
from weakmedsam.backbones.prompting import decode_points
from weakmedsam.backbones.sam_parts import make_mask_decoder, make_prompt_encoder, size_of
from weakmedsam.backbones.sam_state import fit_positions, load_matching
from weakmedsam.backbones.samus_encoder import STRIDE, SamusEncoder
from weakmedsam.errors import ConfigError, check_range

SMALLEST, LARGEST = 64, 512

ADDED = (
    "cnn_embed.",
    "post_pos_embed.",
    "input_Adapter.",
    "MLP_Adapter.",
    "Space_Adapter.",
    "refine_Adapter.",
)
"""Parts of a parameter's name that SAM does not have."""

WEIGHTS = {"samus": "sam_vit_b", "samus_vit_l": "sam_vit_l", "samus_vit_h": "sam_vit_h"}
"""SAM's own: SAMUS's lie at no stable public address. Read by ``weights.declared``."""

CLASS_HEADS = ("parent_fc.", "child_fc.")
"""WeakMedSAM's own heads in the authors' checkpoints; here they belong to ``classify.WeakMedSAM``."""

_log = logging.getLogger(__name__)


class SAMUS(Backbone):
    """SAMUS behind SAM's own prompt encoder and mask decoder; 32 x 32 cells at 256 pixels.

    Its input is one grey channel in [0, 1], repeated to three and used as it is, without mean and
    deviation. Features are those before SAM's neck, (B, D, S / 8, S / 8) with D = 768, 1024 or 1280; the
    mask of a point is the decoder's single-mask output, (S / 2, S / 2).

    Where no checkpoint gives them, adapters and cross-attention start at zero output, so that the
    transformer begins as it was loaded; convolutions and norms start as torch makes them.

    Args:
        image_size: S, side of the input frame, pixels: 256 as published, else a multiple of 8 from 64 to
            512; position tables are resized.
        size: ``vit_b`` (the paper's), ``vit_l``, ``vit_h``, or ``tiny`` for tests and dry runs.
        weights: ``sam`` (SAM's official checkpoint of this size; the rest keeps its initial values),
            ``none`` (random), or the path of a SAMUS or SAM checkpoint. SAMUS's own weights lie at no
            stable public address.
        attention: ``auto``, ``explicit`` or ``sdpa``, see ``attention.attend``; changes no result.
        gradient_checkpointing: keep only each block's input for the backward pass; changes no result.
        compile: ``torch.compile`` the image encoder.
        points_per_call: pairs of image and point decoded at once; memory and time only.
        last_blocks: blocks at the end that ``published`` trains whole; published: 4.

    Raises:
        ConfigError: an unknown size or attention, an ``image_size`` that does not fit.
        CheckpointError: a checkpoint that is missing or of another network.
    """

    policies = ("published", "adapters", "decoder", "all", "none")

    def __init__(
        self,
        image_size: int = 256,
        size: str = "vit_b",
        weights: str = "sam",
        attention: str = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002
        points_per_call: int = 16,
        last_blocks: int = 4,
    ) -> None:
        super().__init__()
        check_range("model.backbone.points_per_call", points_per_call, 1, 65_536)
        check_range("model.backbone.last_blocks", last_blocks, 0)
        shape = size_of(size)
        if not SMALLEST <= image_size <= LARGEST or image_size % STRIDE:
            raise ConfigError(
                f"model.backbone.image_size: SAMUS takes 256 pixels (published), or another multiple of {STRIDE} "
                f"from {SMALLEST} to {LARGEST}, got {image_size}"
            )
        self.name = "samus" if size == "vit_b" else f"samus_{size}"
        self.size, self.global_blocks = size, shape.global_blocks
        self.image_size, self.feature_dim = image_size, shape.width
        self.points_per_call, self.last_blocks = points_per_call, last_blocks
        self.image_encoder = SamusEncoder(shape, image_size, check_kind(attention), gradient_checkpointing)
        self.prompt_encoder = make_prompt_encoder(shape, self.image_encoder.cells, image_size)
        self.mask_decoder = make_mask_decoder(shape)
        self._initialise(weights)
        if compile:
            self.image_encoder.compile()

    def _initialise(self, weights: str) -> None:
        if weights == checkpoints.REPLACED:
            return
        if weights == "none":
            _log.warning("model.backbone.weights is none: %s starts from random numbers", self.name)
            return
        if weights == "official":
            raise ConfigError(
                "model.backbone.weights: SAMUS's official weights lie at no stable public address; give the path "
                "of their file, or 'sam' for SAM's official weights"
            )
        if weights == "sam" and self.size == "tiny":
            raise ConfigError("model.backbone.weights: the tiny size has no official weights; set none")
        state, source = checkpoints.read_source(weights, self.name if weights == "sam" else None)
        self.load_state(state, source)

    def load_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load a SAMUS checkpoint, or the part that a SAM checkpoint of the same size has.

        Position tables of another grid are resized (``sam_state.fit_positions``). Class heads in the file
        are dropped; what SAM does not have keeps its values. Both are listed in the log.

        Args:
            state: the checkpoint's tensors.
            source: where it is from, for messages.

        Raises:
            CheckpointError: neither SAMUS nor SAM of this size; nothing is loaded then.
        """
        dropped = [key for key in state if key.startswith(CLASS_HEADS)]
        own = self.state_dict()
        kept = [key for key in own if any(part in key for part in ADDED)]
        if any(key in state for key in kept):
            kept = []
        fitted = fit_positions(
            {key: value for key, value in state.items() if key not in dropped}, own, self.global_blocks
        )
        wanted = {key: value for key, value in own.items() if key not in kept}
        load_matching(wanted, fitted, source, f"SAMUS {self.size}")
        if dropped:
            _log.info("%s: class heads are not the backbone's, dropped: %s", source, ", ".join(dropped))
        if kept:
            _log.warning("%s is of SAM; these keep their initial values: %s", source, ", ".join(kept))

    def encode(self, image: Tensor) -> Encoded:
        """Features with gradient, embedding without: training uses the features only.

        See ``Backbone.encode``. No gradient flows through the embedding.
        """
        features = self.features(image)
        with torch.no_grad():
            embedding = self.image_encoder.neck(features.detach())
        return Encoded(features, embedding)

    def features(self, image: Tensor) -> Tensor:  # noqa: D102
        self.check_frame(image)
        return self.image_encoder(image)

    def masks_at_points(self, embedding: Tensor, points: Tensor) -> Tensor:
        """The decoder's single-mask output at each point: (B, P, S / 2, S / 2) logits."""
        return self.prompted(embedding, points)[0]

    def prompted(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        logits, quality = decode_points(
            self.prompt_encoder,
            self.mask_decoder,
            embedding,
            points,
            self.points_per_call,
            candidates=slice(0, 1),
        )
        return logits.squeeze(2), quality.squeeze(2)

    def set_trainable(self, policy: str) -> None:
        """Freeze by name.

        ``published``: convolutional branch, adapters, the position table's convolution, relative positions
        of the global blocks, and the last four blocks whole. ``adapters``: the same without the last
        blocks. ``decoder``: the mask decoder only. ``all``: every parameter. ``none``: nothing.

        Classification reaches neither neck nor decoder: with ``decoder`` or ``all`` several processes need
        a strategy that finds unused parameters.

        Raises:
            ConfigError: an unknown policy.
        """
        self.check_policy(policy)
        self.requires_grad_(policy == "all")
        if policy == "decoder":
            self.mask_decoder.requires_grad_(True)
        if policy in ("published", "adapters"):
            for name, parameter in self.image_encoder.named_parameters():
                parameter.requires_grad_(any(part in name for part in ADDED))
            for i in self.global_blocks:
                attention = cast(Attention, self.image_encoder.blocks[i].attn)
                attention.rel_pos_h.requires_grad_(True)
                attention.rel_pos_w.requires_grad_(True)
        if policy == "published" and self.last_blocks:
            for block in self.image_encoder.blocks[-self.last_blocks :]:
                block.requires_grad_(True)
