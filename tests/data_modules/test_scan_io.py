"""Files in, class ids in the same space out; what is done is known by its header."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from clinic import draw_clinic
from fakes import save_nifti

from data_modules import scan_io as new_scans
from data_modules.scan_io import (
    Measure,
    find_scans,
    find_unsegmented,
    mark_of,
    measure,
    scores_path,
    segmentation_path,
    write_scores,
    write_segmentation,
)
from data_modules.store import stamp
from data_modules.volumes import read_volume
from weakmedsam.errors import DataError

SHAPE = (5, 4, 3)
# Axes of the file: posterior, superior, left, as a scanner may write them.
TURNED = np.array([[0, 0, -2.0, 7], [-1.5, 0, 0, 3], [0, 4.0, 0, -9], [0, 0, 0, 1]])


@pytest.fixture
def scans(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("b.nii", "a.nii.gz"):
        save_nifti(tmp_path / "scans" / name, rng.integers(0, 9, SHAPE).astype(np.int16), TURNED)
    for name in (".hidden.nii.gz", "notes.txt"):
        (tmp_path / "scans" / name).write_text("no scan")
    (tmp_path / "scans/folder.nii.gz").mkdir()
    return tmp_path / "scans"


def segment(scans, out, made_by="a network"):
    for case in find_scans(scans):
        voxels, geometry = read_volume(case.image)
        ids = (voxels % 3).astype(np.uint8)
        write_segmentation(segmentation_path(out, case.name), ids, geometry, mark_of(stamp(case, str(scans)), made_by))


def test_among_series_of_several_kinds_those_of_the_training_scans_are_taken(tmp_path):
    draw_clinic(tmp_path / "both", 2)
    assert len(find_scans(tmp_path / "both")) == 4
    for pattern in ("ct thorax*", "CT thorax 3mm"):
        assert [case.name for case in find_scans(tmp_path / "both", pattern)] == ["PAT000", "PAT001"]
    with pytest.raises(DataError, match=r"no DICOM series fits 'MR\*' .*--series.* There are: CT thin, CT thorax 3mm"):
        find_scans(tmp_path / "both", "MR*")
    assert len(find_scans(tmp_path / "both/export/PAT000/1/B", "MR*")) == 1  # there is no choice


def test_a_folder_or_one_file_is_found(scans):
    assert [case.name for case in find_scans(scans)] == ["a", "b"]
    assert [case.image for case in find_scans(scans / "b.nii")] == [str(scans / "b.nii")]


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ([], "nowhere", "no such folder.*Correct SCANS"),
        (["notes.txt"], "notes.txt", "nor a file of that name that is read"),
        (["notes.txt"], ".", "holds no scan that is read"),
        (["a.nii", "a.nii.gz"], ".", r"a\.nii\.gz: .*a\.nii has the same name"),
    ],
)
def test_what_cannot_be_scans_is_refused_by_name(tmp_path, made, asked, message):
    for name in made:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        find_scans(tmp_path / asked)


def test_names_of_windows_links_and_folders_of_one_file(scans):
    (scans / "b.nii").rename(scans / "b.NII")
    save_nifti(scans / "c.nii.gz/other.nii.gz", np.zeros(SHAPE, np.int16))
    (scans / "d.nii.gz").symlink_to("../.git/annex/objects/d")
    cases = {case.name: case for case in find_scans(scans)}
    assert list(cases) == ["a", "b", "c", "d"]
    assert cases["c"].image == str(scans / "c.nii.gz/other.nii.gz")
    assert [name for name, case in cases.items() if case.problem] == ["d"]
    (alone,) = find_scans(scans / "d.nii.gz")
    assert "is a link to a file that is not there" in alone.problem


def test_a_segmentation_lies_voxel_for_voxel_beside_its_scan(scans, tmp_path):
    segment(scans, tmp_path / "out")
    scan, found = (nib.load(p) for p in (scans / "b.nii", tmp_path / "out/b.nii.gz"))
    assert np.array_equal(np.asarray(found.dataobj), np.asarray(scan.dataobj) % 3)
    assert np.allclose(found.affine, scan.affine)
    assert found.get_data_dtype() == np.uint8


def test_the_same_ids_give_the_same_bytes_and_nothing_is_left_beside_them(scans, tmp_path):
    for folder in ("one", "two"):
        segment(scans, tmp_path / folder)
    held = [{p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "two")]
    assert held[0] == held[1]
    assert held[0].keys() == {"a.nii.gz", "b.nii.gz"}


def test_what_is_done_is_done_until_the_scan_or_the_network_changes(scans, tmp_path):
    out = tmp_path / "out"
    cases = find_scans(scans)

    def left(made_by="a network"):
        return [case.name for case in find_unsegmented(cases, out, made_by)]

    assert left() == ["a", "b"]
    segment(scans, out)
    assert left() == []
    assert left("another network") == ["a", "b"]
    os.utime(scans / "a.nii.gz", ns=(1, 1))
    assert left() == ["a"]
    (scans / "b.nii").unlink()
    assert left() == ["a", "b"]  # whoever reads it will say that it is gone


def test_a_scan_that_was_moved_with_its_times_is_done_still(scans, tmp_path):
    segment(scans, tmp_path / "out")
    scans.rename(tmp_path / "moved")
    assert find_unsegmented(find_scans(tmp_path / "moved"), tmp_path / "out", "a network") == []


@pytest.mark.parametrize("damage", ["another", "cut", "garbage", "a folder"])
def test_what_is_not_ours_is_never_written_over(scans, tmp_path, damage):
    out = tmp_path / "out"
    segment(scans, out)
    whole = (out / "a.nii.gz").read_bytes()
    if damage == "another":
        save_nifti(out / "a.nii.gz", np.zeros(SHAPE, np.uint8))
    elif damage == "a folder":
        (out / "a.nii.gz").unlink()
        (out / "a.nii.gz").mkdir()
    else:
        (out / "a.nii.gz").write_bytes(whole[:40] if damage == "cut" else whole[:10] + b"garbage" * 9)
    with pytest.raises(DataError, match=r"a\.nii\.gz: is damaged, or not a segmentation.*another OUT"):
        find_unsegmented(find_scans(scans), out, "a network")


def test_volumes_are_in_millilitres_of_the_files_own_voxels(tmp_path):
    ids = np.zeros((10, 10, 4), np.uint8)
    ids[:5, :2, 1:3], ids[9, 9, 3] = 1, 3
    path = save_nifti(tmp_path / "scan.nii.gz", ids, np.diag([-2.0, 5.0, 10.0, 1.0]))
    assert measure(path, ["liver", "spleen", "kidney"], "axial") == [
        Measure("scan", "liver", 20, pytest.approx(2.0), 2),
        Measure("scan", "spleen", 0, 0.0, 0),
        Measure("scan", "kidney", 1, pytest.approx(0.1), 1),
    ]


def test_slices_are_counted_in_the_networks_plane_and_sheared_voxels_are_no_larger(tmp_path):
    ids = np.zeros((2, 3, 6), np.uint8)
    ids[0, 1, 1:5] = 1
    sheared = np.diag([1.0, 1.0, 1.0, 1.0])
    sheared[0, 2] = 0.4
    path = save_nifti(tmp_path / "scan.nii.gz", ids, sheared)
    counted = {plane: measure(path, ["liver"], plane)[0] for plane in ("axial", "coronal", "sagittal")}
    assert {plane: found.slices for plane, found in counted.items()} == {
        "axial": 4,
        "coronal": 1,
        "sagittal": 1,
    }
    assert counted["axial"].ml == pytest.approx(0.004)


def test_a_damaged_segmentation_is_named_with_the_mend(scans, tmp_path):
    segment(scans, tmp_path)
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"a\.nii\.gz: cannot be read.*the same command makes it anew"):
        measure(tmp_path / "a.nii.gz", ["liver"], "axial")


def test_ids_of_another_shape_are_refused_and_leave_nothing(scans, tmp_path):
    _, geometry = read_volume(scans / "b.nii")
    with pytest.raises(DataError, match="not of this scan"):
        write_segmentation(tmp_path / "out/b.nii.gz", np.zeros((1, 2, 3), np.uint8), geometry, "x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", ["<", ">"])
def test_scores_lie_on_a_scan_of_either_byte_order(tmp_path, order):
    voxels = np.arange(60).reshape(SHAPE).astype(np.int16)
    header = nib.Nifti1Header(endianness=order)
    nib.save(nib.Nifti1Image(voxels, TURNED, header), tmp_path / "scan.nii.gz")
    slices, geometry = read_volume(tmp_path / "scan.nii.gz")
    path = scores_path(tmp_path, "scan", 2, "right / left")
    write_scores(path, slices / 100, geometry)
    found = nib.load(path)
    assert path == tmp_path / "scores/scan_2_right_left.nii.gz"
    assert found.header.endianness == order
    assert found.get_data_dtype() == np.dtype(f"{order}f4")
    assert np.allclose(found.get_fdata(), voxels / 100)
    assert np.array_equal(found.affine, TURNED)


def test_a_mark_fits_into_a_header(scans):
    sources = stamp(find_scans(scans)[0], str(scans))
    assert len(mark_of(sources, "a network " * 99)) < 80
    assert mark_of(sources, "x").startswith(new_scans.MARK)
