import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_modules.augmentation import (
    Augmentation,
    apply_geometry,
    apply_intensity,
    augment_batch,
    draw_parameters,
    sampling_grid,
)
from weakmedsam.contracts import IGNORE, SliceBatch
from weakmedsam.errors import ConfigError

WILD = Augmentation(
    flip_columns=0.5,
    flip_rows=0.5,
    rotation=45,
    shrink=0.6,
    translation=1,
    gamma=0.5,
    brightness=0.2,
    contrast=0.3,
    noise=0.1,
)
GEOMETRY = Augmentation(flip_columns=0.5, flip_rows=0.5, rotation=45, shrink=0.6, translation=1)


def make_batch(indices, size=32) -> SliceBatch:
    image = torch.stack([torch.rand(1, size, size, generator=torch.Generator().manual_seed(i)) for i in indices])
    target = (image[:, 0] > 0.5).long()
    return SliceBatch(
        image=image,
        label=torch.ones(len(indices), 1),
        index=torch.tensor(indices),
        case=[f"c{i}" for i in indices],
        slice=torch.tensor(indices),
        target=target,
        confidence=torch.full(target.shape, 0.7),
    )


def test_no_pixel_of_the_frame_ever_leaves_it():
    draws = draw_parameters(WILD, 0, 0, np.arange(5000))
    source = draws.to_source.double()
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    # to_source leads from the result to the slice; its inverse leads the slice's corners to the result.
    arrived = torch.linalg.solve(source[:, :, :2], (corners.T[None] - source[:, :, 2:]))
    assert arrived.abs().max() <= 1 + 1e-5
    # and the ranges are really used: some reach the border, some are small, some are turned over
    assert arrived.abs().amax(dim=(1, 2)).max() > 0.99
    assert torch.linalg.det(source[:, :, :2]).min() < -1 < 1 < torch.linalg.det(source[:, :, :2]).max()


def test_a_mark_in_the_corner_survives():
    image = torch.zeros(500, 1, 32, 32)
    image[:, :, :3, :3] = 1
    moved = apply_geometry(image, sampling_grid(draw_parameters(GEOMETRY, 1, 0, np.arange(500)), 32), "bilinear")
    assert (moved.amax(dim=(1, 2, 3)) > 0.5).all()


def test_a_draw_depends_on_seed_epoch_and_index_only():
    together = augment_batch(make_batch([3, 8, 5]), WILD, 0, 2)["image"]
    alone = augment_batch(make_batch([8]), WILD, 0, 2)["image"]
    torch.testing.assert_close(together[1:2], alone)
    for seed, epoch in ((1, 2), (0, 3)):
        assert not torch.allclose(augment_batch(make_batch([8]), WILD, seed, epoch)["image"], alone)
    assert not torch.allclose(
        draw_parameters(WILD, 0, 2, np.array([9])).to_source, draw_parameters(WILD, 0, 2, np.array([8])).to_source
    )


def test_the_default_changes_nothing():
    batch = make_batch([1, 2])
    same = augment_batch(batch, Augmentation(), 0, 0)
    torch.testing.assert_close(same["image"], batch["image"], atol=1e-5, rtol=0)
    torch.testing.assert_close(same["target"], batch["target"])
    torch.testing.assert_close(same["confidence"], batch["confidence"])


