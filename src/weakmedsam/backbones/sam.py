"""SAM ViT-B, L and H: segment-anything's own network, frozen or adapted with LoRA.

Source: Segment Anything (Kirillov et al., ICCV 2023, arXiv 2304.02643).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import cast

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor

from weakmedsam.backbones import checkpoints
from weakmedsam.backbones.attention import Attention, check_kind
from weakmedsam.backbones.base import Backbone, Encoded
from weakmedsam.backbones.lora import add_low_rank, low_rank_parameters, original_state
from weakmedsam.backbones.prompting import decode_points
from weakmedsam.backbones.sam_parts import (
    SAM_PATCH,
    Size,
    layer_norm,
    make_mask_decoder,
    make_prompt_encoder,
    resize_frame,
    run_block,
    size_of,
)
from weakmedsam.backbones.sam_state import fit_positions, load_matching
from weakmedsam.errors import ConfigError, check_range

WEIGHTS = {
    "sam_vit_b": {
        "url": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
        "size": 375_042_383,
        "sha256": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        "licence": "Apache-2.0",
    },
    "sam_vit_l": {
        "url": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
        "size": 1_249_524_607,
        "sha256": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        "licence": "Apache-2.0",
    },
    "sam_vit_h": {
        "url": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
        "size": 2_564_550_879,
        "sha256": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        "licence": "Apache-2.0",
    },
}
"""Official weights, read by ``weights.declared``."""

SMALLEST, LARGEST = 64, 1024

MEAN = (123.675, 116.28, 103.53)
"""SAM's published mean of red, green, blue, on 0..255."""

DEVIATION = (58.395, 57.12, 57.375)
"""SAM's published standard deviation, likewise."""

_log = logging.getLogger(__name__)


class SamEncoder(ImageEncoderViT):
    """segment-anything's image encoder up to its neck, with its own attention replaced by ours."""

    def __init__(self, size: Size, image_size: int, attention: str, gradient_checkpointing: bool) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=SAM_PATCH,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            out_chans=size.embed,
            norm_layer=layer_norm,
            use_rel_pos=True,
            window_size=size.window,
            global_attn_indexes=size.global_blocks,
        )
        for block in self.blocks:
            block.attn = Attention(block.attn, attention, gradient_checkpointing)
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S), normalised -> features (B, D, S / 16, S / 16), before the neck."""
        tokens = self.patch_embed(image) + self.pos_embed
        for block in self.blocks:
            tokens = cast(Tensor, run_block(block, tokens, checkpointing=self.gradient_checkpointing))
        return tokens.permute(0, 3, 1, 2)


class SAM(Backbone):
    """Segment Anything; S / 16 cells a side, 64 at its own 1024 pixels.

    Its input is one grey channel in [0, 1], repeated to three, brought to 0..255 and normalised with SAM's
    published mean and deviation; of another size than S it is resized to it (bilinear, with anti-aliasing
    when it is larger). Features are those before the neck, D = 768, 1024 or 1280; the mask of a point is the
    decoder's single-mask output, (S / 4, S / 4).

    Args:
        image_size: side of the input frame, pixels; points are given in it.
        size: ``vit_b``, ``vit_l``, ``vit_h``, or ``tiny`` for tests and dry runs.
        weights: ``official`` (in the cache or downloaded), ``none`` (random), or a checkpoint's path.
        attention: ``auto``, ``explicit`` or ``sdpa``, see ``attention.attend``; changes no result.
        gradient_checkpointing: keep only each block's input for the backward pass; changes no result.
        compile: ``torch.compile`` the image encoder.
        points_per_call: pairs of image and point decoded at once; memory and time only.
        encode_size: S, side of the frame that the encoder sees, pixels: a multiple of 16 from 64 to 1024
            (published); below 1024 the position tables are resized. None: ``image_size``.
        lora_rank: rank of the change that ``qkv`` and ``proj`` of every block learn; 0: no LoRA, the
            encoder stays frozen.
        lora_alpha: scale of that change, times rank.

    Raises:
        ConfigError: an unknown size or attention, an ``encode_size`` or ``lora_rank`` out of range.
        CheckpointError: a checkpoint that is missing or of another network.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        image_size: int = 1024,
        size: str = "vit_b",
        weights: str = "official",
        attention: str = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002
        points_per_call: int = 16,
        encode_size: int | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 4.0,
    ) -> None:
        super().__init__()
        check_range("model.backbone.points_per_call", points_per_call, 1, 65_536)
        shape = size_of(size)
        side = image_size if encode_size is None else encode_size
        if not SMALLEST <= side <= LARGEST or side % SAM_PATCH:
            raise ConfigError(
                f"model.backbone.encode_size: SAM takes multiples of {SAM_PATCH} from {SMALLEST} to {LARGEST} pixels, "
                f"got {side}"
            )
        check_range("model.backbone.lora_rank", lora_rank, 0, 4096)
        check_range("model.backbone.lora_alpha", lora_alpha)
        self.name = f"sam_{size}"
        self.size, self.global_blocks = size, shape.global_blocks
        self.image_size, self.encode_size = image_size, side
        self.feature_dim, self.points_per_call = shape.width, points_per_call
        self.image_encoder = SamEncoder(shape, side, check_kind(attention), gradient_checkpointing)
        self.prompt_encoder = make_prompt_encoder(shape, side // SAM_PATCH, image_size)
        self.mask_decoder = make_mask_decoder(shape)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) / 255, persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1) / 255, persistent=False)
        self._initialise(weights)
        if lora_rank:
            for block in self.image_encoder.blocks:
                add_low_rank(block.attn.qkv, lora_rank, lora_alpha)
                add_low_rank(block.attn.proj, lora_rank, lora_alpha)
        self.policies = ("published", "decoder", "all", "none")
        if lora_rank:
            self.policies = ("published", "adapters", "decoder", "all", "none")
        if compile:
            self.image_encoder.compile()

    def _initialise(self, weights: str) -> None:
        if weights == checkpoints.REPLACED:
            return
        if weights == "none":
            _log.warning("model.backbone.weights is none: %s starts from random numbers", self.name)
            return
        if weights == "official" and self.size == "tiny":
            raise ConfigError("model.backbone.weights: the tiny size has no official weights; set none")
        state, source = checkpoints.read_source(weights, self.name if weights == "official" else None)
        self.load_state(state, source)

    def load_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load a SAM checkpoint of this size; position tables of another grid are resized.

        LoRA parameters are not part of a SAM checkpoint and keep their values.

        Args:
            state: the checkpoint's tensors.
            source: where it is from, for messages.

        Raises:
            CheckpointError: not SAM of this size; nothing is loaded then.
        """
        own = original_state(self)
        fitted = fit_positions(state, own, self.global_blocks)
        load_matching(own, fitted, source, f"SAM {self.size}")

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
        image = resize_frame(image, self.encode_size)
        return self.image_encoder((image - self.mean) / self.deviation)

    def masks_at_points(self, embedding: Tensor, points: Tensor) -> Tensor:
        """The decoder's single-mask output at each point: (B, P, S / 4, S / 4) logits."""
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

        ``published`` and ``adapters``: the LoRA parameters; without LoRA ``published`` trains nothing of
        the network (only the heads on it learn) and ``adapters`` is unknown. ``decoder``: the mask decoder
        only. ``all``: every parameter. ``none``: nothing.

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
            for parameter in low_rank_parameters(self):
                parameter.requires_grad_(True)
