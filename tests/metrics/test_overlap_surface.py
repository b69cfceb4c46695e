"""Metrics against values worked out by hand."""

import math
import os
import sys

import pytest
import torch
from commands import run_ranks
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from weakmedsam.contracts import IGNORE
from weakmedsam.metrics.overlap_surface import (
    VolumeDice,
    dice_from_counts,
    grid_diagonal,
    jaccard_from_counts,
    overlap_counts,
    slice_metrics,
    surface_distances,
    volume_metrics,
)


def box(shape, z, y, x, class_id=1):
    volume = torch.zeros(shape, dtype=torch.uint8)
    volume[slice(*z), slice(*y), slice(*x)] = class_id
    return volume


# Counts, Dice, Jaccard


def test_counts_dice_and_jaccard_equal_the_hand_values():
    truth = torch.tensor([[1, 1, 2, 0], [1, 1, 2, 0]])
    prediction = torch.tensor([[1, 1, 1, 0], [0, 0, 2, 0]])
    counts = overlap_counts(prediction, truth, num_classes=3)
    assert counts.tolist() == [[2, 3, 4], [1, 1, 2], [0, 0, 0]]
    dice, jaccard = dice_from_counts(counts), jaccard_from_counts(counts)
    assert dice[:2].tolist() == pytest.approx([4 / 7, 2 / 3])
    assert jaccard[:2].tolist() == pytest.approx([2 / 5, 1 / 2])
    assert dice[2].isnan()
    assert jaccard[2].isnan()


def test_class_in_one_of_both_only_scores_zero():
    empty, full = torch.zeros(2, 2), torch.ones(2, 2)
    for prediction, truth in ((empty, full), (full, empty)):
        counts = overlap_counts(prediction, truth, 1)
        assert dice_from_counts(counts).tolist() == [0.0]
        assert jaccard_from_counts(counts).tolist() == [0.0]


def test_ignored_pixels_count_nowhere():
    truth = torch.tensor([[1, IGNORE, IGNORE, 0]])
    assert overlap_counts(torch.tensor([[1, 1, 0, 1]]), truth, 1).tolist() == [[1, 2, 1]]


def test_counts_keep_leading_dimensions_and_refuse_other_shapes():
    assert overlap_counts(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5), 6).shape == (2, 3, 6, 3)
    with pytest.raises(ValueError, match="differ in shape"):
        overlap_counts(torch.zeros(4, 5), torch.zeros(5, 4), 1)


# VolumeDice

CASES = ["b", "b", "a", "a", "c"]


def slices():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (5, 6, 6), generator=generator)
    prediction = torch.where(torch.rand(5, 6, 6, generator=generator) < 0.7, truth, 0)
    truth[4], prediction[4] = 0, 0
    return prediction, truth


def volume_dice(order):
    prediction, truth = slices()
    metric = VolumeDice(CASES, 2)
    for rows in order:
        metric.update(prediction[rows], truth[rows], torch.tensor(rows))
    return metric


def test_volume_dice_is_dice_over_all_slices_of_a_volume_then_mean_over_volumes():
    prediction, truth = slices()
    want = [
        dice_from_counts(overlap_counts(prediction[rows].flatten(0, 1), truth[rows].flatten(0, 1), 2))
        for rows in ([0, 1], [2, 3])  # c has no class: left out, not 1
    ]
    torch.testing.assert_close(volume_dice([[0, 1, 2, 3, 4]]).compute(), torch.stack(want).mean(0))


@pytest.mark.parametrize("order", [[[4, 2], [0, 3], [1]], [[0, 1, 2], [2, 3, 4], [0, 0, 4]], [[i] for i in range(5)]])
def test_volume_dice_does_not_depend_on_order_or_repetition(order):
    assert volume_dice(order).compute().equal(volume_dice([[0, 1, 2, 3, 4]]).compute())


