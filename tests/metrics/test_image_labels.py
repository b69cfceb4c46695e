import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from weakmedsam.metrics.image_labels import LabelScores, operating_points, specific_points, stratified_sample

NAMES = ["lesion", "cyst"]


def drawn(slices):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(slices, 2, generator=generator)
    return logits, (torch.rand(slices, 2, generator=generator) < 0.4).float()


def test_they_are_those_of_scikit_learn_whatever_the_batches():
    scores, (logits, label) = LabelScores(NAMES), drawn(50)
    scores.update(logits[:20], label[:20])
    scores.update(logits[20:].bfloat16(), label[20:])
    figures = scores.finish()
    logits = torch.cat([logits[:20], logits[20:].bfloat16().float()])
    for name, metric in (("auroc", roc_auc_score), ("ap", average_precision_score)):
        theirs = [metric(label[:, c], logits[:, c]) for c in range(2)]
        assert [float(figures[f"{name}/{c}"]) for c in NAMES] == pytest.approx(theirs, abs=1e-5)
        assert float(figures[name]) == pytest.approx(sum(theirs) / 2, abs=1e-5)


def test_what_is_not_defined_is_nan_and_not_in_the_mean():
    scores, (logits, label) = LabelScores(NAMES), drawn(50)
    label[:, 1] = 0
    scores.update(logits, label)
    figures = scores.finish()
    assert figures["auroc/cyst"].isnan()
    assert figures["ap/cyst"].isnan()
    assert figures["auroc"] == figures["auroc/lesion"]
    assert figures["ap"] == figures["ap/lesion"]


def test_what_is_finished_is_forgotten():
    scores, (logits, label) = LabelScores(NAMES), drawn(50)
    scores.update(-logits, label)
    scores.finish()
    scores.update(logits, label)
    assert float(scores.finish()["auroc/cyst"]) == pytest.approx(roc_auc_score(label[:, 1], logits[:, 1]), abs=1e-5)


def test_an_operating_point_finds_nearly_all_slices_with_the_class():
    truth = torch.tensor([[1.0]] * 100 + [[0.0]] * 50)
    score = torch.cat([torch.linspace(0.1, 0.3, 100), torch.linspace(0.0, 0.2, 50)])[:, None]
    found = operating_points(score, truth)
    assert (score[:100] >= found).float().mean() == pytest.approx(0.98)
    assert operating_points(score, truth, sensitivity=1.0) == pytest.approx(0.1)


def test_an_operating_point_is_at_most_one_half_and_open_where_nothing_is_known():
    truth = torch.tensor([[1.0, 0, 1], [1, 0, 1], [0, 0, 0]])
    score = torch.tensor([[0.99, 0.9, torch.nan], [0.97, 0.8, 0.9], [0.01, 0.7, 0.1]])
    assert operating_points(score, truth).tolist() == [0.5, 0.0, 0.0]


def test_operating_points_are_those_of_the_slices_last_finished():
    scores, (logits, label) = LabelScores(NAMES), drawn(50)
    assert scores.points.tolist() == [0, 0]
    scores.update(logits, label)
    scores.finish()
    assert scores.points.equal(operating_points(logits.sigmoid(), label))


def test_a_stratified_sample_is_spread_over_the_slices_of_each_class():
    labels = torch.zeros(100, 2)
    labels[20:60, 0] = 1
    labels[90, 1] = 1
    assert stratified_sample(labels, 8).nonzero().flatten().tolist() == [25, 35, 45, 55, 90]
    assert stratified_sample(labels, 1000).equal(labels.any(1))
    assert not stratified_sample(torch.zeros(5, 2), 4).any()


def test_a_slice_of_two_classes_counts_once_in_a_sample():
    assert stratified_sample(torch.ones(6, 2), 6).nonzero().flatten().tolist() == [1, 3, 5]


def test_with_labels_of_scans_an_operating_point_leaves_out_nearly_all_slices_of_scans_without():
    truth = torch.tensor([[1.0, 1]] * 50 + [[0.0, 1]] * 200)
    score = torch.cat([torch.linspace(0.0, 1.0, 50), torch.linspace(0.0, 0.2, 200)])[:, None].expand(-1, 2)
    first, second = specific_points(score, truth).tolist()
    assert (score[50:, 0] < first).float().mean() == pytest.approx(0.99)
    assert second == 0.5  # no scan is without it


def test_a_single_label_has_no_figure_and_is_no_fault():
    scores = LabelScores(["lesion"])
    scores.update(torch.ones(1, 1), torch.ones(1, 1))
    assert scores.finish()["auroc"].isnan()
