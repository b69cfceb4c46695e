"""Where images and masks are taken to lie, in layouts of public data sets and of clinics."""

import re

import numpy as np
import pytest
from fakes import draw_scan, save_nifti
from scan_formats import save_dicom

from data_modules.folder_files import find_folder_cases
from data_modules.survey_layout import guess_layout

AXIAL = np.diag([-1.5, -2.0, 3.0, 1.0])


@pytest.mark.parametrize(
    ("layout", "images", "masks"),
    [
        ("{c}/{c}_t1.nii.gz {c}/{c}_flair.nii.gz {c}/{c}_seg.nii.gz", "*/*_flair.nii.gz", "*/*_seg.nii.gz"),
        ("{c}/anat/t1.nii.gz {c}/anat/t1_mask.nii.gz", "*/anat/t1.nii.gz", "*/anat/t1_mask.nii.gz"),
        ("s-{c}/anat/s-{c}_T1w.nii.gz s-{c}/anat/s-{c}_label.nii.gz", "*/anat/*_T1w.nii.gz", "*/anat/*_label.nii.gz"),
        ("imagesTr/{c}_0000.nii.gz imagesTr/{c}_0001.nii.gz labelsTr/{c}.nii.gz", "imagesTr/*_0000.nii.gz", "labelsTr"),
        ("imagesTr/{c}.nii.gz labelsTr/{c}.nii.gz imagesTs/x{c}.nii.gz", "imagesTr", "labelsTr"),
        ("{c}_ct.nii.gz {c}_label.nii.gz", "*_ct.nii.gz", "*_label.nii.gz"),
        ("images/{c}.nii images/x{c}.nii.gz masks/{c}.nii masks/x{c}.nii.gz", "images", "masks"),
        ("Images/{c}_0000.nii.gz Mask/{c}.nii.gz", "Images/*_0000.nii.gz", "Mask"),
        ("{c}_ct.nii.gz {c}_ct_label.nii.gz", "*_ct.nii.gz", "*_ct_label.nii.gz"),
        ("images/{c}.nii.gz labels/{c}_label.nii.gz", "images", "labels/*_label.nii.gz"),
        ("{c}/x{c}y.nii.gz masks/{c}.nii.gz", "*/x*y.nii.gz", "masks"),
    ],
)  # fmt: skip
def test_layouts_of_public_data_sets_are_understood(tmp_path, layout, images, masks):
    root = tmp_path / "d"
    for number in range(4):
        case = f"pat{'abcd'[number]}"
        for name in layout.format(c=case).split():
            is_mask = re.search("seg|mask|label", name.lower()) is not None
            save_nifti(root / name, draw_scan(number)[1 if is_mask else 0])
    found, reasons = guess_layout(root)
    assert (found.images, found.masks, found.series) == (images, masks, None)
    assert all(guess.reason for guess in reasons.values())
    cases = find_folder_cases(found, ["target"])
    assert len(cases) == (8 if "images/x{c}" in layout else 4)
    assert [case.problem for case in cases] == [None] * len(cases)
    assert all(case.mask for case in cases)


def test_what_else_is_there_is_named(tmp_path):
    for number in range(2):
        image, mask = draw_scan(number)
        save_nifti(tmp_path / f"a/b/images/s{number}.nii.gz", image)
        save_nifti(tmp_path / f"a/b/masks/s{number}.nii.gz", mask)
        save_dicom(tmp_path / "a/b/raw", image, AXIAL)
    layout, reasons = guess_layout(tmp_path)
    assert (layout.data_dir, layout.images) == (str(tmp_path / "a/b"), "images")
    assert "also there: 12 DICOM files" not in reasons["masks"].reason
    assert "also there: 6 DICOM files" in reasons["images"].reason


def test_masks_beside_dicom_and_the_series_of_most_patients(tmp_path):
    for number in range(3):
        image, mask = draw_scan(number)
        for part in ("t1 tse", "T2")[: 1 + (number > 0)]:
            said = {"PatientID": f"p{number}", "SeriesDescription": part, "Modality": "MR"}
            save_dicom(tmp_path / f"p{number}/{part}", image, AXIAL, **said)
        save_nifti(tmp_path / f"p{number}/seg.nii.gz", mask, AXIAL)
    layout, reasons = guess_layout(tmp_path)
    assert (layout.images, layout.masks, layout.series) == (".", "*/seg.nii.gz", "MR t1 tse")
    assert reasons["series"].reason == "3 of 3 patients have it; also there: MR T2 (2 patient(s))"
    cases = find_folder_cases(layout, ["target"])
    assert [(case.name, case.patient, case.problem) for case in cases] == [(f"p{n}", f"p{n}", None) for n in range(3)]


def test_folders_of_cases_are_no_folder_of_images_and_modalities_are_not_mixed(tmp_path):
    for number, modality in enumerate(("CT", "MR", "CT")):
        said = {"PatientID": f"p{number}", "SeriesDescription": f"s{number}", "Modality": modality}
        save_dicom(tmp_path / f"CT{number}", draw_scan(number)[0], AXIAL, **said)
    layout, reasons = guess_layout(tmp_path)
    assert (layout.images, layout.series) == (".", "CT*")
    assert reasons["series"].reason == "2 patients have this modality; also there: MR"
