"""DICOM: series and multi-frame files lie where the same volume does as NIfTI; what is no volume is refused."""

import re
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless
from scan_formats import SECONDARY, place_of, same_places, save, save_dicom, save_enhanced, slice_of, write_by_itk

from data_modules.formats.read import read_scan
from data_modules.formats.volume import NO_SPACING, Reading, make_volume
from weakmedsam.errors import DataError

RAS = np.array([[0.8, 0, 0, -20], [0, 0.7, 0, 30], [0, 0, 2.5, 12], [0, 0, 0, 1.0]])
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def draw(shape=(5, 4, 6), seed=0, kind=np.int16):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(kind)


def turned(seed, sizes, flips) -> np.ndarray:
    """An oblique affine with its handedness."""
    axes, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.diag(np.multiply(sizes, flips))
    affine[:3, 3] = [-30.5, 12.25, 7]
    return affine


@QUICK
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(2, 5)),
    sizes=st.tuples(*[st.floats(0.3, 6)] * 3),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    enhanced=st.booleans(),
)
def test_every_voxel_lies_where_it_does_as_nifti(tmp_path_factory, seed, shape, sizes, flips, enhanced):
    folder = tmp_path_factory.mktemp("scan")
    voxels, affine = draw(shape, seed), turned(seed, sizes, flips)
    if enhanced:
        found = read_scan(save_enhanced(folder / "all.dcm", voxels, affine))
    else:
        found = read_scan(folder, save_dicom(folder, voxels, affine, seed))
    assert same_places(make_volume(voxels, affine, "x"), found)
    assert found.unit == "mm"
    header = nib.Nifti1Header(found.header)
    for way in (header.get_sform(), header.get_qform()):  # of what is written onto it, whichever a viewer takes
        assert np.allclose(way, found.affine, atol=1e-3)


CODES = [
    "".join(pair[side] for pair, side in zip(pairs, sides, strict=True))
    for pairs in permutations(("LR", "PA", "IS"))
    for sides in product((0, 1), repeat=3)
]


@pytest.mark.parametrize("code", CODES)
def test_every_orientation_code(tmp_path, code):
    voxels = draw((3, 4, 5))
    affine = np.zeros((4, 4))
    for axis, (row, sign) in enumerate(nib.orientations.axcodes2ornt(code)):
        affine[int(row), axis] = sign * (axis + 1)
    affine[:, 3] = [7, -8, 9, 1]
    assert "".join(nib.aff2axcodes(affine)) == code
    found = read_scan(tmp_path, save_dicom(tmp_path, voxels, affine))
    assert same_places(make_volume(voxels, affine, "x"), found)


def test_itk_finds_the_same_voxels_at_the_same_places(tmp_path):
    voxels, affine = draw((7, 6, 5)), turned(3, (0.7, 0.9, 2.5), (1, -1, 1))
    paths = save_dicom(tmp_path / "s", voxels, affine, RescaleSlope=2, RescaleIntercept=-7)
    write_by_itk(
        "reader = sitk.ImageSeriesReader()\n"
        "reader.SetFileNames(reader.GetGDCMSeriesFileNames(sys.argv[1]))\n"
        "sitk.WriteImage(reader.Execute(), sys.argv[2])",
        *(tmp_path / "s", tmp_path / "itk.nii.gz"),
    )
    assert same_places(read_scan(tmp_path / "itk.nii.gz"), read_scan(tmp_path / "s", paths))


def test_slices_are_counted_along_their_normal_and_columns_come_first(tmp_path):
    voxels = draw()
    found = read_scan(tmp_path, save_dicom(tmp_path, voxels, np.diag([-0.8, -0.7, 2.5, 1])))
    assert np.array_equal(found.voxels, voxels)  # as scanners write axial slices: feet to head
    assert np.allclose(found.affine, np.diag([-0.8, -0.7, 2.5, 1]))
    assert found.voxels.dtype == np.int16


def test_one_slice_takes_its_thickness(tmp_path):
    paths = save_dicom(tmp_path, draw((5, 4, 1)), RAS, SliceThickness=3.5)
    assert np.linalg.norm(read_scan(tmp_path, paths).affine[:3, 2]) == pytest.approx(3.5)
    other = save(slice_of(draw((4, 5)), **place_of(RAS, 0)), tmp_path / "bare")
    assert read_scan(other).voxels.shape == (5, 4, 1)
    assert np.linalg.norm(read_scan(other).affine[:3, 2]) == pytest.approx(0.7)


def test_a_tilted_gantry_is_kept_as_a_sheared_affine(tmp_path):
    affine = RAS.copy()
    affine[1, 2] = 1.1  # slices are shifted to the front as they go up
    voxels = draw()
    found = read_scan(tmp_path, save_dicom(tmp_path, voxels, affine))
    assert same_places(make_volume(voxels, affine, "x"), found)
    header = nib.Nifti1Header(found.header)
    assert (header["sform_code"], header["qform_code"]) == (1, 0)


