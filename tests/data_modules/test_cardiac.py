from pathlib import Path

import pytest
from data_settings import data_settings

from data_modules.cardiac import MSDCardiac
from tests.fakes import draw_scan, fake_cardiac, save_nifti
from weakmedsam.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_training_images_only_and_no_hidden_files(tmp_path):
    fake_cardiac(tmp_path)
    for root in (tmp_path, tmp_path / "Task02_Heart"):
        cases = MSDCardiac(str(root)).find_cases()
        assert [case.name for case in cases] == ["la_003", "la_004", "la_005", "la_006"]
        assert all(Path(case.image).parent.name == "imagesTr" and case.problem is None for case in cases)


def test_unpaired_files_are_named(tmp_path):
    task = fake_cardiac(tmp_path) / "Task02_Heart"
    (task / "labelsTr" / "la_004.nii.gz").unlink()
    save_nifti(task / "labelsTr" / "la_020.nii.gz", draw_scan(0)[1])
    with pytest.raises(
        DataError, match=r"(?s)2 of 5.*la_004\.nii\.gz: has no mask.*la_020\.nii\.gz: is a mask without"
    ):
        MSDCardiac(
            str(tmp_path),
            image_size=32,
            **data_settings(prepare__store_dir=str(tmp_path / "s"), prepare__workers=1),
        ).prepare_data()


def test_the_task_is_found_in_a_doubled_folder_and_among_others(tmp_path):
    fake_cardiac(tmp_path / "Task02_Heart")
    (tmp_path / "Task09_Spleen/imagesTr").mkdir(parents=True)
    assert len(MSDCardiac(str(tmp_path)).find_cases()) == 4
    (tmp_path / "Task02_Heart").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    with pytest.raises(DataError, match=r"(?s)there is: Task09_Spleen/.*Task02_Heart"):
        MSDCardiac(str(tmp_path)).find_cases()


def test_it_is_prepared(tmp_path):
    fake_cardiac(tmp_path)
    module = MSDCardiac(
        str(tmp_path),
        image_size=32,
        **data_settings(prepare__store_dir=str(tmp_path / "s"), prepare__workers=1),
    )
    module.prepare_data()
    module.setup("fit")
    assert module.class_names == ["left_atrium"]
    assert module.train_slices == 12


def test_no_data_says_the_layout(tmp_path):
    with pytest.raises(DataError, match=r"(?s)imagesTr.*medicaldecathlon"):
        MSDCardiac(str(tmp_path)).find_cases()


def test_the_real_layout_is_found():
    if not (SHARED / "Task02_Heart").is_dir():
        pytest.skip("no real heart scans in ../shared/data")
    assert len(MSDCardiac(str(SHARED)).find_cases()) == 40
