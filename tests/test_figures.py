"""Pictures: they are written, and what they outline is where they outline it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from weakmedsam.contracts import IGNORE
from weakmedsam.figures import PictureRow, draw_contours, draw_grid, mark_changes, most_telling_slice

SIDE = 16


def row(mask, pseudo_label=None):
    """A black slice; its maps are on a coarser grid, as in a run."""
    coarse = np.zeros((4, 4), np.float32)
    label = np.zeros((SIDE, SIDE), np.uint8) if pseudo_label is None else pseudo_label
    image = np.zeros((SIDE, SIDE), np.float32)
    return PictureRow("case 1, slice 3\nliver", image, coarse, coarse + 0.5, coarse, label, mask)


def box(top, bottom, left, right, side=SIDE):
    ids = np.zeros((side, side), np.uint8)
    ids[top:bottom, left:right] = 1
    return ids


def extent(inside):
    """First and last row, first and last column, in pixels of the picture."""
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    return np.array([rows[0], rows[-1], columns[0], columns[-1]])


def read(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


# Grid


@pytest.mark.parametrize(("masks", "panels"), [((None,), 5), ((box(2, 5, 1, 9),), 6), ((None, box(2, 5, 1, 9)), 6)])
def test_grid_has_a_line_per_row_and_a_panel_per_step(tmp_path, masks, panels):
    path = tmp_path / "new" / "grid.png"
    draw_grid([row(mask) for mask in masks], path)
    picture = read(path)
    assert picture.shape[1] == pytest.approx(panels * 168, abs=2)
    assert picture.shape[0] == pytest.approx(len(masks) * 180 + 20, abs=2)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
    green = (picture[..., 1] - picture[..., [0, 2]].max(-1)) > 80
    assert green.any() == (panels == 6)


def test_the_second_column_is_headed_by_what_it_shows(tmp_path):
    pictures = []
    for start in ("class activation", "prediction"):
        draw_grid([row(None)._replace(start=start)], tmp_path / "grid.png")
        pictures.append(read(tmp_path / "grid.png"))
    rows, columns = np.nonzero(np.ptp(np.stack(pictures), axis=(0, -1)) > 40)
    assert rows.max() < 24
    assert 168 < columns.min() < columns.max() < 2 * 168 + 5


def test_a_last_panel_marks_what_refinement_corrected_and_broke(tmp_path):
    before, after, mask = box(0, 8, 0, 8), box(0, 8, 4, 12), box(0, 8, 4, 16)
    before[15, 15] = after[15, 14] = 1
    mask[15] = IGNORE
    colours = mark_changes(before, after, mask)
    shown = colours[..., 3] > 0
    green, red = shown & (colours[..., 1] > 0.8), shown & (colours[..., 0] > 0.8)
    assert (green == ((box(0, 8, 0, 4) + box(0, 8, 8, 12)) > 0)).all()
    assert not red.any()
    worse = mark_changes(after, before, mask)
    assert ((worse[..., 0] > 0.8) == green).all()
    path = tmp_path / "grid.png"
    draw_grid([row(mask, after)._replace(unrefined=before)], path)
    picture = read(path)
    assert picture.shape[1] == pytest.approx(7 * 168, abs=2)
    last = picture[:, 6 * 168 :]
    assert ((last[..., 1] - last[..., [0, 2]].max(-1)) > 80).any()


# Each near another corner: a flip, a shift by half a pixel (5 of the picture's) or a stretch is seen.
@pytest.mark.parametrize(
    ("corners", "finer"), [((1, 4, 2, 9), 1), ((11, 15, 1, 5), 1), ((9, 14, 8, 15), 2), ((0, 16, 5, 6), 1)]
)
def test_the_green_outline_lies_on_the_border_of_the_expert_mask(tmp_path, corners, finer):
    mask = box(*(finer * corner for corner in corners), side=finer * SIDE)
    draw_grid([row(mask, pseudo_label=box(*corners))], tmp_path / "grid.png")
    picture = read(tmp_path / "grid.png")
    width = picture.shape[1]
    fifth = picture[:, round(0.68 * width) : round(0.83 * width)]
    red, green, blue = fifth[..., 0], fifth[..., 1], fifth[..., 2]
    outline, filled = (green - np.maximum(red, blue)) > 80, (red - green > 20) & (green - blue > 40)
    # A tall box has no outline above and below, where it meets the border of the slice.
    sides = slice(2, 4) if corners[0] == 0 else slice(0, 4)
    assert np.abs(extent(outline) - extent(filled))[sides].max() <= 2


def test_an_outline_leaves_the_panels_as_they_are(tmp_path):
    pictures = []
    for mask in (np.zeros((SIDE, SIDE), np.uint8), box(1, 4, 2, 9)):
        draw_grid([row(mask)], tmp_path / "grid.png")
        pictures.append(read(tmp_path / "grid.png"))
    grey = [np.ptp(picture, axis=-1) < 10 for picture in pictures]
    both = grey[0] & grey[1]
    assert both.mean() > 0.9
    np.testing.assert_allclose(pictures[0][both], pictures[1][both], atol=9)


# Contours


def test_picture_shows_the_largest_truth_and_is_drawn_for_empty_slices_too():
    truth = torch.zeros(4, 8, 8, dtype=torch.uint8)
    truth[2, :3, :3], truth[1, 0, 0] = 1, 1
    assert most_telling_slice(torch.zeros_like(truth), truth) == 2
    assert most_telling_slice(truth, torch.zeros_like(truth)) == 2
    assert most_telling_slice(torch.zeros_like(truth), torch.zeros_like(truth)) == 2
    png = draw_contours(torch.zeros(8, 8), torch.zeros(8, 8), torch.zeros(8, 8), (1.0, 1.0, 1.0), "nothing")
    assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [20, 56, 62])
def test_a_title_of_two_lines_is_whole_whatever_the_pictures_proportions(width):
    box = torch.zeros(128, 128, dtype=torch.uint8)
    box[40:90, 40 : 40 + width] = 1
    png = draw_contours(torch.rand(128, 128), box, box, (1.0, 1.0, 1.0), "case, slice 9\nDice lesion 0.37")
    assert (read(io.BytesIO(png))[:4, :, :3] > 250).all()


def test_contours_are_of_truth_in_green_and_of_the_prediction_in_magenta():
    # Rows are twice as far apart as columns.
    truth, prediction = torch.zeros(2, 40, 40, dtype=torch.uint8)
    truth[10:20, 8:18], prediction[10:20, 22:32] = 1, 2
    png = draw_contours(torch.zeros(40, 40), prediction, truth, (1.0, 2.0, 1.0), "two")
    picture = read(io.BytesIO(png))[60:-60]
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    lime, magenta = green - np.maximum(red, blue) > 120, np.minimum(red, blue) - green > 120
    true, predicted = extent(lime), extent(magenta)
    np.testing.assert_allclose(true[:2], predicted[:2], atol=1)
    assert true[3] < predicted[2]
    height, width = true[1] - true[0], true[3] - true[2]
    assert height == pytest.approx(2 * width, rel=0.05)
    # 14 columns from one to the other, of which each box is 10 wide.
    assert predicted[2] - true[2] == pytest.approx(1.4 * width, rel=0.05)
