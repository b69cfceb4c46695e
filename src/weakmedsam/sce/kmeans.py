"""k-means on many points in bounded memory: initialisations on a sample, then a few passes over all points.

FAISS measures the distances, on the CPU or on one GPU; scikit-learn's greedy k-means++ (Arthur and
Vassilvitskii 2007) initialises the centroids. FAISS's own initialisations end at a higher inertia
(docs/negative_results.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from weakmedsam.errors import check_range
from weakmedsam.sce.config import Clustering

Points: TypeAlias = NDArray[np.float32]

TEMPORARY = 64 * 2**20
"""Bytes of a GPU that FAISS sets aside while it clusters: more than a chunk needs. Its default is 1.5 GB, beside a
network that may fill the card."""


@contextmanager
def lone_thread() -> Iterator[None]:
    """FAISS works in the calling thread alone.

    Its threads spin for a while after each call, on the processors that NumPy's BLAS needs at that moment: with two
    of each, a clustering took two to three times as long as with one.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


class Clusters(NamedTuple):
    """What k-means found.

    Attributes:
        owner: (n,) int64, cluster 0..K-1 of each point.
        distance: (n,) float32, squared distance to the own centroid.
        centroids: (K, D) float32.
    """

    owner: NDArray[np.int64]
    distance: NDArray[np.float32]
    centroids: Points

    @property
    def inertia(self) -> float:
        """Mean squared distance to the own centroid."""
        return float(self.distance.mean(dtype=np.float64))