# Values


def test_hounsfield_units_stay_whole_and_other_scales_become_floating_point(tmp_path):
    voxels = draw(kind=np.uint16)
    found = read_scan(tmp_path / "ct", save_dicom(tmp_path / "ct", voxels, RAS, RescaleSlope=1, RescaleIntercept=-1024))
    assert found.voxels.dtype == np.int16
    assert same_places(make_volume(voxels.astype(int) - 1024, RAS, "x"), found)
    found = read_scan(tmp_path / "b", save_dicom(tmp_path / "b", voxels, RAS, RescaleSlope=0.5, RescaleIntercept=1))
    assert same_places(make_volume(voxels * 0.5 + 1, RAS, "x"), found)


def test_each_slice_has_a_scale_of_its_own_as_in_pet(tmp_path):
    voxels = draw((4, 3, 3))
    paths = save_dicom(tmp_path, voxels, RAS)
    for number, path in enumerate(paths):
        held = pydicom.dcmread(path)
        held.RescaleSlope, held.RescaleIntercept = number + 0.5, 0
        held.save_as(path)
    assert same_places(make_volume(voxels * (np.arange(3) + 0.5), RAS, "x"), read_scan(tmp_path, paths))
    found = read_scan(save_enhanced(tmp_path / "e.dcm", voxels, RAS, slopes=[1, 2, 4]))
    assert same_places(make_volume(voxels * np.array([1.0, 2, 4]) - 1, RAS, "x"), found)


def test_light_is_high_where_it_is_stored_as_low(tmp_path):
    pixels = draw((4, 5), kind=np.uint8)
    path = save(slice_of(pixels, PhotometricInterpretation="MONOCHROME1"), tmp_path / "x.dcm")
    assert np.array_equal(read_scan(path).voxels[:, :, 0].T, 255 - pixels)


def test_big_endian_and_compressed_files(tmp_path):
    pixels = draw((4, 5))
    held = slice_of(pixels, **place_of(RAS, 0))
    held.PixelData = pixels.astype(">i2").tobytes()
    path = save(held, tmp_path / "big.dcm", ExplicitVRBigEndian)
    assert np.array_equal(read_scan(path).voxels[:, :, 0].T, pixels)
    plain = read_scan(get_testdata_file("MR_small.dcm", download=False)).voxels
    for name in ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"):
        assert np.array_equal(read_scan(get_testdata_file(name, download=False)).voxels, plain), name


