"""Pocket: the embedded SAM-like network, small enough to ship and to train on two cores.

segment-anything's own prompt encoder, two-way transformer and mask decoder at width 128, behind a
convolutional pyramid instead of a vision transformer: at this size it is four times as fast on a CPU
and learns sooner. Pre-trained on procedurally drawn images only (``weakmedsam.pretraining``), its
weights lie beside this file; it needs no download.

Adaptation: classification trains a copy of the encoder, its features are classified; the embedding that
prompts are answered from comes from the encoder as it was pre-trained. Training the one encoder for
both, the frozen decoder's masks degraded within three epochs, and with them the affinity.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from weakmedsam.backbones.base import Backbone, Encoded
from weakmedsam.backbones.checkpoints import REPLACED, check_fit, read_weights
from weakmedsam.backbones.prompting import decode_points
from weakmedsam.errors import ConfigError

EMBEDDED = Path(__file__).with_name("pocket.safetensors")
WEIGHTS = {"pocket": None}
"""Nothing to download; read by ``weights.declared``."""

_log = logging.getLogger(__name__)

FRAME = 128
"""Side of the frame the network sees, pixels; larger inputs are reduced to it."""

CELLS = 32
"""Side of its feature map."""

EMBED = 128
"""Width of embedding and decoder; SAM's is 256."""

FEATURES = 160
"""Feature channels before the neck."""

ENCODER_STAGES = ((32, 1), (64, 2), (128, 3), (160, 2))
"""(channels, residual blocks) at strides 2, 4, 8, 16 of the frame."""

DETAIL = (EMBED // 4, EMBED // 8)
"""Channels of the detail maps, one (64 x 64) after each step of the decoder's upscaling."""


def _norm(channels: int) -> nn.Module:
    # Group rather than batch statistics: the same numbers for any batch, process count and mode.
    return nn.GroupNorm(8, channels)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y)))


class _Attention(nn.Module):
    """Global self-attention over the coarsest map."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        y = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class _Detail(nn.Module):
    """Borders finer than a cell, for the decoder's upscaling (as the high-resolution maps of SAM 2).

    segment-anything's decoder upscales each cell by itself, so a border within a cell has to be squeezed
    into the cell's 128 channels; with these maps a pixel brings its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(ENCODER_STAGES[0][0], DETAIL[0], 1)
        last_of_fine = nn.Conv2d(DETAIL[1], DETAIL[1], 3, padding=1)
        self.fine = nn.Sequential(nn.Conv2d(1, DETAIL[1], 3, padding=1), nn.ReLU(), last_of_fine)
        for parameter in (*self.coarse.parameters(), *last_of_fine.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, frame: Tensor, finest: Tensor) -> Tensor:
        """Frame (B, 1, 128, 128), map at stride 2 (B, 32, 64, 64) -> (B, 384, 32, 32), folded into cells."""
        return torch.cat([F.pixel_unshuffle(self.coarse(finest), 2), F.pixel_unshuffle(self.fine(frame), 4)], 1)


def split_embedding(embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 512, 32, 32) -> SAM's embedding (B, 128, 32, 32), detail (B, 32, 64, 64) and (B, 16, 128, 128)."""
    cells, half, full = embedding.split([EMBED, 4 * DETAIL[0], 16 * DETAIL[1]], dim=1)
    return cells, F.pixel_shuffle(half, 2), F.pixel_shuffle(full, 4)


class PyramidEncoder(nn.Module):
    """(B, 1, 128, 128) -> features (B, 160, 32, 32), embedding (B, 512, 32, 32).

    Down to stride 16, then the coarse maps are added back onto the 32 x 32 cells, as in a feature
    pyramid network (Lin et al., CVPR 2017). The embedding is SAM's, 128 channels after the neck, and
    384 of detail finer than a cell.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = [c for c, _ in ENCODER_STAGES]
        inputs = [1, *channels[:-1]]
        self.down = nn.ModuleList(
            nn.Conv2d(i, o, 5 if i == 1 else 3, stride=2, padding=2 if i == 1 else 1)
            for i, o in zip(inputs, channels, strict=True)
        )
        self.blocks = nn.ModuleList(nn.Sequential(*(_Residual(c) for _ in range(n))) for c, n in ENCODER_STAGES)
        self.context = _Attention(channels[-1])
        self.lateral = nn.ModuleList(nn.Conv2d(c, FEATURES, 1) for c in channels[1:])
        self.skip = nn.Conv2d(4 * channels[0], FEATURES, 1)
        self.smooth = _Residual(FEATURES)
        self.final = _norm(FEATURES)
        self.neck = nn.Sequential(nn.Conv2d(FEATURES, EMBED, 1, bias=False), nn.GroupNorm(1, EMBED))
        self.detail = _Detail()

    def forward(self, frame: Tensor) -> Encoded:
        """Features before and embedding after the neck."""
        features, finest = self.features(frame)
        return Encoded(features, torch.cat([self.neck(features), self.detail(frame, finest)], dim=1))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the map at stride 2 that the detail is taken from."""
        maps = []
        for down, block in zip(self.down, self.blocks, strict=True):
            x = block(down(x))
            maps.append(x)
        maps[-1] = self.context(maps[-1])
        # The stride-2 map goes in with its four pixels of a cell as channels: its detail is what the
        # decoder draws borders from.
        features = self.skip(F.pixel_unshuffle(maps[0], 2))
        for lateral, coarse in zip(self.lateral, maps[1:], strict=True):
            scale = features.shape[-1] // coarse.shape[-1]
            y = lateral(coarse)
            features = features + (y if scale == 1 else F.interpolate(y, scale_factor=scale, mode="bilinear"))
        return F.relu(self.final(self.smooth(features))), maps[0]


