"""NIfTI files, sound, odd and damaged: read as nibabel reads them, or refused in one line."""

import gzip
import json
import logging
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fakes import RAS, draw_scan, save_nifti
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_modules.formats.nifti import read_description, read_nifti
from data_modules.scan_io import write_segmentation
from data_modules.volumes import lay_on_image, read_classes, read_volume
from weakmedsam.errors import DataError

ROOT = Path(__file__).parents[3]
QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it remarks on each mutated header


def file_of(voxels, affine=RAS, kind=nib.Nifti1Image, unit="mm", **fields) -> bytes:
    """A plain file; ``fields`` are written into its header last."""
    image = kind(voxels, affine, dtype=voxels.dtype)
    image.header.set_xyzt_units(unit)
    content = bytearray(image.to_bytes())
    if fields:
        header = kind.header_class(bytes(content[: len(image.header.binaryblock)]), check=False)
        for name, value in fields.items():
            header[name] = value
        content[: len(header.binaryblock)] = header.binaryblock
    return bytes(content)


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.name.endswith(".gz") else content)
    return path


def read_or_refuse(path: Path):
    """What is read, or None where it is refused in one line that names the file."""
    try:
        return read_nifti(path)
    except DataError as error:
        refusal = str(error)
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal
    return None


# Positions


@st.composite
def headers(draw):
    """A scan whose two transforms, codes, units and version are whatever they may be."""
    numbers = st.floats(-200, 200, width=32)
    zooms = draw(st.tuples(*[st.floats(0.25, 6, width=32)] * 3))
    turn = nib.eulerangles.euler2mat(*draw(st.tuples(*[st.floats(-3, 3)] * 3)))
    turn = np.rint(turn) if draw(st.booleans()) and abs(np.linalg.det(np.rint(turn))) == 1 else turn
    flips = np.diag(draw(st.tuples(*[st.sampled_from([1, -1])] * 3)))
    rigid, moved = np.eye(4), np.eye(4)
    rigid[:3, :3] = turn @ flips @ np.diag(zooms)
    rigid[:3, 3] = draw(st.tuples(numbers, numbers, numbers))
    moved[:3, :3] = rigid[:3, :3] @ (np.eye(3) + draw(st.sampled_from([0, 0, 0.02])) * np.eye(3, k=2))
    moved[:3, 3] = draw(st.tuples(numbers, numbers, numbers))
    kind = draw(st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]))
    shape = draw(st.sampled_from([(3, 4, 5), (5, 3, 2), (4, 4, 1), (4, 3, 2, 1), (5, 4)]))
    image = kind(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), np.eye(4))
    image.header.set_qform(rigid, draw(st.sampled_from([0, 1, 2])))
    image.header.set_sform(moved, draw(st.sampled_from([0, 1, 2, 4])))
    image.header["xyzt_units"] = draw(st.sampled_from([0, 1, 2, 3, 10, 11]))
    return kind(np.asarray(image.dataobj), None, image.header)


ITK = """
import json, sys
import SimpleITK
for line in sys.stdin:
    try:
        image = SimpleITK.ReadImage(line.rstrip("\\n"))
    except RuntimeError:
        print("null", flush=True)
        continue
    place = image.GetSize(), image.GetOrigin(), image.GetSpacing(), image.GetDirection()
    print(json.dumps([place, SimpleITK.GetArrayFromImage(image).tolist()]), flush=True)
"""


