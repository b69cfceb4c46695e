import pytest
import torch

from weakmedsam.classification.local_encoder import LocalEncoder
from weakmedsam.errors import ConfigError


def test_features_have_the_cells_asked_for_at_any_frame():
    for side in (16, 40, 64, 256):  # smaller than the frame, reduced to 32, equal, reduced
        encoder = LocalEncoder(side, frame=64, cells=8, width=12, members=3).eval()
        assert encoder.feature_dim == 36
        assert encoder(torch.rand(2, 1, side, side)).shape == (2, 36, 8, 8)


def test_a_member_is_what_it_would_be_alone():
    encoder = LocalEncoder(32, cells=8, width=8, members=3).eval()
    alone = LocalEncoder(32, cells=8, width=8, members=1).eval()
    image = torch.rand(2, 1, 32, 32)
    parts = []
    for member in range(3):
        with torch.no_grad():
            for ours, theirs in zip(alone.parameters(), encoder.parameters(), strict=True):
                ours.copy_(theirs.unflatten(0, (3, -1))[member])
            parts.append(alone(image))
    assert not torch.allclose(parts[0], parts[1], atol=1e-3)  # each has first weights of its own
    assert torch.allclose(encoder(image), torch.cat(parts, dim=1), atol=1e-5)


def test_a_cell_hears_nothing_from_farther_than_its_field():
    encoder = LocalEncoder(128, cells=16, field=0.64).eval()
    assert encoder.field == 82
    image = torch.rand(1, 1, 128, 128)
    for cell, first, last in ((0, 0, 45), (8, 27, 109)):  # 82 pixels about the cell's middle, 8 c + 4
        changed = torch.rand(1, 1, 128, 128)
        changed[..., first:last, :] = image[..., first:last, :]
        with torch.no_grad():
            before, after = encoder(image), encoder(changed)
            assert torch.equal(before[..., cell, :], after[..., cell, :])
            changed[..., first + 5 : last - 5, :] += 1
            assert not torch.equal(before[..., cell, :], encoder(changed)[..., cell, :])


@pytest.mark.parametrize(
    ("side", "field", "pixels"),
    [(64, 0.4, 22), (64, 0.84, 54), (128, 0.4, 50), (128, 0.6, 82), (240, 0.4, 50), (16, 0.4, 5)],
)
def test_what_a_cell_sees_is_the_nearest_to_a_share_of_the_frame(side, field, pixels):
    torch.manual_seed(0)  # of one in 200 every ReLU behind the cell is closed
    encoder = LocalEncoder(side, field=field, width=8).eval()
    assert encoder.field == pixels
    image = torch.rand(1, 1, encoder.side, encoder.side, requires_grad=True)
    encoder(image)[0, :, 8, 8].sum().backward()
    seen = image.grad[0, 0].abs().sum(0).nonzero().flatten()
    assert int(seen.max() - seen.min()) + 1 <= min(pixels, encoder.side)
    if pixels < encoder.side // 2:
        assert int(seen.max() - seen.min()) + 1 >= pixels - 2  # a ReLU may close


def test_mirroring_weights_and_image_mirrors_the_map():
    encoder = LocalEncoder(32, cells=8, width=8).eval()
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        there = encoder(image)
        for parameter in encoder.parameters():
            if parameter.ndim == 4:
                parameter.copy_(parameter.flip(3))
        # Only a map that lies in the middle of its cells comes back: with strides of 3 x 3 it does not.
        assert torch.allclose(encoder(image.flip(3)).flip(3), there, atol=1e-5)


def test_a_frame_that_cannot_be_halved_to_its_cells_is_refused():
    for arguments in ({"image_size": 8}, {"cells": 0}, {"cells": 256}):
        with pytest.raises(ConfigError, match=r"model\.local_encoder.*cells"):
            LocalEncoder(**{"image_size": 128, "frame": 128, "cells": 16, **arguments})