def test_a_mirror_is_a_mirror():
    batch = make_batch([1])
    mirrored = augment_batch(batch, Augmentation(flip_columns=1), 0, 0)
    torch.testing.assert_close(mirrored["image"], batch["image"].flip(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(mirrored["target"], batch["target"].flip(-1))
    upside_down = augment_batch(batch, Augmentation(flip_rows=1), 0, 0)
    torch.testing.assert_close(upside_down["image"], batch["image"].flip(-2), atol=1e-5, rtol=0)


def test_the_target_moves_with_the_image():
    batch = make_batch(list(range(20)))
    smooth = torch.linspace(0, 1, 32).expand(20, 1, 32, 32).contiguous()
    batch["image"], batch["target"] = smooth, (smooth[:, 0] * 250).round().long()
    moved = augment_batch(batch, GEOMETRY, 0, 0)
    inside = moved["target"] != IGNORE
    assert 0.3 < inside.float().mean() < 0.99
    # Half a pixel of nearest neighbour is 1/62 of the ramp; the border, blended with outside, is left out.
    core = torch.nn.functional.max_pool2d((~inside)[:, None].float(), 5, 1, 2)[:, 0] == 0
    assert (moved["image"][:, 0] - moved["target"] / 250)[core].abs().max() < 0.05
    assert (moved["confidence"][~inside] == 0).all()
    assert torch.allclose(moved["confidence"][inside], torch.tensor(0.7))
    assert set(moved) == set(batch)


def test_intensities_stay_in_range_and_follow_the_draw():
    image = torch.rand(4, 1, 8, 8)
    draws = draw_parameters(WILD, 0, 0, np.arange(4))
    changed = apply_intensity(image, draws)
    assert changed.min() >= 0
    assert changed.max() <= 1
    only_gamma = draw_parameters(Augmentation(gamma=1), 0, 0, np.arange(4))
    torch.testing.assert_close(apply_intensity(image, only_gamma), image ** only_gamma.gamma[:, None, None, None])


@pytest.mark.parametrize(
    "wrong", [{"shrink": 1.2}, {"shrink": 0}, {"translation": 2}, {"flip_rows": -1}, {"rotation": -5}]
)
def test_ranges_that_could_crop_or_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"augment.{next(iter(wrong))}"):
        Augmentation(**wrong)


def test_the_scan_moves_with_the_image_and_padding_stays_padding():
    box = torch.tensor([[8, 24, 0, 32]]).expand(6, 4)
    batch = make_batch(list(range(6)))
    batch["box"] = box
    batch["image"][:, :, :8] = 0
    batch["image"][:, :, 24:] = 0
    batch["image"][:, :, 8:24] = 1
    changed = augment_batch(batch, GEOMETRY, 0, 0)
    assert changed["scan"].shape == (6, 1, 32, 32)
    inside, outside = changed["image"][changed["scan"]], changed["image"][~changed["scan"]]
    assert (inside >= 0.45).float().mean() > 0.99  # a half at the border itself, by interpolation
    assert (outside <= 0.55).float().mean() > 0.99
    same = augment_batch(batch, Augmentation(), 0, 0)
    assert same["scan"][:, :, 8:24].all()
    assert not same["scan"][:, :, :8].any()


def step_by_step(batch, ranges, seed, epoch):
    """The same without shortcuts: a new array at each step, a channel at a time. The grid has its own test."""
    draws, image = draw_parameters(ranges, seed, epoch, batch["index"].numpy()), batch["image"]
    grid = sampling_grid(draws, image.shape[-1]).contiguous()

    def move(values, mode):
        return F.grid_sample(values, grid, mode=mode, padding_mode="zeros", align_corners=False)

    parts = (draws.gamma, draws.brightness, draws.contrast, draws.noise)
    gamma, brightness, contrast, deviation = (part[:, None, None, None] for part in parts)
    moved = move(image, "bilinear")
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    changed = ((moved - mean) * contrast + mean + brightness).clamp(0, 1) ** gamma
    generators = [torch.Generator().manual_seed(number) for number in draws.noise_seeds]
    noise = torch.stack([torch.randn(image.shape[1:], generator=generator) for generator in generators])
    at, (top, bottom, left, right) = torch.arange(image.shape[-1]), batch["box"].T[:, :, None]
    box = ((at >= top) & (at < bottom))[:, :, None] & ((at >= left) & (at < right))[:, None]
    target = move((batch["target"] + 1).float()[:, None], "nearest")[:, 0].long()
    return {
        "image": (changed + deviation * noise).clamp(0, 1),
        "scan": move(box[:, None].float(), "nearest") > 0.5,
        "target": torch.where(target == 0, IGNORE, target - 1),
        "confidence": move(batch["confidence"][:, None], "nearest")[:, 0],
    }


@pytest.mark.parametrize("size", [32, 75])
def test_the_grid_is_that_of_torch(size):
    draws = draw_parameters(WILD, 3, 5, np.arange(16))
    wanted = F.affine_grid(draws.to_source, [16, 1, size, size], align_corners=False)
    torch.testing.assert_close(sampling_grid(draws, size), wanted, atol=5e-7, rtol=0)


@pytest.mark.parametrize("ranges", [WILD, GEOMETRY, Augmentation(), Augmentation(gamma=1, noise=0.2)])
def test_shortcuts_change_nothing(ranges):
    batch = make_batch(list(range(16)), size=64)
    batch["image"][:4, :, :20] = 0  # 0 to any power
    batch["image"][4:8, :, 20:] = 1
    edges = torch.randint(0, 32, (16, 4), generator=torch.Generator().manual_seed(1))
    batch["box"] = edges + torch.tensor([0, 32, 0, 32])
    before = {key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)}
    wanted, found = step_by_step(batch, ranges, 3, 5), augment_batch(batch, ranges, 3, 5)
    torch.testing.assert_close(found["image"], wanted["image"], atol=1e-6, rtol=0)
    for key in ("scan", "target", "confidence"):
        assert torch.equal(found[key], wanted[key]), key
    assert all(torch.equal(batch[key], value) for key, value in before.items())  # nothing in place outside