@pytest.fixture(scope="module")
def seen_by_itk():
    """Where ITK finds a file's voxels, and them; None where it refuses the file.

    In a process of its own: in one with SimpleITK, FAISS takes SimpleITK's vectors for its own and fails.
    """
    with subprocess.Popen(
        [sys.executable, "-c", ITK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def see(path: Path):
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield see


@given(scan=headers(), plane=st.sampled_from(["axial", "coronal", "sagittal"]))
@QUICK
def test_a_segmentation_lies_on_its_scan_for_nibabel_and_itk(scan, plane, tmp_path, seen_by_itk):
    path, result = tmp_path / "scan.nii", tmp_path / "result.nii.gz"
    path.write_bytes(scan.to_bytes())
    slices, geometry = read_volume(path, plane)
    write_segmentation(result, (slices % 251).astype(np.uint8), geometry, "a mark")
    held, found = nib.load(path), nib.load(result)
    assert read_description(result) == "a mark"
    kept = ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z")
    for name in (*kept, "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
        assert held.header[name].tobytes() == found.header[name].tobytes(), name
    assert np.array_equal(held.affine, found.affine)
    assert np.array_equal(np.asarray(found.dataobj), np.asarray(held.dataobj) % 251)
    ours, theirs = seen_by_itk(result), seen_by_itk(path)
    assert (ours is None) == (theirs is None)
    if ours is not None:
        assert ours[0] == theirs[0]
        assert np.array_equal(ours[1], np.array(theirs[1]) % 251)


@pytest.mark.parametrize("code", ["<", ">"])
def test_of_two_sound_transforms_the_sform_counts_then_the_qform_then_sizes_alone(tmp_path, code):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), None, nib.Nifti1Header(endianness=code))
    image.header.set_xyzt_units("mm")
    near, far = RAS.copy(), RAS.copy()
    near[:3, 3], far[:3, 3] = (1, 2, 3), (-9, 8, -7)
    image.header.set_qform(near, 1)
    image.header.set_sform(far, 2)
    found = []
    for sform, qform in ((2, 1), (0, 1), (0, 0)):
        image.header["sform_code"], image.header["qform_code"] = sform, qform
        found.append(read_nifti(put(tmp_path / "scan.nii", image.to_bytes())).affine)
    assert np.allclose(found[0], far)
    assert np.allclose(found[1], near)
    assert np.allclose(found[2][:3, :3], np.diag([-1.5, 2, 3]))


@pytest.mark.parametrize(("unit", "length"), [("meter", 1000), ("mm", 1), ("micron", 0.001), ("unknown", 1)])
def test_positions_are_in_mm_whatever_the_unit(tmp_path, unit, length):
    voxels, stated = draw_scan(0)[0], RAS / [length, length, length, 1]
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        path = put(tmp_path / "scan.nii.gz", file_of(voxels, stated, kind, unit))
        found, geometry = read_volume(path)
        assert np.allclose(geometry.affine, RAS)
        assert geometry.spacing == pytest.approx((3.0, 2.0, 1.5))
        assert geometry.unit == {"meter": "m"}.get(unit, unit)
        write_segmentation(tmp_path / "result.nii.gz", found.astype(np.uint8), geometry, "x")
        result = nib.load(tmp_path / "result.nii.gz")
        assert result.header.get_xyzt_units()[0] == unit
        assert np.allclose(result.affine, stated)


def test_a_slice_is_a_volume_of_one_slice(tmp_path):
    picture = np.arange(20, dtype=np.int16).reshape(5, 4)
    for affine, thickness in ((np.diag([0.5, 2.0, 3.0, 1.0]), 3.0), (np.diag([0.5, 2.0, 0.0, 1.0]), 1.0)):
        content = file_of(picture, np.diag([0.5, 2.0, 3.0, 1.0]))
        header = nib.Nifti1Header(content[:348])
        header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
        path = put(tmp_path / "picture.nii.gz", header.binaryblock + content[348:])
        slices, geometry = read_volume(path)
        assert slices.shape == (1, 4, 5)
        assert geometry.spacing == pytest.approx((thickness, 2.0, 0.5))
        write_segmentation(tmp_path / "result.nii.gz", (slices % 3).astype(np.uint8), geometry, "x")
        assert np.array_equal(np.asarray(nib.load(tmp_path / "result.nii.gz").dataobj), picture % 3)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"srow_x": [np.nan, 0, 0, 0]}, "NaN or infinity"),
        ({"srow_y": [0, np.inf, 0, 0]}, "NaN or infinity"),
        ({"srow_x": [0, 0, 0, 0]}, "voxels of 0"),
        ({"srow_x": [1, 1, 0, 0], "srow_y": [1, 1, 0, 0]}, "two of its axes are parallel"),
        ({"srow_x": [1e30, 0, 0, 0]}, "voxels of 1e"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 7}, "w2 should be positive"),
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 1, 0, 1, 0, 0, 0, 0]}, "voxels of 1, 0, 1 mm"),
        ({"sform_code": 77}, "sform_code 77"),
        ({"sform_code": 0, "qform_code": 1, "pixdim": [9, 1, 1, 1, 0, 0, 0, 0]}, r"pixdim\[0\]"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused_by_name(tmp_path, fields, reason):
    path = put(tmp_path / "scan.nii.gz", file_of(draw_scan(0)[0], **fields))
    with pytest.raises(DataError, match=rf"scan\.nii\.gz: its header has no usable geometry .*{reason}"):
        read_nifti(path)


# Several volumes, and colour


def test_a_volume_or_a_colour_is_chosen_by_its_number(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (4, 3, 2, 3)).astype(np.int16)
    path = put(tmp_path / "four.nii.gz", file_of(voxels, scl_slope=2, scl_inter=1))
    for channel in range(3):
        found = read_nifti(path, channel)
        assert np.array_equal(found.voxels, voxels[..., channel] * 2 + 1)
        assert nib.Nifti1Header(found.header).get_data_shape() == (4, 3, 2)
    for channel, said in ((None, r"has 4 axes .*data\.channel: 0 to 2"), (3, r"data\.channel: 3 is not there")):
        with pytest.raises(DataError, match=said):
            read_nifti(path, channel)
    colours = np.ascontiguousarray(voxels.astype(np.uint8)).view([(c, "u1") for c in "RGB"])[..., 0]
    path = put(tmp_path / "colour.nii", file_of(colours))
    assert np.array_equal(read_nifti(path, 1).voxels, voxels[..., 1])
    with pytest.raises(DataError, match="has 3 channels of colour"):
        read_nifti(path)


# Content


def test_files_are_told_apart_by_content_not_by_name(tmp_path):
    voxels = draw_scan(0)[0]
    plain = file_of(voxels)
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain))
    for name in ("plain.nii.gz", "packed.nii"):
        assert np.array_equal(read_nifti(tmp_path / name).voxels, voxels)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_pipe_or_a_folder_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / "folder.nii").mkdir()
    for path in (tmp_path / name, tmp_path / "folder.nii"):
        with pytest.raises(DataError, match="it is no file"):
            read_nifti(path)


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("damage", ["flipped", "inserted", "zeroed", "removed", "length", "checksum"])
def test_a_damaged_compressed_file_is_never_read_as_if_whole(tmp_path, damage, at):
    rng = np.random.default_rng(0)
    path = put(tmp_path / "scan.nii.gz", file_of(rng.integers(0, 2000, (24, 24, 12)).astype(np.int16)))
    content = bytearray(path.read_bytes())
    place = int(at * len(content))
    if damage == "flipped":
        content[place] ^= 16
    elif damage == "inserted":
        content[place:place] = b"\x55\xaa"
    elif damage == "zeroed":
        content[place : place + 8] = bytes(8)
    elif damage == "removed":
        del content[place]
    else:
        content[-8 if damage == "checksum" else -4] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"scan\.nii\.gz: cannot be read"):
        read_nifti(path)


