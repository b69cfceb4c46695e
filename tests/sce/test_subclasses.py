import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from weakmedsam.errors import DataError
from weakmedsam.sce.kmeans import KMeans
from weakmedsam.sce.subclasses import (
    explore,
    match_ids,
    nearest_members,
    subclass_loss,
    subclass_targets,
)


def blobs(seed=0, samples=400, centers=8, features=16):
    points, owner = make_blobs(samples, features, centers=centers, cluster_std=0.6, random_state=seed)
    return points.astype(np.float32), owner


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


def test_sub_classes_that_are_cases_have_a_case_information_of_one():
    points, owner, labels = two_classes()
    shuffled = np.random.default_rng(0).permutation(owner)
    assert explore(points, labels, ["a", "b"], 3, cases=owner).case_information[1] == pytest.approx(1)
    assert abs(explore(points, labels, ["a", "b"], 3, cases=shuffled).case_information[1]) < 0.05
    assert np.isnan(explore(points, labels, ["a", "b"], 3).case_information).all()


def test_a_warm_start_keeps_ids_over_a_small_change_and_a_new_seed_does_not():
    points, _, labels = two_classes()
    first = explore(points, labels, ["a", "b"], 4, KMeans(0))
    moved = points + np.random.default_rng(0).normal(0, 0.05, points.shape).astype(np.float32)
    warm = explore(moved, labels, ["a", "b"], 4, KMeans(1), previous=first.ids)
    assert (warm.kept > 0.95).all()
    cold = explore(moved, labels, ["a", "b"], 4, KMeans(1))
    assert (cold.ids == first.ids).mean() < 0.9


def test_ids_survive_features_that_have_all_moved():
    points, _, labels = two_classes()
    first = explore(points, labels, ["a", "b"], 4)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0].astype(np.float32)
    moved = explore(3 * points @ rotation + 5, labels, ["a", "b"], 4, KMeans(1), previous=first.ids)
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


