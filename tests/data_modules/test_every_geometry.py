"""However a scan lies, in whatever format: a network that says what it sees gives the scan back, voxel for voxel."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRBigEndian
from saved_segmenter import CLASSES
from scan_formats import LPS, same_places, save_dicom, save_enhanced

from data_modules.cases import Case, Intensity
from data_modules.formats.read import read_scan
from data_modules.formats.volume import make_volume
from data_modules.scan_io import segmentation_path, write_segmentation
from data_modules.store import read_case
from data_modules.store_index import StoreSpec
from data_modules.volumes import PLANES
from weakmedsam.segmentation.module import Segmenter

VALUE = 100
"""Of a class id in the scan; the window is 0 to 200."""

NETWORK = Segmenter("saved_segmenter.Identity", CLASSES)

AXES = [(turn, signs) for turn in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def write_nifti(folder, voxels, affine, kind):
    order, stored, header = "<>"["big" in kind], voxels, nib.Nifti1Header
    if "nifti2" in kind:
        header = nib.Nifti2Header
    image_of = nib.Nifti2Image if "nifti2" in kind else nib.Nifti1Image
    image = image_of(stored, affine, header(endianness=order))
    image.set_sform(affine, 1)
    image.set_qform(np.diag([3.0, 2.0, 1.0, 1.0]) if "differ" in kind else None, int("differ" in kind))
    if "scaled" in kind:
        image = image_of((stored * 2 + 6).astype(np.int16), affine, image.header)
        image.header.set_data_dtype(np.int16)
        nib.save(image, folder / "x.nii")
        content = bytearray((folder / "x.nii").read_bytes())
        at, number = (176, "f8") if "nifti2" in kind else (112, "f4")  # scl_slope, scl_inter
        slopes = np.array([0.5, -3], order + number).tobytes()
        content[at : at + len(slopes)] = slopes
        (folder / "x.nii").write_bytes(content)
        return [folder / "x.nii"]
    nib.save(image, folder / "x.nii.gz")
    return [folder / "x.nii.gz"]


def write_nrrd(folder, voxels, affine, kind):
    lps = LPS @ affine
    directions = " ".join(f"({','.join(map(repr, column))})" for column in lps[:3, :3].T.tolist())
    order = "big" if "big" in kind else "little"
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {' '.join(map(str, voxels.shape))}\n"
        f"space directions: {directions}\nendian: {order}\nencoding: raw\n"
        f"space origin: ({','.join(map(repr, lps[:3, 3].tolist()))})\n\n"
    )
    content = voxels.astype(">i2" if order == "big" else "<i2").tobytes(order="F")
    (folder / "x.nrrd").write_bytes(header.encode() + content)
    return [folder / "x.nrrd"]


def write_metaimage(folder, voxels, affine, kind):
    lps = LPS @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    numbers = {
        "TransformMatrix": (lps[:3, :3] / sizes).T.ravel(), "Offset": lps[:3, 3], "ElementSpacing": sizes,
        "DimSize": voxels.shape,
    }  # fmt: skip
    said = "".join(f"{key} = {' '.join(repr(float(x)) if key != 'DimSize' else str(x) for x in values)}\n"
                   for key, values in numbers.items())  # fmt: skip
    order = "big" in kind
    header = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = {order}\n{said}"
        "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    (folder / "x.mha").write_bytes(header.encode() + voxels.astype(">i2" if order else "<i2").tobytes(order="F"))
    return [folder / "x.mha"]


def write_dicom(folder, voxels, affine, kind):
    if "enhanced" in kind:
        return [save_enhanced(folder / "all.dcm", voxels, affine)]
    scale = {"RescaleSlope": 2, "RescaleIntercept": -6} if "scaled" in kind else {}
    stored = (voxels // 2 + 3).astype(np.int16) if scale else voxels
    # The distance of slices, where there is one slice alone.
    thickness = float(np.linalg.norm(affine[:3, 2]))
    paths = save_dicom(folder / "s", stored, affine, shuffled=1, SliceThickness=f"{thickness:.10f}"[:16], **scale)
    if "big" in kind:
        for path in paths:
            held = pydicom.dcmread(path)
            held.PixelData = held.pixel_array.astype(">i2").tobytes()
            held.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
            pydicom.dcmwrite(path, held, enforce_file_format=True)
    return paths


WRITERS = {"nifti": write_nifti, "nrrd": write_nrrd, "meta": write_metaimage, "dicom": write_dicom}
KINDS = [
    *("nifti", "nifti big", "nifti2", "nifti2 big scaled", "nifti scaled", "nifti differ", "nifti big differ"),
    *("nrrd", "nrrd big", "meta", "meta big", "dicom", "dicom scaled", "dicom big", "dicom enhanced"),
]


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=6, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(3, 9), st.integers(3, 9), st.integers(1, 5)),
    sizes=st.tuples(*[st.floats(0.2, 7)] * 3),
    axes=st.sampled_from(AXES),
    oblique=st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.5]),
    tilt=st.sampled_from([0.0, 0.0, 0.3]),
    plane=st.sampled_from(sorted(PLANES)),
)
def test_what_a_network_sees_comes_back_where_it_was(
    tmp_path_factory, kind, seed, shape, sizes, axes, oblique, tilt, plane
):
    folder, rng = tmp_path_factory.mktemp("scan"), np.random.default_rng(seed)
    ids = rng.integers(0, 3, shape).astype(np.uint8)
    ids.ravel()[:3] = range(3)
    affine = placed(axes, sizes, oblique, 0.0 if kind.startswith("meta") else tilt, rng)
    files = WRITERS[kind.split()[0].rstrip("2")](folder, (ids.astype(np.int16) * VALUE), affine, kind)
    if kind.startswith("dicom") and shape[2] == 1:  # one slice lies at right angles to itself
        lps = LPS @ affine
        normal = np.cross(*(lps[:3, :2] / np.linalg.norm(lps[:3, :2], axis=0)).T)
        affine[:3, 2] = LPS[:3, :3] @ normal * np.linalg.norm(affine[:3, 2])
    case = Case("x", "x", str(files[0] if len(files) == 1 else folder / "s"), image_files=tuple(map(str, files)))
    image = read_scan(case.image, case.image_files)
    side = max(spec_shape(image, plane))
    spec = StoreSpec("x", str(folder), "", side, plane, Intensity(window=(VALUE, 2 * VALUE)), {}, ())
    read = read_case(case, spec)
    frames = torch.from_numpy(read.image.astype(np.float32) / 65535)[:, None]
    with torch.no_grad():
        seen = NETWORK.segment_volume(frames, read.entry.frame).numpy()
    path = segmentation_path(folder / "out", "x")
    write_segmentation(path, seen, read.entry.geometry, "x")
    written = read_scan(path)
    assert same_places(make_volume(ids, affine, "x"), written)
    if not kind.startswith("dicom"):
        assert np.array_equal(np.asarray(nib.load(path).dataobj), ids)
        assert np.allclose(nib.load(path).affine, affine, atol=1e-3)


def placed(axes, sizes, oblique, tilt, rng) -> np.ndarray:
    """A RAS affine: axes turned and mirrored, then by an angle about any direction, sheared."""
    turn, signs = axes
    straight = np.eye(3)[list(turn)].T * signs
    about = rng.normal(size=3)
    x, y, z = about / np.linalg.norm(about)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + np.sin(oblique) * cross + (1 - np.cos(oblique)) * cross @ cross
    columns = rotation @ straight
    columns[:, 2] += tilt * columns[:, 1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns * sizes, rng.uniform(-99, 99, 3)
    return affine


def spec_shape(image, plane) -> tuple[int, int]:
    """Rows and columns of the slices of a plane."""
    wanted = nib.orientations.axcodes2ornt(PLANES[plane])
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)
    return nib.orientations.apply_orientation(image.voxels, turn).shape[1:]
