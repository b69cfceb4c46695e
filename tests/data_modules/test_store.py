import errno
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from data_modules.cases import Case, Intensity
from data_modules.store import FULL_SCALE, SliceReader, find_window, read_case, scale_slices, write_case
from data_modules.store_index import Entry, StoreSpec
from data_modules.summary import check_sizes
from tests.fakes import RAS, draw_scan, save_nifti
from weakmedsam.contracts import Frame
from weakmedsam.errors import DataError, DiskError


@pytest.fixture
def spec(tmp_path) -> StoreSpec:
    return StoreSpec("fake", str(tmp_path), "", 20, "axial", Intensity(), {"tumour": (1,)}, ())


@pytest.fixture
def case(tmp_path) -> Case:
    image, mask = draw_scan(0)
    paths = [str(save_nifti(tmp_path / name, v)) for name, v in (("i.nii.gz", image), ("m.nii.gz", mask))]
    return Case("one", "patient", paths[0], paths[1])


def test_a_case_is_stored_faithfully(tmp_path, spec, case):
    image, mask = draw_scan(0)
    arrays = read_case(case, spec)
    write_case(arrays, tmp_path / "store")
    reader = SliceReader(tmp_path / "store")
    # By hand: columns run from right to left, rows from front to back, slices from the feet up.
    seen = image[::-1, ::-1].transpose(2, 1, 0).astype(float)
    low, high = np.percentile(image[image > 0], [0.5, 99.5])
    wanted = np.clip((seen - low) / (high - low), 0, 1)
    stored = reader.image("one")
    assert stored.shape == (6, 20, 20)
    assert stored.dtype == np.uint16
    np.testing.assert_allclose(stored[:, 2:18] / FULL_SCALE, wanted, atol=1 / FULL_SCALE)
    assert not stored[:, :2].any()
    np.testing.assert_array_equal(reader.mask_native("one"), mask[::-1, ::-1].transpose(2, 1, 0))
    np.testing.assert_array_equal(reader.mask("one")[:, 2:18], reader.mask_native("one"))
    entry = arrays.entry
    assert entry.frame == Frame(16, 20, 20, 20)
    assert entry.geometry.spacing == (3.0, 2.0, 1.5)
    assert entry.counts == tuple((int(n),) for n in mask.sum((0, 1)))
    assert (entry.mean, entry.deviation) == pytest.approx((wanted.mean(), wanted.std()), abs=1e-6)
    assert Entry.from_json(entry.to_json()) == entry


def test_a_case_without_a_mask_has_no_mask_files(tmp_path, spec, case):
    write_case(read_case(replace(case, mask=None), spec), tmp_path / "store")
    assert sorted(p.name for p in (tmp_path / "store" / "one").iterdir()) == ["entry.json", "image.npy"]


def test_twelve_bits_survive():
    values = np.arange(4096).reshape(1, 64, 64)
    stored = scale_slices(values, 0, 4095, 64)[0]
    assert len(np.unique(stored)) == 4096


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 21},
        {"plane": "coronal"},
        {"intensity": Intensity(window=(40, 400))},
        {"classes": {"tumour": (1, 2)}},
        {"classes": {"lesion": (1,)}},
        {"values": (3,)},
        {"variant": "t1"},
        {"data_dir": "elsewhere"},
        {"data_set": "other"},
    ],
)
def test_the_key_changes_with_every_setting(spec, change):
    assert replace(spec, **change).folder("s") != spec.folder("s")


def test_the_key_knows_the_order_of_classes(spec):
    first, second = ({"a": (1,), "b": (2,)}, {"b": (2,), "a": (1,)})
    assert replace(spec, classes=first).key != replace(spec, classes=second).key


def test_a_window_is_used_as_given():
    volume = np.array([[[-1000, 0, 100, 3000]]])
    assert find_window(volume, Intensity(window=(40, 400)), "p")[:2] == (-160, 240)


def test_percentiles_leave_out_the_background():
    volume = np.concatenate([np.zeros(900), np.arange(1, 101)]).reshape(10, 10, 10)
    low, high, rule = find_window(volume, Intensity(percentiles=(10, 90)), "p")
    assert (low, high) == pytest.approx((10.9, 90.1))
    assert "percentiles 10 and 90" in rule


def test_two_values_are_an_image():
    volume = np.zeros((2, 2, 2))
    volume[0] = 7
    assert find_window(volume, Intensity(), "p")[:2] == (0, 7)


@pytest.mark.parametrize(
    ("volume", "intensity", "said"),
    [
        (np.array([[[0.0, np.nan]]]), Intensity(), r"scan\.nii: holds NaN"),
        (np.array([[[0.0, np.inf]]]), Intensity(), r"scan\.nii: holds NaN or infinite"),
        (np.full((2, 2, 2), 5), Intensity(), r"scan\.nii: is constant \(5"),
        (np.array([[[500, 600]]]), Intensity(window=(40, 400)), "constant within its window"),
        (np.array([[[0.0, 0.3]]]), Intensity(window=(40, 400)), "in HU"),
    ],
)
def test_useless_images_are_named(volume, intensity, said):
    with pytest.raises(DataError, match=said):
        find_window(volume, intensity, "scan.nii")


def test_a_mask_elsewhere_is_refused(tmp_path, spec, case):
    moved = RAS.copy()
    moved[0, 3] = 50
    mask = save_nifti(tmp_path / "moved.nii.gz", draw_scan(0)[1], moved)
    with pytest.raises(DataError, match=r"moved\.nii\.gz: lies up to 50\.00 mm away"):
        read_case(replace(case, mask=str(mask)), spec)


def test_the_reader_maps_few_files_and_pickles_without_them(tmp_path, spec, case):
    for name in ("a", "b", "c"):
        write_case(read_case(replace(case, name=name), spec), tmp_path / "store")
    reader = SliceReader(tmp_path / "store", max_open=2)
    for name in ("a", "b", "c", "a"):
        assert isinstance(reader.image(name), np.memmap)
        assert len(reader._maps) <= 2
    assert len(pickle.dumps(reader)) < 1000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).image("b"), reader.image("b"))


def test_what_workers_import_is_light():
    modules = "data_modules, data_modules.store, data_modules.splits, data_modules.prepare"
    heavy = "[m for m in ('torch', 'lightning', 'monai') if m in sys.modules]"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print({heavy})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_on_a_full_disk_no_half_case_is_left(tmp_path, spec, case, monkeypatch):
    store, arrays = tmp_path / "store", read_case(case, spec)
    write_case(arrays, store)
    before = SliceReader(store).image("one").copy()

    def fill(path, content):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fill)
        with pytest.raises(DiskError, match=r"store/one could not be written: its disk is full"):
            write_case(arrays, store)
    assert [folder.name for folder in store.iterdir()] == ["one"]
    np.testing.assert_array_equal(SliceReader(store).image("one"), before)


@pytest.mark.parametrize("name", ["image.npy", "mask.npy", "mask_native.npz"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\x93NUMPY\x01\x00v\x00{'descr'", b"PK\x03\x04"])
def test_a_damaged_array_is_one_message_to_who_reads_it(tmp_path, spec, case, name, content):
    store = tmp_path / "store"
    entry = write_case(read_case(case, spec), store)
    path = store / "one" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"one/{name} cannot be read .*make prepare`, prepares its volume again"):
        getattr(SliceReader(store), name.partition(".")[0])("one")
    with pytest.raises(DataError, match=rf"one/{name} is .*make prepare` prepares its volume again"):
        check_sizes(store, {"one": entry})