def test_a_cluster_that_became_empty_begins_anew_and_the_others_keep_their_ids():
    points, owner = blobs(samples=300, centers=6)
    labels = np.ones((300, 1), np.float32)
    previous = owner[:, None] + 1
    previous[previous == 6] = 5  # id 6 has no member: two blobs were one
    found = explore(points, labels, ["a"], 6, KMeans(seed=4), previous=previous)
    assert adjusted_rand_score(owner, found.ids[:, 0]) == pytest.approx(1.0)
    same = owner < 4
    assert (found.ids[same, 0] == previous[same, 0]).all()
    assert set(found.ids[~same, 0]) == {5, 6}
    assert found.kept[0] == pytest.approx(5 / 6, abs=0.01)
    # Ids were matched, and the centroids with them.
    for k in range(6):
        assert np.allclose(found.centroids[0, k], points[found.ids[:, 0] == k + 1].mean(0), atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_new_seed_keeps_the_ids_if_the_clusters_are_the_same(seed):
    points, _, labels = two_classes()
    first = explore(points, labels, ["a", "b"], 3, KMeans(0))
    rows = labels[:, 1] > 0
    fresh = KMeans(seed + 1).fit(points[rows], 3)
    ids = match_ids(fresh.owner, first.ids[rows, 1], 3)
    assert (ids[fresh.owner] == first.ids[rows, 1]).all()


def test_matching_maximises_the_points_that_keep_their_id():
    owner = np.array([0] * 5 + [1] * 6 + [2] * 4)
    previous = np.array([1] * 3 + [2] * 2 + [1] * 6 + [0, 9, 3, 2])  # 0 and 9 are no id of these clusters
    # Each for itself, cluster 0 would take id 1, of which cluster 1 has more.
    assert match_ids(owner, previous, 3).tolist() == [2, 1, 3]


def test_a_slice_with_several_classes_is_clustered_in_each():
    points, owner, labels = two_classes()
    found = explore(points, labels, ["a", "b"], 3)
    both = owner == 3
    assert (found.ids[both] > 0).all()
    assert len(np.unique(found.ids[both, 0])) == len(np.unique(found.ids[both, 1])) == 1


def test_classes_of_very_different_frequency_get_clusters_of_their_own():
    points, owner = blobs(samples=2000, centers=8, seed=1)
    rare = np.flatnonzero(owner == 7)[:6]
    labels = np.zeros((2000, 2), np.float32)
    labels[:, 0] = owner < 6
    labels[rare, 1] = 1
    labels[np.flatnonzero(owner == 6)[:6], 1] = 1
    found = explore(points, labels, ["common", "rare"], 2)
    common = labels[:, 0] > 0
    assert np.bincount(found.ids[:, 1])[1:].tolist() == [6, 6]
    assert set(found.ids[common, 0]) == {1, 2}
    # The rare class does not depend on the common one.
    alone = explore(points, labels[:, 1:], ["rare"], 2)
    assert (alone.ids[:, 0] == found.ids[:, 1]).all()


def test_spherical_clusters_are_those_of_directions():
    rng = np.random.default_rng(0)
    directions = np.eye(3, 20)
    owner = np.arange(300) % 3
    points = directions[owner] + rng.normal(0, 0.02, (300, 20))
    points *= 10 ** rng.uniform(-1.5, 1.5, (300, 1))  # lengths tell nothing
    labels = np.ones((300, 1), np.float32)
    found = explore(points.astype(np.float32), labels, ["a"], 3, KMeans(spherical=True))
    assert adjusted_rand_score(owner, found.ids[:, 0]) == pytest.approx(1.0)
    assert np.allclose(np.linalg.norm(found.centroids[0], axis=1), 1, atol=1e-5)
    plain = explore(points.astype(np.float32), labels, ["a"], 3)
    assert adjusted_rand_score(owner, plain.ids[:, 0]) < 0.8
    again = explore(points.astype(np.float32)[:, ::-1], labels, ["a"], 3, KMeans(1, spherical=True), previous=found.ids)
    assert again.kept[0] == 1


def test_the_number_is_chosen_once_per_class_and_then_kept():
    points, owner = blobs(samples=600, centers=5, seed=3, features=64)
    labels = np.stack([owner < 3, owner >= 3, owner == 0], axis=1).astype(np.float32)
    found = explore(points, labels, ["a", "b", "c"], 8, automatic=True)
    assert found.counts.tolist() == [3, 2, 1]
    assert found.ids.max(0).tolist() == [3, 2, 1]
    assert np.isnan(found.centroids[2, 1:]).all()
    noise = np.random.default_rng(0).normal(size=points.shape).astype(np.float32)
    later = explore(noise, labels, ["a", "b", "c"], 8, previous=found.ids, counts=found.counts, automatic=True)
    assert later.counts.tolist() == [3, 2, 1]


def test_nearest_members_are_those_of_least_distance():
    points, _, labels = two_classes()
    found = explore(points, labels, ["a", "b"], 3)
    for k, rows in enumerate(nearest_members(found, 1, 4)):
        members = np.flatnonzero(found.ids[:, 1] == k + 1)
        away = ((points[members] - found.centroids[1, k]) ** 2).sum(1)
        assert set(rows) == set(members[np.argsort(away)[:4]])


def test_outputs_without_a_cluster_take_no_part_in_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 1 + 2 * 4, generator=generator, requires_grad=True)
    ids = torch.tensor([[0, 0], [2, 0], [0, 1], [1, 1], [2, 0]])
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    whole = bce(logits, subclass_targets(ids, 4))
    assert torch.allclose(subclass_loss(logits, ids, torch.tensor([4, 4])), whole)
    assert torch.allclose(subclass_loss(logits, ids, torch.tensor([0, 0])), whole)
    loss = subclass_loss(logits, ids, torch.tensor([2, 1]))
    used = [0, 1, 2, 5]
    assert torch.allclose(loss, bce(logits[:, used], subclass_targets(ids, 4)[:, used]))
    loss.backward()
    assert logits.grad.abs().sum(0).nonzero().flatten().tolist() == used