@dataclass(frozen=True)
class KMeans(Clustering):
    """Settings of k-means, beside those of ``Clustering``; ``fit`` runs it.

    Attributes:
        iterations: Lloyd iterations of each start.
        passes: most Lloyd iterations over all points, from the best start.
        tolerance: passes end when the inertia falls by less than this share of it.
        chunk: points looked at at once in a pass; bounds memory.
        gpu: number of the device that measures distances, None = CPU.

    Raises:
        ConfigError: a number out of its range.
    """

    iterations: int = 25
    passes: int = 20
    tolerance: float = 1e-4
    chunk: int = 16384
    gpu: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("iterations", self.iterations, 1, 10_000)
        check_range("passes", self.passes, 1, 10_000)
        check_range("tolerance", self.tolerance, 0, 1)
        check_range("chunk", self.chunk, 1, 1_000_000)

    def on(self, gpu: int | None) -> KMeans:
        """The same settings on another device."""
        return replace(self, gpu=gpu)

    @lone_thread()
    def fit(
        self,
        features: Points,
        clusters: int,
        rows: NDArray[np.int64] | None = None,
        start: Points | None = None,
    ) -> Clusters:
        """Cluster the chosen rows.

        Args:
            features: (N, D), finite.
            clusters: K, at most n.
            rows: the n rows to cluster; None takes all. They are copied a chunk at a time.
            start: (K, D) centroids to continue from: then there are passes only. A cluster that loses
                all its members on the way makes it begin anew.

        Returns:
            Clusters of the n rows, in their order.
        """
        rows = np.arange(len(features)) if rows is None else rows
        sample = self._sample(features, rows, clusters)
        # FAISS expands the square of a difference: far from 0 the digits that count would be lost.
        shift = np.zeros(features.shape[1], np.float32) if self.spherical else sample.mean(axis=0)

        def chunks() -> Iterator[Points]:
            for begin in range(0, len(rows), self.chunk):
                points = self.place(features[rows[begin : begin + self.chunk]])
                points -= shift
                yield points

        index = self._index(features.shape[1])
        if start is not None:
            found = self._refine(chunks, self.place(start.copy()) - shift, index)
            if len(np.unique(found.owner)) < clusters:
                start = None
        if start is None:
            found = self._refine(chunks, self._best_start(sample - shift, clusters, index), index)
        return found._replace(centroids=found.centroids + shift)

    def place(self, points: Points) -> Points:
        """Points as they are clustered, in their own memory: of unit length where directions count."""
        points = np.ascontiguousarray(points, dtype=np.float32)
        if self.spherical:
            length = np.linalg.norm(points, axis=1, keepdims=True)
            points /= np.maximum(length, np.finfo(np.float32).tiny)
        return points

    def _sample(self, features: Points, rows: NDArray[np.int64], clusters: int) -> Points:
        wanted = clusters * self.points_per_centroid
        if len(rows) > wanted:
            chosen = np.random.default_rng(self.seed).choice(len(rows), wanted, replace=False)
            rows = rows[np.sort(chosen)]
        return self.place(features[rows])

    def _index(self, dimension: int) -> faiss.Index:
        """Measures all distances of a ``fit``: on a GPU, making one costs more than using it."""
        index = faiss.IndexFlatL2(dimension)
        if self.gpu is None:
            return index
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(TEMPORARY)
        # FAISS's own switch would spread over *all* GPUs; every process has one of its own.
        return faiss.index_cpu_to_gpu(resources, self.gpu, index)

    def _best_start(self, sample: Points, clusters: int, index: faiss.Index) -> Points:
        """(K, D) centroids of the start that ends with the least inertia on the sample."""
        from sklearn.cluster import kmeans_plusplus  # here: a second to import, and only SCE needs it

        best, least = sample[:clusters], np.inf
        doubled = sample.astype(np.float64)  # scikit-learn would turn it anew at each of its steps
        for restart in range(self.restarts):
            begin, _ = kmeans_plusplus(doubled, clusters, random_state=self.seed + restart)
            machine = faiss.Kmeans(
                sample.shape[1], clusters, niter=self.iterations, seed=self.seed + restart,
                spherical=self.spherical, min_points_per_centroid=1, max_points_per_centroid=len(sample),
            )  # fmt: skip
            machine.index = index
            machine.train(sample, init_centroids=np.ascontiguousarray(begin, dtype=np.float32))
            inertia = float(machine.assign(sample)[0].mean())
            if inertia < least:
                assert machine.centroids is not None
                best, least = machine.centroids.copy(), inertia
        return best

    def _refine(self, chunks: Callable[[], Iterator[Points]], centroids: Points, index: faiss.Index) -> Clusters:
        """Lloyd's iterations over all points, a chunk at a time."""
        before: Clusters | None = None
        for _ in range(self.passes):
            found, means = self._pass(chunks, centroids, index)
            settled = before is not None and found.inertia > (1 - self.tolerance) * before.inertia
            if settled or (before is not None and (found.owner == before.owner).all()):
                return found
            before, centroids = found, means
        return self._pass(chunks, centroids, index)[0]

    def _pass(
        self, chunks: Callable[[], Iterator[Points]], centroids: Points, index: faiss.Index
    ) -> tuple[Clusters, Points]:
        """Give every point to its nearest centroid; also the means of the new clusters."""
        index.reset()
        index.add(centroids)
        sums, counts = np.zeros(centroids.shape), np.zeros(len(centroids))
        numbers = np.arange(len(centroids))[:, None]
        owners, distances = [], []
        for points in chunks():
            distance, owner = index.search(points, 1)
            members = (owner[:, 0] == numbers).astype(np.float32)
            sums += members @ points
            counts += members.sum(axis=1)
            owners.append(owner[:, 0])
            distances.append(distance[:, 0])
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
        found = Clusters(np.concatenate(owners), np.concatenate(distances), centroids)
        return found, self.place(means.astype(np.float32))


def member_means(
    features: Points, rows: NDArray[np.int64], owner: NDArray[np.int64], clusters: int, chunk: int = 16384
) -> Points | None:
    """(K, D) means of the members of clusters 0..K-1; None if a cluster has none.

    Args:
        features: (N, D).
        rows: the n rows that are members.
        owner: (n,) cluster of each of them.
        clusters: K.
        chunk: rows looked at at once; bounds memory.
    """
    sums, counts = np.zeros((clusters, features.shape[1])), np.zeros(clusters)
    for begin in range(0, len(rows), chunk):
        members = (owner[begin : begin + chunk] == np.arange(clusters)[:, None]).astype(np.float32)
        sums += members @ features[rows[begin : begin + chunk]]
        counts += members.sum(axis=1)
    return (sums / counts[:, None]).astype(np.float32) if counts.all() else None
