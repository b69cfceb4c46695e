"""Unlabelled scans through Lightning, with a segmentation network that sees what is bright, so that all is known."""

import csv
import os

import nibabel as nib
import numpy as np
import pytest
import torch
from classifiers import module, trainer
from pam_settings import pam_callback
from saved_segmenter import CLASSES, save
from scan_formats import save_dicom, seg_on, write_by_itk
from tiny import tiny_phantom

from data_modules.nifti_files import nifti_stem
from data_modules.scan_io import find_scans, find_unsegmented
from data_modules.scan_module import UnseenScans
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.segmentation.module import Segmenter


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    tiny_phantom(folder).prepare_data()
    return folder


@pytest.fixture
def images(drawn):
    (folder,) = (drawn / "scans").glob("*/images")
    return folder


def unseen(drawn, scans, out, made_by="x", **settings):
    return UnseenScans(str(scans), str(out), tiny_phantom(drawn, **settings), made_by)


def ids_in(folder):
    return {nifti_stem(p.name): np.asarray(nib.load(p).dataobj) for p in sorted(folder.glob("*.nii.gz"))}


def segment(folder, drawn, scans, network=None, **settings):
    folder.mkdir(exist_ok=True)
    network = save(folder / "best.ckpt") if network is None else network
    data = unseen(drawn, scans, folder / "out", **settings)
    trainer(folder / "provenance").predict(network, data, return_predictions=False)
    return ids_in(folder / "out")


def test_scans_come_as_in_training_and_without_labels(drawn, images, tmp_path):
    data = unseen(drawn, images, tmp_path)
    data.prepare_data()
    data.setup("predict")
    trained = tiny_phantom(drawn)
    trained.setup("test")
    tested = {volume["case"]: volume["image"] for volume in trained.test_dataloader()}
    assert tested
    seen = {volume["case"]: volume for volume in data.predict_dataloader()}
    assert len(seen) == 6
    assert all("label" not in volume and "mask" not in volume for volume in seen.values())
    assert all(torch.equal(seen[case]["image"], image) for case, image in tested.items())


def test_a_network_segments_them_as_it_does_in_the_test(drawn, images, tmp_path):
    network = save(tmp_path / "best.ckpt")
    found = segment(tmp_path, drawn, images, network)
    trained = tiny_phantom(drawn)
    trained.setup("test")
    reader = trained.entries
    for volume in trained.test_dataloader():
        expected = network.segment_volume(volume["image"], volume["frame"]).numpy()
        geometry = reader[volume["case"]].geometry
        assert np.array_equal(geometry.to_slices(found[volume["case"]]), expected)
        assert {1, 2} <= set(np.unique(expected).tolist())
    assert len(list((tmp_path / "out/pictures").glob("*.png"))) == 6


