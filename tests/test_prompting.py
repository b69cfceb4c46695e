import torch

from weakmedsam.backbones.pocket import Pocket
from weakmedsam.backbones.prompting import decode_points


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
