"""What a check of a whole data set finds, and that it is what ``prepare`` and training would refuse."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_modules.check import check
from data_modules.findings import Checked
from data_modules.folder import Folder
from data_modules.phantom import Phantom
from data_modules.store_index import read_index
from tests.data_settings import data_settings
from tests.fakes import RAS, SHAPE, draw_scan, fake_folder, save_nifti
from weakmedsam.errors import DataError


def module_of(root: Path, classes: tuple[str, ...] = ("tumour",), **settings) -> Folder:
    held = data_settings(prepare__store_dir=str(root.parent / "store"), prepare__workers=1, **settings)
    return Folder(str(root), {name: [n] for n, name in enumerate(classes, start=1)}, image_size=16, **held)


def found(checked: Checked, kind: str) -> list[str]:
    return [("must " if one.must else "") + one.text for one in checked.findings if one.kind == kind]


def split_file(root: Path, **splits: list[int]) -> str:
    rows = [f"scan{number},{name}" for name, numbers in splits.items() for number in numbers]
    path = root / "split.csv"
    path.write_text("\n".join(["case,split", *rows]) + "\n")
    return str(path)


@pytest.fixture
def root(tmp_path) -> Path:
    return fake_folder(tmp_path / "scans", 6)


def test_a_sound_set_has_nothing_to_mend_and_is_prepared_afterwards(root, monkeypatch):
    data = module_of(root)
    checked = check(data)
    assert checked.passed
    assert len(checked.entries) == checked.total == 6
    assert checked.counts["train"]["positive_slices"] == {"tumour": 16}
    assert checked.labelled["scan0"] == [1, 2, 3, 4]
    monkeypatch.setattr("data_modules.prepare.read_case", None)  # nothing is read again
    data.prepare_data()
    assert check(data) == checked


def test_what_prepare_refuses_must_be_mended_each_case_once(root):
    shifted = RAS.copy()
    shifted[:3, 3] = 5
    save_nifti(root / "masks" / "scan1.nii.gz", draw_scan(1)[1], shifted)
    save_nifti(root / "masks" / "scan2.nii.gz", draw_scan(2)[1] * 7)
    cut = root / "images" / "scan3.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-100])
    said: list[str] = []
    checked = check(module_of(root), said.append)
    one, two, three = found(checked, "case")
    assert "must " in one
    assert "scan1.nii.gz: lies up to 5.00 mm away from its image" in one
    assert "scan2.nii.gz: holds unknown label values 7" in two
    assert "scan3.nii.gz: cannot be read" in three
    assert "6 case(s), 1 with a fault: " in said[0]
    assert not checked.passed
    with pytest.raises(DataError, match="3 of 6 cases cannot be used"):
        module_of(root).prepare_data()
    assert check(module_of(root, prepare__on_bad_case="skip")).passed


def test_refused_volumes_are_not_read_again_until_they_change(root, monkeypatch):
    save_nifti(root / "masks" / "scan2.nii.gz", draw_scan(2)[1] * 7)
    checked = check(module_of(root))
    with monkeypatch.context() as patched:
        patched.setattr("data_modules.prepare.read_case", None)
        assert check(module_of(root)) == checked
    save_nifti(root / "masks" / "scan2.nii.gz", draw_scan(2)[1])
    assert check(module_of(root)).passed


def test_an_image_in_two_splits_must_be_mended_and_one_in_a_split_is_worth_a_look(root):
    image, _ = draw_scan(0)
    save_nifti(root / "images" / "scan5.nii", image.astype(np.float32))  # another file, the same image
    (root / "images" / "scan5.nii.gz").unlink()
    shutil.copy(root / "images" / "scan2.nii.gz", root / "images" / "scan3.nii.gz")
    file = split_file(root, train=[0, 2, 3], val=[1], test=[4, 5])
    checked = check(module_of(root, split__file=file))
    across, within = found(checked, "duplicate")
    assert across.startswith("must scan5 (test) and scan0 (train) are one image in two splits")
    assert within == "scan3 and scan2 are one image, as the network sees them. Remove one"
    assert not checked.passed


def test_all_patients_in_two_splits_are_named(root):
    file = split_file(root, train=[0, 1, 2], val=[3], test=[4, 5])
    patients = {0: "a", 1: "b", 2: "c", 3: "a", 4: "b", 5: "d"}
    (root / "patients.csv").write_text("case,patient\n" + "".join(f"scan{n},{p}\n" for n, p in patients.items()))
    checked = check(module_of(root, split__file=file))
    first, second = found(checked, "patient")
    assert "must " in first
    assert f"{file}: patient a is in both train (scan0) and val (scan3)" in first
    assert "patient b is in both train (scan1) and test (scan4)" in second
    assert checked.counts["train"]["cases"] == 3


def test_a_split_file_with_faults_is_one_finding_and_nothing_is_counted(root):
    file = split_file(root, train=[0, 1, 2], val=[3], test=[4])
    checked = check(module_of(root, split__file=file))
    (text,) = found(checked, "split")
    assert text.startswith("must data.split.file: ")
    assert checked.counts == {}
    assert len(checked.entries) == 6


def test_a_class_that_cannot_be_learnt_and_empty_splits(root):
    checked = check(module_of(root, ("tumour", "cyst"), split__file=split_file(root, train=range(6))))
    assert found(checked, "split") == [
        "must the val split is empty (6 cases). Correct data.split.file or data.split.fractions",
        "the test split is empty, so nothing will be scored",
    ]
    (text,) = found(checked, "class")
    assert text.startswith("must No training slice of folder shows cyst")


def test_labels_masks_and_files_that_are_worth_a_look(root):
    save_nifti(root / "masks" / "scan1.nii.gz", draw_scan(1)[1] * 0)
    speck = np.zeros(SHAPE, np.int16)
    speck[9, 9, 1:3] = (5, 9)
    save_nifti(root / "images" / "scan2.nii.gz", speck)
    (root / "images" / "notes.mgz").touch()
    checked = check(module_of(root))
    assert checked.passed
    assert found(checked, "empty mask") == ["scan1: its mask has no class. Right, if the scan shows none"]
    assert found(checked, "content")[0].startswith("scan2: is constant outside a box of ")
    assert "notes.mgz" in found(checked, "files")[0]
    assert any("training slices are without tumour" in text for text in found(checked, "labels"))


def test_no_data_and_tables_with_faults_are_findings_too(root, tmp_path):
    (tmp_path / "empty").mkdir()
    (text,) = found(check(module_of(tmp_path / "empty")), "data set")
    assert text.startswith("must No folder data in ")
    (root / "labels.csv").write_text("case,slice,tumour\nscan0,0,7\n")
    checked = check(module_of(root))
    assert "labels.csv" in found(checked, "data set")[0]
    assert (checked.passed, checked.entries) == (False, {})


def test_where_no_case_can_be_used_all_are_named_whatever_is_skipped(root):
    for path in root.glob("images/*"):
        path.write_bytes(b"nothing")
    checked = check(module_of(root, prepare__on_bad_case="skip"))
    assert len(found(checked, "case")) == 6
    assert not checked.passed


def test_the_log_is_as_it_was_and_silent(root, capsys):
    log = logging.getLogger("data_modules")
    before = (log.handlers, log.level, log.propagate)
    check(module_of(root))
    assert (log.handlers, log.level, log.propagate) == before
    assert capsys.readouterr().err == ""


def test_the_index_of_the_store_is_that_of_prepare(root):
    data = module_of(root)
    check(data)
    index = read_index(data.store)
    data.prepare_data()
    assert read_index(data.store) == index


def test_a_drawn_set_is_drawn_first(tmp_path):
    settings = data_settings(prepare__store_dir=str(tmp_path / "store"), prepare__workers=1)
    checked = check(Phantom(str(tmp_path / "scans"), num_volumes=3, image_size=16, **settings))
    assert len(checked.entries) == 3
    assert not found(checked, "data set")
