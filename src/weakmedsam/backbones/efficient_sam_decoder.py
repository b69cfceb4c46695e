"""EfficientSAM's prompt encoder and mask decoder: many point prompts of an image in one call.

Source: EfficientSAM (Xiong et al., arXiv 2312.00863). It is SAM's two-way decoder with other parameter
names, GELU in place of ReLU, one group over all channels in the upscaling, no dense prompts, and always
six prompt tokens: a single point is padded with five "invalid" ones, which are attended to like any
other. What the paper leaves open was settled against ``tests/data/efficient_sam_small.safetensors``.

Differs from the published code: what the prompts of an image share (the image's keys and values in the
first layer) is projected once per image, not once per prompt. The function is the same.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROMPT_TOKENS = 6
"""Prompt tokens of a query, padding included; the official networks are trained with six."""

HEADS = 8
"""Attention heads of the decoder, as in SAM."""

LAYERS = 2
"""Two-way layers of the decoder, as in SAM."""

CANDIDATES = 3
"""Masks of an ambiguous prompt; a fourth token gives SAM's single mask."""


class FourierEncoding(nn.Module):
    """Random Fourier features of positions, SAM's own: sine and cosine of a fixed Gaussian projection.

    Always in float32: under bf16 autocast a point would move by about a pixel of a 512-pixel frame.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, position: Tensor) -> Tensor:
        """(..., 2) as (x, y), 0 to 1 over the frame -> (..., E)."""
        with torch.autocast(position.device.type, enabled=False):
            matrix = self.positional_encoding_gaussian_matrix.float()
            phase = 2 * math.pi * ((2 * position.float() - 1) @ matrix)
            return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PointEncoder(nn.Module):
    """Prompt tokens of single positive points.

    The embeddings of box corners are there because the official checkpoints hold them.

    Args:
        width: E, channels of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pe_layer = FourierEncoding(width)
        self.invalid_points = nn.Embedding(1, width)
        self.point_embeddings = nn.Embedding(1, width)
        self.bbox_top_left_embeddings = nn.Embedding(1, width)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, width)

    def forward(self, position: Tensor, frame: int) -> Tensor:
        """Tokens of P prompts, each one point.

        Args:
            position: (P, 2) as (x, y), 0 to 1 over the frame.
            frame: side of the frame that the encoder sees, pixels; the padding lies at (-1, -1) of it.

        Returns:
            (P, 6, E).
        """
        point = self.pe_layer(position)[:, None] + self.point_embeddings.weight
        # Pixel (-1, -1) has its centre at -0.5; its encoding is part of what the network was trained with.
        outside = self.pe_layer(torch.full_like(position[:1], -0.5 / frame)) + self.invalid_points.weight
        return torch.cat([point, outside.expand(len(point), PROMPT_TOKENS - 1, -1)], dim=1)

    def cells(self, height: int, width: int) -> Tensor:
        """(h * w, E): where each cell lies."""
        device = self.point_embeddings.weight.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        yy, xx = torch.meshgrid(y, x, indexing="ij")
        return self.pe_layer(torch.stack([xx, yy], dim=-1).flatten(0, 1))


class Perceptron(nn.Module):
    """Linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int, out: int, hidden_layers: int) -> None:
        super().__init__()
        widths = [width, *[hidden] * hidden_layers]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(i, o), nn.GELU()) for i, o in itertools.pairwise(widths))
        self.fc = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., out)."""
        for layer in self.layers:
            x = layer(x)
        return self.fc(x)


