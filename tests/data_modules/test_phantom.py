"""The phantom: what is drawn, what is written, and that nothing depends on order or interruption."""

import json
import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from data_settings import data_settings
from scipy import ndimage

from data_modules import phantom as module
from data_modules.phantom import Phantom, phantom_folder, write_phantom
from data_modules.phantom_drawing import CYST, LESION, MODES, Drawing, PhantomParameters, draw_volume
from data_modules.volumes import read_volume
from weakmedsam.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
SMALL = PhantomParameters(slices=12, size=48)


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return [draw_volume(SMALL, number) for number in range(60)]


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_volume_depends_on_seed_and_number_alone(drawings: list[Drawing]) -> None:
    again = draw_volume(SMALL, 7)  # 60 others were drawn in between
    np.testing.assert_array_equal(again.image, drawings[7].image)
    np.testing.assert_array_equal(again.mask, drawings[7].mask)
    assert not np.array_equal(again.image, drawings[8].image)
    assert not np.array_equal(again.image, draw_volume(replace(SMALL, seed=1), 7).image)


def test_types_and_values(drawings: list[Drawing]) -> None:
    for drawing in drawings:
        assert drawing.image.shape == drawing.mask.shape == drawing.distractor.shape == (12, 48, 48)
        assert (drawing.image.dtype, drawing.mask.dtype, drawing.distractor.dtype) == (
            np.int16,
            np.uint8,
            bool,
        )
        assert 0 <= drawing.image.min() < drawing.image.max() < 4000
        assert set(np.unique(drawing.mask)) <= {0, LESION, CYST}


def test_targets_are_frequent_and_large_enough(drawings: list[Drawing]) -> None:
    for target in (LESION, CYST):
        area = np.stack([(d.mask == target).mean(axis=(1, 2)) for d in drawings])
        assert 0.2 < (area > 0).mean() < 0.45  # of slices
        assert 0.03 < np.median(area[area > 0]) < 0.12  # of the slice
        assert (area > 0).any(axis=1).mean() < 1  # some volumes have none


def test_distractor_goes_with_the_lesion_and_is_in_no_mask(drawings: list[Drawing]) -> None:
    lesion = np.concatenate([(d.mask == LESION).any(axis=(1, 2)) for d in drawings])
    ring = np.concatenate([d.distractor.any(axis=(1, 2)) for d in drawings])
    assert ring[lesion].mean() == pytest.approx(SMALL.co_occurrence, abs=0.05)
    assert ring[~lesion].mean() == pytest.approx(SMALL.distractor_rate, abs=0.05)
    assert not any((d.distractor & (d.mask > 0)).any() for d in drawings)


@pytest.mark.parametrize(("with_lesion", "without"), [(0.0, 0.0), (0.5, 0.5), (1.0, 0.0)])
def test_co_occurrence_is_an_argument(with_lesion: float, without: float) -> None:
    parameters = replace(SMALL, co_occurrence=with_lesion, distractor_rate=without)
    drawn = [draw_volume(parameters, number) for number in range(40)]
    lesion = np.concatenate([(d.mask == LESION).any(axis=(1, 2)) for d in drawn])
    ring = np.concatenate([d.distractor.any(axis=(1, 2)) for d in drawn])
    assert ring[lesion].mean() == pytest.approx(with_lesion, abs=0.06)
    assert ring[~lesion].mean() == pytest.approx(without, abs=0.06)


def test_modes_are_an_argument(drawings: list[Drawing]) -> None:
    assert {d.mode for d in drawings} == set(MODES[:3])
    assert {draw_volume(replace(SMALL, modes=1), number).mode for number in range(10)} == {"solid"}


