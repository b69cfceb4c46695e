import pytest
import torch
from segment_anything.modeling import TwoWayTransformer

from weakmedsam.backbones.pocket import Pocket
from weakmedsam.backbones.prompting import best_candidate, decode_points
from weakmedsam.backbones.two_way import attend_both_ways

IMAGES, PROMPTS, TOKENS, SIDE, WIDTH = 2, 3, 5, 4, 16


def random_transformer(depth: int, rate: int = 2) -> TwoWayTransformer:
    """Double precision; norms and biases far from their first values, which would hide a mistake."""
    torch.manual_seed(depth)
    transformer = TwoWayTransformer(depth, WIDTH, num_heads=4, mlp_dim=8, attention_downsample_rate=rate)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return transformer.double()


def random_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (IMAGES, WIDTH, SIDE, SIDE), (1, WIDTH, SIDE, SIDE), (IMAGES, PROMPTS, TOKENS, WIDTH)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def both(transformer, image, position, tokens):
    """(tokens, cells) of segment-anything, one pair of image and prompt at a time, and of ours."""
    theirs = [
        transformer(image[b : b + 1], position, tokens[b, p][None]) for b in range(IMAGES) for p in range(PROMPTS)
    ]
    theirs = [torch.cat(part).unflatten(0, (IMAGES, PROMPTS)) for part in zip(*theirs, strict=True)]
    rows = image.flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2)
    return theirs, attend_both_ways(transformer, *rows, tokens)


@pytest.mark.parametrize(("depth", "rate"), [(1, 2), (2, 2), (3, 1)])
def test_attention_both_ways_equals_segment_anything(depth, rate):
    theirs, ours = both(random_transformer(depth, rate), *random_inputs())
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_so_do_its_gradients():
    transformer, inputs = random_transformer(2), random_inputs()
    gradients = []
    for result in both(transformer, *(part.requires_grad_() for part in inputs)):
        loss = sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in result)
        # A key's bias moves no softmax; its gradient is zero there and absent here.
        wanted = [*inputs, *(p for name, p in transformer.named_parameters() if "k_proj.bias" not in name)]
        gradients.append(torch.autograd.grad(loss, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_in_bfloat16_the_masks_are_as_near_to_the_exact_ones_as_segment_anythings():
    torch.manual_seed(0)
    model = Pocket(weights="none").eval()
    prompts, decoder = model.prompt_encoder, model.mask_decoder
    embedding, points = torch.randn(2, 128, 32, 32), torch.rand(4, 2) * 128

    def theirs():
        sparse, dense = prompts(points=(points[:, None] - 0.5, torch.ones(4, 1)), boxes=None, masks=None)
        images = (decoder.predict_masks(one[None], prompts.get_dense_pe(), sparse, dense)[0] for one in embedding)
        return torch.stack(list(images))

    with torch.no_grad():
        exact = theirs()
        with torch.autocast("cpu", torch.bfloat16):
            rough, ours = theirs().float(), decode_points(prompts, decoder, embedding, points)[0].float()
    error = (rough - exact).abs().mean()
    assert 0 < (ours - exact).abs().mean() < 1.5 * error < 0.1 * exact.abs().mean()


def test_the_best_candidate_is_the_one_drawn():
    torch.manual_seed(0)
    model = Pocket(weights="none").eval()
    parts = model.prompt_encoder, model.mask_decoder, torch.randn(2, 128, 32, 32), torch.rand(5, 2) * 128
    with torch.no_grad():
        logits, quality = decode_points(*parts, candidates=slice(1, None))
        best, predicted = decode_points(*parts, candidates=slice(1, None), best=True)
        every, _ = decode_points(*parts)
    expected, highest = best_candidate(logits, quality)
    assert logits.shape == (2, 5, 3, 128, 128)
    assert torch.allclose(best.squeeze(2), expected, atol=1e-5)
    assert torch.allclose(predicted.squeeze(2), highest, atol=1e-6)
    assert torch.allclose(every[:, :, 1:], logits, atol=1e-5)
