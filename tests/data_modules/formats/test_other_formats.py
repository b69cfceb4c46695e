"""NRRD, MetaImage and pictures: read as ITK and Pillow write them, refused in one line where damaged."""

import gzip
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scan_formats import same_places, write_by_itk

from data_modules.formats.read import read_place, read_scan
from data_modules.formats.volume import NO_SPACING, Reading, make_volume
from weakmedsam.errors import DataError

QUICK = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

BY_ITK = """
folder, rng = sys.argv[1], np.random.default_rng(0)
for kind in ("int16", "uint8", "float32", "float64", "uint32"):
    image = sitk.GetImageFromArray(rng.integers(0, 200, (5, 7, 9)).astype(kind))
    image.SetSpacing((0.7, 1.1, 2.5))
    image.SetOrigin((-12.5, 30, 7))
    image.SetDirection(np.linalg.qr(rng.normal(size=(3, 3)))[0].ravel().tolist())
    for packed in (0, 1):
        for ending in ("nrrd", "nhdr", "mha", "mhd", "nii.gz"):
            sitk.WriteImage(image, f"{folder}/{kind}_{packed}.{ending}", bool(packed))
colour = sitk.GetImageFromArray(rng.integers(0, 200, (5, 7, 9, 3)).astype("uint8"), isVector=True)
series = sitk.GetImageFromArray(rng.integers(0, 200, (2, 5, 7, 9)).astype("int16"), isVector=False)
flat = sitk.GetImageFromArray(rng.integers(0, 200, (7, 9)).astype("uint8"))
flat.SetSpacing((0.5, 0.6))
for ending in ("nrrd", "mha", "nii.gz"):
    for name, image in (("colour", colour), ("series", series), ("flat", flat)):
        sitk.WriteImage(image, f"{folder}/{name}.{ending}")
"""