def test_volume_dice_over_ranks_that_share_slices_equals_one_process():
    ranks = [volume_dice([[0, 2, 4]]), volume_dice([[1, 3], [0]]), volume_dice([])]
    for other in ranks[1:]:
        ranks[0].merge_state(other)
    assert ranks[0].compute().equal(volume_dice([[0, 1, 2, 3, 4]]).compute())


def test_volume_dice_counts_a_false_alarm_as_zero_and_an_unknown_class_as_nan():
    metric = VolumeDice(["a", "b"], 2)
    truth = torch.zeros(2, 2, 2, dtype=torch.int64)
    truth[0] = 1
    metric.update(torch.ones(2, 2, 2, dtype=torch.int64), truth, torch.arange(2))
    dice = metric.compute()
    assert dice[0] == 0.5
    assert dice[1].isnan()


def test_volume_dice_leaves_nothing_in_a_checkpoint_and_starts_anew():
    metric = volume_dice([[0, 1]])
    assert metric.state_dict() == {}
    metric.reset()
    assert metric.compute().isnan().all()


def volume_dice_on_rank(folder):
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    # DistributedSampler's way: slice 0 again, so that both ranks have three.
    dice = volume_dice([[0, 2, 4]] if rank == 0 else [[1, 3, 0]]).compute()
    torch.save(dice, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.ddp
def test_volume_dice_of_two_processes_equals_one(tmp_path):
    run_ranks([__file__, tmp_path], processes=2)
    want = volume_dice([[0, 1, 2, 3, 4]]).compute()
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True).equal(want)


# Volumes


@pytest.mark.parametrize(("axis", "distance"), [(0, 3.0), (1, 2.0), (2, 0.5)])
def test_distances_of_shifted_boxes_are_in_mm_along_each_axis(axis, distance):
    shape, spacing = (12, 14, 16), (3.0, 2.0, 0.5)
    ranges = [(4, 7), (4, 7), (4, 7)]
    truth = box(shape, *ranges)
    ranges[axis] = (5, 8)
    # 3 x 3 x 3 cubes, shifted by one voxel: of 26 surface voxels each, the 9 on the far side are one
    # voxel away; so is no other, except the middle of the cube's near side seen from the other's inside:
    # the two centres (not surface) lie on the other's surface plane's middle row.
    score = volume_metrics(box(shape, *ranges), truth, spacing, 1)[0]
    assert score.dice == pytest.approx(2 / 3)
    assert score.jaccard == pytest.approx(1 / 2)
    # The voxel in the middle of the shared face is a surface voxel of one cube and the other's centre:
    # its nearest surface voxel is a neighbour, the closest of them at the smallest spacing.
    inner = min(spacing)
    assert score.assd_mm == pytest.approx((9 * distance + inner) / 26)
    assert score.hd95_mm == pytest.approx(distance)
    assert score.true_ml == score.predicted_ml == pytest.approx(27 * 3.0 / 1000)


def test_two_voxels_apart():
    # Single voxels: one distance each way, sqrt((2 * 3)^2 + (4 * 2)^2) = 10.
    truth, prediction = box((5, 9, 4), (1, 2), (1, 2), (1, 2)), box((5, 9, 4), (3, 4), (5, 6), (1, 2))
    score = volume_metrics(prediction, truth, (3.0, 2.0, 1.0), 1)[0]
    assert (score.dice, score.assd_mm, score.hd95_mm) == (0.0, 10.0, 10.0)


def test_surface_is_three_dimensional_and_not_the_whole_mask():
    # Against a cube inside it, a 7-cube's surface is 3 away at the nearest; its inside does not count.
    truth, prediction = box((9, 9, 9), (1, 8), (1, 8), (1, 8)), box((9, 9, 9), (4, 5), (4, 5), (4, 5))
    assert volume_metrics(prediction, truth, (1.0, 1.0, 1.0), 1)[0].assd_mm > 3


