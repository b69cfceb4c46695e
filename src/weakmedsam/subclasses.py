"""Sub-class exploration (SCE): k-means splits the positives of each class.

Source: WeakMedSAM (arXiv 2503.04106), sub-class exploration: the classification network also learns
which cluster of its class an image falls into, and so to tell the target from what merely co-occurs
with it. Differs from the published code: clusters are found for every class (published: one), among
training patients only, seeded, and from the features of the network being trained; k-means++ decides
where it starts, and later clusterings start from the clusters of the one before.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from weakmedsam.contracts import DataError

ABSENT = 0
"""Sub-class id of a slice without the class; clusters are 1..K."""


class SubClasses(NamedTuple):
    """The sub-classes of all training slices.

    Attributes:
        ids: (N, C) int64, 0 = class absent, 1..K = cluster.
        centroids: (C, K, D) float32, NaN where a class has fewer than K clusters.
        inertia: (C,) float64, mean squared distance to the own centroid.
        kept: (C,) float64, share of positives whose id is that of the previous clustering; NaN
            without one.
    """

    ids: NDArray[np.int64]
    centroids: NDArray[np.float32]
    inertia: NDArray[np.float64]
    kept: NDArray[np.float64]


def kmeans(
    features: NDArray[np.float32],
    clusters: int,
    seed: int,
    start: NDArray[np.float32] | None = None,
    restarts: int = 5,
    iterations: int = 25,
    gpu: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32], float]:
    """Euclidean k-means with FAISS on every point.

    FAISS's plain random start ended at 2 to 4 times the best inertia on separated blobs; here each
    restart begins at scikit-learn's greedy k-means++ and the best one stays.

    Args:
        features: (n, D), n >= ``clusters``, finite.
        clusters: K.
        seed: of the restarts.
        start: (K, D) centroids to continue from; then there is one start only.
        restarts: k-means++ starts.
        iterations: Lloyd iterations of each.
        gpu: device number for the distance computations, None = CPU.

    Returns:
        Cluster of each point (n,) 0..K-1, centroids (K, D), mean squared distance.
    """
    points = np.ascontiguousarray(features, dtype=np.float32)
    best: tuple[NDArray[np.int64], NDArray[np.float32], float] | None = None
    for restart in range(1 if start is not None else restarts):
        if start is None:
            begin, _ = kmeans_plusplus(points, clusters, random_state=seed + restart)
        else:
            begin = start
        search: faiss.Index = faiss.IndexFlatL2(points.shape[1])
        if gpu is not None:
            search = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, search)
        settings = {"niter": iterations, "seed": seed + restart, "min_points_per_centroid": 1}
        machine = faiss.Kmeans(points.shape[1], clusters, max_points_per_centroid=len(points), **settings)
        # The class would spread over *all* GPUs; every process has one of its own.
        machine.index = search
        machine.train(points, init_centroids=np.ascontiguousarray(begin, dtype=np.float32))
        distance, owner = machine.assign(points)
        assert machine.centroids is not None
        inertia = float(distance.mean())
        if best is None or inertia < best[2]:
            best = owner.astype(np.int64), machine.centroids.copy(), inertia
    assert best is not None
    return best


def explore(
    features: NDArray[np.float32],
    labels: NDArray[np.float32],
    class_names: list[str],
    clusters: int,
    seed: int = 0,
    previous: NDArray[np.int64] | None = None,
    gpu: int | None = None,
) -> SubClasses:
    """Cluster the positives of every class.

    Args:
        features: (N, D), one pooled feature vector a training slice.
        labels: (N, C) in {0, 1}.
        class_names: C names, for messages.
        clusters: K; shrinks, with a warning, for a class with fewer positives.
        seed: of k-means.
        previous: (N, C) ids of the last clustering. The means of its clusters in the *new* features
            are where this one starts: ids keep their meaning even when an epoch has moved all features,
            which the old centroids would not survive.
        gpu: device number, None = CPU.

    Raises:
        DataError: a class has no positive slice; features are not finite.
    """
    if not np.isfinite(features).all():
        raise DataError(
            "the features to cluster contain NaN or infinity: the network has diverged; lower model.learning_rate"
        )
    count = len(class_names)
    ids = np.zeros(labels.shape, np.int64)
    centroids = np.full((count, clusters, features.shape[1]), np.nan, np.float32)
    inertia, kept = np.full(count, np.nan), np.full(count, np.nan)
    for c, name in enumerate(class_names):
        rows = np.flatnonzero(labels[:, c] > 0.5)
        if not len(rows):
            raise DataError(
                f"class {name!r} has no positive training slice: leave it out of data.classes or change the split"
            )
        k = min(clusters, len(rows))
        if k < clusters:
            warnings.warn(
                f"class {name!r} has {len(rows)} positive slices: {k} sub-classes instead of {clusters}",
                stacklevel=2,
            )
        start = None if previous is None else _cluster_means(features[rows], previous[rows, c], k)
        owner, centroids[c, :k], inertia[c] = kmeans(features[rows], k, seed, start, gpu=gpu)
        ids[rows, c] = owner + 1
        if previous is not None:
            kept[c] = (ids[rows, c] == previous[rows, c]).mean()
    return SubClasses(ids, centroids, inertia, kept)


def _cluster_means(
    features: NDArray[np.float32], ids: NDArray[np.int64], clusters: int
) -> NDArray[np.float32] | None:
    """(K, D) means of the clusters 1..K; None if one is empty, so that k-means++ starts anew."""
    members = [features[ids == k + 1] for k in range(clusters)]
    return np.stack([part.mean(axis=0) for part in members]) if all(map(len, members)) else None


def subclass_targets(ids: Tensor, clusters: int) -> Tensor:
    """What the sub-class head learns.

    Args:
        ids: (B, C) int64, 0 = absent, 1..K.
        clusters: K.

    Returns:
        (B, C * K + 1) float32 in {0, 1}: output 0 = no class present, output 1 + c * K + (k - 1) =
        cluster k of class c; a slice with several classes has several ones.
    """
    batch, classes = ids.shape
    chosen = torch.nn.functional.one_hot(ids, clusters + 1)[..., 1:].reshape(batch, classes * clusters)
    none = (ids == ABSENT).all(dim=1, keepdim=True)
    return torch.cat([none, chosen], dim=1).float()
