"""What is guessed of scans that nobody has described."""

from pathlib import Path

import numpy as np
import pytest
from fakes import draw_scan, save_nifti
from PIL import Image

from data_modules.survey import look_into
from weakmedsam.errors import DataError


def guessed(folder: Path) -> dict:
    return {key: guess.value for key, guess in look_into(folder).guesses.items()}


def test_the_plane_is_that_of_the_finest_pixels_and_sides_are_not_mirrored(tmp_path):
    for number in range(3):
        image, mask = draw_scan(number)
        save_nifti(tmp_path / f"d/images/s{number}.nii.gz", image, np.diag([1, 5, 1, 1.0]))
        save_nifti(tmp_path / f"d/masks/s{number}.nii.gz", mask, np.diag([1, 5, 1, 1.0]))
    (tmp_path / "d/dataset.json").write_text('{"labels": {"background": 0, "left kidney": 1}}')
    held = guessed(tmp_path / "d")
    assert (held["plane"], held["classes"], held["flip_columns"]) == ("coronal", {"left_kidney": [1]}, 0.0)


def test_several_volumes_and_pictures(tmp_path):
    for number in range(3):
        image, mask = draw_scan(number)
        save_nifti(tmp_path / f"four/images/s{number}.nii.gz", np.stack([image, image + 1], axis=-1))
        save_nifti(tmp_path / f"four/masks/s{number}.nii.gz", mask)
        for place in range(3):
            path = tmp_path / f"pictures/images/s{number}/{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[:, :, place].astype(np.uint8)).save(path)
    assert guessed(tmp_path / "four")["channel"] == 0
    held = guessed(tmp_path / "pictures")
    assert (held["images"], held["channel"], held["spacing"], held["classes"]) == (
        "images",
        None,
        None,
        {"target": [1]},
    )
    assert "files do not say it" in look_into(tmp_path / "pictures").guesses["spacing"].reason


def test_values_tell_ct_and_small_targets_lower_the_bar(tmp_path):
    for number in range(3):
        image, mask = draw_scan(number)
        image = np.where(image == 0, -1000, image)
        save_nifti(tmp_path / f"images/s{number}.nii.gz", image)
        save_nifti(tmp_path / f"masks/s{number}.nii.gz", mask * (np.indices(mask.shape)[0] < 3))
    held = guessed(tmp_path)
    assert (held["window"], held["percentiles"]) == ([40, 400], None)
    assert held["min_pixels"] == 3  # of 14


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("case,slice,note\ns0,0,x\n", "has no column of 0 and 1 beside case and slice"),
        ("case,slice,tumour\ns0,0\n", "line 2 has 2 cell"),
        ("case,slice,tumour\ns0,0,1\ns0,1,yes\ns0,2,0\n", "line 3, column tumour: 'yes' is no label"),
        ("case;slice;tumour\ns0;0;1\ns0;0;1\n", "line 3: case 's0' slice 0 has two rows"),
        ("case,class\ns0,tumour\ns0,none\n", "line 3: none contradicts line 2"),
        ("case,from,to,class\ns9,0,1,tumour\n", r"1 case\(s\) of its rows are not there"),
    ],
)
def test_a_table_with_faults_is_refused_as_in_training(tmp_path, table, said):
    save_nifti(tmp_path / "images/s0.nii.gz", draw_scan(0)[0])
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=rf"labels\.csv: .*{said}"):
        look_into(tmp_path)


def test_a_column_of_remarks_is_no_class(tmp_path):
    save_nifti(tmp_path / "images/s0.nii.gz", draw_scan(0)[0])
    rows = [f"s0,{k},{'' if k else 'blurred'},{k % 2}" for k in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(["case,slice,remark,tumour", *rows]))
    assert guessed(tmp_path)["classes"] == {"tumour": [1]}
