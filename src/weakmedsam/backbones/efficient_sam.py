"""EfficientSAM Ti and S: a plain vision transformer and a decoder that takes many points at once.

Source: EfficientSAM (Xiong et al., arXiv 2312.00863), code and weights github.com/yformer/EfficientSAM
(Apache-2.0), which is on no package index: the architecture is written here, with the official names of
the parameters, so that the official checkpoints load as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from weakmedsam.backbones import checkpoints
from weakmedsam.backbones.attention import check_kind
from weakmedsam.backbones.base import Backbone, Encoded
from weakmedsam.backbones.efficient_sam_decoder import PointEncoder, PointMaskDecoder
from weakmedsam.backbones.efficient_sam_encoder import EFFICIENT_SAM_PATCH, Architecture, ImageEncoder
from weakmedsam.backbones.prompting import best_candidate
from weakmedsam.backbones.sam_parts import resize_frame
from weakmedsam.errors import ConfigError, check_range

log = logging.getLogger(__name__)

EFFICIENT_SAM_SIZES = {
    "ti": Architecture(width=192, depth=12, heads=3),
    "s": Architecture(width=384, depth=12, heads=6),
    "tiny": Architecture(48, 3, 3, neck=32, decoder_hidden=64, upscaling=(16, 8), quality_hidden=32),
}
"""``tiny`` is for tests and dry runs; it has no official weights."""

# A commit rather than a branch: its files cannot change.
WEIGHTS = {
    "efficient_sam_ti": {
        "url": "https://raw.githubusercontent.com/yformer/EfficientSAM/d525f622e6f640acf5a0fc37c7ca1f243da5bde0/"
        "weights/efficient_sam_vitt.pt",
        "size": 40_982_470,
        "sha256": "dff858b19600a46461cbb7de98f796b23a7a888d9f5e34c0b033f7d6eb9e4e6a",
        "licence": "Apache-2.0",
    },
    "efficient_sam_s": {
        "url": "https://raw.githubusercontent.com/yformer/EfficientSAM/d525f622e6f640acf5a0fc37c7ca1f243da5bde0/"
        "weights/efficient_sam_vits.pt.zip",
        "size": 105_742_022,
        "sha256": "339376940b92351ae26dd1162e2305a1cc6f5cde735105e91286251abd9a6b65",
        "licence": "Apache-2.0",
    },
}
"""Official weights, read by ``weights.declared``."""


class EfficientSAM(Backbone):
    """EfficientSAM: 10 M parameters (Ti) or 26 M (S); at 512 pixels 32 x 32 cells.

    Intensities and channels: [0, 1], one grey channel repeated to three (an RGB image goes in as it is),
    minus ImageNet's mean and over its deviation, all inside. An input of another size is resized to
    ``encode_size``, bilinear, with anti-aliasing when it is larger.

    ``encode`` gives features with a graph and the embedding without: this project trains on the features
    only, so neck and decoder never get a gradient through it. Upstream's frame has 1024 pixels; the
    decoder knows positions as parts of the frame only, so points hold at any size.

    Args:
        image_size: side of the input frame, pixels; points are given in it.
        size: ``ti``, ``s``, or ``tiny`` for tests.
        weights: ``official`` (in the cache or downloaded), ``none`` (random), or the
            path of a checkpoint.
        encode_size: side of the frame that the encoder sees, pixels, a multiple of 16; cells a side are a
            sixteenth of it. Upstream: 1024; 512 gives the 32 x 32 cells of SAMUS.
        attention: ``sdpa``, ``explicit``, or ``auto``: sdpa, as there is no position bias.
        gradient_checkpointing: trained blocks are computed again in the backward pass: less memory, more time.
        compile: ``torch.compile`` of the image encoder.
        points_per_call: pairs of image and point decoded at once; bounds memory, changes no result.
        trained_blocks: last blocks that ``published`` trains; 4 as for SAMUS.

    Raises:
        ConfigError: an unknown size or attention, or an ``encode_size`` that is no multiple of 16.
        CheckpointError: a checkpoint that is missing or of another network.
    """

    policies = ("published", "decoder", "all", "none")

    def __init__(
        self,
        image_size: int = 512,
        size: str = "ti",
        weights: str = "official",
        encode_size: int = 512,
        attention: str = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002 - the name is the same for every backbone
        points_per_call: int = 16,
        trained_blocks: int = 4,
    ) -> None:
        super().__init__()
        check_range("model.backbone.points_per_call", points_per_call, 1, 65_536)
        check_range("model.backbone.trained_blocks", trained_blocks, 0)
        _check_arguments(size, weights, encode_size, attention)
        architecture = EFFICIENT_SAM_SIZES[size]
        self.name = f"efficient_sam_{size}"
        self.image_size = image_size
        self.encode_size = encode_size
        self.feature_dim = architecture.width
        self.points_per_call = points_per_call
        self.trained_blocks = trained_blocks
        self.image_encoder = ImageEncoder(architecture, attention == "explicit", gradient_checkpointing)
        self.prompt_encoder = PointEncoder(architecture.neck)
        self.mask_decoder = PointMaskDecoder(
            architecture.neck,
            architecture.decoder_hidden,
            architecture.upscaling,
            architecture.quality_hidden,
        )
        if weights == "none":
            log.warning("model.backbone.weights is none: %s starts from random numbers", self.name)
        elif weights != checkpoints.REPLACED:
            self._load(weights)
        if compile:
            self.image_encoder.compile()

    def _load(self, weights: str) -> None:
        state, source = checkpoints.read_source(weights, self.name if weights == "official" else None)
        checkpoints.check_fit(self.state_dict(), state, source, self.name, _recognise(state))
        self.load_state_dict(state)

    def encode(self, image: Tensor) -> Encoded:  # noqa: D102
        features = self.features(image)
        with torch.no_grad():
            embedding = self.image_encoder.neck(features.detach())
        return Encoded(features, embedding)

    def features(self, image: Tensor) -> Tensor:  # noqa: D102
        return self.image_encoder(self._frame(image))

    def _frame(self, image: Tensor) -> Tensor:
        """(B, 1 or 3, S, S) -> (B, 3, encode_size, encode_size)."""
        self.check_frame(image, channels=(1, 3))
        return resize_frame(image, self.encode_size).expand(-1, 3, -1, -1)

    def candidates_at_points(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """The three candidate masks of each point and their predicted quality, in one decoder call.

        Args:
            embedding: (B, 256, h, w).
            points: (P, 2), (x, y) in pixels of the input frame, centres at + 0.5.

        Returns:
            logits (B, P, 3, 4h, 4w) and predicted IoU (B, P, 3).
        """
        prompts = self.prompt_encoder(points / self.image_size, self.encode_size)
        cells = self.prompt_encoder.cells(*embedding.shape[-2:])
        logits, quality = self.mask_decoder(embedding, prompts, cells)
        return logits[:, :, 1:], quality[:, :, 1:]

    def masks_at_points(self, embedding: Tensor, points: Tensor) -> Tensor:
        """The candidate with the best predicted quality at each point: (B, P, 4h, 4w) logits."""
        return self.prompted(embedding, points)[0]

    def prompted(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        if points.dim() == 3:  # points of their own: image by image
            parts = zip(embedding.split(1), points, strict=True)
            own = [self.prompted(image, asked) for image, asked in parts]
            return torch.cat([logits for logits, _ in own]), torch.cat([quality for _, quality in own])
        # Images share a call only where their points leave room: larger calls are slower on a CPU.
        images = max(1, self.points_per_call // max(1, len(points)))
        rows = []
        for part in embedding.split(images):
            chunks = points.split(self.points_per_call)
            answers = [best_candidate(*self.candidates_at_points(part, chunk)) for chunk in chunks]
            rows.append([torch.cat(column, dim=1) for column in zip(*answers, strict=True)])
        logits, quality = (torch.cat(row) for row in zip(*rows, strict=True))
        return logits, quality

    def set_trainable(self, policy: str) -> None:
        """Freeze by name.

        ``published``: the last ``trained_blocks`` blocks. The paper names what it trains for SAMUS only
        (CNN branch, adapters, relative positions, last four blocks); of these EfficientSAM has the blocks.
        ``decoder``: the mask decoder. ``all``: everything. ``none``: nothing. ``adapters`` is not known
        here: there are none. Stage 1's loss reaches the image encoder without its neck; with several
        processes ``decoder`` and ``all`` need a strategy that allows unused parameters.
        """
        self.check_policy(policy)
        self.requires_grad_(policy == "all")
        if policy == "published":
            first = len(self.image_encoder.blocks) - self.trained_blocks
            self.image_encoder.blocks[max(0, first) :].requires_grad_(True)
        if policy == "decoder":
            self.mask_decoder.requires_grad_(True)


def _check_arguments(size: str, weights: str, encode_size: int, attention: str) -> None:
    if size not in EFFICIENT_SAM_SIZES:
        raise ConfigError(
            f"model.backbone.size: {size!r} is unknown; EfficientSAM has {', '.join(EFFICIENT_SAM_SIZES)}"
        )
    check_kind(attention)
    if weights == "official" and f"efficient_sam_{size}" not in WEIGHTS:
        raise ConfigError(f"model.backbone.weights: size {size!r} has no official checkpoint; set it to none or a path")
    check_range("model.backbone.encode_size", encode_size, high=4096)
    if encode_size < EFFICIENT_SAM_PATCH or encode_size % EFFICIENT_SAM_PATCH:
        below = max(EFFICIENT_SAM_PATCH, encode_size // EFFICIENT_SAM_PATCH * EFFICIENT_SAM_PATCH)
        raise ConfigError(
            f"model.backbone.encode_size: EfficientSAM takes multiples of {EFFICIENT_SAM_PATCH} pixels, "
            f"got {encode_size}; the next ones are {below} and {below + EFFICIENT_SAM_PATCH}, and 512 gives 32 x 32 "
            "cells"
        )


def _recognise(state: Mapping[str, Tensor]) -> str:
    """Name of the network that a checkpoint belongs to, by the width of its position table."""
    table = state.get("image_encoder.pos_embed")
    names = [
        size for size, sizes in EFFICIENT_SAM_SIZES.items() if table is not None and table.shape[-1] == sizes.width
    ]
    own_prompts = "prompt_encoder.invalid_points.weight" in state
    return f"efficient_sam_{names[0]}" if names and own_prompts else "another network"
