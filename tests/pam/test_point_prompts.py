import torch

from weakmedsam.pam.affinity import grid_points
from weakmedsam.pam.point_prompts import content_prompts, peak_prompts

WHOLE = torch.tensor([[0, 32, 0, 32]])


def test_content_leaves_out_the_dark_and_the_padding():
    image = torch.zeros(2, 1, 32, 32)
    image[0, :, :16, :16] = 1.0
    image[1, :, :, 16:] = 0.5
    box = torch.tensor([[0, 32, 0, 32], [16, 32, 0, 32]])
    points, used = content_prompts(image, box, 4, share=0.2)
    asked = [{tuple(point.tolist()) for point in points[row > 0]} for row in used]
    assert asked[0] == {(4.0, 4.0), (12.0, 4.0), (4.0, 12.0), (12.0, 12.0)}
    assert asked[1] == {(20.0, 20.0), (28.0, 20.0), (20.0, 28.0), (28.0, 28.0)}
    assert len(points) == 8


def test_without_a_share_content_is_the_grid_on_the_scan():
    points, used = content_prompts(torch.zeros(1, 1, 32, 32), WHOLE, 4, share=0.0)
    assert torch.equal(points, grid_points(4, 32))
    assert used.all()


def test_no_content_at_all_still_gives_a_point_that_nobody_uses():
    points, used = content_prompts(torch.rand(1, 1, 32, 32), torch.tensor([[0, 1, 0, 1]]), 4)
    assert points.shape == (1, 2)
    assert used.eq(0).all()


def test_peaks_are_the_highest_of_each_present_class_inside_the_scan():
    cam = torch.zeros(2, 2, 8, 8)
    cam[0, 0, 1, 2], cam[0, 0, 5, 6], cam[0, 0, 1, 3] = 0.9, 0.8, 0.7  # the last is beside the first
    cam[0, 1, 4, 4] = 1.0  # of a class that is absent
    cam[1, 0, 7, 0], cam[1, 1, 3, 3] = 1.0, 1.0  # the first lies in the padding
    label = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    box = torch.tensor([[0, 32, 0, 32], [0, 32, 8, 32]])
    points, used = peak_prompts(cam, label, box, 32, peaks=2)
    first = points[0][used[0] > 0]
    assert first.tolist() == [[10.0, 6.0], [26.0, 22.0]]
    second = {tuple(point) for point in points[1][used[1] > 0].tolist()}
    assert (14.0, 14.0) in second
    assert (2.0, 30.0) not in second
    assert all(x >= 8 for x, _ in second)


def test_slices_without_a_class_use_no_peak():
    points, used = peak_prompts(torch.rand(2, 1, 8, 8), torch.zeros(2, 1), WHOLE.expand(2, 4), 32)
    assert points.shape == (2, 1, 2)
    assert used.eq(0).all()
