"""The one contract between a SAM-like network and everything that sits on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from weakmedsam.errors import ConfigError


class Encoded(NamedTuple):
    """What a backbone's image encoder gives.

    Attributes:
        features: (B, D, h, w), before SAM's neck: what is classified and clustered.
        embedding: (B, E, h', w'), after the neck: what the mask decoder is prompted on.
    """

    features: Tensor
    embedding: Tensor


class Backbone(nn.Module, ABC):
    """A SAM-like network.

    Heads, SCE and PAM see nothing of a backbone but this.

    Attributes:
        name: the name in ``experiments/backbone/<name>.yaml``.
        image_size: side of the square input frame, pixels; points are given in it.
        feature_dim: channels of the features, D.
    """

    name: str
    image_size: int
    feature_dim: int

    @abstractmethod
    def encode(self, image: Tensor) -> Encoded:
        """Encode each image once.

        Args:
            image: (B, 1, H, W) float in [0, 1], H = W = ``image_size``. The network's own intensity
                normalisation and channel rule are applied inside.

        Raises:
            ConfigError: another input size.
        """

    def features(self, image: Tensor) -> Tensor:
        """``encode(image).features``, for those who need no embedding; a network may save its cost."""
        return self.encode(image).features

    def embed(self, image: Tensor) -> Tensor:
        """``encode(image).embedding``, for those who classify something else; may save the features' cost."""
        return self.encode(image).embedding

    @abstractmethod
    def masks_at_points(self, embedding: Tensor, points: Tensor) -> Tensor:
        """Ask the mask decoder for one mask at each of P points, as often as wanted.

        Args:
            embedding: (B, E, h', w') of ``encode``.
            points: (P, 2) float, the same for every image, or (B, P, 2); (x, y) in pixels of the input
                frame; each is one positive prompt.

        Returns:
            (B, P, h'', w'') mask logits, 0 = the border.
        """

    def prompted(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """``masks_at_points``, and how good the network itself takes each mask to be.

        Args:
            embedding: as there.
            points: as there.

        Returns:
            (B, P, h'', w'') mask logits and (B, P) predicted IoU, 1 = perfect.

        Raises:
            ConfigError: the network predicts no quality (as it is here).
        """
        raise ConfigError(
            f"model.pam: {self.name} predicts no quality of its masks; set min_quality to 0 and "
            "weigh_by_quality to false"
        )

    @abstractmethod
    def set_trainable(self, policy: str) -> None:
        """Freeze and unfreeze parameters by the name of a policy.

        Raises:
            ConfigError: an unknown policy; the message lists the known ones.
        """