def test_what_stands_behind_the_voxels_is_refused_unless_it_is_padding(tmp_path):
    whole = file_of(draw_scan(0)[0])
    assert read_nifti(put(tmp_path / "padded.nii", whole + bytes(512))).voxels.any()
    with pytest.raises(DataError, match="9 bytes or more follow"):
        read_nifti(put(tmp_path / "more.nii", whole + b"\1" * 9))
    with pytest.raises(DataError, match="bytes or more follow"):  # of another shape, or a bomb
        read_nifti(put(tmp_path / "more.nii.gz", whole + bytes(2**21)))


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize(
    "fields",
    [
        {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]},
        {"dim": [3, 1000, 1000, 100, 1, 1, 1, 1]},
        {"vox_offset": 348},
        {"vox_offset": 2e9},
        {"vox_offset": np.inf},
        {"vox_offset": np.nan},
        {"dim": [9, 2, 2, 2, 1, 1, 1, 1]},
        {"dim": [3, -5, 2, 2, 1, 1, 1, 1]},
        {"dim": [0, 2, 2, 2, 1, 1, 1, 1]},
    ],
)
def test_a_header_that_claims_too_much_is_compared_with_the_file_first(tmp_path, name, fields):
    path = put(tmp_path / name, file_of(draw_scan(0)[0], **fields))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="cannot be read"):
        read_nifti(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200_000  # KiB


def test_a_volume_beyond_the_memory_is_one_message(tmp_path):
    # 6 GiB of zeros are 6 MiB when they are compressed: the file holds what it says.
    program = f"""
        import gzip, resource, numpy as np
        import nibabel as nib
        from data_modules.formats.nifti import read_nifti
        header = nib.Nifti1Header()
        header.set_data_dtype(np.int16)
        header["dim"] = [3, 2048, 2048, 768, 1, 1, 1, 1]
        header["magic"], header["vox_offset"] = b"n+1", 352
        with gzip.open(r"{tmp_path}/huge.nii.gz", "wb", 1) as file:
            file.write(header.binaryblock + bytes(4))
            for _ in range(64):
                file.write(bytes(2**20))
        with open(r"{tmp_path}/huge.nii.gz", "ab") as file:
            file.write(bytes(2**23))
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        try:
            read_nifti(r"{tmp_path}/huge.nii.gz")
        except Exception as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "MemoryShortError" in done.stdout, done.stdout + done.stderr
    assert "6.0 GiB, more memory than there is" in done.stdout


def test_large_values_keep_their_differences(tmp_path):
    small = draw_scan(0)[0].astype(np.int64)
    for voxels in (small + 10**9, (small + 10**9).astype(np.int32), small + 10**12, small + 1e9):
        found = read_nifti(put(tmp_path / "scan.nii.gz", file_of(voxels))).voxels
        assert np.array_equal(found - found.min(), voxels - voxels.min())


def test_scaled_headers_are_read_as_nibabel_reads_them(tmp_path):
    fields = {"scl_slope": 0.25, "scl_inter": -1024.0}
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        for dtype in (np.uint8, np.int16, np.float32, np.float64):
            path = put(tmp_path / "scan.nii.gz", file_of(draw_scan(0)[0].astype(dtype), kind=kind, **fields))
            assert np.array_equal(read_nifti(path).voxels, np.asanyarray(nib.load(path).dataobj))


@given(
    place=st.integers(0, 400),
    bits=st.integers(1, 255),
    cut=st.one_of(st.none(), st.integers(0, 900)),
    name=st.sampled_from(["scan.nii", "scan.nii.gz"]),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
)
@settings(QUICK, max_examples=400)
def test_a_mutated_file_is_read_as_nibabel_reads_it_or_refused_in_one_line(place, bits, cut, name, kind, tmp_path):
    rng = np.random.default_rng(place)
    content = bytearray(file_of(rng.integers(0, 99, (4, 4, 3)).astype(np.int16), kind=kind))
    content[place] ^= bits
    path = put(tmp_path / name, bytes(content)[:cut])
    found = read_or_refuse(path)
    if found is None:
        return
    theirs = nib.load(path)
    assert np.array_equal(found.voxels, np.asanyarray(theirs.dataobj).reshape(found.voxels.shape), equal_nan=True)
    length = {1: 1000, 3: 0.001}.get(int(theirs.header["xyzt_units"]) & 7, 1)
    assert np.allclose(found.affine[:3], theirs.affine[:3] * length)


@given(content=st.binary(max_size=600), name=st.sampled_from(["scan.nii", "scan.nii.gz"]))
@QUICK
def test_any_bytes_are_refused_in_one_line(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_or_refuse(tmp_path / name) is None
    put(tmp_path / "scan.nii.gz", content)
    assert read_or_refuse(tmp_path / "scan.nii.gz") is None


# Masks


def test_masks_in_another_storage_order_lie_on_their_image(tmp_path):
    image, mask = draw_scan(0)
    affine = np.diag([-1.5, 2.0, 3.0, 1.0])
    affine[:3, :3] = nib.eulerangles.euler2mat(0.2, -0.1, 0.15) @ affine[:3, :3]
    affine[:3, 3] = 24, -20, 7
    save_nifti(tmp_path / "image.nii.gz", image, affine)
    _, place = read_volume(tmp_path / "image.nii.gz")
    stored = nib.Nifti1Image(mask, affine)
    for order in ([[0, 1], [1, -1], [2, 1]], [[2, 1], [0, -1], [1, -1]], [[1, 1], [2, 1], [0, 1]]):
        nib.save(stored.as_reoriented(np.array(order)), tmp_path / "mask.nii.gz")
        found, other = read_classes(str(tmp_path / "mask.nii.gz"), "axial", {1: 1}, ())
        laid = lay_on_image("mask", found, other, "image", place)
        assert np.array_equal(place.from_slices(laid), mask)


def test_masks_within_a_thousandth_of_whole_numbers_are_those(tmp_path):
    mask = draw_scan(0, (1, 2, 4))[1]
    header = nib.Nifti1Image(draw_scan(0)[0], RAS).header
    scaled = nib.Nifti1Image(mask.astype(np.float64), RAS, header)  # int16: 1 comes back as 1.00002
    nib.save(scaled, tmp_path / "scaled.nii.gz")
    assert not np.array_equal(nib.load(tmp_path / "scaled.nii.gz").get_fdata(), mask)
    save_nifti(tmp_path / "resampled.nii.gz", mask.astype(np.float32) * np.float32(0.99999994))
    for name in ("scaled", "resampled"):
        found, geometry = read_classes(str(tmp_path / f"{name}.nii.gz"), "axial", {1: 1, 2: 2, 4: 3}, ())
        assert np.array_equal(geometry.from_slices(found), np.choose(mask, [0, 1, 2, 0, 3]))


def test_other_values_are_shown_in_full_with_the_mend(tmp_path):
    mask = draw_scan(0)[1].astype(np.float32)
    mask[3, 3, 3] = 0.9876543
    path = save_nifti(tmp_path / "mask.nii.gz", mask)
    with pytest.raises(DataError, match=r"values 0\.9876543; expected \[0, 1\]\. .*nearest neighbour"):
        read_classes(str(path), "axial", {1: 1}, ())


def test_fields_that_place_nothing_are_not_looked_at(tmp_path):
    fields = {"pixdim": [9, 1.5, 2, 3, 0, 0, 0, 0], "qform_code": 77, "sform_code": 1}
    path = put(tmp_path / "scan.nii.gz", file_of(draw_scan(0)[0], **fields))
    assert np.allclose(read_nifti(path).affine, RAS)
