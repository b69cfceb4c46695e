import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.utils.data import default_collate

from data_modules.cases import Case, Intensity
from data_modules.loaders import slice_loader
from data_modules.prepare import prepare
from data_modules.pseudo_labels import PseudoLabelReader
from data_modules.slice_datasets import (
    SliceDataset,
    VolumeDataset,
    check_positives,
    slice_labels,
    tabulate,
)
from data_modules.store import SliceReader
from data_modules.store_index import StoreSpec
from tests.fakes import SHAPE, draw_scan, fake_folder
from weakmedsam.errors import DataError
from weakmedsam.pam.pseudo_label_io import Origin, write_pseudo_label
from weakmedsam.pam.thresholding import PseudoLabel


@pytest.fixture
def stored(tmp_path):
    """(entries, reader) of two cases."""
    root = fake_folder(tmp_path / "scans", 2)
    spec = StoreSpec("fake", str(root), "", 24, "axial", Intensity(), {"tumour": (1,)}, ())
    cases = [
        Case(n, n, str(root / "images" / f"{n}.nii.gz"), str(root / "masks" / f"{n}.nii.gz"))
        for n in ("scan0", "scan1")
    ]
    index = prepare(cases, spec, tmp_path, workers=1)
    return list(index.entries.values()), SliceReader(spec.folder(tmp_path))


def write_pseudo(folder, entries):
    folder.mkdir()
    rng = np.random.default_rng(0)
    written = {}
    for entry in entries:
        shape = (entry.depth, 24, 24)
        written[entry.name] = {
            "label": rng.integers(0, 2, shape).astype(np.uint8),
            "confidence": rng.integers(0, 256, shape).astype(np.uint8),
            "quality": np.where(np.arange(entry.depth) == 3, 0.25, np.nan).astype(np.float32)[:, None],
            "histogram": np.zeros((1, 256), np.int64),
        }
        save_file(written[entry.name], folder / f"{entry.name}.safetensors")
    return written