def test_colour_has_channels(tmp_path):
    pixels = draw((4, 5, 3), kind=np.uint8)
    held = slice_of(pixels[:, :, 0], SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    held.PixelData = pixels.tobytes()
    path = save(held, tmp_path / "rgb.dcm")
    assert np.array_equal(read_scan(path, (), Reading(1)).voxels[:, :, 0].T, pixels[:, :, 1])
    with pytest.raises(
        DataError, match=r"rgb\.dcm: has 3 channels of colour\. Say which one is taken, data\.channel: 0"
    ):
        read_scan(path)


def test_phases_at_one_position_are_volumes(tmp_path):
    first, second = draw(seed=1), draw(seed=2)
    paths = save_dicom(tmp_path / "a", first, RAS, SeriesInstanceUID="1.9")
    for number, path in enumerate(save_dicom(tmp_path / "b", second, RAS, SeriesInstanceUID="1.9")):
        held = pydicom.dcmread(path)
        held.InstanceNumber = 100 + number
        held.save_as(path)
        paths.append(path)
    for channel, wanted in enumerate((first, second)):
        assert same_places(make_volume(wanted, RAS, "x"), read_scan(tmp_path, paths, Reading(channel)))
    with pytest.raises(DataError, match=r"has 2 slices at each position .* data.channel: 0 to 1"):
        read_scan(tmp_path, paths)


def test_frames_without_positions_are_slices_of_no_known_size(tmp_path):
    frames = draw((3, 4, 5), kind=np.uint8)
    path = save(slice_of(frames, SOPClassUID=SECONDARY, Modality="US"), tmp_path / "us.dcm")
    found = read_scan(path)
    assert found.unit == NO_SPACING
    assert np.array_equal(found.voxels.T, frames)
    assert np.allclose(read_scan(path, (), Reading(spacing=(1, 2, 3))).affine, np.diag([-1, -2, 3, 1]))


# What is no volume


def change(path: Path, **tags) -> None:
    held = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(held, name, value)
    held.save_as(path)


def harm(paths: list[Path], kind: str) -> None:
    """Spoil a series; slices are in the order in which they lie."""
    middle = paths[len(paths) // 2]
    if kind == "gap":
        paths.remove(middle)
    elif kind == "unequal":
        position = list(pydicom.dcmread(middle).ImagePositionPatient)
        change(middle, ImagePositionPatient=[*position[:2], position[2] + 0.9])
    elif kind == "shifted":
        position = list(pydicom.dcmread(middle).ImagePositionPatient)
        change(middle, ImagePositionPatient=[position[0] + 5, *position[1:]])
    elif kind == "twice":
        held = pydicom.dcmread(middle)
        held.SOPInstanceUID = "1.2.3.9"
        paths.append(save(held, middle.with_name("again.dcm")))
    elif kind == "size":
        held = pydicom.dcmread(middle)
        held.Rows, held.Columns = held.Columns, held.Rows
        held.save_as(middle)
    elif kind == "orientation":
        change(middle, ImageOrientationPatient=[0, 1, 0, 0, 0, 1])
    elif kind == "spacing":
        change(middle, PixelSpacing=[3, 3])
    elif kind == "no spacing":
        held = pydicom.dcmread(middle)
        del held.PixelSpacing
        held.save_as(middle)
    elif kind == "no position":
        held = pydicom.dcmread(middle)
        del held.ImagePositionPatient
        held.save_as(middle)
    elif kind == "bad orientation":
        for path in paths:
            change(path, ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    elif kind == "half":
        for path in paths:
            change(path, ImagesInAcquisition=12)
    elif kind == "cut":
        middle.write_bytes(middle.read_bytes()[:-20])
    elif kind == "page":
        middle.write_text("<html>404</html>")
    elif kind == "bomb":
        change(middle, Rows=65000, Columns=65000)
    elif kind == "mosaic":
        change(middle, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])
    elif kind == "segmentation":
        change(middle, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gap", r"lies 5\.00 mm from .*, other slices 2\.50 mm: 1 slice\(s\) are missing\. Get the whole series"),
        ("unequal", r"lies 3\.40 mm from .*, other slices 2\.50 mm: distances of slices are unequal"),
        ("shifted", "beside the line of the other slices: they are not one volume"),
        ("twice", "lies at the position of .*Remove the slice that is too many"),
        ("size", "has 4 x 5 pixels, .* has 5 x 4: they are not one volume"),
        ("orientation", "lies in another orientation than"),
        ("spacing", r"has pixels of \(3\.0, 3\.0\) mm"),
        ("no spacing", "has a position, and no pixel spacing"),
        ("no position", "has a position, it is the other way|has no position, it is the other way"),
        ("bad orientation", "its orientation cannot be used"),
        ("half", "has 6 of the 12 slices of its acquisition. Get the whole series"),
        ("cut", "cannot be read .* It is truncated, damaged or no DICOM image: get it again"),
        ("page", "does not begin as a DICOM file"),
        ("bomb", r"states 1 frame\(s\) of 65000 x 65000 pixels, 7\.9 GiB"),
        ("mosaic", r"is a mosaic, slices in one picture\. Convert the series to NIfTI"),
        ("segmentation", "is a DICOM segmentation object. Convert it to NIfTI"),
    ],
)
def test_what_is_no_volume_is_refused_in_one_line(tmp_path, kind, said):
    paths = save_dicom(tmp_path, draw(), RAS)
    harm(paths, kind)
    with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path))}.*{said}") as told:
        read_scan(tmp_path, paths)
    assert "\n" not in str(told.value)


def test_a_compressed_file_that_cannot_be_decoded_names_the_mend(tmp_path):
    held = slice_of(draw((4, 5)), **place_of(RAS, 0))
    held.PixelData = pydicom.encaps.encapsulate([b"nothing of JPEG 2000 "])
    held["PixelData"].is_undefined_length = True
    path = save(held, tmp_path / "x.dcm", JPEG2000Lossless)
    with pytest.raises(DataError, match=r"is compressed as JPEG 2000 .*: save the series uncompressed"):
        read_scan(path)


def test_rounded_positions_are_no_gap(tmp_path):
    affine = np.diag([1, 1, 1.2333, 1.0])
    voxels = draw((3, 3, 20))
    paths = save_dicom(tmp_path, voxels, affine)
    for number, path in enumerate(paths):
        change(path, ImagePositionPatient=[0, 0, round(number * 1.2333, 2)])
    assert read_scan(tmp_path, paths).affine[2, 2] == pytest.approx(1.2333, abs=1e-3)


@settings(QUICK, max_examples=150)
@given(place=st.floats(0, 1), value=st.integers(0, 255), name=st.sampled_from(["IM0000.dcm", "e.dcm"]))
def test_a_damaged_byte_gives_a_volume_or_one_line(tmp_path, place, value, name):
    paths = save_dicom(tmp_path / "s", draw((3, 2, 2)), RAS, SeriesInstanceUID="1.5")
    files = paths if name.startswith("IM") else [save_enhanced(tmp_path / "s" / name, draw((3, 2, 2)), RAS)]
    (path,) = [file for file in files if file.name == name]
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] = value
    path.write_bytes(content)
    said = ""
    try:
        read_scan(tmp_path / "s", files)
    except DataError as error:
        said = str(error)
    assert "\n" not in said
