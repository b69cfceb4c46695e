from pathlib import Path

import numpy as np
import pytest
from data_settings import data_settings

from data_modules.abdomen import AbdomenCT1K
from data_modules.cases import class_ids
from data_modules.store import read_case
from tests.fakes import draw_scan, fake_abdomen, save_nifti
from weakmedsam.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "AbdomenCT-1K"


def test_images_and_masks_are_paired_and_unlabelled_images_left_out(tmp_path):
    cases = AbdomenCT1K(str(fake_abdomen(tmp_path, unlabelled=3))).find_cases()
    assert [case.name for case in cases] == ["Case_00001", "Case_00002", "Case_00297", "Case_00928"]
    for case in cases:
        assert Path(case.image).name == f"{case.name}_0000.nii.gz"
        assert Path(str(case.mask)).name == f"{case.name}.nii.gz"


def test_one_scan_under_two_numbers_is_one_patient(tmp_path):
    patients = {case.name: case.patient for case in AbdomenCT1K(str(fake_abdomen(tmp_path))).find_cases()}
    assert patients["Case_00928"] == patients["Case_00297"]
    assert len(set(patients.values())) == 3


def test_a_mask_without_its_image_and_a_doubled_image_are_named(tmp_path):
    root = fake_abdomen(tmp_path)
    save_nifti(root / "Mask" / "Case_00050.nii.gz", draw_scan(0)[1])
    save_nifti(root / "part2" / "Case_00002_0000.nii.gz", draw_scan(0)[0])
    module = AbdomenCT1K(
        str(root), image_size=32, **data_settings(prepare__store_dir=str(tmp_path / "s"), prepare__workers=1)
    )
    with pytest.raises(DataError, match=r"(?s)2 of 5.*Case_00002 is there more.*Case_00050\.nii\.gz: has no image"):
        module.prepare_data()


def test_other_names_are_listed_and_what_the_program_wrote_is_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    root = fake_abdomen(tmp_path)
    first = root / "AbdomenCT-1K-ImagePart1/AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz"
    for path in (
        "out/provenance/predict.yaml",
        "Case_00003_0000.nii.bz2",
        "liver_1.nii.gz",
        "out/picture.png",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    (root / "out/Case_00001_0000.nii.gz").write_bytes(first.read_bytes())
    first.rename(first.with_name("CASE_00001_0000.NII.GZ"))
    (root / "elsewhere").symlink_to(root / "Mask")
    cases = AbdomenCT1K(str(root)).find_cases()
    assert [case.problem for case in cases] == [None] * 4
    assert "2 name(s): liver_1.nii.gz, Case_00003_0000.nii.bz2" in caplog.text
    assert "folders left out (written by this program): out/" in caplog.text


def test_the_window_is_in_hu_and_a_false_spacing_is_told(tmp_path, caplog):
    root = fake_abdomen(tmp_path, unlabelled=0)
    image, mask = draw_scan(5, (1, 2, 3, 4))
    save_nifti(root / "part2" / "Case_00005_0000.nii.gz", (image - 400).astype(np.int16), np.eye(4))
    save_nifti(root / "Mask" / "Case_00005.nii.gz", mask, np.eye(4))
    module = AbdomenCT1K(
        str(root), image_size=32, **data_settings(prepare__store_dir=str(tmp_path / "s"), prepare__workers=1)
    )
    module.prepare_data()
    assert "Case_00005" in caplog.text
    assert "Case_00001" not in caplog.text
    module.setup("fit")
    entry = module.entries["Case_00005"]
    assert (entry.low, entry.high, entry.window_rule) == (-160, 240, "level 40, width 400")
    assert module.num_classes == 4


def test_a_part_of_the_classes_may_be_chosen(tmp_path):
    root = fake_abdomen(tmp_path)
    module = AbdomenCT1K(str(root), classes={"spleen": [3]}, image_size=32)
    assert class_ids(module.classes) == {3: 1}
    arrays = read_case(module.find_cases()[0], module.spec)
    assert arrays.mask_native is not None
    assert int((arrays.mask_native == 1).sum()) == int((draw_scan(1, (1, 2, 3, 4))[1] == 3).sum())


def test_no_data_says_the_layout(tmp_path):
    with pytest.raises(DataError, match=r"Mask/Case_00001\.nii\.gz"):
        AbdomenCT1K(str(tmp_path)).find_cases()


def test_the_real_layout_lies_as_a_body_does():
    if not SHARED.is_dir():
        pytest.skip("no real CT in ../shared/data")
    module = AbdomenCT1K(str(SHARED), image_size=64)
    mask = read_case(AbdomenCT1K(str(SHARED)).find_cases()[0], module.spec).mask
    assert mask is not None
    # (slice, row, column) of the centres of liver, kidneys and spleen
    centre = {organ: np.argwhere(mask == organ).mean(axis=0) for organ in (1, 2, 3)}
    assert centre[1][2] < centre[3][2]  # the liver is at the picture's left, the spleen at its right
    assert centre[1][1] < centre[2][1]  # the liver reaches further forward, up, than the kidneys