class Pocket(Backbone):
    """The embedded backbone: 3.7 M parameters and an adapted copy of its encoder; 32 x 32 cells.

    Its input is one grey channel in [0, 1], used as (x - 0.5) / 0.25; a frame other than 128 x 128 is
    resized to it (area average when larger), so that every input gives 32 x 32 cells.

    Args:
        image_size: side of the input frame, pixels, 64 to 512.
        weights: ``embedded`` (pre-trained on drawn images), ``none`` (random), or the path of a
            safetensors file of ``python -m weakmedsam.pretraining``.

    Raises:
        ConfigError: an ``image_size`` out of range.
        CheckpointError: a weights file that is missing or of another network.
    """

    name = "pocket"
    feature_dim = FEATURES
    policies = ("published", "head", "none")

    def __init__(self, image_size: int = FRAME, weights: str = "embedded") -> None:
        super().__init__()
        if not 64 <= image_size <= 512:
            raise ConfigError(f"model.backbone.image_size: pocket takes 64 to 512 pixels, got {image_size}")
        self.image_size = image_size
        self.encoder = PyramidEncoder()
        self.adapted = PyramidEncoder()
        self.prompt_encoder = PromptEncoder(
            embed_dim=EMBED,
            image_embedding_size=(CELLS, CELLS),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED, mlp_dim=512, num_heads=8),
            transformer_dim=EMBED,
            iou_head_depth=3,
            iou_head_hidden_dim=EMBED,
        )
        if weights == "none":
            _log.warning("model.backbone.weights is none: %s starts from random numbers", self.name)
        elif weights != REPLACED:
            self._load(EMBEDDED if weights == "embedded" else Path(weights))
        self.adapted.load_state_dict(self.encoder.state_dict())

    def _load(self, path: Path) -> None:
        state = {key: value.float() for key, value in read_weights(path).items()}
        check_fit(self.pretrained_state(), state, str(path), self.name)
        self.load_state_dict(state, strict=False)

    def pretrained_state(self) -> dict[str, Tensor]:
        """What a weights file holds: all but the adapted copy."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("adapted.")}

    def encode(self, image: Tensor) -> Encoded:  # noqa: D102
        frame = self._frame(image)
        # The pre-trained encoder gets no gradient under any policy.
        with torch.no_grad():
            embedding = self.encoder(frame).embedding
        return Encoded(self.adapted.features(frame)[0], embedding)

    def features(self, image: Tensor) -> Tensor:  # noqa: D102
        return self.adapted.features(self._frame(image))[0]

    def embed(self, image: Tensor) -> Tensor:
        """(B, 512, 32, 32) embedding with gradient: what pre-training trains."""
        return self.encoder(self._frame(image)).embedding

    def _frame(self, image: Tensor) -> Tensor:
        """(B, 1, 128, 128), normalised."""
        self.check_frame(image)
        if self.image_size > FRAME:
            image = F.interpolate(image, size=(FRAME, FRAME), mode="bilinear", antialias=True)
        elif self.image_size < FRAME:
            image = F.interpolate(image, size=(FRAME, FRAME), mode="bilinear", align_corners=False)
        return ((image - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)

    def candidates_at_points(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """The three candidate masks of each point and their predicted quality.

        Args:
            embedding: (B, 512, 32, 32).
            points: (P, 2) or (B, P, 2), (x, y) in pixels of the input frame.

        Returns:
            logits (B, P, 3, 128, 128) and predicted IoU (B, P, 3).
        """
        return self._decode(embedding, points, best=False)

    def masks_at_points(self, embedding: Tensor, points: Tensor) -> Tensor:
        """The candidate with the best predicted quality at each point: (B, P, 128, 128) logits."""
        return self.prompted(embedding, points)[0]

    def prompted(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        logits, quality = self._decode(embedding, points, best=True)
        return logits.squeeze(2), quality.squeeze(2)

    def _decode(self, embedding: Tensor, points: Tensor, best: bool) -> tuple[Tensor, Tensor]:
        cells, half, full = split_embedding(embedding)
        # Token 0 is SAM's answer to several prompts at once; it was not trained.
        return decode_points(
            self.prompt_encoder,
            self.mask_decoder,
            cells,
            points,
            detail=(half, full),
            candidates=slice(1, None),
            best=best,
        )

    def set_trainable(self, policy: str) -> None:
        """Freeze by name.

        ``published``: the adapted copy is trained, the pre-trained encoder, prompt encoder and mask
        decoder are frozen (the paper trains SAMUS's adapters, CNN branch and last blocks). ``head``: the
        adapted copy's last layers only, from the coarse maps on; ``none``: nothing.
        """
        self.check_policy(policy)
        self.requires_grad_(False)
        if policy == "published":
            self.adapted.requires_grad_(True)
            for unreached in (self.adapted.neck, self.adapted.detail):  # no classification loss gets there
                unreached.requires_grad_(False)
        if policy == "head":
            for part in (self.adapted.context, self.adapted.lateral, self.adapted.skip, self.adapted.smooth):
                part.requires_grad_(True)
            self.adapted.final.requires_grad_(True)
