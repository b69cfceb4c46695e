"""How often each criterion finds the number of clusters, 1 to 6, on points whose number is known.

Silhouette (Rousseeuw 1987), BIC of spherical Gaussians (Pelleg and Moore 2000), gap statistic (Tibshirani,
Walther and Hastie 2001) and prediction strength (Tibshirani and Walther 2005), each on all features and
on the leading principal components. The points are Gaussian, round or elongated, in 64 or 256 dimensions;
at the true number k-means finds the modes in all of them, so that only the number is asked for. With
``--phantom`` the number of lesion appearances on the phantom is asked for too.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, silhouette_score

from benchmarks._phantom_modes import features_of_modes
from weakmedsam.sce.cluster_count import choose_number
from weakmedsam.sce.kmeans import Clusters, KMeans, Points

MOST = 8
COMPONENTS = 16
QUICK = KMeans(restarts=3)


class Case(NamedTuple):
    """How points are drawn.

    Attributes:
        elongated: deviation 2 * j ** -0.25 along axis j instead of 1 along all.
        features: dimensions.
        points: how many.
        apart: distance between two modes, in units of the root mean square deviation.
    """

    elongated: bool
    features: int
    points: int
    apart: float


CASES = (
    Case(False, 64, 300, 6), Case(False, 256, 300, 8), Case(False, 256, 1500, 5),
    Case(True, 64, 300, 8), Case(True, 256, 300, 12), Case(True, 64, 1500, 8), Case(True, 256, 1500, 8),
)  # fmt: skip


def draw(case: Case, modes: int, seed: int) -> tuple[Points, NDArray[np.int64]]:
    """Points and the mode of each; the smallest mode has at least half of its fair share."""
    rng = np.random.default_rng([case.features, case.points, modes, seed, case.elongated])
    deviation: NDArray[np.floating[Any]] = np.ones(case.features)
    if case.elongated:
        deviation = 2 * np.arange(1, case.features + 1) ** -0.25
    turn, axes = (np.linalg.qr(rng.normal(size=(case.features, n)))[0] for n in (case.features, modes))
    weight = np.maximum(rng.dirichlet(np.full(modes, 5.0)), 0.5 / modes)
    owner = rng.choice(modes, case.points, p=weight / weight.sum())
    centres = axes.T * case.apart * np.sqrt((deviation**2).mean()) / np.sqrt(2)
    noise = (rng.normal(size=(case.points, case.features)) * deviation) @ turn
    return (centres[owner] + noise).astype(np.float32), owner


def silhouette(points: Points, found: dict[int, Clusters]) -> int:
    """The number with the largest mean silhouette; not defined for one cluster."""
    sample = min(len(points), 1000)
    widths = {k: silhouette_score(points, found[k].owner, sample_size=sample, random_state=0) for k in found if k > 1}
    return max(widths, key=lambda k: widths[k])


def bic(points: Points, found: dict[int, Clusters]) -> int:
    """The number with the largest BIC of Gaussians that share one variance in all directions."""
    n, dimension = points.shape
    scores = {}
    for k, clusters in found.items():
        size = np.bincount(clusters.owner, minlength=k)
        variance = clusters.distance.sum() / (dimension * (n - k))
        likelihood = (size * np.log(np.maximum(size, 1) / n)).sum()
        likelihood -= n * dimension / 2 * np.log(2 * np.pi * variance) + dimension * (n - k) / 2
        scores[k] = likelihood - (k - 1 + k * dimension + 1) / 2 * np.log(n)
    return max(scores, key=lambda k: scores[k])


def gap(points: Points, found: dict[int, Clusters], references: int = 5) -> int:
    """The least number whose gap is that of the next one less its error; references in the PCA's box."""
    rng = np.random.default_rng(0)
    centred = points - points.mean(axis=0)
    placed = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    low, high = placed.min(axis=0), placed.max(axis=0)
    logs = np.empty((references, MOST))
    for row in logs:
        drawn = (rng.random(placed.shape) * (high - low) + low).astype(np.float32)
        row[:] = [np.log(KMeans(restarts=1).fit(drawn, k).distance.sum()) for k in found]
    gaps = logs.mean(axis=0) - np.array([np.log(clusters.distance.sum()) for clusters in found.values()])
    error = logs.std(axis=0) * np.sqrt(1 + 1 / references)
    enough = np.flatnonzero(gaps[:-1] >= gaps[1:] - error[1:])
    return int(enough[0]) + 1 if len(enough) else MOST


def ask_all(points: Points) -> dict[str, int]:
    """What each criterion says."""
    rows = np.arange(len(points))
    answers = {}
    kept = min(COMPONENTS, *points.shape)
    reduced = np.ascontiguousarray(PCA(kept, random_state=0).fit_transform(points), dtype=np.float32)
    for name, given in (("all", points), (f"{COMPONENTS} components", reduced)):
        found = {k: QUICK.fit(given, k) for k in range(1, MOST + 1)}
        answers[f"silhouette, {name}"] = silhouette(given, found)
        answers[f"BIC, {name}"] = bic(given, found)
        answers[f"gap statistic, {name}"] = gap(given, found)
        for cutoff in (0.8, 0.9):
            answers[f"prediction strength {cutoff}, {name}"] = choose_number(
                given, rows, MOST, QUICK, cutoff, components=given.shape[1]
            )
    return answers


def compare(cases: tuple[Case, ...], repeats: int) -> dict[str, float]:
    """Print how often each criterion is right, on round and on elongated modes; the share over both."""
    right: dict[tuple[str, bool], list[bool]] = defaultdict(list)
    agreement = []
    for case in cases:
        for modes in range(1, 7):
            for seed in range(repeats):
                points, owner = draw(case, modes, seed)
                agreement.append(adjusted_rand_score(owner, KMeans().fit(points, modes).owner))
                for name, answer in ask_all(points).items():
                    right[name, case.elongated].append(answer == modes)
    table = Table(
        "criterion", "round", "elongated",
        title=f"number of clusters right; k-means at the true number: adjusted Rand {np.mean(agreement):.2f}",
    )  # fmt: skip
    shares = {}
    for name in dict.fromkeys(name for name, _ in right):
        columns = [right[name, elongated] for elongated in (False, True)]
        table.add_row(name, *(f"{sum(column)} of {len(column)}" for column in columns))
        shares[name] = float(np.mean([share for column in columns for share in column]))
    Console().print(table)
    return shares


def on_phantom() -> dict[str, float]:
    """Print what is chosen for drawn lesions of 1 to 4 appearances; the share that is right."""
    table = Table("appearances", "features", "slices", "chosen", "adjusted Rand at the true number", title="phantom")
    right = defaultdict(list)
    for modes in range(1, 5):
        for name, (points, owner) in features_of_modes(modes).items():
            chosen = choose_number(points, np.arange(len(points)), MOST, KMeans())
            rand = adjusted_rand_score(owner, KMeans().fit(points, modes).owner)
            right[name].append(chosen == modes)
            table.add_row(str(modes), name, str(len(points)), str(chosen), f"{rand:.2f}")
    Console().print(table)
    return {f"phantom, {name}": float(np.mean(hits)) for name, hits in right.items()}


def main() -> None:
    """Compare, print tables and one line of JSON: the share of right answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="all seven kinds of points, three draws of each: many minutes"
    )
    parser.add_argument("--phantom", action="store_true", help="the phantom's lesions instead")
    options = parser.parse_args()
    if options.phantom:
        shares = on_phantom()
    else:
        shares = compare(CASES if options.full else CASES[:5], 3 if options.full else 1)
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
