"""Which scans are found, of which formats, and how cases are named."""

import numpy as np
import pydicom
import pytest
from fakes import RAS, draw_scan, save_nifti
from PIL import Image
from scan_formats import save, save_dicom, slice_of

from data_modules.scan_files import files_below, list_scans, scan_stem
from weakmedsam.errors import ConfigError, DataError

VOXELS = np.zeros((4, 3, 2), np.int16)


def series(folder, patient="P1", description="thorax", uid=None, **tags):
    """A DICOM series of two slices."""
    uid = uid or pydicom.uid.generate_uid()
    said = {"PatientID": patient, "SeriesDescription": description, "SeriesInstanceUID": uid}
    return save_dicom(folder, VOXELS, RAS, **said, **tags)


def named(root, place="images", **more):
    return {name: len(file.files) for name, file in list_scans(root, place, **more).files.items()}


def test_files_of_all_formats_and_folders_of_one_scan(tmp_path):
    root = tmp_path / "images"
    for name in ("a.nii.gz", "b.NRRD", "c.mha", "d.png", "e.tiff", "f.JPG", "g.raw", "notes.txt"):
        root.mkdir(exist_ok=True)
        (root / name).touch()
    save_nifti(root / "inside/deep/x.nii.gz", draw_scan(0)[0])
    series(root / "patient7/study/s1")
    (root / "stack").mkdir()
    for number in range(3):
        (root / f"stack/{number}.png").touch()
    assert named(tmp_path) == {
        **dict.fromkeys("abcdef", 0), "inside": 0, "patient7": 2, "stack": 3,
    }  # fmt: skip
    assert [scan_stem(name) for name in ("a.nii.gz", "b.Mhd", "c.v2.dcm", "d")] == ["a", "b", "c.v2", "d"]
    assert len(files_below(tmp_path, "images")) == 6 + 1 + 2 + 3


def test_dicom_is_grouped_by_series_in_any_folders_and_named_by_patient_and_description(tmp_path):
    flat = tmp_path / "images"
    first, second = (series(tmp_path / part, "P1", part) for part in ("t1 tse/axial", "T2"))
    third = series(tmp_path / "other", "P2", "T2")
    (flat / "export").mkdir(parents=True)
    for number, path in enumerate([*first, *second, *third]):
        path.rename(flat / ("export" if number % 2 else ".") / f"{number}")  # no ending, two folders
    found = list_scans(tmp_path, "images").files
    assert {name: len(file.files) for name, file in found.items()} == {"P1_t1_tse_axial": 2, "P1_T2": 2, "P2": 2}
    assert found["P2"].patient == "P2"
    assert found["P2"].title == "CT T2"
    assert named(tmp_path, series="ct t2*") == {"P1": 2, "P2": 2}
    with pytest.raises(DataError, match=r"no DICOM series fits 'MR' \(data\.series.*There are: CT T2, CT t1 tse/axial"):
        list_scans(tmp_path, "images", series="MR")


def test_names_are_told_apart_and_safe(tmp_path):
    series(tmp_path / "images", "../P 1", "a/b", SeriesNumber=1)
    series(tmp_path / "images/x/1", "../P 1", "a/b", SeriesNumber=2)
    series(tmp_path / "images/x/2", "../P 1", "a/b", SeriesNumber=2)
    assert sorted(named(tmp_path)) == ["P_1_a_b_1", "P_1_a_b_2", "P_1_a_b_2_2"]


