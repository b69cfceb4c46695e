"""ResNet-18 of ImageNet as a fixed extractor: the features that the published code clusters.

Source: WeakMedSAM's published setting (arXiv 2503.04106): k-means once, before training, on the pooled
features of torchvision's ResNet-18. Grey slices are repeated to three channels and normalised with
ImageNet's mean and deviation, which its weights expect.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from weakmedsam.backbones.checkpoints import check_fit, read_source
from weakmedsam.errors import ConfigError

WEIGHTS = {
    "resnet18": {
        "url": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        "size": 46_830_571,
        "sha256": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
        "licence": "BSD-3-Clause (torchvision's code); ImageNet has terms of its own",
    }
}
"""Official weights, read by ``weights.declared``."""

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images, red, green, blue, in [0, 1]."""

_log = logging.getLogger(__name__)


class ResNet18(nn.Module):
    """Slices (B, 1, H, W) in [0, 1] -> (B, 512) features, averaged over the image; nothing is trained.

    Args:
        weights: ``official`` (torchvision's, in the cache or downloaded), ``none`` (random, for
            tests), or the path of a file with the same keys.

    Raises:
        CheckpointError: the weights cannot be had, or are of another network.
        ConfigError: no weights are named.
    """

    feature_dim = 512

    def __init__(self, weights: str = "official") -> None:
        super().__init__()
        if not weights:
            raise ConfigError("model.sce.weights is empty; set official, none, or the path of a file")
        network = resnet18()
        if weights == "none":
            _log.warning("model.sce.weights is none: ResNet-18 starts from random numbers")
        else:
            official = "resnet18" if weights == "official" else None
            state, source = read_source(weights, official, "model.sce.weights")
            # Files of before batch norm counted its batches lack these; nothing reads them here.
            own = network.state_dict()
            state = {key: own[key] for key in own if key.endswith("num_batches_tracked")} | state
            check_fit(own, state, source, "ResNet-18", key="model.sce.weights")
            network.load_state_dict(state)
        network.fc = nn.Identity()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        """Features of (B, 1, H, W) slices."""
        normal = (image.expand(-1, 3, -1, -1) - self.mean) / self.deviation  # type: ignore[operator]
        features: Tensor = self.network(normal)
        return features