class PromptAttention(nn.Module):
    """Attention within each prompt of each image, at a reduced inner width.

    Args:
        width: E.
        reduction: E over the inner width; SAM uses 2 between tokens and image.
    """

    def __init__(self, width: int, reduction: int = 1) -> None:
        super().__init__()
        inner = width // reduction
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            q: (B, P, n, E), or (B, 1, n, E) where all prompts ask the same.
            k: (B, P, m, E), or (B, 1, m, E) where all prompts look at the same.
            v: as ``k``.

        Returns:
            (B, P, n, E).
        """
        images, _, tokens, _ = q.shape
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        # A token attends on its own: where keys are shared, all prompts' tokens stand side by side.
        q = q.flatten(1, 2)[:, None] if k.shape[1] == 1 else q.expand(-1, k.shape[1], -1, -1)
        heads = [x.flatten(0, 1).unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v)]
        y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return y.reshape(images, -1, tokens, y.shape[-1])


class TwoWayLayer(nn.Module):
    """Tokens attend to themselves and the image, then the image to the tokens; norms come after."""

    def __init__(self, width: int, hidden: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = PromptAttention(width)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = PromptAttention(width, reduction=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Perceptron(width, hidden, width, hidden_layers=1)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = PromptAttention(width, reduction=2)

    def forward(self, tokens: Tensor, image: Tensor, prompts: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """One exchange.

        Args:
            tokens: (B, P, t, E).
            image: (B, P, h * w, E), or (B, 1, h * w, E) while it is the same for every prompt.
            prompts: (B, P, t, E), the tokens as they were at first: their own position encoding.
            cells: (h * w, E), where each cell lies.

        Returns:
            tokens and image (B, P, h * w, E).
        """
        if not self.first:
            tokens = tokens + prompts  # stays in, other than in SAM, which adds it to query and key only
        tokens = self.norm1(tokens + self.self_attn(tokens, tokens, tokens))
        seen = self.cross_attn_token_to_image(tokens + prompts, image + cells, image)
        tokens = self.norm2(tokens + seen)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image + cells, tokens + prompts, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two-way layers and a last look of the tokens at the image."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(width, hidden, first=i == 0) for i in range(LAYERS))
        self.final_attn_token_to_image = PromptAttention(width, reduction=2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, prompts: Tensor, image: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts (B, P, t, E), image (B, 1, h * w, E) -> tokens (B, P, t, E), image (B, P, h * w, E)."""
        tokens = prompts
        for layer in self.layers:
            tokens, image = layer(tokens, image, prompts, cells)
        seen = self.final_attn_token_to_image(tokens + prompts, image + cells, image)
        return self.norm_final_attn(tokens + seen), image


class PointMaskDecoder(nn.Module):
    """Masks and their predicted quality from prompt tokens.

    Args:
        width: E of embedding and tokens.
        hidden: of the transformer's perceptrons.
        upscaling: channels after each of the two upscaling steps.
        quality_hidden: of the quality head.
    """

    def __init__(self, width: int, hidden: int, upscaling: tuple[int, int], quality_hidden: int) -> None:
        super().__init__()
        coarse, fine = upscaling
        self.transformer = TwoWayTransformer(width, hidden)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(CANDIDATES + 1, width)
        self.final_output_upscaling_layers = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(width, coarse, 2, 2), nn.GroupNorm(1, coarse), nn.GELU()),
                nn.Sequential(nn.ConvTranspose2d(coarse, fine, 2, 2), nn.GELU()),
            ]
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            Perceptron(width, width, fine, hidden_layers=2) for _ in range(CANDIDATES + 1)
        )
        self.iou_prediction_head = Perceptron(width, quality_hidden, CANDIDATES + 1, hidden_layers=2)

    def forward(self, embedding: Tensor, prompts: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Decode the same P prompts for each of B images.

        Args:
            embedding: (B, E, h, w).
            prompts: (P, t, E) of ``PointEncoder``.
            cells: (h * w, E) of ``PointEncoder.cells``.

        Returns:
            Logits (B, P, 4, 4h, 4w) and predicted IoU (B, P, 4); index 0 is the single mask, 1 to 3 the
            candidates of an ambiguous prompt.
        """
        images, _, height, width = embedding.shape
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(prompts), -1, -1), prompts], dim=1).expand(images, -1, -1, -1)
        tokens, image = self.transformer(tokens, embedding.flatten(2).transpose(1, 2)[:, None], cells)
        maps = image.flatten(0, 1).transpose(1, 2).unflatten(2, (height, width))
        for layer in self.final_output_upscaling_layers:
            maps = layer(maps)
        maps = maps.unflatten(0, (images, -1))
        weights = [mlp(tokens[:, :, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        logits = torch.einsum("bptc,bpchw->bpthw", torch.stack(weights, dim=2), maps)
        return logits, self.iou_prediction_head(tokens[:, :, 0])
