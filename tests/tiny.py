"""A tiny real backbone and data for tests of the training loop: seconds, not minutes."""

from pathlib import Path

import torch
from data_settings import data_settings
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import nn

from data_modules.phantom import Phantom
from data_modules.phantom_drawing import PhantomParameters
from weakmedsam.backbones.base import Backbone, Encoded
from weakmedsam.backbones.prompting import decode_points

SIZE = 32


class TinyBackbone(Backbone):
    """segment-anything's decoder at width 16 behind two convolutions: (B, 1, 32, 32) -> 8 x 8 cells."""

    name = "tiny"
    feature_dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.image_size = SIZE
        self.encodings = 0
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(16, 16, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 1, 1),
        )
        self.neck = nn.Conv2d(16, 16, 1)
        self.prompt_encoder = PromptEncoder(16, (8, 8), (SIZE, SIZE), 4)
        transformer = TwoWayTransformer(depth=1, embedding_dim=16, mlp_dim=16, num_heads=2)
        self.mask_decoder = MaskDecoder(transformer_dim=16, transformer=transformer, iou_head_hidden_dim=16)

    def encode(self, image):
        self.encodings += len(image)
        features = self.encoder(image * 2 - 1).relu()
        return Encoded(features, self.neck(features))

    def masks_at_points(self, embedding, points):
        masks, _ = decode_points(self.prompt_encoder, self.mask_decoder, embedding, points, candidates=slice(0, 1))
        return masks.squeeze(2)

    def set_trainable(self, policy: str) -> None:
        self.requires_grad_(False)
        self.encoder.requires_grad_(policy == "published")


def tiny_phantom(folder: Path, **changes) -> Phantom:
    """Six drawn volumes of 12 slices at 32 pixels; further arguments are the data module's, see ``data_settings``."""
    settings = {
        "num_volumes": 6,
        "phantom": PhantomParameters(slices=12, size=48),
        "image_size": SIZE,
        "split__fractions": (0.5, 0.25, 0.25),
        "batch_size": 8,
        "num_workers": 0,
        "prepare__workers": 1,
        "slices__min_pixels": 3,
        **changes,
    }
    return Phantom(
        data_dir=str(folder / "scans"),
        **data_settings(prepare__store_dir=str(folder / "store"), **settings),
    )


def same_state(a: dict, b: dict) -> bool:
    """Two state dictionaries are equal, bit for bit; NaN equals NaN."""
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(-9), b[k].nan_to_num(-9)) for k in a)