@pytest.fixture(scope="module")
def by_itk(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("itk")
    write_by_itk(BY_ITK, folder)
    return folder


KINDS = ("int16", "uint8", "float32", "float64", "uint32")


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd"])
@pytest.mark.parametrize("name", [f"{kind}_{packed}" for kind in KINDS for packed in "01"])
def test_it_is_the_same_volume_as_itks_nifti(by_itk, name, ending):
    found, wanted = (read_scan(by_itk / f"{name}.{e}") for e in (ending, "nii.gz"))
    assert np.array_equal(found.voxels, wanted.voxels)
    assert found.voxels.dtype == wanted.voxels.dtype
    assert np.allclose(found.affine, wanted.affine, atol=1e-4)


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd", "nii.gz"])
@pytest.mark.parametrize("name", ["int16_0", "float64_1", "flat"])
def test_the_header_alone_says_where_a_volume_lies(by_itk, name, ending):
    if name == "flat" and ending in ("nhdr", "mhd"):
        return
    place, scan = read_place(by_itk / f"{name}.{ending}"), read_scan(by_itk / f"{name}.{ending}")
    assert place is not None
    assert place.shape == scan.voxels.shape
    assert np.array_equal(place.affine, scan.affine)
    assert place.unit == scan.unit


def test_pictures_say_nothing_of_a_place(tmp_path):
    assert read_place(tmp_path / "x.png") is None


@pytest.mark.parametrize("ending", ["nrrd", "mha", "nii.gz"])
def test_colours_volumes_and_flat_pictures(by_itk, ending):
    for name, count in (("colour", 3), ("series", 2)):
        path, wanted = by_itk / f"{name}.{ending}", by_itk / f"{name}.nii.gz"
        for channel in range(count):
            reading = Reading(channel)
            assert np.array_equal(read_scan(path, (), reading).voxels, read_scan(wanted, (), reading).voxels)
        with pytest.raises(DataError, match=rf"data\.channel: 0 to {count - 1}"):
            read_scan(path)
        with pytest.raises(DataError, match=r"data\.channel: 7 is not there"):
            read_scan(path, (), Reading(7))
    found = read_scan(by_itk / f"flat.{ending}")
    assert found.voxels.shape == (9, 7, 1)
    assert np.allclose(np.diag(found.affine)[:2], [-0.5, -0.6])


def nrrd(fields: str, voxels: bytes) -> bytes:
    return f"NRRD0004\n{fields.strip()}\n\n".encode() + voxels


HEADER = "type: short\ndimension: 3\nsizes: 2 3 4\nencoding: raw\nendian: big\n"
PLACED = "space: {}\nspace directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (5,6,7)"


THERE = np.array([[1, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])


def test_spaces_and_byte_orders_of_nrrd(tmp_path):
    voxels = np.arange(24, dtype=">i2")
    path = tmp_path / "x.nrrd"
    for space, sign in (("left-posterior-superior", (-1, -1)), ("RAS", (1, 1)), ("LAS", (-1, 1))):
        path.write_bytes(nrrd(HEADER + PLACED.format(space), voxels.tobytes()))
        found = read_scan(path)
        assert np.allclose(found.affine, np.diag([*sign, 1, 1]) @ THERE)
        assert np.array_equal(found.voxels.ravel(order="F"), voxels)
    path.write_bytes(nrrd(HEADER, voxels.tobytes()))
    assert read_scan(path).unit == NO_SPACING
    path.write_bytes(nrrd(HEADER + "spacings: 1 2 3", voxels.tobytes()))
    assert np.allclose(np.diag(read_scan(path).affine), [-1, -2, 3, 1])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.nrrd", b"NIFTI", "does not begin as an NRRD file"),
        ("a.nrrd", nrrd("type: short", b""), "its header lacks dimension, sizes, encoding"),
        ("a.nrrd", nrrd(HEADER, bytes(40)), "it ends after 40 of 48|no more than"),
        ("a.nrrd", nrrd(HEADER, bytes(48) + b"\1" * 9), "bytes or more follow"),
        ("a.nrrd", nrrd(HEADER.replace("raw", "ascii"), bytes(48)), "has the encoding 'ascii'. Save it as raw or gzip"),
        ("a.nrrd", nrrd(HEADER.replace("short", "block"), bytes(48)), "holds 'block', not numbers"),
        ("a.nrrd", nrrd(HEADER.replace("2 3 4", "2 3"), bytes(48)), "are not 3 numbers"),
        ("a.nrrd", nrrd(HEADER.replace("2 3 4", "2 -3 4"), bytes(48)), "states 3 axes"),
        ("a.nrrd", nrrd(HEADER.replace("2 3 4", "2000000 300000 4000"), bytes(48)), "the file has no more than"),
        ("a.nrrd", nrrd(HEADER + PLACED.format("scanner-xyz"), bytes(48)), "lies in the space 'scanner-xyz'"),
        ("a.nrrd", nrrd(HEADER + PLACED.format("RAS").replace("(0,2,0)", "(1,0,0)"), bytes(48)), "axes are parallel"),
        ("a.nrrd", nrrd(HEADER + "data file: ../secret.raw", b""), "voxels are in another folder"),
        ("a.nhdr", nrrd(HEADER + "data file: gone.raw", b""), "its voxels are not there"),
        ("a.nhdr", nrrd(HEADER + "data file: LIST", b""), "are in several files"),
        ("a.mha", b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\n", "its header does not end"),
        ("a.mha", b"NDims = 3\nDimSize = 2 3 4\nElementDataFile = LOCAL\n", "its header lacks elementtype"),
        ("a.mha", b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\nElementDataFile = /etc/x\n", "another folder"),
        ("a.mha", b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_OTHER\nElementDataFile = LOCAL\n", "not numbers"),
        (
            "a.mha",
            b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\n\0\0",
            "it ends after 2 of 48",
        ),
    ],
)
def test_a_header_that_cannot_be_is_refused_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path / name))}: .*({said})") as told:
        read_scan(tmp_path / name)
    assert "\n" not in str(told.value)


@QUICK
@given(
    place=st.floats(0, 1),
    value=st.integers(0, 255),
    name=st.sampled_from(["int16_1.nrrd", "int16_0.mha", "int16_1.mha"]),
)
def test_a_damaged_byte_gives_a_volume_or_one_line(by_itk, tmp_path, place, value, name):
    content = bytearray((by_itk / name).read_bytes())
    content[int(place * (len(content) - 1))] = value
    (tmp_path / name).write_bytes(content)
    said = ""
    try:
        read_scan(tmp_path / name)
    except DataError as error:
        said = str(error)
    assert "\n" not in said


