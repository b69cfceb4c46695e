import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from weakmedsam.contracts import DataError
from weakmedsam.subclasses import explore, kmeans, subclass_targets


def blobs(seed=0, samples=400, centers=8, features=16):
    points, owner = make_blobs(samples, features, centers=centers, cluster_std=0.6, random_state=seed)
    return points.astype(np.float32), owner


@pytest.mark.parametrize("seed", range(10))
def test_kmeans_finds_separated_blobs_from_every_seed(seed):
    points, owner = blobs()
    found, centroids, inertia = kmeans(points, 8, seed)
    assert adjusted_rand_score(owner, found) == pytest.approx(1.0)
    expected = np.mean(
        [((points[owner == k] - points[owner == k].mean(0)) ** 2).sum(1).mean() for k in range(8)]
    )
    assert inertia == pytest.approx(expected, rel=0.05)
    assert centroids.shape == (8, 16)


def test_same_seed_gives_the_same_ids():
    points, _ = blobs()
    assert (kmeans(points, 5, 3)[0] == kmeans(points, 5, 3)[0]).all()


def two_classes():
    points, owner = blobs(samples=300, centers=6)
    labels = np.stack([owner < 4, owner >= 3], axis=1).astype(np.float32)
    return points, owner, labels


def test_each_class_is_clustered_among_its_positives_only():
    points, owner, labels = two_classes()
    found = explore(points, labels, ["a", "b"], 3)
    assert ((found.ids > 0) == (labels > 0)).all()
    assert found.ids.max() == 3
    rows = labels[:, 1] > 0  # three blobs, three clusters
    assert adjusted_rand_score(owner[rows], found.ids[rows, 1]) == pytest.approx(1.0)
    assert np.isnan(found.kept).all()


def test_a_warm_start_keeps_ids_over_a_small_change_and_a_new_seed_does_not():
    points, _, labels = two_classes()
    first = explore(points, labels, ["a", "b"], 4, seed=0)
    moved = points + np.random.default_rng(0).normal(0, 0.05, points.shape).astype(np.float32)
    warm = explore(moved, labels, ["a", "b"], 4, seed=1, previous=first.ids)
    assert (warm.kept > 0.95).all()
    cold = explore(moved, labels, ["a", "b"], 4, seed=1)
    assert (cold.ids == first.ids).mean() < 0.9


def test_ids_survive_features_that_have_all_moved():
    points, _, labels = two_classes()
    first = explore(points, labels, ["a", "b"], 4)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0].astype(np.float32)
    moved = explore(3 * points @ rotation + 5, labels, ["a", "b"], 4, seed=1, previous=first.ids)
    assert (moved.kept > 0.95).all()


def test_ids_follow_the_slice_under_shuffling():
    points, _, labels = two_classes()
    first = explore(points, labels, ["a", "b"], 3)
    order = np.random.default_rng(1).permutation(len(points))
    again = explore(points[order], labels[order], ["a", "b"], 3, previous=first.ids[order])
    assert (again.ids == first.ids[order]).all()


def test_fewer_positives_than_clusters_shrinks_k_with_a_warning():
    points, _, labels = two_classes()
    labels[:, 1] = 0
    labels[:2, 1] = 1
    with pytest.warns(UserWarning, match=r"class 'b' has 2 positive slices: 2 sub-classes instead of 3"):
        found = explore(points, labels, ["a", "b"], 3)
    assert set(found.ids[:2, 1]) == {1, 2}
    assert np.isnan(found.centroids[1, 2]).all()
    with pytest.warns(UserWarning, match="class 'b'"):
        explore(points, labels, ["a", "b"], 3, previous=found.ids)


def test_a_class_without_positives_is_an_error_that_names_it():
    points, _, labels = two_classes()
    labels[:, 1] = 0
    with pytest.raises(DataError, match="class 'b' has no positive training slice"):
        explore(points, labels, ["a", "b"], 3)


def test_features_that_are_not_finite_are_an_error():
    points, _, labels = two_classes()
    points[3, 2] = np.nan
    with pytest.raises(DataError, match="NaN"):
        explore(points, labels, ["a", "b"], 3)


def test_targets_have_one_output_for_none_and_one_per_cluster():
    ids = torch.tensor([[0, 0], [2, 0], [0, 3], [1, 1]])
    targets = subclass_targets(ids, 3)
    expected = torch.zeros(4, 7)
    expected[0, 0] = 1
    expected[1, 1 + 0 * 3 + 1] = 1
    expected[2, 1 + 1 * 3 + 2] = 1
    expected[3, [1, 4]] = 1
    assert torch.equal(targets, expected)
