import torch

from weakmedsam.cam import class_activation_map, inside_box, min_max, min_max_inside


def test_min_max_spans_zero_to_one_and_keeps_order():
    maps = torch.tensor([[[[-3.0, 1.0], [5.0, 0.0]]]])
    assert torch.allclose(min_max(maps), torch.tensor([[[[0.0, 0.5], [1.0, 0.375]]]]))


def test_constant_map_becomes_zero_not_nan():
    assert min_max(torch.full((1, 1, 3, 3), 7.0)).eq(0).all()


def test_activation_is_the_heads_weights_at_every_cell():
    features = torch.zeros(1, 2, 2, 2)
    features[0, 0] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    features[0, 1] = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    cam = class_activation_map(features, torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]))
    assert cam.shape == (1, 3, 2, 2)
    assert cam[0, 0, 0, 0] == 1
    assert cam[0, 1, 1, 1] == 1
    # No ReLU: the most negative cell is 0, a cell without evidence lies between.
    assert torch.allclose(cam[0, 2], torch.tensor([[0.0, 1 / 3], [1 / 3, 1.0]]))


def test_cells_inside_are_those_whose_centre_is_on_the_scan():
    inside = inside_box(torch.tensor([[2, 6, 0, 8], [0, 8, 3, 4]]), 8, 4)
    assert inside[0, 0, :, 0].tolist() == [False, True, True, False]
    assert inside[0, 0, 1].all()
    assert inside[1, 0, 0].tolist() == [False, True, False, False]


def test_padding_neither_scales_a_map_nor_lights_up():
    maps = torch.tensor([[[[9.0, 1.0], [-9.0, 3.0]]]])
    inside = torch.tensor([[[[False, True], [False, True]]]])
    assert torch.equal(min_max_inside(maps, inside), torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]))
