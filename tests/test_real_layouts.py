"""BraTS and AbdomenCT-1K as they are downloaded, from ../shared: found, prepared, drawn."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_modules.abdomen import AbdomenCT1K
from data_modules.brats import BraTS2019
from weakmedsam.frames import to_native
from weakmedsam.pictures import draw_contours, most_telling_slice

SHARED = Path(__file__).parents[2] / "shared/data"
SETS = {
    "brats": (BraTS2019, SHARED, SHARED / "MICCAI_BraTS_2019_Data_Training"),
    "abdomen": (AbdomenCT1K, SHARED / "AbdomenCT-1K", SHARED / "AbdomenCT-1K"),
}


@pytest.mark.parametrize("name", SETS)
def test_the_downloaded_layout_is_prepared_and_its_contours_lie_on_the_organs(tmp_path, name):
    made, root, there = SETS[name]
    if not there.is_dir():
        pytest.skip(f"no scans in {there}")
    module = made(
        str(root), store_dir=str(tmp_path), image_size=128, split_fractions=(0, 0, 1), split_file=None,
        num_workers=0, prepare_workers=1,
    )  # fmt: skip
    module.prepare_data()
    module.setup("test")
    volume = next(iter(module.test_dataloader()))
    mask = volume["mask"]
    assert mask.unique().tolist() == list(range(len(module.class_names) + 1))
    native = to_native(volume["image"], volume["frame"])[:, 0]
    assert native.shape == mask.shape
    # Fat and air lie around organs, and FLAIR is bright in a tumour: a shifted or turned mask would not show it.
    inside, near = native[mask > 0].mean(), native[torch.roll(mask, (40, 40), (1, 2)) > 0].mean()
    assert inside > near + 0.1
    z = most_telling_slice(mask, mask)
    png = draw_contours(native[z], torch.zeros_like(mask[z]), mask[z], volume["spacing"], volume["case"])
    picture = np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)
    assert (
        (picture[..., 1] - picture[..., 0] > 150) & (picture[..., 1] - picture[..., 2] > 150)
    ).any()  # a contour
