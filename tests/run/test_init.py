"""``weakmedsam init``: what it finds in folders of many kinds, and that its YAML prepares."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from fakes import RAS, draw_scan, fake_folder, save_nifti
from PIL import Image
from scan_formats import LPS, save, save_dicom, slice_of

from data_modules.folder import Folder
from weakmedsam.cli import prepare_command
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.run.init import dataset_name, init, main

AXIAL = np.diag([-1.5, -2.0, 3.0, 1.0])
"""As scanners write axial slices: rows to the back, columns to the left, slices up."""


def described(folder: Path, output: Path | None = None) -> dict:
    """The settings that init writes, flat."""
    path = init(folder, output or folder.parent / f"{folder.name}.yaml")
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 120
    held = yaml.safe_load(text)["data"]["init_args"]
    return held | held["slices"] | held["split"] | held["augment"]


def clinic(root: Path, cases: int = 5) -> dict[str, np.ndarray]:
    """A DICOM tree as a clinic exports it: a CT and a scout per patient, labels by ranges. Patient -> voxels."""
    drawn = {}
    rows = []
    for number in range(cases):
        patient = f"PAT{number:03d}"
        voxels = draw_scan(number)[0] - 1000
        voxels[1] += 1500
        drawn[patient] = voxels
        said = {"PatientID": patient, "Modality": "CT"}
        save_dicom(root / f"export/{patient}/1/A", voxels, AXIAL, number, SeriesDescription="thorax 3mm", **said)
        save_dicom(root / f"export/{patient}/1/B", voxels[:, :, :2], AXIAL, SeriesDescription="thin", **said)
        held = slice_of(np.zeros((9, 9), np.int16), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **said)
        held.SeriesInstanceUID = f"1.2.{number}"
        save(held, root / f"export/{patient}/scout")
        rows.append(f"{patient},1,4,tumour")
    (root / "labels.csv").write_text("case,from,to,class\n" + "\n".join(rows))
    return drawn


def test_a_dicom_tree_with_labels_by_ranges_is_described_and_prepares(tmp_path, monkeypatch, capsys):
    drawn = clinic(tmp_path / "My clinic")
    monkeypatch.chdir(tmp_path)
    main(["My clinic"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "make train DATASET=my_clinic" in said
    held = yaml.safe_load(Path("experiments/data/my_clinic.yaml").read_text())["data"]["init_args"]
    assert (held["images"], held["series"], held["classes"]) == (".", "CT thorax 3mm", {"tumour": [1]})
    assert held["slices"]["window"] == [40, 400]
    assert held["split"]["fractions"] == [0.6, 0.2, 0.2]
    alone = ["--data.prepare.workers", "1"]
    prepare_command(["--config", "experiments/data/my_clinic.yaml", "--summary", "s.json", *alone])
    counted = json.loads(Path("s.json").read_text())["splits"]
    assert sum(part["cases"] for part in counted.values()) == 5
    assert sum(part["positive_slices"]["tumour"] for part in counted.values()) == 5 * 4
    # The same volumes as NIfTI, in its own order of voxels, are the same slices in the store.
    for patient, voxels in drawn.items():
        save_nifti(tmp_path / f"nifti/images/{patient}.nii.gz", voxels[::-1, ::-1], AXIAL @ _flip(voxels.shape))
    (tmp_path / "nifti/labels.csv").write_text((tmp_path / "My clinic/labels.csv").read_text())
    main(["nifti"])
    prepare_command(["--config", "experiments/data/nifti.yaml", "--summary", "n.json", *alone])
    stores = [Path(json.loads(Path(name).read_text())["store"]) for name in ("s.json", "n.json")]
    for patient in drawn:
        first, second = (np.load(store / patient / "image.npy") for store in stores)
        assert np.array_equal(first, second)


def _flip(shape):
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = np.array(shape[:2]) - 1
    return flip


def test_the_usual_layout_with_masks_and_a_table_matches_values_and_columns(tmp_path):
    root = fake_folder(tmp_path / "scans", 5)
    rows = ["case,slice,note,cyst,tumour"]
    for number in range(5):
        mask = draw_scan(number, (3, 5))[1]
        mask[:, :, 2] = np.where(mask[:, :, 2] == 3, 0, mask[:, :, 2])  # the one is not in this slice
        save_nifti(root / f"masks/scan{number}.nii.gz", mask)
        rows += [
            f"scan{number},{k},x,{int((mask[:, :, k] == 5).any())},{int((mask[:, :, k] == 3).any())}" for k in range(6)
        ]
    (root / "labels.csv").write_text("\n".join(rows))
    held = described(root)
    assert held["classes"] == {"cyst": [5], "tumour": [3]}
    assert (held["images"], held["masks"], held["plane"], held["window"]) == ("images", "masks", "axial", None)
    assert (held["image_size"], held["flip_columns"], held["percentiles"]) == (32, 0.5, [0.5, 99.5])


@pytest.mark.parametrize(
    ("layout", "images", "masks"),
    [
        ("{c}/{c}_t1.nii.gz {c}/{c}_flair.nii.gz {c}/{c}_seg.nii.gz", "*/*_flair.nii.gz", "*/*_seg.nii.gz"),
        ("{c}/anat/t1.nii.gz {c}/anat/t1_mask.nii.gz", "*/anat/t1.nii.gz", "*/anat/t1_mask.nii.gz"),
        ("s-{c}/anat/s-{c}_T1w.nii.gz s-{c}/anat/s-{c}_label.nii.gz", "*/anat/*_T1w.nii.gz", "*/anat/*_label.nii.gz"),
        ("imagesTr/{c}_0000.nii.gz imagesTr/{c}_0001.nii.gz labelsTr/{c}.nii.gz", "imagesTr/*_0000.nii.gz", "labelsTr"),
        ("imagesTr/{c}.nii.gz labelsTr/{c}.nii.gz imagesTs/x{c}.nii.gz", "imagesTr", "labelsTr"),
        ("{c}_ct.nii.gz {c}_label.nii.gz", "*_ct.nii.gz", "*_label.nii.gz"),
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
    held = described(root)
    assert (held["images"], held["masks"]) == (images, masks)
    module = Folder(str(root), held["classes"], images=images, masks=masks)
    cases = module.find_cases()
    assert len(cases) == 4
    assert [case.problem for case in cases] == [None] * 4
    assert all(case.mask for case in cases)


def test_the_plane_is_that_of_the_finest_pixels_and_sides_are_not_mirrored(tmp_path):
    for number in range(3):
        image, mask = draw_scan(number)
        save_nifti(tmp_path / f"d/images/s{number}.nii.gz", image, np.diag([1, 5, 1, 1.0]))
        save_nifti(tmp_path / f"d/masks/s{number}.nii.gz", mask, np.diag([1, 5, 1, 1.0]))
    (tmp_path / "d/dataset.json").write_text('{"labels": {"background": 0, "left kidney": 1}}')
    held = described(tmp_path / "d")
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
    assert described(tmp_path / "four")["channel"] == 0
    held = described(tmp_path / "pictures")
    assert (held["images"], held["channel"], held["spacing"], held["classes"]) == (
        "images",
        None,
        None,
        {"target": [1]},
    )
    text = (tmp_path / "pictures.yaml").read_text()
    assert "spacing: null                   # files do not say it" in text


def test_it_is_written_once_and_says_what_is_wrong_in_one_line(tmp_path, capsys):
    root = fake_folder(tmp_path / "scans", 3)
    (root / "images/scan0.nii.gz").write_bytes(b"damaged")
    init(root, tmp_path / "a.yaml")
    said = " ".join(capsys.readouterr().out.split())
    assert "1 case(s) cannot be used" in said
    assert "scan0.nii.gz: cannot be read" in said
    with pytest.raises(ConfigError, match="is there already: remove it, or name another file with --output"):
        init(root, tmp_path / "a.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no scan is there that can be read"):
        init(tmp_path / "empty", None)
    with pytest.raises(ConfigError, match="there is no such folder"):
        init(tmp_path / "nowhere", None)
    (root / "labels.csv").write_text("case,class\nscan1,tumour\n")
    with pytest.raises(DataError, match="Labels of whole scans are not read yet"):
        init(root, tmp_path / "b.yaml")
    assert not (tmp_path / "b.yaml").exists()
    assert dataset_name(Path("/x/My scans (2)")) == "my_scans_2"


def test_the_command_shows_no_trace_back_and_loads_no_torch(tmp_path):
    fake_folder(tmp_path / "scans", 3)
    code = "import sys; from weakmedsam.__main__ import main; main(['init', *sys.argv[1:]]); "
    for words, status in ((["scans"], 0), (["nowhere"], 1)):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}assert 'torch' not in sys.modules", *words],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
    assert "ConfigError: nowhere: there is no such folder" in done.stderr
    assert LPS.shape == RAS.shape
