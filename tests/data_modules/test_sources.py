"""What a data set is made of, and that nothing else makes a finished run train again."""

import json
import os

import pytest
from data_settings import data_settings
from fakes import touch

from data_modules.abdomen import AbdomenCT1K
from data_modules.brats import BraTS2019
from data_modules.cardiac import MSDCardiac
from data_modules.folder import Folder
from data_modules.sources import Sources, source_files
from tests.fakes import fake_abdomen, fake_brats, fake_cardiac, fake_folder
from tests.tiny import tiny_phantom
from weakmedsam.run.stage_inputs import mark_inputs

SETTINGS = {"configs": {}, "options": []}


def look_at(summary):
    return tuple(mark_inputs(SETTINGS, summary).items())


def prepared(root, make=Folder, **changes):
    """The summary of a data set that has been prepared, as it is kept."""
    words = {"classes": {"tumour": [1]}} if make is Folder else {}
    settings = {
        "prepare__store_dir": str(root / "store"),
        "image_size": 32,
        "prepare__workers": 1,
        **words,
        **changes,
    }
    module = make(str(root), **data_settings(**settings))
    module.prepare_data()
    return json.loads(json.dumps(module.summary()))


SETS = {
    "folder": (fake_folder, Folder, "images/scan9.nii.gz"),
    "brats": (fake_brats, BraTS2019, "MICCAI_BraTS_2019_Data_Training/HGG/BraTS19_NEW/BraTS19_NEW_seg.nii"),
    "abdomen": (fake_abdomen, AbdomenCT1K, "elsewhere/CASE_00077_0000.NII"),
    "cardiac": (fake_cardiac, MSDCardiac, "Task02_Heart/labelsTr/la_099.nii.gz"),
}


@pytest.mark.parametrize("name", SETS)
def test_a_run_inside_the_data_folder_changes_nothing_and_a_new_scan_does(tmp_path, name):
    fake, make, new = SETS[name]
    fake(tmp_path)
    summary = prepared(tmp_path, make)
    before = look_at(summary)
    run = f"runs/{name}/e"
    for path in (
        *(f"{run}/prepare/settings.json", f"{run}/classify/history.csv", f"{run}/labels.csv"),
        *(f"{run}/segmentations/x/{part}.nii.gz" for part in ("Case_00001_0000", "la_003", "BraTS19_A_flair")),
        *("out/provenance/predict.yaml", "out/Case_00001_0000.nii.gz", "out/volumes.csv", "other.nii.gz"),
        *("notes.csv", "split.csv", "store/x.csv", "._a.nii.gz"),
    ):
        touch(tmp_path, path)
    assert look_at(summary) == before
    touch(tmp_path, new)
    assert look_at(summary) != before


def test_a_table_that_is_added_corrected_or_removed_is_noticed(tmp_path):
    fake_folder(tmp_path)
    summary = prepared(tmp_path)
    seen = [look_at(summary)]
    for text in ("case,patient\n", "case,patient\na,b\n"):
        (tmp_path / "Patients.csv").write_text(text)
        seen.append(look_at(summary))
    assert len(set(seen)) == 3
    (tmp_path / "Patients.csv").unlink()
    assert look_at(summary) == seen[0]


def test_a_table_that_is_corrected_with_size_and_time_as_they_were_is_noticed(tmp_path):
    fake_folder(tmp_path)
    split = tmp_path / "mine.csv"
    summary = prepared(tmp_path)
    summary["sources"]["files"] = [str(split)]
    for table in (tmp_path / "patients.csv", tmp_path / "labels.csv", split):
        seen = set()
        for text in ("case,any\na,1\n", "case,any\na,2\n"):
            table.write_text(text)
            os.utime(table, ns=(1, 1))
            seen.add(look_at(summary))
        assert len(seen) == 2


def test_changed_scans_masks_and_split_files_are_noticed(tmp_path):
    root = fake_folder(tmp_path)
    split = tmp_path / "mine.csv"
    split.write_text("case,split\n" + "".join(f"scan{n},{s}\n" for n, s in enumerate(["train"] * 3 + ["val", "test"])))
    summary = prepared(root, split__file=str(split))
    seen = {look_at(summary)}
    for path in (root / "images/scan0.nii.gz", root / "masks/scan1.nii.gz", split):
        os.utime(path, ns=(1, 1))
        seen.add(look_at(summary))
    (root / "images/scan2.nii.gz").unlink()
    (root / "images/scan2.nii.gz").symlink_to("nowhere")
    seen.add(look_at(summary))
    assert len(seen) == 5


def test_what_is_not_clear_any_more_is_a_change_and_no_error(tmp_path):
    fake_folder(tmp_path / "one")
    summary = prepared(tmp_path)
    before = look_at(summary)
    touch(tmp_path, "two/images/x.nii")
    assert look_at(summary) != before
    del summary["sources"]  # of an earlier version
    assert look_at(summary) != before


def test_the_sources_are_the_files_of_the_cases(tmp_path):
    for name, (fake, make, _) in SETS.items():
        root = fake(tmp_path / name)
        words = {"classes": {"tumour": [1]}} if make is Folder else {}
        module = make(str(root), **data_settings(prepare__store_dir=str(tmp_path / "s"), **words))
        found = {str(path) for path in source_files(module.sources())}
        cases = module.find_cases()
        assert {path for case in cases for path in (case.image, case.mask)} <= found
        assert len(found) == 2 * len(cases) + (name == "abdomen")  # one image has no mask
    module = tiny_phantom(tmp_path)
    module.prepare_data()
    assert len(source_files(module.sources())) == 12
    assert source_files(Sources(str(tmp_path / "nowhere"))) == []