def test_pictures_of_x_ray_are_scans_of_their_own_and_scouts_are_left_out(tmp_path):
    root = tmp_path / "images"
    for number in (1, 2):
        held = slice_of(np.zeros((4, 5), np.uint8), Modality="CR", SeriesInstanceUID="1.7", InstanceNumber=number)
        save(held, root / f"{number}.dcm")
    held = slice_of(np.zeros((4, 5), np.uint8), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.8")
    save(held, root / "scout.dcm")
    held = slice_of(np.zeros((4, 5), np.uint8), Rows=None, SeriesInstanceUID="1.9")
    save(held, root / "report.dcm")
    found = list_scans(tmp_path, "images")
    assert sorted(found.files) == ["P1_thorax_1_1", "P1_thorax_1_2"]
    assert [path.name for path in found.passed_over] == ["report.dcm", "scout.dcm"]


def test_previews_beside_dicom_are_passed_over(tmp_path):
    series(tmp_path / "images/p1/dicom", "P1")
    for name in ("preview.png", "mask.nii.gz"):
        (tmp_path / "images/p1" / name).touch()
    found = list_scans(tmp_path, "images")
    assert list(found.files) == ["p1"]
    assert sorted(path.name for path in found.passed_over) == ["mask.nii.gz", "p1"]


def test_what_is_wrong_with_a_series_is_a_problem_of_its_case(tmp_path):
    root = tmp_path / "images"
    for path in series(root / "a"):
        (root / "copy").mkdir(exist_ok=True)
        (root / "copy" / path.name).write_bytes(path.read_bytes())
    (root / "broken").mkdir()
    (root / "broken/1.dcm").write_bytes(b"<html>")
    found = list_scans(tmp_path, "images").files
    problems = {name: file.problem or "" for name, file in found.items()}
    assert "copy/IM0000.dcm: is a copy of the slice" in problems["P1"]
    assert "Remove one, or the folder that was copied" in problems["P1"]
    assert "does not begin as a DICOM file" in problems["broken"]


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    save_nifti(tmp_path / "elsewhere/x.nii.gz", draw_scan(0)[0])
    series(tmp_path / "elsewhere/dicom")
    root = tmp_path / "data"
    series(root / "images/good")
    (root / "images/a.nii.gz").symlink_to(tmp_path / "elsewhere/x.nii.gz")
    (root / "images/b").symlink_to(tmp_path / "elsewhere/dicom")
    (root / "images/good/c").symlink_to(tmp_path / "elsewhere")
    (root / "images/round").symlink_to(root)
    found = list_scans(root, "images").files
    said = {name: file.problem for name, file in found.items() if file.problem}
    assert set(said) == {"a", "b", "c"}, said
    assert [p for p in said.values() if "is a link out of" not in p or "Copy there what it leads to" not in p] == []
    assert list_scans(root, "images/*.nii.gz").files["a"].problem
    # The store of a DataLad repository may lie above the folder.
    store = tmp_path / ".git/annex/objects/9"
    store.parent.mkdir(parents=True)
    (tmp_path / "elsewhere/x.nii.gz").rename(store)
    (root / "images/a.nii.gz").unlink()
    (root / "images/a.nii.gz").symlink_to(store)
    assert list_scans(root, "images").files["a"].problem is None


def test_several_files_in_one_folder_are_listed_and_two_of_a_name_are_a_problem(tmp_path):
    for name in ("p1/t1.nii.gz", "p1/t2.nii.gz", "a.nii.gz", "a.nrrd"):
        save_nifti(tmp_path / "images" / name.replace(".nrrd", ".nii.gz"), draw_scan(0)[0])
    (tmp_path / "images/a.nrrd").touch()
    found = list_scans(tmp_path, "images")
    assert [path.name for path in found.passed_over] == ["t1.nii.gz", "t2.nii.gz"]
    assert "has the same name" in (found.files["a"].problem or "")


# Patterns


def test_stars_name_the_case(tmp_path):
    for name in (
        "sub-01/anat/sub-01_T1w",
        "sub-02/anat/sub-02_T1w",
        "sub-02/anat/sub-02_T2w",
        "flat_0000",
        "flat_0001",
    ):
        save_nifti(tmp_path / f"{name}.nii.gz", draw_scan(0)[0])
    assert list(named(tmp_path, "sub-*/anat/*_T1w.nii.gz")) == ["01_sub-01", "02_sub-02"]
    assert list(named(tmp_path, "sub-*/anat/sub-*_T1w.nii.gz")) == ["01", "02"]
    assert list(named(tmp_path, "**/sub-*_T2w.nii.gz")) == ["02"]
    assert list(named(tmp_path, "*_0000.nii.gz")) == ["flat"]
    assert list(named(tmp_path, "*/anat/*_T?w.nii.gz")) == ["sub-01", "sub-02"]
    assert "has the same name" in (list_scans(tmp_path, "*/anat/sub-*_T?w.nii.gz").files["sub-02_02"].problem or "")
    with pytest.raises(ConfigError, match=r"needs a \* that names the case"):
        list_scans(tmp_path, "**/sub-01_T1w.nii.gz")


def test_a_pattern_of_folders_takes_the_one_scan_in_each(tmp_path):
    for name in ("p1", "p2"):
        series(tmp_path / name / "t1", name)
        for number in range(2):
            (tmp_path / name / "pictures").mkdir(exist_ok=True)
            Image.new("L", (4, 3)).save(tmp_path / name / f"pictures/{number}.png")
    series(tmp_path / "p2/t1/more", "p2", "again")
    assert named(tmp_path, "*/pictures") == {"p1": 2, "p2": 2}
    assert named(tmp_path, "*/t1", series="* thorax") == {"p1": 2, "p2": 2}
    assert "p2/t1: holds 2 scans. Keep one" in (list_scans(tmp_path, "*/t1").files["p2"].problem or "")
    with pytest.raises(DataError, match="a DICOM series is found by its folder, not file by file"):
        list_scans(tmp_path, "*/t1/*.dcm")
    assert len(files_below(tmp_path, "*/pictures")) == 4


def test_what_is_left_out_is_no_scan_wherever_it_lies(tmp_path):
    series(tmp_path / "p1/dicom", "P1")
    mask = save_nifti(tmp_path / "p1/seg.nii.gz", draw_scan(0)[1])
    save_nifti(tmp_path / "masks/more/p2.nii.gz", draw_scan(0)[1])
    assert sorted(named(tmp_path, ".")) == ["masks", "p1"]
    assert sorted(named(tmp_path, ".", aside=[mask, tmp_path / "masks"])) == ["p1"]
    assert sorted(named(tmp_path, ".", aside=[mask, tmp_path / "masks/more"])) == ["p1"]


def test_a_case_has_a_name_that_can_be_a_folder(tmp_path):
    for name in ("_seg.nii.gz", "a_seg.nii.gz", "index.json_seg.nii.gz"):
        save_nifti(tmp_path / name, draw_scan(0)[0])
    found = list_scans(tmp_path, "*_seg.nii.gz").files
    assert sorted(found) == ["a", "index.json"]
    assert "cannot be named as a table or a note" in (found["index.json"].problem or "")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/index.json.nrrd").touch()
    assert "cannot be named as a table or a note" in (list_scans(tmp_path, "images").files["index.json"].problem or "")
