"""Sub-class exploration (SCE): k-means splits the positives of each class.

Source: WeakMedSAM (arXiv 2503.04106), sub-class exploration: the classification network also learns
which cluster of its class an image falls into, and so to tell the target from what merely co-occurs
with it. Differs from the published code: clusters are found for every class (published: one), among
training patients only, seeded, and from the features of the network being trained; later clusterings start
from the clusters of the one before, and their ids are matched to it; the number of clusters can be
chosen from the features.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weakmedsam.errors import DataError
from weakmedsam.sce.cluster_count import choose_number
from weakmedsam.sce.kmeans import Clusters, KMeans, Points, member_means

ABSENT = 0
"""Sub-class id of a slice without the class; clusters are 1..K."""


class SubClasses(NamedTuple):
    """The sub-classes of all training slices.

    Attributes:
        ids: (N, C) int64, 0 = class absent, 1..K = cluster.
        counts: (C,) int64, clusters of each class, at most K.
        distance: (N, C) float32, squared distance to the own centroid, NaN = class absent.
        centroids: (C, K, D) float32, NaN where a class has fewer than K clusters.
        inertia: (C,) float64, mean squared distance to the own centroid.
        kept: (C,) float64, share of positives whose id is that of the previous clustering; NaN
            without one.
        case_information: (C,) float64, adjusted mutual information of id and case over the positives; NaN where
            the cases are not known.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    distance: NDArray[np.float32]
    centroids: Points
    inertia: NDArray[np.float64]
    kept: NDArray[np.float64]
    case_information: NDArray[np.float64]


def explore(
    features: Points,
    labels: NDArray[np.float32],
    class_names: list[str],
    clusters: int,
    kmeans: KMeans | None = None,
    previous: NDArray[np.int64] | None = None,
    counts: NDArray[np.int64] | None = None,
    automatic: bool = False,
    cases: NDArray[np.int64] | None = None,
) -> SubClasses:
    """Cluster the positives of every class.

    Args:
        features: (N, D), one pooled feature vector a training slice.
        labels: (N, C) in {0, 1}; a slice may have several classes and is then clustered in each.
        class_names: C names, for messages.
        clusters: K; shrinks, with a warning, for a class with fewer positives.
        kmeans: settings of the clustering; None takes the defaults.
        previous: (N, C) ids of the last clustering. The means of its clusters in the *new* features
            are where this one starts, and its ids are given to the clusters that share most members with
            its own: ids keep their meaning even when an epoch has moved all features, which the old
            centroids would not survive.
        counts: (C,) how many clusters each class was found to have, at most K; None or 0 where that is
            still open.
        automatic: choose the number of clusters where it is open, at most K (``choose_number``);
            otherwise it is K.
        cases: (N,) number of each slice's case, for ``case_information``.

    Raises:
        DataError: a class has no positive slice; features are not finite.
    """
    kmeans = KMeans() if kmeans is None else kmeans
    if not np.isfinite(features.sum(axis=1)).all():
        raise DataError(
            "the features to cluster contain NaN or infinity: the network has diverged; lower model.learning_rate"
        )
    classes = len(class_names)
    found = SubClasses(
        ids=np.zeros(labels.shape, np.int64),
        counts=np.zeros(classes, np.int64),
        distance=np.full(labels.shape, np.nan, np.float32),
        centroids=np.full((classes, clusters, features.shape[1]), np.nan, np.float32),
        inertia=np.full(classes, np.nan),
        kept=np.full(classes, np.nan),
        case_information=np.full(classes, np.nan),
    )
    for c, name in enumerate(class_names):
        rows = _positives(labels[:, c], name)
        k = int(counts[c]) if counts is not None else 0
        if not k:
            k = choose_number(features, rows, clusters, kmeans) if automatic else clusters
        k = _at_most(k, len(rows), name)
        old = None if previous is None else previous[rows, c]
        parts, ids = _cluster(features, rows, k, kmeans, old)
        found.ids[rows, c], found.counts[c] = ids[parts.owner], k
        found.distance[rows, c], found.inertia[c] = parts.distance, parts.inertia
        found.centroids[c, ids - 1] = parts.centroids
        if old is not None:
            found.kept[c] = (found.ids[rows, c] == old).mean()
        if cases is not None:
            from sklearn.metrics import adjusted_mutual_info_score  # as in kmeans.py

            found.case_information[c] = adjusted_mutual_info_score(cases[rows], found.ids[rows, c])
    return found


