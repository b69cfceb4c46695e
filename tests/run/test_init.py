"""``weakmedsam init``: what it finds in folders of many kinds, and that its YAML prepares."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from clinic import AXIAL, draw_clinic
from fakes import SHAPE, draw_scan, fake_folder, save_nifti
from scan_formats import save_dicom

from weakmedsam.data_commands import prepare_command
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.run.init import dataset_name, init, main


def described(folder: Path, output: Path | None = None) -> dict:
    """The settings that init writes, flat."""
    path = init(folder, output or folder.parent / f"{folder.name}.yaml")
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 120
    held = yaml.safe_load(text)["data"]["init_args"]
    return held | held["slices"] | held["split"] | held["augment"]


def test_a_dicom_tree_with_labels_by_ranges_is_described_and_prepares(tmp_path, monkeypatch, capsys):
    drawn = draw_clinic(tmp_path / "My clinic")
    monkeypatch.chdir(tmp_path)
    main(["My clinic"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "weakmedsam check --dataset my_clinic" in said
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
    assert (held["image_size"], held["flip_columns"], held["percentiles"]) == (64, 0.5, [0.5, 99.5])


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
    (root / "labels.csv").write_text("case,class\nscan1,tumour\nscan1,tumour\n")
    with pytest.raises(DataError, match="has a row already, line 2"):
        init(root, tmp_path / "b.yaml")
    assert not (tmp_path / "b.yaml").exists()
    assert dataset_name(Path("/x/My scans (2)")) == "my_scans_2"


@pytest.mark.parametrize("masks", [True, False])
def test_a_table_of_scans_names_the_classes_and_leaves_plane_and_pixels_to_the_scans(tmp_path, capsys, masks):
    root = fake_folder(tmp_path / "scans", 4, masks=masks)
    if masks:
        save_nifti(root / "masks/scan3.nii.gz", np.zeros(SHAPE, np.uint8))
    (root / "labels.csv").write_text("case,class\nscan0,tumour\nscan1,tumour\nscan2,tumour\nscan3,none\n")
    held = described(root)
    assert held["classes"] == {"tumour": [1]}
    text = next(tmp_path.rglob("*.yaml")).read_text()
    assert "labels.csv, which scans show them" in text
    assert ("masks and labels.csv agree in 100 % of scans" in text) is masks
    assert "labels.csv counts slices" not in text
    assert "not used for cases in labels.csv" not in text
    assert "labels.csv (case,class)" in capsys.readouterr().out


def test_cases_of_one_anonymous_patient_need_a_table(tmp_path, capsys):
    for number in range(3):
        save_dicom(tmp_path / f"d/{number}", draw_scan(number)[0], AXIAL, PatientID="ANON")
    init(tmp_path / "d", tmp_path / "d.yaml")
    said = " ".join(capsys.readouterr().out.split())
    assert "all cases are of 'ANON': give patients.csv" in said
    assert "no labels.csv: write one (case,from,to,class) before you train" in said
    assert "cannot be used" not in said


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
