import pytest
import torch
from tiny import TinyBackbone

from weakmedsam.backbones.efficient_sam import EfficientSAM
from weakmedsam.backbones.pocket import Pocket
from weakmedsam.backbones.prompting import best_candidate, decode_points
from weakmedsam.errors import ConfigError


def test_three_images_times_five_points_equal_fifteen_single_calls_of_segment_anything():
    torch.manual_seed(0)
    model = Pocket(weights="none").eval()
    embedding, points = torch.randn(3, 128, 32, 32), torch.rand(5, 2) * 128
    with torch.no_grad():
        logits, quality = decode_points(model.prompt_encoder, model.mask_decoder, embedding, points, chunk=4)
        for b in range(3):
            for p in range(5):
                prompt = points[p].view(1, 1, 2) - 0.5, torch.ones(1, 1)
                sparse, dense = model.prompt_encoder(points=prompt, boxes=None, masks=None)
                pe = model.prompt_encoder.get_dense_pe()
                one, score = model.mask_decoder.predict_masks(embedding[b : b + 1], pe, sparse, dense)
                assert torch.allclose(logits[b, p], one[0], atol=1e-5)
                assert torch.allclose(quality[b, p], score[0], atol=1e-5)


def test_points_of_each_image_go_to_that_image():
    torch.manual_seed(0)
    model = Pocket(weights="none").eval()
    embedding, points = torch.randn(2, 128, 32, 32), torch.rand(2, 3, 2) * 128
    with torch.no_grad():
        both, _ = decode_points(model.prompt_encoder, model.mask_decoder, embedding, points)
        second, _ = decode_points(model.prompt_encoder, model.mask_decoder, embedding[1:], points[1])
    assert torch.allclose(both[1], second[0], atol=1e-5)


def test_the_best_candidate_comes_with_its_own_quality():
    logits, quality = torch.randn(2, 3, 4, 5, 6), torch.rand(2, 3, 4)
    masks, best = best_candidate(logits, quality)
    for b in range(2):
        for p in range(3):
            t = int(quality[b, p].argmax())
            assert torch.equal(masks[b, p], logits[b, p, t])
            assert best[b, p] == quality[b, p, t]


def test_points_of_each_image_are_decoded_in_parts_of_any_size():
    torch.manual_seed(0)
    model = EfficientSAM(64, size="tiny", weights="none", encode_size=64, points_per_call=2).eval()
    points = torch.rand(2, 3, 2) * 64
    with torch.no_grad():
        embedding = model.encode(torch.rand(2, 1, 64, 64)).embedding
        masks, quality = model.prompted(embedding, points)
        model.points_per_call = 16
        other, score = model.prompted(embedding, points)
    assert torch.allclose(masks, other, atol=1e-4)
    assert torch.allclose(quality, score, atol=1e-5)


def test_a_backbone_without_a_quality_says_so():
    with pytest.raises(ConfigError, match="tiny predicts no quality of its masks; set min_quality to 0"):
        TinyBackbone().prompted(torch.zeros(1, 16, 8, 8), torch.zeros(1, 2))
