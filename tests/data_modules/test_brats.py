import shutil
from pathlib import Path

import pytest
from data_settings import data_settings

from data_modules.brats import BraTS2019
from tests.fakes import fake_brats
from weakmedsam.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("doubled", [False, True])
def test_both_endings_and_a_doubled_root_are_read(tmp_path, ending, doubled):
    fake_brats(tmp_path, ending=ending, doubled=doubled)
    for root in (tmp_path, tmp_path / "MICCAI_BraTS_2019_Data_Training"):
        cases = BraTS2019(str(root)).find_cases()
        assert [case.name for case in cases] == [f"BraTS19_FAKE_{n}_1" for n in range(4)]
        assert all(case.problem is None and case.image.endswith(f"_flair{ending}") for case in cases)
        assert all(str(case.mask).endswith(f"_seg{ending}") for case in cases)


def test_only_the_chosen_modality_must_be_there(tmp_path):
    fake_brats(tmp_path)
    assert BraTS2019(str(tmp_path), "t1ce").find_cases()[0].image.endswith("_t1ce.nii.gz")
    with pytest.raises(DataError, match=r"lacks BraTS19_FAKE_0_1_t2\.nii\.gz"):
        BraTS2019(
            str(tmp_path), "t2", **data_settings(prepare__store_dir=str(tmp_path / "s"), prepare__workers=1)
        ).prepare_data()


def test_modalities_have_stores_of_their_own(tmp_path):
    assert BraTS2019(str(tmp_path), "flair").store != BraTS2019(str(tmp_path), "t1ce").store


def test_whole_tumour_is_all_three_values_and_the_hash_splits_a_part_of_the_set(tmp_path):
    fake_brats(tmp_path)
    module = BraTS2019(
        str(tmp_path),
        image_size=32,
        num_workers=0,
        **data_settings(prepare__store_dir=str(tmp_path / "s"), prepare__workers=1),
    )
    module.prepare_data()
    module.setup("fit")
    assert module.class_names == ["tumour"]
    assert sorted(module.split.values()) == ["test", "train", "train", "val"]
    assert module.train_labels().sum() == 2 * 4
    parts = BraTS2019(
        str(tmp_path),
        classes={"oedema": [2], "enhancing": [4]},
        image_size=32,
        **data_settings(prepare__store_dir=str(tmp_path / "s"), prepare__workers=1),
    )
    parts.prepare_data()
    parts.setup("fit")
    assert parts.train_labels().shape == (12, 2)


@pytest.mark.parametrize("inner", ["{name}", "anything_{part}.nii"])
def test_a_copy_with_a_folder_for_each_file_is_read(tmp_path, inner, caplog):
    top = fake_brats(tmp_path, ending=".nii") / "MICCAI_BraTS_2019_Data_Training"
    for path in [p for p in top.rglob("BraTS19_*.nii") if not p.name.startswith(".")]:
        place = path.with_name(path.name + "x")
        place.mkdir()
        path.rename(place / inner.format(name=path.name, part=path.name.split("_")[-1][:-4]))
        place.rename(path)
    (top / "HGG").rename(top / "hgg")
    cases = BraTS2019(str(tmp_path)).find_cases()
    assert [case.name for case in cases] == [f"BraTS19_FAKE_{n}_1" for n in range(4)]
    assert all(case.problem is None and Path(case.image).is_file() and Path(case.mask).is_file() for case in cases)
    assert caplog.text == ""


def test_links_two_of_a_name_and_files_of_other_names(tmp_path, caplog):
    caplog.set_level("INFO")
    fake_brats(tmp_path / "real")
    high = tmp_path / "real/MICCAI_BraTS_2019_Data_Training/HGG"
    (tmp_path / "data/HGG").mkdir(parents=True)
    for folder in high.iterdir():
        (tmp_path / "data/HGG" / folder.name).symlink_to(folder)
    (tmp_path / "data/round").symlink_to(tmp_path / "data")
    name = "BraTS19_FAKE_1_1"
    (high / name / f"{name}_FLAIR.NII").touch()
    (high / name / f"{name}_flair.nrrd").touch()
    (high / name / f"{name}_flair (1).nii.gz").touch()
    first, second = BraTS2019(str(tmp_path / "data")).find_cases()
    assert "has the same name" in first.problem
    assert second.problem is None
    assert f"2 name(s): HGG/{name}/{name}_flair.nrrd" in caplog.text


def test_a_case_twice_and_no_case_are_refused(tmp_path):
    with pytest.raises(DataError, match="MICCAI_BraTS_2019_Data_Training"):
        BraTS2019(str(tmp_path)).find_cases()
    fake_brats(tmp_path, cases=1)
    top = tmp_path / "MICCAI_BraTS_2019_Data_Training"
    shutil.copytree(top / "LGG", top / "copy" / "LGG")
    with pytest.raises(DataError, match="Two cases are named"):
        BraTS2019(str(tmp_path)).find_cases()


def test_the_real_layout_is_found():
    if not (SHARED / "MICCAI_BraTS_2019_Data_Training").is_dir():
        pytest.skip("no real BraTS scans in ../shared/data")
    cases = BraTS2019(str(SHARED)).find_cases()
    assert len(cases) == 4
    assert all(case.problem is None for case in cases)