META = b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\nCompressedData = True\nElementDataFile = LOCAL\n"


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_a_compressed_file_that_holds_more_than_it_states_is_not_unpacked(tmp_path, name):
    bombs = {
        "x.nrrd": nrrd(HEADER.replace("raw", "gzip"), gzip.compress(bytes(10**8))),
        "x.mha": META + zlib.compress(bytes(10**8)),
    }
    (tmp_path / name).write_bytes(bombs[name])
    with pytest.raises(DataError, match="bytes or more follow"):
        read_scan(tmp_path / name)


# Pictures


def test_a_picture_is_one_slice_and_numbered_ones_are_a_volume(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (11, 4, 5)).astype(np.uint8)
    for number, page in enumerate(pixels):
        Image.fromarray(page).save(tmp_path / f"s{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    found = read_scan(tmp_path, files)
    assert np.array_equal(found.voxels.T, pixels)
    assert found.unit == NO_SPACING
    assert np.array_equal(read_scan(files[0]).voxels[:, :, 0].T, pixels[0])
    placed = read_scan(tmp_path, files, Reading(spacing=(0.5, 0.6, 3)))
    assert same_places(make_volume(pixels.T, np.diag([-0.5, -0.6, 3, 1]), "x"), placed)
    assert placed.unit == "mm"
    pages = [Image.fromarray(page) for page in pixels]
    pages[0].save(tmp_path / "all.tiff", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_scan(tmp_path / "all.tiff").voxels.T, pixels)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", np.uint8), ("I;16", np.uint16), ("I", np.int32), ("F", np.float32), ("1", bool)]
)
def test_greys_of_any_depth(tmp_path, mode, kind):
    pixels = np.random.default_rng(0).integers(0, 2, (4, 5)).astype(kind)
    picture = Image.fromarray(pixels)
    assert picture.mode == mode
    path = tmp_path / "x.tif"
    picture.save(path)
    assert np.array_equal(read_scan(path).voxels[:, :, 0].T, pixels)


def test_grey_saved_as_colour_is_grey_and_a_palette_is_labels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 3, (4, 5)).astype(np.uint8)
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "grey.png")
    assert np.array_equal(read_scan(tmp_path / "grey.png").voxels[:, :, 0].T, pixels)
    palette = Image.fromarray(pixels).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "mask.png")
    assert np.array_equal(read_scan(tmp_path / "mask.png", labels=True).voxels[:, :, 0].T, pixels)
    with pytest.raises(DataError, match=r"mask\.png: has 3 channels of colour"):
        read_scan(tmp_path / "mask.png")
    assert np.array_equal(read_scan(tmp_path / "mask.png", (), Reading(0)).voxels[:, :, 0].T, 255 * (pixels == 1))


def bomb(path: Path) -> None:
    """A PNG of a few bytes that states 60,000 x 60,000 pixels."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = part(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(bytes(999))) + part(b"IEND", b""))


def test_pictures_that_are_no_volume_are_refused(tmp_path):
    files = [tmp_path / f"s{number}.png" for number in (1, 2, 4, 5)]
    for file in files:
        Image.new("L", (5, 4)).save(file)
    with pytest.raises(DataError, match=r"s4\.png: follows s2\.png, while other numbers are 1 apart: a slice"):
        read_scan(tmp_path, files)
    Image.new("L", (5, 4)).save(tmp_path / "s1_mask.png")
    with pytest.raises(DataError, match=r"s1_mask\.png: differs from s1\.png in more than numbers: .*Put masks"):
        read_scan(tmp_path, [files[0], tmp_path / "s1_mask.png"])
    Image.new("L", (9, 4)).save(files[1])
    with pytest.raises(DataError, match=r"s2\.png: has 9 x 4 pixels, .*s1\.png has 5 x 4: they are not one volume"):
        read_scan(tmp_path, files[:2])
    files[0].write_bytes(files[0].read_bytes()[:40])
    with pytest.raises(DataError, match=r"s1\.png: cannot be read .* no picture file"):
        read_scan(files[0])
    bomb(files[0])
    with pytest.raises(DataError, match=r"s1\.png: states more pixels than are read \(89,478,485\)"):
        read_scan(files[0])