def test_organs_are_an_argument() -> None:
    """Without contrast of their own the organs vanish; the targets stay as they are."""
    quiet = replace(SMALL, bias=0.0, noise=0.0, contrast=1.0)
    faint = replace(quiet, organs=0.0)
    spreads = []
    for number in range(6):
        full, plain = draw_volume(quiet, number), draw_volume(faint, number)
        np.testing.assert_array_equal(full.mask, plain.mask)
        inner = (plain.mask == 0) & ~plain.distractor & (np.hypot(*np.mgrid[-24:24, -24:24]) < 12)
        spreads.append((full.image[inner].std(), plain.image[inner].std()))
    before, after = np.mean(spreads, axis=0)
    assert after < 0.9 * before


def test_the_strength_of_patterns_is_an_argument() -> None:
    """At 0 lesions of every appearance are as even as solid ones; their mean does not matter."""
    quiet = replace(SMALL, bias=0.0, noise=0.0, size=96)
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(24):
        full, even = draw_volume(quiet, number), draw_volume(replace(quiet, pattern=0.0), number)
        lesion = ndimage.binary_erosion(full.mask == LESION, np.ones((1, 7, 7)))
        np.testing.assert_array_equal(full.mask, even.mask)
        if lesion.any():
            found[full.mode].append(even.image[lesion].std() / full.image[lesion].std())
    assert np.mean(found["mottled"]) < 0.7
    assert np.mean(found["rimmed"]) < 0.7


def test_the_documented_hard_setting_gives_the_defaults_back() -> None:
    """What docs/results.md calls HARD, over the default run's file, is ``PhantomParameters()``."""
    file = yaml.safe_load((ROOT / "experiments/data/phantom.yaml").read_text())
    text = (ROOT / "docs/results.md").read_text()
    hard = re.findall(r"--data\.phantom\.(\w+)\s+([^\s`]+)", text.partition("## Real scans")[0])
    asked = file["data"]["init_args"]["phantom"] | {key: yaml.safe_load(value) for key, value in hard}
    assert PhantomParameters(**asked | {"spacing": tuple(asked["spacing"])}) == PhantomParameters()
    assert PhantomParameters(**file["data"]["init_args"]["phantom"]) != PhantomParameters()


def test_contrast_is_an_argument(drawings: list[Drawing]) -> None:
    """Lesions are brighter, cysts darker, than the tissue around; without contrast neither is."""

    def difference(parameters: PhantomParameters, target: int) -> float:
        found = []
        for number in range(12):
            drawing = draw_volume(parameters, number)
            body = drawing.image > 0.3 * np.median(drawing.image[drawing.image > drawing.image.mean()])
            around = body & (drawing.mask == 0) & ~drawing.distractor
            inside = drawing.mask == target
            if inside.any():
                found.append(drawing.image[inside].mean() / np.median(drawing.image[around]) - 1)
        return float(np.mean(found))

    quiet = replace(SMALL, bias=0.0, noise=0.01)
    clear, faint = difference(quiet, LESION), difference(replace(quiet, contrast=0.4), LESION)
    assert clear > 0.25
    assert faint < clear - 0.1
    assert difference(quiet, CYST) < -0.25
    assert abs(difference(replace(quiet, contrast=0.0), CYST)) < 0.15


def test_noise_and_bias_are_arguments() -> None:
    quiet = replace(SMALL, noise=0.0, bias=0.0)
    image = draw_volume(quiet, 0).image.astype(float)
    corner = (slice(None), slice(0, 4), slice(0, 4))  # air
    assert image[corner].max() <= 1
    noisy = draw_volume(replace(quiet, noise=0.1), 0).image[corner].std()
    assert noisy > 1.5 * draw_volume(replace(quiet, noise=0.05), 0).image[corner].std() > 0
    body = image > 100
    ratio = draw_volume(replace(quiet, bias=0.3), 0).image[body] / image[body]
    assert ratio.max() / ratio.min() > 1.2
    assert ratio.max() < 1.02 * np.exp(0.3) * 1.1
    assert np.array_equal(draw_volume(replace(SMALL, noise=0.2), 0).mask, draw_volume(quiet, 0).mask)


