"""How files are found: names, links, folders named as files, and what is listed as passed over."""

import os
from pathlib import Path

import pytest
from fakes import touch

from data_modules.nifti_files import (
    OUTPUTS,
    case_name,
    describe_folder,
    find_folder,
    find_root,
    find_table,
    is_nifti,
    list_nifti,
    nifti_stem,
    walk,
)
from weakmedsam.errors import DataError
from weakmedsam.run.predict import CONFIG


def found(folder: Path) -> dict[str, str]:
    return {name: str(file.path.relative_to(folder)) for name, file in list_nifti(folder).files.items()}


def test_endings_count_in_any_case_and_hidden_names_never(tmp_path):
    touch(tmp_path, "b.nii", "a.nii.gz", "C.NII.GZ", "d.Nii", "._a.nii.gz", ".nii.gz", "notes.txt", "e.nii.d/x")
    assert found(tmp_path) == {"C": "C.NII.GZ", "a": "a.nii.gz", "b": "b.nii", "d": "d.Nii"}
    assert list_nifti(tmp_path / "nowhere").files == {}
    assert [nifti_stem(name) for name in ("a.NII.gz", "a.b.nii", "a.gz")] == ["a", "a.b", "a.gz"]
    assert not is_nifti(".a.nii")


@pytest.mark.parametrize("other", ["a.nii", "a.NII.GZ", " a.nii.gz", "a.Nii/x.nii"])
def test_two_files_of_a_name_are_a_problem_that_names_both(tmp_path, other):
    touch(tmp_path, "a.nii.gz", other, "b.nii")
    files = list_nifti(tmp_path).files
    assert sorted(files) == ["a", "b"]
    assert files["b"].problem is None
    assert files["a"].twice
    assert "a.nii.gz" in files["a"].problem
    assert other.split("/")[0] in files["a"].problem
    assert "same name" in files["a"].problem


def test_accents_are_the_same_in_either_encoding(tmp_path):
    touch(tmp_path, "Mu\u0308ller .nii")
    assert list(list_nifti(tmp_path).files) == ["M\u00fcller"] == [case_name(" Mu\u0308ller ")]


def test_a_name_that_is_not_utf_8_is_a_problem_that_can_be_printed(tmp_path):
    (tmp_path / os.fsdecode(b"M\xfcller.nii")).touch()
    ((name, file),) = list_nifti(tmp_path).files.items()
    assert name == r"M\xfcller"
    assert r"M\xfcller.nii: the name is not UTF-8" in file.problem
    file.problem.encode()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a\nb.nii", r"a\nb.nii: the name is not UTF-8, or holds what cannot be seen. Rename it."),
        ("a\u202eb.nii.gz", r"a\u202eb.nii.gz: the name is not UTF-8"),
        ("\u60a3" * 67 + ".nii", "its name is too long (201 bytes; 200 are possible). Rename it."),
        ("index.json.nii", "a scan cannot be named as a table or a note (index.json). Rename it."),
        ("skipped.CSV.nii.gz", "a scan cannot be named as a table or a note"),
    ],
)
def test_a_name_after_which_no_result_can_be_named_is_a_problem_in_one_line(tmp_path, name, said):
    touch(tmp_path, name, "\u60a3" * 66 + ".nii", "na\u00efve (1)'s.nii")
    listing = list_nifti(tmp_path).files
    ((case, problem),) = [(case, file.problem) for case, file in listing.items() if file.problem]
    assert said in problem
    assert "\n" not in case + problem


def test_a_folder_of_one_file_is_that_file(tmp_path):
    touch(tmp_path, "a.nii/a.nii", "b.nii.gz/any.NII", "b.nii.gz/._any.NII", "c.nii/c.nii/c.nii")
    touch(tmp_path, "d.nii/1.nii", "d.nii/2.nii")
    (tmp_path / "empty.nii").mkdir()
    (tmp_path / "loop.nii").mkdir()
    (tmp_path / "loop.nii/loop.nii").symlink_to(tmp_path / "loop.nii")
    listing = list_nifti(tmp_path)
    assert found(tmp_path) == {
        "a": "a.nii/a.nii",
        "b": "b.nii.gz/any.NII",
        "c": "c.nii/c.nii/c.nii",
        "d": "d.nii",
        "loop": "loop.nii/loop.nii/loop.nii/loop.nii",
    }
    assert "several files, 1.nii, 2.nii" in listing.files["d"].problem
    assert listing.files["loop"].problem
    assert listing.passed_over == [tmp_path / "empty.nii"]


def test_links_are_followed_and_dead_ones_are_problems_or_ignored(tmp_path):
    touch(tmp_path, "real/a.nii.gz", "scans/x.txt")
    scans = tmp_path / "scans"
    (scans / "a.nii.gz").symlink_to("../real/a.nii.gz")
    (scans / "b.nii.gz").symlink_to("../.git/annex/objects/b")
    (scans / "notes.txt").symlink_to("nowhere")
    (scans / "._c.nii.gz").symlink_to("nowhere")
    (scans / "d.nii").symlink_to("d.nii")
    files = list_nifti(scans).files
    assert sorted(files) == ["a", "b", "d"]
    assert files["a"].problem is None
    assert "b.nii.gz: is a link to a file that is not there (../.git/annex/objects/b)" in files["b"].problem
    assert "git annex get" in files["b"].problem
    assert "is a link" in files["d"].problem