def test_labels_follow_min_pixels_and_a_table_wins(stored):
    entry = replace(stored[0][0], counts=((0,), (9,), (10,), (500,)))
    np.testing.assert_array_equal(slice_labels(entry, 10)[:, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(slice_labels(entry, 1)[:, 0], [0, 1, 1, 1])
    np.testing.assert_array_equal(slice_labels(replace(entry, table=((1,),) * 4), 10)[:, 0], [1, 1, 1, 1])
    with pytest.raises(DataError, match=r"scan0\.nii\.gz: has neither"):
        slice_labels(replace(entry, counts=None), 10)


def test_rows_run_by_case_and_slice(stored):
    table = tabulate(stored[0], 10)
    assert len(table) == 12
    assert [(table.cases[c], s) for c, s in zip(table.case, table.slice, strict=True)][5:7] == [
        ("scan0", 5),
        ("scan1", 0),
    ]
    positive = tabulate(stored[0], 10, only_positive=True)
    assert positive.slice.tolist() == [1, 2, 3, 4] * 2
    assert positive.labels.all()


def test_a_slice_is_what_was_scanned(stored):
    dataset = SliceDataset(tabulate(stored[0], 10), stored[1], with_mask=True)
    item = dataset[8]
    assert set(item) == {"image", "label", "index", "case", "slice", "box", "mask"}
    assert (item["index"], item["case"], item["slice"]) == (8, "scan1", 2)
    assert item["image"].shape == (1, 24, 24)
    assert item["image"].dtype == torch.float32
    assert 0 <= item["image"].min() < item["image"].max() <= 1
    assert item["mask"].dtype == torch.int64
    # The target is the brightest thing there is, so mask and image must agree.
    inside, outside = item["image"][0][item["mask"] == 1], item["image"][0][item["mask"] == 0]
    assert inside.mean() > 0.7 > 0.3 > outside.mean()


def test_training_items_hold_no_mask(stored):
    assert set(SliceDataset(tabulate(stored[0], 10), stored[1])[0]) == {
        "image",
        "label",
        "index",
        "case",
        "slice",
        "box",
    }


def test_pseudo_labels_are_read_by_slice(stored, tmp_path):
    written = write_pseudo(tmp_path / "pseudo", stored[0])
    reader = PseudoLabelReader(tmp_path / "pseudo", max_open=1)
    reader.check(stored[0])
    dataset = SliceDataset(tabulate(stored[0], 10), stored[1], pseudo=reader)
    for index, case, number in ((3, "scan0", 3), (10, "scan1", 4)):
        item = dataset[index]
        np.testing.assert_array_equal(item["target"], written[case]["label"][number])
        np.testing.assert_allclose(item["confidence"], written[case]["confidence"][number] / 255, atol=1e-6)
        assert item["quality"] == (0.25 if number == 3 else 1.0)
        assert "mask" not in item
    assert len(reader._open) == 1
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[3]["target"], dataset[3]["target"])


@pytest.mark.parametrize("kind", ["mask", "pseudo", "expert_target"])
def test_a_batch_is_its_slices_collated(stored, tmp_path, kind):
    write_pseudo(tmp_path / "pseudo", stored[0])
    options = {
        "mask": {"with_mask": True},
        "pseudo": {"pseudo": PseudoLabelReader(tmp_path / "pseudo")},
        "expert_target": {"expert_target": True},
    }
    dataset = SliceDataset(tabulate(stored[0], 10), stored[1], **options[kind])
    order = [8, 3, 11]
    found = next(iter(slice_loader(dataset, order, 3, 0)))
    wanted = default_collate([dataset[row] for row in order])
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert type(found[key]) is type(value), key
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


def test_a_slice_is_as_good_as_its_worst_class(tmp_path):
    quality = np.array([[0.75, 0.5], [np.nan, 0.75], [np.nan, np.nan]], np.float32)
    maps = np.zeros((3, 4, 4), np.uint8)
    save_file({"label": maps, "confidence": maps, "quality": quality}, tmp_path / "a.safetensors")
    reader = PseudoLabelReader(tmp_path)
    assert [reader.read("a", number).quality for number in range(3)] == [0.5, 0.75, 1.0]


def test_missing_damaged_and_foreign_pseudo_labels_are_named(stored, tmp_path):
    entries = stored[0]
    write_pseudo(tmp_path / "pseudo", entries)
    other = replace(entries[0], frame=entries[0].frame._replace(size=32))
    with pytest.raises(DataError, match=r"scan0\.safetensors: is \(6, 24, 24\), the slices are \(6, 32, 32\)"):
        PseudoLabelReader(tmp_path / "pseudo").check([other])
    (tmp_path / "pseudo" / "scan1.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match=r"scan1\.safetensors: cannot be read"):
        PseudoLabelReader(tmp_path / "pseudo").check(entries)
    (tmp_path / "pseudo" / "scan1.safetensors").unlink()
    with pytest.raises(DataError, match=r"1 of 2 cases have no pseudo-label: \['scan1'\]"):
        PseudoLabelReader(tmp_path / "pseudo").check(entries)


def test_the_upper_bound_learns_the_expert_mask(stored):
    table = tabulate(stored[0], 10)
    item = SliceDataset(table, stored[1], expert_target=True)[2]
    np.testing.assert_array_equal(item["target"], SliceDataset(table, stored[1], with_mask=True)[2]["mask"])
    assert (item["confidence"] == 1).all()
    assert item["quality"] == 1
    assert "mask" not in item


def test_a_volume_comes_whole(stored):
    volume = VolumeDataset(stored[0], stored[1], 10, with_mask=True)[1]
    assert volume["image"].shape == (6, 1, 24, 24)
    assert volume["label"].shape == (6, 1)
    assert volume["spacing"] == (3.0, 2.0, 1.5)
    assert volume["frame"] == (16, 20, 20, 24)
    wanted = draw_scan(1)[1][::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(volume["mask"], wanted)
    assert volume["mask"].shape == SHAPE[::-1]
    assert "mask" not in VolumeDataset(stored[0], stored[1], 10)[0]


def test_a_class_that_is_never_there_is_named(stored):
    table = tabulate(stored[0], 10)
    check_positives(table, ["tumour"], "fake")
    nothing = replace(table, labels=np.stack([table.labels[:, 0], 0 * table.labels[:, 0]], axis=1))
    with pytest.raises(DataError, match=r"No training slice of fake shows cyst:"):
        check_positives(nothing, ["tumour", "cyst"], "fake")


def test_a_pseudo_label_of_another_case_is_refused(stored, tmp_path):
    entries = stored[0]
    entry, other = entries[:2]
    size = entry.frame.size
    maps = torch.zeros(entry.depth, size, size)
    quality = torch.ones(entry.depth, 1)
    labels = PseudoLabel(maps.to(torch.uint8), maps, quality, quality)
    for name in (entry.name, other.name):
        write_pseudo_label(tmp_path / f"{name}.safetensors", labels, Origin(name, {}))
    PseudoLabelReader(tmp_path).check([entry, other])
    shutil.copy(tmp_path / f"{other.name}.safetensors", tmp_path / f"{entry.name}.safetensors")
    with pytest.raises(DataError, match=rf"{entry.name}\.safetensors: is of case {other.name}\. Remove it"):
        PseudoLabelReader(tmp_path).check([entry, other])
    save_file({"else": np.zeros(1)}, tmp_path / f"{entry.name}.safetensors")
    with pytest.raises(DataError, match=rf"{entry.name}\.safetensors: is no pseudo-label"):
        PseudoLabelReader(tmp_path).check([entry, other])