def test_the_dice_of_the_files_is_that_of_the_test(drawn, images, tmp_path):
    network = save(tmp_path / "best.ckpt")
    found = segment(tmp_path, drawn, images, network)
    trainer(tmp_path / "test").test(network, tiny_phantom(drawn), verbose=False)
    with (tmp_path / "test/cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    between = 0
    for row in rows:
        k = 1 + CLASSES.index(row["class"])
        mask = np.asarray(nib.load(images.parent / f"masks/{row['case']}.nii.gz").dataobj) == k
        predicted = found[row["case"]] == k
        outside = 2 * (mask & predicted).sum() / (mask.sum() + predicted.sum())
        assert float(row["dice"]) == pytest.approx(outside, abs=1e-4)
        between += 0 < outside < 1
    assert between


def test_however_a_file_turns_its_axes_the_segmentation_is_the_same_in_space(drawn, images, tmp_path):
    for path in images.glob("*.nii.gz"):
        scan = nib.load(path)
        turned = scan.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
        assert turned.shape != scan.shape
        (tmp_path / "turned").mkdir(exist_ok=True)
        nib.save(turned, tmp_path / "turned" / path.name)
    straight = segment(tmp_path / "one", drawn, images, save(tmp_path / "best.ckpt"))
    other = segment(tmp_path / "two", drawn, tmp_path / "turned", save(tmp_path / "best.ckpt"))
    canonical = [
        np.asarray(nib.as_closest_canonical(nib.load(tmp_path / way / "out/phantom_000.nii.gz")).dataobj)
        for way in ("one", "two")
    ]
    assert np.array_equal(*canonical)
    assert straight["phantom_000"].shape != other["phantom_000"].shape
    assert canonical[0].any()


def test_a_scan_of_another_format_is_segmented_in_the_same_place(drawn, images, tmp_path):
    scans = tmp_path / "formats"
    scans.mkdir()
    first, second, third = sorted(images.glob("*.nii.gz"))[:3]
    scan = nib.load(first)
    voxels = np.asarray(scan.dataobj)
    assert voxels.dtype == np.int16
    save_dicom(scans / "phantom_000/series", voxels, scan.affine, PatientID="secret")
    convert = (
        "for source, target in zip(sys.argv[1::2], sys.argv[2::2]): sitk.WriteImage(sitk.ReadImage(source), target)"
    )
    write_by_itk(convert, second, scans / "phantom_001.nrrd", third, scans / "phantom_002.mha")
    straight = segment(tmp_path / "one", drawn, images, save(tmp_path / "best.ckpt"))
    other = segment(tmp_path / "two", drawn, scans, save(tmp_path / "best.ckpt"))
    assert sorted(other) == sorted(straight)[:3]
    for name in other:
        ways = [nib.load(tmp_path / way / f"out/{name}.nii.gz") for way in ("one", "two")]
        canonical = [nib.as_closest_canonical(way) for way in ways]
        assert np.array_equal(*(np.asarray(way.dataobj) for way in canonical))
        assert np.allclose(*(way.affine for way in canonical), atol=1e-4)
        assert ways[1].get_qform(coded=True)[1] == ways[1].get_sform(coded=True)[1] == 1


@pytest.fixture
def series(images, tmp_path):
    """A scan as a DICOM series beside one as NIfTI."""
    first, second = sorted(images.glob("*.nii.gz"))[:2]
    scan = nib.load(first)
    voxels = np.asarray(scan.dataobj)
    save_dicom(tmp_path / "scans/phantom_000/series", voxels, scan.affine, FrameOfReferenceUID="1.2.9")
    (tmp_path / "scans" / second.name).write_bytes(second.read_bytes())
    return tmp_path / "scans"


def test_a_dicom_series_gets_a_dicom_seg_beside(drawn, series, tmp_path):
    segment(tmp_path, drawn, series)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("p*.*")) == [
        "phantom_000.dcm",
        "phantom_000.nii.gz",
        "phantom_001.nii.gz",
    ]
    found = nib.load(out / "phantom_000.nii.gz")
    ids = np.asarray(found.dataobj)
    assert {1, 2} <= set(np.unique(ids).tolist())
    assert np.array_equal(seg_on(out / "phantom_000.dcm", ids.shape, found.affine), ids)


@pytest.mark.parametrize("gone", ["dcm", "nii.gz"])
def test_both_files_are_the_result_of_a_series(drawn, series, tmp_path, gone):
    segment(tmp_path, drawn, series)
    out = tmp_path / "out"
    assert find_unsegmented(find_scans(series), out, "x") == []
    (out / f"phantom_000.{gone}").unlink()
    assert [case.name for case in find_unsegmented(find_scans(series), out, "x")] == ["phantom_000"]
    segment(tmp_path, drawn, series)
    assert (out / f"phantom_000.{gone}").is_file()
    (out / "phantom_000.dcm").write_bytes(next((series / "phantom_000/series").iterdir()).read_bytes())
    with pytest.raises(DataError, match=r"phantom_000\.dcm: is damaged, or not a segmentation of this program"):
        find_unsegmented(find_scans(series), out, "x")


def test_a_series_in_which_nothing_is_found_keeps_no_earlier_seg(drawn, series, tmp_path, caplog):
    segment(tmp_path, drawn, series)
    out = tmp_path / "out"
    assert (out / "phantom_000.dcm").is_file()
    (out / "phantom_000.nii.gz").unlink()
    segment(tmp_path, drawn, series, save(tmp_path / "best.ckpt", level=0.5, network="saved_segmenter.Nothing"))
    assert not np.asarray(nib.load(out / "phantom_000.nii.gz").dataobj).any()
    assert not (out / "phantom_000.dcm").exists()
    assert "phantom_000: no DICOM SEG, NIfTI alone: nothing was found" in caplog.text
    assert find_unsegmented(find_scans(series), out, "x") == []


def test_a_seg_is_not_written_on_a_series_that_has_changed(drawn, series, tmp_path, caplog):
    data = unseen(drawn, series, tmp_path / "out")
    data.prepare_data()
    data.setup("predict")
    os.utime(next((series / "phantom_000/series").iterdir()))
    for volume in data.predict_dataloader():
        frame = volume["frame"]
        data.save_segmentation(volume["case"], np.ones((len(volume["image"]), frame.height, frame.width), np.uint8))
    assert "the scan has changed meanwhile" in caplog.text
    assert not list((tmp_path / "out").glob("*.dcm"))
    assert len(ids_in(tmp_path / "out")) == 2


def refined(folder, drawn, scans, start, **settings):
    torch.manual_seed(0)
    miner = {
        "affinity__kind": "intensity",
        "walk__extent": "volume",
        "threshold__sigma": 0.0,
        "walk__map_size": 32,
        "walk__rescale": False,
    }
    model = module()
    model._callbacks.append(pam_callback(start=str(start), presence="predicted", **(miner | settings)))
    data = unseen(drawn, scans, folder / "out")
    trainer(folder).predict(model, data, return_predictions=False)
    return ids_in(folder / "out")


