import torch

from weakmedsam.backbones.pocket import Pocket
from weakmedsam.pretraining.grouping import Grouping, Sample
from weakmedsam.pretraining.scenes import draw_prompts, draw_scenes


def sample(values, owners):
    places = torch.linspace(0, 0.1, len(owners))[None, :, None].expand(1, -1, 2)
    return Sample(torch.tensor(values).view(1, -1, 1), torch.tensor(owners)[None], places)


def test_pieces_that_lie_apart_cost_less_than_pieces_that_lie_together():
    lesson = Grouping()
    apart = lesson._compare(sample([0.0, 0.1, 5.0, 5.1], [1, 1, 2, 2]), 0)
    together = lesson._compare(sample([0.0, 0.1, 0.0, 0.1], [1, 1, 2, 2]), 0)
    torn = lesson._compare(sample([0.0, 5.0, 0.1, 5.1], [1, 1, 2, 2]), 0)
    assert apart < together < torn


def test_both_kinds_of_pair_weigh_the_same_however_many_there_are():
    lesson = Grouping()
    few = lesson._compare(sample([0.0, 0.0, 3.0], [1, 1, 2]), 0)
    many = lesson._compare(sample([0.0] * 20 + [3.0], [1] * 20 + [2]), 0)
    assert torch.allclose(few, many, atol=1e-5)


def test_what_is_out_of_reach_is_not_compared():
    lesson = Grouping(reach=(0.4, 0.1))
    near = sample([0.0, 0.0], [1, 2])
    far = near._replace(places=torch.tensor([[[0.0, 0.0], [0.9, 0.0]]]))
    assert lesson._compare(near, 0) > lesson._compare(far, 0) + 1


def test_it_teaches_the_encoder_to_tell_pieces_apart():
    torch.manual_seed(0)
    model, lesson = Pocket(weights="none"), Grouping(cells=128, window=16)
    model.encoder.requires_grad_(True)
    asked = draw_prompts(draw_scenes(4, 0), 1, 0)
    optimizer = torch.optim.Adam([*model.encoder.parameters(), *lesson.parameters()], lr=1e-3)
    losses = []
    for _ in range(12):
        loss = lesson(model.embed(asked.image), asked.pieces, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model.encoder.detail.coarse.weight.grad.abs().max() > 0
    assert model.encoder.context.qkv.weight.grad.abs().max() > 0
