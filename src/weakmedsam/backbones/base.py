"""The interface of every backbone, a SAM-like network."""

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
    """A SAM-like network; heads, SCE and PAM use a backbone through this class only.

    Attributes:
        name: the name in ``experiments/backbone/<name>.yaml``.
        image_size: side of the square input frame, pixels; points are given in it.
        feature_dim: channels of the features, D.
        policies: names that ``set_trainable`` takes.
    """

    name: str
    image_size: int
    feature_dim: int
    policies: tuple[str, ...]

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
        """``encode(image).features``; a network may override it to skip the neck."""
        return self.encode(image).features

    def embed(self, image: Tensor) -> Tensor:
        """``encode(image).embedding``; a network may override it to skip what only the features need."""
        return self.encode(image).embedding

    @abstractmethod
    def masks_at_points(self, embedding: Tensor, points: Tensor) -> Tensor:
        """Decode one mask for each of P points; the embedding can be reused for further points.

        Args:
            embedding: (B, E, h', w') of ``encode``.
            points: (P, 2) float, the same for every image, or (B, P, 2); (x, y) in pixels of the input
                frame; each is one positive prompt.

        Returns:
            (B, P, h'', w'') mask logits, 0 = the border.
        """

    def prompted(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """``masks_at_points`` with the predicted quality of each mask.

        Args:
            embedding: as in ``masks_at_points``.
            points: as in ``masks_at_points``.

        Returns:
            (B, P, h'', w'') mask logits and (B, P) predicted IoU, 1 = perfect.

        Raises:
            ConfigError: the network predicts no quality (the default).
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

    def check_policy(self, policy: str) -> None:
        """See that a policy is one of ``policies``.

        Raises:
            ConfigError: it is not; the message lists them.
        """
        if policy not in self.policies:
            raise ConfigError(f"model.trainable: {policy!r} is unknown; {self.name} knows {', '.join(self.policies)}")

    def check_frame(self, image: Tensor, channels: tuple[int, ...] = (1,)) -> None:
        """See that an image has the shape that the network was built for.

        Raises:
            ConfigError: it is not (B, C, ``image_size``, ``image_size``), C one of ``channels``.
        """
        if image.shape[1:] not in [(c, self.image_size, self.image_size) for c in channels]:
            raise ConfigError(
                f"model.backbone.image_size is {self.image_size}, but an image of shape {tuple(image.shape)} came in: "
                "set data.image_size and model.backbone.image_size to the same value"
            )