@pytest.mark.parametrize(
    "wrong",
    [
        {"modes": 5},
        {"organs": -1.0},
        {"slices": 2},
        {"spacing": (1.0, 0.0, 1.0)},
        {"co_occurrence": 1.1},
        {"noise": -1.0},
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PhantomParameters(**wrong)


def test_files_lie_as_a_scanner_writes_them(tmp_path: Path) -> None:
    root = write_phantom(tmp_path, SMALL, 2)
    image = nib.load(root / "images/phantom_001.nii.gz")
    mask = nib.load(root / "masks/phantom_001.nii.gz")
    assert image.shape == mask.shape == (48, 48, 12)
    assert image.header.get_zooms() == (1.5, 1.5, 4.0)
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    np.testing.assert_array_equal(image.affine, mask.affine)
    drawing = draw_volume(SMALL, 1)
    slices, geometry = read_volume(root / "images/phantom_001.nii.gz")
    np.testing.assert_array_equal(slices, drawing.image)
    np.testing.assert_array_equal(read_volume(root / "masks/phantom_001.nii.gz")[0], drawing.mask)
    assert geometry.spacing == (4.0, 1.5, 1.5)
    facts = json.loads((root / "phantom.json").read_text())
    assert (facts["num_volumes"], facts["noise"]) == (2, SMALL.noise)


def test_anisotropic_pixels_keep_their_axes(tmp_path: Path) -> None:
    root = write_phantom(tmp_path, replace(SMALL, spacing=(1.0, 2.0, 4.0)), 1)
    assert read_volume(root / "images/phantom_000.nii.gz")[1].spacing == (4.0, 1.0, 2.0)


def test_a_killed_set_is_finished_with_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files(write_phantom(tmp_path / "whole", SMALL, 4))
    save, calls = nib.save, []

    def save_until_killed(image: nib.Nifti1Image, path: Path) -> None:
        calls.append(path)
        if len(calls) == 6:  # the third image: its mask is there
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(image, path)

    monkeypatch.setattr(module.nib, "save", save_until_killed)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "killed", SMALL, 4)
    root = phantom_folder(tmp_path / "killed", SMALL, 4)
    drawn = Phantom(str(tmp_path / "killed"), 4, SMALL)
    assert drawn.data_dir == str(root)
    assert [case.name for case in drawn.find_cases()] == ["phantom_000", "phantom_001"]
    monkeypatch.undo()
    assert files(write_phantom(tmp_path / "killed", SMALL, 4)) == whole


def test_a_finished_set_is_left_alone_and_others_go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_phantom(tmp_path, SMALL, 2)
    times = {p: p.stat().st_mtime_ns for p in first.rglob("*.nii.gz")}
    second = write_phantom(tmp_path, replace(SMALL, noise=0.1), 2)
    more = write_phantom(tmp_path, SMALL, 3)
    assert len({first, second, more}) == 3
    monkeypatch.setattr(module, "draw_volume", lambda *_: pytest.fail("drawn again"))
    assert write_phantom(tmp_path, SMALL, 2) == first
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*.nii.gz")} == times
    shared = "images/phantom_001.nii.gz"
    assert (first / shared).read_bytes() == (more / shared).read_bytes()  # whatever the number of volumes


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No phantom data"):
        Phantom(str(tmp_path)).find_cases()


def test_data_module_draws_and_prepares(tmp_path: Path) -> None:
    data = Phantom(
        data_dir=str(tmp_path / "scans"),
        phantom=SMALL,
        num_volumes=9,
        image_size=64,
        batch_size=4,
        num_workers=0,
        **data_settings(prepare__store_dir=str(tmp_path / "stores"), prepare__workers=1),
    )
    data.prepare_data()
    data.setup("fit")
    assert data.class_names == ["lesion", "cyst"]
    assert sum(len(data.cases(split)) for split in ("train", "val", "test")) == 9
    batch = next(iter(data.train_dataloader()))
    assert "mask" not in batch
    assert batch["image"].shape == (4, 1, 64, 64)
    with pytest.raises(ConfigError, match="num_volumes"):
        Phantom(num_volumes=2)
