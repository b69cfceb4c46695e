"""The rules by which scans of a data set are compared."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_modules.cases import Case, Intensity
from data_modules.findings import (
    content_share,
    far_from_others,
    find_duplicates,
    find_header_faults,
    find_poor_content,
    find_unusual,
)
from data_modules.formats import nifti
from data_modules.store import read_case
from data_modules.store_index import Entry, StoreSpec
from tests.fakes import RAS, draw_scan, save_nifti
from weakmedsam.contracts import SOMEWHERE


def entry_of(tmp_path: Path, name: str = "scan", affine: np.ndarray = RAS, factor: int = 1) -> Entry:
    image, mask = draw_scan(0)
    paths = [
        save_nifti(tmp_path / part / f"{name}.nii.gz", voxels, affine)
        for part, voxels in (("i", image.astype(np.int32) * factor), ("m", mask))
    ]
    spec = StoreSpec("fake", str(tmp_path), "", 16, "axial", Intensity(), {"tumour": (1,)}, ())
    return read_case(Case(name, name, *map(str, paths)), spec).entry


def test_far_is_beyond_the_factor_and_beyond_the_spread_of_the_others():
    usual = {str(n): 10.0 + n / 10 for n in range(9)}
    assert far_from_others(usual | {"far": 40.0, "near": 19.0}, 2) == ["far"]
    assert far_from_others(usual | {"far": 2.0}, 2) == ["far"]
    spread = {str(n): 2.0**n for n in range(9)}  # all over the place: nothing is far
    assert far_from_others(spread | {"far": 2.0**12}, 2) == []


def test_unusual_spacing_range_and_axes_are_named_with_case_and_median(tmp_path):
    entries = {f"scan{n}": entry_of(tmp_path, f"scan{n}") for n in range(10)}
    assert find_unusual(entries) == []
    thick = np.diag([1.5, 2.0, 9.0, 1.0])
    entries |= {
        "thick": entry_of(tmp_path, "thick", thick),
        "bright": entry_of(tmp_path, "bright", factor=1000),
        "turned": entry_of(tmp_path, "turned", np.diag([-1.5, -2.0, 3.0, 1.0])),
    }
    found = {(finding.kind, finding.case): finding.text for finding in find_unusual(entries)}
    assert set(found) == {("spacing", "thick"), ("intensity", "bright"), ("orientation", "turned")}
    assert "its slices are 9 mm apart, the median of all scans is 3" in found["spacing", "thick"]
    assert "its axes are LPS, of most scans RAS" in found["orientation", "turned"]


def test_four_scans_say_nothing_of_what_is_usual(tmp_path):
    entries = {name: entry_of(tmp_path, name, np.diag([1, 1, 2.0**n, 1])) for n, name in enumerate("abcd")}
    assert find_unusual(entries) == []


def test_within_a_window_the_mean_tells_what_is_unusual(tmp_path):
    entry = replace(entry_of(tmp_path), window_rule="level 40, width 400", mean=0.2)
    entries = {str(n): replace(entry, name=str(n), high=1000.0**n) for n in range(6)} | {
        "far": replace(entry, mean=0.9)
    }
    assert [(finding.kind, finding.case) for finding in find_unusual(entries)] == [("intensity", "far")]


def test_the_box_of_what_is_not_constant():
    voxels = np.full((4, 10, 10), 7, np.uint16)
    assert content_share(voxels) == 0
    voxels[1, 2:4, 5] = voxels[2, 2, 6] = 9
    assert content_share(voxels) == pytest.approx(2 / 4 * 2 / 10 * 2 / 10)
    assert content_share(np.random.default_rng(0).integers(0, 99, (4, 9, 9)).astype(np.uint16)) == 1


def test_a_mask_without_a_class_is_named(tmp_path):
    entry = entry_of(tmp_path)
    assert find_poor_content(entry, ["tumour"], 1) == []
    (found,) = find_poor_content(replace(entry, counts=tuple((0,) for _ in entry.counts)), ["tumour"], 1)
    assert (found.kind, found.must) == ("empty mask", False)


def test_a_table_counted_from_the_other_end_is_told_from_one_that_is_wrong(tmp_path):
    entry = entry_of(tmp_path)
    half = tuple((99 if n < 3 else 0,) for n in range(6))
    table = tuple((int(n >= 3),) for n in range(6))
    (turned,) = find_poor_content(replace(entry, counts=half, table=table), ["tumour"], 1)
    assert "differ on tumour in 100% of its slices. Counted from the other end they agree" in turned.text
    (wrong,) = find_poor_content(replace(entry, counts=half, table=((0,), (1,)) * 3), ["tumour"], 1)
    assert wrong.text.endswith("Look at both")
    assert find_poor_content(replace(entry, counts=half, table=tuple((c[0] // 99,) for c in half)), ["tumour"], 1) == []


def test_headers_tell_a_shifted_mask_and_no_voxel_is_read(tmp_path, monkeypatch):
    image, mask = draw_scan(0)
    shifted = RAS.copy()
    shifted[0, 3] = 4
    first = save_nifti(tmp_path / "image.nii.gz", image)
    masks = [save_nifti(tmp_path / name, mask, place) for name, place in (("m.nii", RAS), ("s.nii.gz", shifted))]
    damaged = tmp_path / "damaged.nii"
    damaged.write_bytes(masks[0].read_bytes()[:300])
    spec = StoreSpec("fake", str(tmp_path), "", 16, "axial", Intensity(), {"tumour": (1,)}, ())
    monkeypatch.setattr(nifti, "read_exactly", None)
    cases = [
        Case("right", "a", str(first), str(masks[0])),
        Case("shifted", "b", str(first), str(masks[1])),
        Case("damaged", "c", str(damaged)),
        Case("known", "d", "nowhere", problem="is known"),
    ]
    faults = find_header_faults(cases, spec)
    assert "right" not in faults
    assert "lies up to 4.00 mm away from its image" in faults["shifted"]
    assert "ends within its header" in faults["damaged"]
    assert faults["known"] == "is known"


def test_equal_checksums_of_unlike_images_are_no_duplicate(tmp_path):
    entry = entry_of(tmp_path)
    entries = {}
    for number, name in enumerate("abc"):
        (tmp_path / "store" / name).mkdir(parents=True)
        np.save(tmp_path / "store" / name / "image.npy", np.full((2, 4, 4), number // 2, np.uint16))
        entries[name] = replace(entry, name=name, files=(("image.npy", 10, 123),))
    split = {"a": "train", "b": "train", "c": "test"}
    (found,) = find_duplicates(entries, split, tmp_path / "store")
    assert (found.case, found.must) == ("b", False)
    (found,) = find_duplicates(entries, split | {"b": "test"}, tmp_path / "store")
    assert found.must
    assert found.text.startswith("b (test) and a (train) are one image in two splits")


def test_a_table_of_scans_is_compared_with_the_mask_by_scan(tmp_path):
    entry = replace(entry_of(tmp_path), table=((SOMEWHERE, 0),) * 6)
    seen = tuple((99 if n < 1 else 0, 0) for n in range(6))
    assert find_poor_content(replace(entry, counts=seen), ["tumour", "cyst"], 1) == []
    turned = tuple(row[::-1] for row in seen)
    texts = [found.text for found in find_poor_content(replace(entry, counts=turned), ["tumour", "cyst"], 1)]
    assert len(texts) == 2
    assert "differ on whether the scan shows tumour" in texts[0]
