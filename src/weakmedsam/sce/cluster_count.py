"""How many clusters there are: prediction strength (Tibshirani and Walther, J. Comput. Graph. Stat. 2005).

The points are halved at random and both halves clustered. If the clusters are there, the centroids of one
half also keep together what the other half's clusters hold together. Prediction strength of k is the
share of such pairs in the cluster where it is smallest; the number of clusters is the largest k for which
it stays high. One cluster is an answer too.

Differs from the paper: features are first reduced to their leading principal components, because
in hundreds of dimensions a few hundred points are too few to cluster a half of them twice alike.
``docs/sce.md`` compares it with silhouette, BIC and the gap statistic.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from weakmedsam.sce.kmeans import KMeans, Points


def choose_number(
    features: Points,
    rows: NDArray[np.int64],
    most: int,
    kmeans: KMeans,
    cutoff: float = 0.8,
    halvings: int = 5,
    points: int = 2000,
    components: int = 16,
) -> int:
    """The largest number of clusters that is found again.

    Args:
        features: (N, D).
        rows: the n rows to cluster.
        most: largest answer, at least 1.
        kmeans: seed, and whether directions are clustered.
        cutoff: least prediction strength, its standard error over the halvings added; the paper advises
            0.8 to 0.9; 0.8 found more true numbers (docs/sce.md).
        halvings: random halvings that are averaged.
        points: rows that are looked at, drawn at random from more; bounds the cost.
        components: principal components that are kept.

    Returns:
        1 to ``most``; never more than half of the rows.
    """
    rng = np.random.default_rng(kmeans.seed)
    if len(rows) > points:
        rows = np.sort(rng.choice(rows, points, replace=False))
    most = min(most, len(rows) // 2)
    if most < 2:
        return 1
    reduced = _reduce(features[rows], components, kmeans)
    # A sphere's directions, projected, no longer have unit length.
    plain = replace(kmeans, spherical=False, gpu=None)
    strengths = np.ones((halvings, most))
    for halving in range(halvings):
        order = rng.permutation(len(reduced))
        halves = reduced[order[: len(order) // 2]], reduced[order[len(order) // 2 :]]
        for k in range(2, most + 1):
            strengths[halving, k - 1] = prediction_strength(*halves, k, plain)
    error = strengths.std(axis=0, ddof=1) / np.sqrt(halvings) if halvings > 1 else 0.0
    return int(np.flatnonzero(strengths.mean(axis=0) + error >= cutoff).max()) + 1


def prediction_strength(train: Points, test: Points, clusters: int, kmeans: KMeans) -> float:
    """Share of a test cluster's pairs that the training clusters keep together; the least of all clusters.

    Args:
        train: (n, D) one half.
        test: (m, D) the other half.
        clusters: k, at most n and m.
        kmeans: settings; Euclidean.

    Returns:
        In [0, 1]; a cluster of one point has no pair and counts as 0 (it was found in one half only).
    """
    centroids = kmeans.fit(train, clusters).centroids
    own = kmeans.fit(test, clusters).owner
    given = ((centroids**2).sum(axis=1) - 2 * test @ centroids.T).argmin(axis=1)
    table = np.zeros((clusters, clusters))
    np.add.at(table, (own, given), 1)
    size = table.sum(axis=1)
    together = (table * (table - 1)).sum(axis=1)
    return float((together / np.maximum(size * (size - 1), 1)).min())


def _reduce(points: Points, components: int, kmeans: KMeans) -> Points:
    """(n, D) -> (n, at most ``components``)."""
    points = kmeans.place(points)
    kept = min(components, *points.shape)
    if kept == points.shape[1]:
        return points
    from sklearn.decomposition import PCA  # as in kmeans.py

    pca = PCA(kept, svd_solver="full" if max(points.shape) <= 500 else "randomized", random_state=kmeans.seed)
    return np.ascontiguousarray(pca.fit_transform(points), dtype=np.float32)
