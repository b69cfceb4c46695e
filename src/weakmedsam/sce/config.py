"""Settings of SCE: one frozen dataclass per concept, each with its range and its source; no torch is loaded.

YAML nests in the same way: ``sce: {sub_classes: {number: 4}, kmeans: {restarts: 20}}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weakmedsam.errors import LARGEST_WEIGHT, ConfigError, check_range


@dataclass(frozen=True)
class SubClassTask:
    """The auxiliary task of the classification network: how many sub-classes there are, and what their loss weighs.

    Attributes:
        number: K, clusters a class, 1 to 1,000; paper: 8. ``auto`` chooses it for each class at the first clustering,
            from its features, and keeps it.
        maximum: largest K that ``auto`` can choose, 1 to 1,000: the head has so many outputs a class; no effect with a
            ``number``; paper: -.
        weight: of the sub-class loss, 0 to 1,000,000; paper: 0.5.

    Raises:
        ConfigError: a value out of its range.
    """

    number: int | Literal["auto"] = 8
    maximum: int = 8
    weight: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.number, str) and self.number != "auto":
            raise ConfigError(f"model.sce.sub_classes.number is {self.number!r}; it must be a whole number or auto")
        check_range("model.sce.sub_classes.maximum", self.maximum, 1, 1000)
        check_range("model.sce.sub_classes.number", self.most, 1, 1000)  # model.sce: null trains without any
        check_range("model.sce.sub_classes.weight", self.weight, 0, LARGEST_WEIGHT)

    @property
    def automatic(self) -> bool:
        """Whether the number is chosen from the features."""
        return self.number == "auto"

    @property
    def most(self) -> int:
        """K, the outputs of the sub-class head for each class."""
        return self.maximum if isinstance(self.number, str) else self.number


@dataclass(frozen=True)
class Clustering:
    """How k-means starts, and what it measures.

    Attributes:
        seed: of sample and initialisations, 0 to 4,294,967,295: the same seed gives the same clusters.
        spherical: points and centroids have unit length, so that directions are clustered (Dhillon and Modha 2001);
            otherwise Euclidean.
        restarts: initialisations by k-means++ of a clustering that does not continue another, 1 to 10,000; the lowest
            inertia is kept.
        points_per_centroid: points of the random sample that they are made on, for each cluster, 1 to 1,000,000; FAISS
            has the same number as its default.

    Raises:
        ConfigError: a number out of its range.
    """

    seed: int = 0
    spherical: bool = False
    restarts: int = 10
    points_per_centroid: int = 256

    def __post_init__(self) -> None:
        check_range("model.sce.kmeans.seed", self.seed, 0, 2**32 - 1)
        check_range("model.sce.kmeans.restarts", self.restarts, 1, 10_000)
        check_range("model.sce.kmeans.points_per_centroid", self.points_per_centroid, 1, 1_000_000)
