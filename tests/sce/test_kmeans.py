import faiss
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as Reference
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from benchmarks.kmeans import draw
from weakmedsam.errors import ConfigError
from weakmedsam.sce.kmeans import TEMPORARY, KMeans, member_means


def blobs(seed=0, samples=400, centers=8, features=16):
    points, owner = make_blobs(samples, features, centers=centers, cluster_std=0.6, random_state=seed)
    return points.astype(np.float32), owner


@pytest.mark.parametrize("seed", range(10))
def test_separated_blobs_are_found_from_every_seed(seed):
    points, owner = blobs()
    found = KMeans(seed).fit(points, 8)
    assert adjusted_rand_score(owner, found.owner) == pytest.approx(1.0)
    means = np.stack([points[found.owner == k].mean(0) for k in range(8)])
    assert np.allclose(found.centroids, means, atol=1e-4)
    distance = ((points - means[found.owner]) ** 2).sum(1)
    assert np.allclose(found.distance, distance, atol=1e-3)
    assert found.inertia == pytest.approx(distance.mean(), rel=1e-4)


def test_same_seed_gives_the_same_clusters_and_another_seed_need_not():
    points = draw(600, 0, 1.0)
    runs = [KMeans(seed, restarts=1).fit(points, 8).owner for seed in (3, 3, 4)]
    assert (runs[0] == runs[1]).all()
    assert (runs[0] != runs[2]).any()


def test_starts_on_a_sample_end_as_well_as_scikit_learn_on_all_points():
    points = draw(12_000, 0, 1.0)
    ours = KMeans(points_per_centroid=128, chunk=5000).fit(points, 8)
    best = Reference(8, n_init=5, random_state=0).fit(points).inertia_ / len(points)
    assert ours.inertia < 1.01 * best


def test_chunks_do_not_matter():
    points = draw(2000, 0, 1.0)
    rows = np.arange(0, 2000, 3)
    whole, parts = (KMeans(chunk=chunk).fit(points, 4, rows) for chunk in (5000, 100))
    alone = KMeans().fit(points[rows], 4)
    assert (whole.owner == parts.owner).all()
    assert (whole.owner == alone.owner).all()
    assert np.allclose(whole.centroids, parts.centroids, atol=1e-5)


def test_faiss_works_in_one_thread_meanwhile_and_has_its_own_again_afterwards(monkeypatch):
    points, _ = blobs()
    seen = []
    refine = KMeans._refine

    def look(self, *parts):
        seen.append(faiss.omp_get_max_threads())
        return refine(self, *parts)

    monkeypatch.setattr(KMeans, "_refine", look)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        KMeans().fit(points, 8)
        with pytest.raises(ValueError, match="3"):  # what has failed has them again too
            KMeans().fit(points[:3], 8)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)
    assert seen
    assert set(seen) == {1}


def test_far_from_the_origin_the_distances_keep_their_digits():
    points, owner = blobs()
    found = KMeans().fit(points + 3000, 8)
    assert adjusted_rand_score(owner, found.owner) == pytest.approx(1.0)
    assert found.inertia == pytest.approx(KMeans().fit(points, 8).inertia, rel=0.01)


def test_a_start_that_loses_a_cluster_begins_anew():
    points, owner = blobs(centers=4)
    start = np.stack([points[owner == k].mean(0) for k in range(4)])
    start[3] = 1e3
    found = KMeans().fit(points, 4, start=start)
    assert adjusted_rand_score(owner, found.owner) == pytest.approx(1.0)


def test_means_of_members_and_none_if_a_cluster_is_empty():
    points, owner = blobs(centers=3)
    rows = np.flatnonzero(owner > 0)
    means = member_means(points, rows, owner[rows] - 1, 2, chunk=7)
    assert np.allclose(means, [points[owner == 1].mean(0), points[owner == 2].mean(0)], atol=1e-5)
    assert member_means(points, rows, owner[rows] - 1, 3) is None


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"model\.sce\.kmeans\.restarts is 0"):
        KMeans(restarts=0)
    with pytest.raises(ConfigError, match=r"model\.sce\.kmeans\.points_per_centroid is 0"):
        KMeans(points_per_centroid=0)


def test_one_index_of_the_named_gpu_measures_all_distances_of_a_fit(monkeypatch):
    asked = []

    class Resources:
        def setTempMemory(self, size):  # noqa: N802
            asked.append(size)

    def move(resources, gpu, index):
        asked.append(gpu)
        return index

    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", move, raising=False)
    points, owner = blobs(centers=4)
    assert adjusted_rand_score(owner, KMeans(gpu=3).fit(points, 4).owner) == pytest.approx(1.0)
    assert asked == [TEMPORARY, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_the_gpu_the_same_clusters_are_found():
    points, owner = blobs(samples=4000)
    cpu, gpu = (KMeans(gpu=device).fit(points, 8) for device in (None, 0))
    assert adjusted_rand_score(owner, gpu.owner) == pytest.approx(1.0)
    assert (gpu.owner == cpu.owner).all()
    assert gpu.inertia == pytest.approx(cpu.inertia, rel=1e-3)