def test_what_looks_like_a_scan_is_listed(tmp_path):
    like = [
        "a.nrrd",
        "b.MHA",
        "c.nii.bz2",
        "d.nii (1).gz",
        "e.hdr",
        "e.img",
        "f.nii.gz.part",
        "g.dcm",
        "h.png",
    ]
    touch(tmp_path, *like, "i.nii.zip", "below/j.nii.gz", "notes.txt", "labels.csv", "k.nii", "minii.txt")
    touch(tmp_path / "out", CONFIG, "k.nii.gz")  # segmentations of these scans
    assert [p.name for p in list_nifti(tmp_path).passed_over] == sorted([*like, "i.nii.zip", "below"])


def test_each_folder_is_walked_once_also_where_links_lead_round(tmp_path):
    root = touch(tmp_path / "root", "one/x", "two/deep/x", ".hidden/x", "scan.nii/x")
    touch(tmp_path, "outside/in/x")
    for name, target in (
        ("one/up", root),
        ("a_link", root / "two"),
        ("out", tmp_path / "outside"),
        ("dead", "no"),
    ):
        (root / name).symlink_to(target)
    assert [str(p.relative_to(root)) for p in walk(root).folders] == [
        ".",
        "one",
        "two",
        "two/deep",
        "out",
        "out/in",
    ]


def test_what_the_program_has_written_is_left_out(tmp_path):
    touch(tmp_path, "scans/x", *(f"runs/{n}/{mark}" for n, mark in enumerate(OUTPUTS)))
    tree = walk(tmp_path)
    assert [p.name for p in tree.folders] == [tmp_path.name, "runs", "scans"]
    assert [p.name for p in tree.outputs] == [str(n) for n in range(len(OUTPUTS))]
    assert walk(tmp_path / "runs/0").folders[0] == tmp_path / "runs/0"  # asked for by name
    assert CONFIG in OUTPUTS


def test_folders_and_tables_are_found_in_any_case_and_two_are_refused(tmp_path):
    touch(tmp_path, "Images/x", "LABELS.csv", "below/labels.csv", "labels.csv.bak")
    assert find_folder(tmp_path, "images").name == "Images"
    assert find_folder(tmp_path, "masks") == tmp_path / "masks"
    assert find_table([tmp_path, tmp_path], "labels.csv") == tmp_path / "LABELS.csv"
    assert find_table([tmp_path], "patients.csv") is None
    with pytest.raises(DataError, match=r"LABELS\.csv and .*below/labels\.csv: only one"):
        find_table([tmp_path, tmp_path / "below"], "labels.csv")
    (tmp_path / "patients.csv").mkdir()
    assert find_table([tmp_path], "patients.csv") == tmp_path / "patients.csv"  # its reader will say that it is none
    (tmp_path / "patients.csv").rmdir()
    (tmp_path / "patients.csv").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"patients\.csv: is a link to a file that is not there"):
        find_table([tmp_path], "patients.csv")
    touch(tmp_path, "images/x")
    if len(list(tmp_path.glob("[iI]mages"))) == 2:
        with pytest.raises(DataError, match=r"Images and .*images"):
            find_folder(tmp_path, "images")


def test_the_data_sets_own_folder_is_found_where_an_archive_was_unpacked(tmp_path):
    touch(tmp_path, "set/set/images/x", "phantom-1/phantom.json", "phantom-1/images/x")
    assert find_root(tmp_path, "images") == tmp_path / "set/set"
    assert find_root(tmp_path, "imagesTr") == tmp_path
    touch(tmp_path, "imgs/x")  # a slip of the user's: a copy somewhere below must not be taken instead
    assert find_root(tmp_path, "images") == tmp_path
    assert find_root(tmp_path, "images", usual="SET") == tmp_path / "set/set"
    assert find_root(tmp_path, "images", usual="third") == tmp_path
    touch(tmp_path, "other/images/x")
    assert find_root(tmp_path, "images") == tmp_path / "other"
    touch(tmp_path, "third/images/x")
    with pytest.raises(DataError, match=r"images is in several folders: other/, third/\. Give one"):
        find_root(tmp_path, "images")


def test_what_is_there_instead_is_told(tmp_path):
    assert describe_folder(tmp_path / "no") == "there is no such folder"
    assert describe_folder(tmp_path) == "it is empty"
    touch(tmp_path, *(f"{n:02d}.dcm" for n in range(20)), "a/x")
    (tmp_path / "images").symlink_to("nowhere")
    assert describe_folder(tmp_path).startswith("there is: 00.dcm, 01.dcm, ")
    assert "09.dcm and 12 more; of these are links to what is not there: images" in describe_folder(tmp_path)
    assert describe_folder(tmp_path / "00.dcm") == "it is a file"
    assert "not there, nowhere" in describe_folder(tmp_path / "images")