def test_pam_refines_them_as_it_does_in_the_test(drawn, images, tmp_path, monkeypatch):
    save(tmp_path / "best.ckpt")
    found = refined(tmp_path, drawn, images, tmp_path / "best.ckpt")
    tested = {}

    def keep(self, batch, prediction):
        tested[batch["case"]] = prediction.cpu().numpy()

    monkeypatch.setattr("weakmedsam.callbacks.pam.Evaluation.add", keep)
    monkeypatch.setattr("weakmedsam.callbacks.pam.Evaluation.finish", lambda self, writes: {})
    torch.manual_seed(0)
    model = module()
    model._callbacks.append(
        pam_callback(
            start=str(tmp_path / "best.ckpt"), presence="predicted", affinity__kind="intensity", walk__extent="volume",
            threshold__sigma=0.0,
            walk__map_size=32, walk__rescale=False,
        )
    )  # fmt: skip
    trained = tiny_phantom(drawn)
    trainer(tmp_path / "test").test(model, trained, verbose=False)
    assert tested
    for case, expected in tested.items():
        assert np.array_equal(trained.entries[case].geometry.to_slices(found[case]), expected)
        assert expected.any()


def test_scans_that_are_segmented_are_not_read_again(drawn, images, tmp_path):
    first = segment(tmp_path, drawn, images)
    out = tmp_path / "out"
    (out / "phantom_003.nii.gz").unlink()
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}
    data = unseen(drawn, images, out)
    data.prepare_data()
    data.setup("predict")
    assert [volume["case"] for volume in data.predict_dataloader()] == ["phantom_003"]
    again = segment(tmp_path, drawn, images)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz") if p.name in times} == times
    assert all(np.array_equal(again[case], ids) for case, ids in first.items())


@pytest.fixture
def some(images, tmp_path):
    """Two scans in a folder of their own, and one that is none."""
    (tmp_path / "scans").mkdir()
    for path in sorted(images.glob("*.nii.gz"))[:2]:
        (tmp_path / "scans" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "scans/broken.nii.gz").write_bytes(b"no scan")
    return tmp_path / "scans"


def test_a_scan_that_cannot_be_read_is_named_or_left_out_again_and_again(drawn, some, tmp_path):
    with pytest.raises(DataError, match=r"broken\.nii\.gz: cannot be read"):
        segment(tmp_path, drawn, some)
    for _ in range(2):
        found = segment(tmp_path, drawn, some, prepare__on_bad_case="skip")
        assert len(found) == 2
    with pytest.raises(DataError, match="No case is left"):  # nothing is there but what cannot be read
        segment(tmp_path / "other", drawn, some / "broken.nii.gz", prepare__on_bad_case="skip")


def test_when_all_is_done_nothing_of_a_killed_call_is_offered_again(drawn, images, tmp_path):
    segment(tmp_path, drawn, images)
    assert (tmp_path / "out/.slices").is_dir()  # the command removes it in the end
    data = unseen(drawn, images, tmp_path / "out")
    data.prepare_data()
    data.setup("predict")
    assert not list(data.predict_dataloader())


def test_a_scan_that_changes_or_goes_meanwhile_is_segmented_as_it_was_read_and_still_to_do(drawn, some, tmp_path):
    (some / "broken.nii.gz").unlink()
    out = tmp_path / "out"
    data = unseen(drawn, some, out)
    data.prepare_data()
    data.setup("predict")
    first, second = sorted(some.glob("*.nii.gz"))
    scan = nib.load(first)
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[:20], scan.affine), tmp_path / "new.nii.gz")
    (tmp_path / "new.nii.gz").replace(first)
    second.rename(tmp_path / "gone.nii.gz")
    for volume in data.predict_dataloader():
        frame = volume["frame"]
        data.save_segmentation(volume["case"], np.zeros((len(volume["image"]), frame.height, frame.width), np.uint8))
    assert len(ids_in(out)) == 2
    (tmp_path / "gone.nii.gz").rename(second)
    left = find_unsegmented(find_scans(some), out, "x")
    assert [case.name for case in left] == [nifti_stem(first.name)]


@pytest.mark.parametrize("refine", [False, True])
def test_prediction_of_a_data_sets_own_cases_is_refused_with_the_way_to_go(drawn, tmp_path, refine):
    model: object = save(tmp_path / "best.ckpt")
    assert isinstance(model, Segmenter)
    assert model.class_names == CLASSES
    if refine:
        model = module()
        model._callbacks.append(pam_callback(start=str(tmp_path / "best.ckpt"), presence="predicted"))
    with pytest.raises(ConfigError, match=r"make predict SCANS="):
        trainer(tmp_path).predict(model, tiny_phantom(drawn), return_predictions=False)
