"""This project's k-means against scikit-learn's, on the same points in one run.

The points are mixtures of more modes than there are clusters, of unequal weight, which overlap along a
few directions of a large space, as features of a network do: there are many local minima, and no
partition is obvious. Bars: inertia at most 1.01 of the best of ten runs of scikit-learn, time at most that of
one of its runs. FAISS's own initialisation by k-means++ stands beside, in the place of scikit-learn's greedy one.
"""

from __future__ import annotations

import argparse
import json
import time

import faiss
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans as Reference

from weakmedsam.sce.kmeans import KMeans, Points

CLUSTERS, FEATURES, MODES, DIRECTIONS, RUNS = 8, 768, 12, 24, 10


class FaissStart(KMeans):
    """The same clustering, initialised by FAISS's k-means++ (one candidate a centroid)."""

    def _best_start(self, sample: Points, clusters: int, index: faiss.Index) -> Points:
        machine = faiss.Kmeans(
            sample.shape[1], clusters, niter=self.iterations, nredo=self.restarts, seed=self.seed + 1,
            min_points_per_centroid=1, max_points_per_centroid=len(sample),
            init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        )  # fmt: skip
        machine.index = index
        machine.train(sample)
        assert machine.centroids is not None
        return machine.centroids


def draw(points: int, seed: int, overlap: float) -> NDArray[np.float32]:
    """(n, 768) float32: modes along 24 directions, spread along the same ones, and noise in all.

    Args:
        points: n.
        seed: of everything random.
        overlap: deviation within a mode along the first direction, in units of the modes' own.
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(FEATURES, DIRECTIONS)))[0].T.astype(np.float32)
    modes = rng.normal(size=(MODES, DIRECTIONS)).astype(np.float32)
    owner = rng.choice(MODES, points, p=rng.dirichlet(np.full(MODES, 3.0)))
    falling = (overlap / np.sqrt(np.arange(1, DIRECTIONS + 1))).astype(np.float32)
    inside = rng.standard_normal((points, DIRECTIONS), dtype=np.float32) * falling
    found = rng.standard_normal((points, FEATURES), dtype=np.float32)
    found *= 2 / np.sqrt(FEATURES)
    found += (modes[owner] + inside) @ basis
    return found


def compare(points: NDArray[np.float32], seed: int) -> tuple[float, float, float, float, float]:
    """Inertia of ours, of FAISS's start (worst of three seeds), best of ten; seconds of ours, of one run (median)."""
    theirs = max(FaissStart(seed=seed + other).fit(points, CLUSTERS).inertia for other in range(3))
    begin = time.perf_counter()
    ours = KMeans(seed=seed).fit(points, CLUSTERS)
    seconds = time.perf_counter() - begin
    inertias, times = [], []
    for run in range(RUNS):
        begin = time.perf_counter()
        reference = Reference(CLUSTERS, n_init=1, random_state=run).fit(points)
        times.append(time.perf_counter() - begin)
        inertias.append(float(reference.inertia_) / len(points))
    return ours.inertia, theirs, min(inertias), seconds, float(np.median(times))


def main() -> None:
    """Measure, print a table and one line of JSON: the worst ratios of all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="up to 500,000 points: 1.5 GB, many minutes")
    full = parser.parse_args().full
    table = Table(
        "points", "overlap", "inertia", "/ best", "FAISS / best", "s", "/ one run",
        title=f"k-means, {FEATURES} features, {CLUSTERS} clusters, against scikit-learn",
    )  # fmt: skip
    inertia, seconds = 0.0, 0.0
    for number, (count, overlap) in enumerate(
        (count, overlap) for count in ((50_000, 200_000, 500_000) if full else (50_000,)) for overlap in (0.5, 1.0)
    ):
        ours, theirs, best, spent, single = compare(draw(count, number, overlap), number)
        inertia, seconds = max(inertia, ours / best), max(seconds, spent / single)
        figures = (ours, ours / best, theirs / best, spent, spent / single)
        table.add_row(f"{count:,}", f"{overlap}", *(f"{figure:.4g}" for figure in figures))
    Console().print(table)
    print(json.dumps({"kmeans_inertia_ratio": inertia, "kmeans_time_ratio": seconds}))


if __name__ == "__main__":
    main()