def _positives(label: NDArray[np.float32], name: str) -> NDArray[np.int64]:
    rows = np.flatnonzero(label > 0.5)
    if not len(rows):
        raise DataError(
            f"class {name!r} has no positive training slice: leave it out of data.classes or change the split"
        )
    return rows


def _at_most(clusters: int, positives: int, name: str) -> int:
    if positives < clusters:
        warnings.warn(
            f"class {name!r} has {positives} positive slices: {positives} sub-classes instead of {clusters}",
            stacklevel=3,
        )
    return min(clusters, positives)


def _cluster(
    features: Points,
    rows: NDArray[np.int64],
    clusters: int,
    kmeans: KMeans,
    old: NDArray[np.int64] | None,
) -> tuple[Clusters, NDArray[np.int64]]:
    """One class's clusters, and the (K,) id 1..K of each."""
    if old is None:
        return kmeans.fit(features, clusters, rows), np.arange(1, clusters + 1)
    start = member_means(features, rows, old - 1, clusters, kmeans.chunk)
    # With an empty cluster there is nothing to start from: k-means++ begins anew.
    parts = kmeans.fit(features, clusters, rows, start)
    return parts, match_ids(parts.owner, old, clusters)


def match_ids(owner: NDArray[np.int64], previous: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    """Ids for new clusters, so that as many points as possible keep theirs (Kuhn 1955).

    Args:
        owner: (n,) new cluster of each point, 0..K-1.
        previous: (n,) ids of before, 1..K; others belong to none.
        clusters: K.

    Returns:
        (K,) the id 1..K of each new cluster; every id once.
    """
    known = (previous >= 1) & (previous <= clusters)
    shared = np.zeros((clusters, clusters))
    np.add.at(shared, (owner[known], previous[known] - 1), 1)
    return linear_sum_assignment(shared, maximize=True)[1].astype(np.int64) + 1


def nearest_members(found: SubClasses, class_index: int, most: int) -> list[NDArray[np.int64]]:
    """The slices nearest to the centroid of each of a class's clusters, nearest first.

    Args:
        found: of ``explore``.
        class_index: which class.
        most: slices a cluster.

    Returns:
        One array of at most ``most`` rows a cluster; ties are in the order of the rows.
    """
    chosen = []
    for k in range(1, int(found.counts[class_index]) + 1):
        members = np.flatnonzero(found.ids[:, class_index] == k)
        order = np.argsort(found.distance[members, class_index], kind="stable")
        chosen.append(members[order[:most]])
    return chosen


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


def subclass_loss(logits: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """Binary cross-entropy of the sub-class head, over the outputs that stand for a cluster.

    Args:
        logits: (B, C * K + 1), as in ``subclass_targets``.
        ids: (B, C) int64, 0 = absent, 1..K.
        counts: (C,) int64, clusters of each class; outputs beyond take no part. 0 = not known: all K do.

    Returns:
        A scalar, the mean over slices and outputs in use.
    """
    classes = len(counts)
    clusters = (logits.shape[1] - 1) // classes
    loss = F.binary_cross_entropy_with_logits(logits, subclass_targets(ids, clusters), reduction="none")
    number = torch.arange(clusters, device=counts.device)
    used = (number < torch.where(counts > 0, counts, clusters)[:, None]).flatten()
    weight = torch.cat([used.new_ones(1), used]).float()
    return (loss.mean(dim=0) * weight).sum() / weight.sum()