def test_crop_and_own_surfaces_change_no_value():
    generator = torch.Generator().manual_seed(1)
    for corner in (0, 3):  # at the border of the volume and away from it
        truth, prediction = torch.zeros(2, 14, 15, 16).bool()
        truth[corner : corner + 7, corner : corner + 8, 2:9] = torch.rand(7, 8, 7, generator=generator) < 0.8
        prediction[corner : corner + 5, 1:9, corner : corner + 9] = torch.rand(5, 8, 9, generator=generator) < 0.8
        spacing = [2.5, 0.7, 1.1]
        pair = (prediction[None, None].float(), truth[None, None].float())
        assd = compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing)
        hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
        assert surface_distances(prediction, truth, spacing) == pytest.approx((float(assd), float(hd95)))


def test_identical_volumes_are_perfect_and_absent_classes_nan():
    truth = box((4, 6, 6), (1, 3), (1, 4), (1, 4))
    present, absent = volume_metrics(truth, truth, (1.0, 1.0, 1.0), 2)
    assert (present.dice, present.jaccard, present.assd_mm, present.hd95_mm) == (1, 1, 0, 0)
    assert all(math.isnan(v) for v in (absent.dice, absent.jaccard, absent.assd_mm, absent.hd95_mm))
    assert not absent.missed
    assert not absent.false_alarm


def test_misses_and_false_alarms_cost_the_penalty_and_are_named():
    shape, spacing = (3, 4, 12), (1.0, 1.0, 1.0)
    organ, nothing = box(shape, (0, 2), (0, 2), (0, 2)), torch.zeros(shape, dtype=torch.uint8)
    missed = volume_metrics(nothing, organ, spacing, 1)[0]
    alarm = volume_metrics(organ, nothing, spacing, 1, penalty_mm=50.0)[0]
    assert (missed.missed, missed.false_alarm) == (True, False)
    assert missed.dice == 0
    assert missed.assd_mm == missed.hd95_mm == grid_diagonal(shape, spacing) == 13.0
    assert (alarm.missed, alarm.false_alarm) == (False, True)
    assert alarm.dice == 0
    assert alarm.assd_mm == alarm.hd95_mm == 50.0


def test_a_volume_of_one_slice_has_a_two_dimensional_surface():
    truth, prediction = box((1, 9, 9), (0, 1), (1, 8), (1, 8)), box((1, 9, 9), (0, 1), (1, 8), (2, 8))
    score = volume_metrics(prediction, truth, (5.0, 1.0, 1.0), 1)[0]
    # 24 and 22 rim pixels. Of the truth's, the left column's 7 are 1 away; of the prediction's, its left
    # column's 5 inner ones are (to the column beside it).
    assert score.assd_mm == pytest.approx((7 + 5) / (24 + 22))


# Slice by slice


def test_slice_protocols_differ_as_they_say():
    truth, prediction = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)
    truth[0, 2:4, 2:4] = prediction[0, 2:4, 3:5] = 1  # Dice 1/2, Jaccard 1/3
    truth[1, 2:4, 2:4] = 1  # missed
    prediction[2, 2:4, 2:4] = 1  # false alarm; slice 3 is empty in both
    score = slice_metrics(prediction, truth, (9.0, 1.0, 2.0), 1)[0]
    assert score.slice_dice == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert score.slice_jaccard == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert score.published_dice == pytest.approx((1 / 2 + 0 + 0 + 1) / 4)
    assert score.published_jaccard == pytest.approx((1 / 3 + 0 + 0 + 1) / 4)
    assert (score.slices_occupied, score.slices_matched, score.slices) == (3, 1, 4)
    assert score.slice_assd_mm == pytest.approx(1.0)  # two of four pixels each way are 2 mm away
    assert score.slice_hd95_mm == pytest.approx(2.0)


def test_slice_scores_of_an_absent_class():
    empty = torch.zeros(3, 4, 4, dtype=torch.uint8)
    score = slice_metrics(empty, empty, (1.0, 1.0, 1.0), 1)[0]
    assert math.isnan(score.slice_dice)
    assert math.isnan(score.slice_hd95_mm)
    assert score.published_dice == 1


if __name__ == "__main__":
    volume_dice_on_rank(sys.argv[1])
