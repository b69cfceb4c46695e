"""BraTS and AbdomenCT-1K as they are downloaded, from ../shared: found, prepared, drawn."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from data_settings import data_settings
from PIL import Image

from data_modules.abdomen import AbdomenCT1K
from data_modules.brats import BraTS2019
from weakmedsam.figures import draw_contours, most_telling_slice
from weakmedsam.geometry import to_native

SHARED = Path(__file__).parents[3] / "shared/data"
SETS = {
    "brats": (BraTS2019, SHARED, SHARED / "MICCAI_BraTS_2019_Data_Training"),
    "abdomen": (AbdomenCT1K, SHARED / "AbdomenCT-1K", SHARED / "AbdomenCT-1K"),
}


SHIFT = 6
"""Pixels of the scan that a mask is moved to see that it was in its place."""


def edge_under(image, mask):
    """Mean slope of the grey values, per pixel, under the outlines of the classes."""
    slope = torch.stack(torch.gradient(image, dim=(1, 2))).norm(dim=0)
    outline = torch.zeros_like(mask, dtype=torch.bool)
    outline[:, :, 1:] |= mask[:, :, 1:] != mask[:, :, :-1]
    outline[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    return slope[outline].mean()


@pytest.mark.parametrize("name", SETS)
def test_the_downloaded_layout_is_prepared_and_its_contours_lie_on_the_organs(tmp_path, name):
    made, root, there = SETS[name]
    if not there.is_dir():
        pytest.skip(f"no scans in {there}")
    module = made(
        str(root),
        image_size=128,
        num_workers=0,
        **data_settings(
            prepare__store_dir=str(tmp_path), split__fractions=(0, 0, 1), split__file=None, prepare__workers=1
        ),
    )
    module.prepare_data()
    module.setup("test")
    volume = next(iter(module.test_dataloader()))
    mask = volume["mask"]
    assert mask.unique().tolist() == list(range(len(module.class_names) + 1))
    native = to_native(volume["image"], volume["frame"])[:, 0]
    assert native.shape == mask.shape
    # Organs and tumours end where the image changes; under a mirrored mask, or one a little aside, it does less.
    slope = edge_under(native, mask)
    for axis in (1, 2):
        assert slope > edge_under(native, mask.flip(axis))
        for pixels in (-SHIFT, SHIFT):
            assert slope > edge_under(native, torch.roll(mask, pixels, axis)), (axis, pixels)
    z = most_telling_slice(mask, mask)
    png = draw_contours(native[z], torch.zeros_like(mask[z]), mask[z], volume["spacing"], volume["case"])
    picture = np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)
    assert ((picture[..., 1] - picture[..., 0] > 150) & (picture[..., 1] - picture[..., 2] > 150)).any()  # a contour
