import nibabel as nib
import numpy as np
import pytest

from data_modules.scan_io import write_segmentation
from data_modules.volumes import lay_on_image, read_classes, read_volume
from tests.fakes import RAS, draw_scan, save_nifti
from weakmedsam.errors import DataError

AXES = ["RAS", "LPS", "LAS", "SRA", "PIR", "ASL", "IPR"]


def affine_of(codes: str, oblique: bool) -> np.ndarray:
    """Affine of a file whose axes run as ``codes`` say, with spacing 1, 2, 3 mm along its own axes."""
    orientation = nib.orientations.axcodes2ornt(tuple(codes))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(orientation):
        affine[int(world), axis] = sign * (axis + 1)
    if oblique:
        turn = nib.eulerangles.euler2mat(0.2, -0.15, 0.25)
        affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = (-12.5, 7.0, 30.25)
    return affine


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("codes", AXES)
def test_a_result_goes_back_to_the_scans_own_space(tmp_path, codes, oblique, plane):
    voxels = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.uint8)
    affine = affine_of(codes, oblique)
    path = save_nifti(tmp_path / "scan.nii.gz", voxels, affine)
    slices, geometry = read_volume(path, plane)
    write_segmentation(tmp_path / "back.nii.gz", slices, geometry, "x")
    back = nib.load(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(back.get_fdata(), voxels)
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)
    assert slices.shape[0] == geometry.shape[geometry.slice_axis[0]]


@pytest.mark.parametrize("codes", AXES)
def test_axial_slices_look_as_a_radiologist_sees_them(tmp_path, codes):
    affine = affine_of(codes, oblique=False)
    voxels = np.zeros((5, 5, 5), np.uint8)
    # One voxel far to the patient's right, in front, near the head: +x is right, +y front, +z head.
    corner = np.array([2 if affine[0, :3].sum() == 0 else 0] * 3)
    place = np.linalg.inv(affine[:3, :3]) @ np.array([1.0, 1.0, 1.0])
    corner = np.where(place > 0, 4, 0)
    voxels[tuple(corner)] = 1
    slices, geometry = read_volume(save_nifti(tmp_path / "scan.nii", voxels, affine))
    # last slice, top row, left column
    assert slices[-1, 0, 0] == 1
    distances = {code: axis + 1 for axis, code in enumerate(codes)}
    found = [next(distances[c] for c in pair if c in distances) for pair in ("SI", "AP", "LR")]
    assert geometry.spacing == pytest.approx(found)


def test_truncated_empty_and_missing_files_are_named(tmp_path):
    path = save_nifti(tmp_path / "scan.nii.gz", np.random.default_rng(0).random((30, 30, 30)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    plain = save_nifti(tmp_path / "plain.nii", np.zeros((9, 9, 9)))
    plain.write_bytes(plain.read_bytes()[:-100])
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    for name in ("scan.nii.gz", "plain.nii", "empty.nii.gz", "nowhere.nii"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read"):
            read_volume(tmp_path / name)


@pytest.mark.parametrize(("at", "value"), [(70, 9999), (42, -5)], ids=["datatype", "dimension"])
def test_a_header_that_says_what_cannot_be_is_named(tmp_path, at, value):
    path = save_nifti(tmp_path / "scan.nii", np.zeros((5, 5, 5)))
    content = bytearray(path.read_bytes())
    content[at : at + 2] = int(value).to_bytes(2, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"scan\.nii: "):
        read_volume(path)


def test_four_axes_are_refused_unless_the_last_is_one(tmp_path):
    with pytest.raises(DataError, match=r"four\.nii: has 4 axes \(3, 3, 3, 2\)"):
        read_volume(save_nifti(tmp_path / "four.nii", np.zeros((3, 3, 3, 2))))
    assert read_volume(save_nifti(tmp_path / "one.nii", np.zeros((3, 4, 5, 1))))[0].shape == (5, 4, 3)
    with pytest.raises(DataError, match=r"one\.nii: has 1 axes \(3,\), not 3"):
        read_volume(save_nifti(tmp_path / "one.nii", np.zeros(3)))


def test_colour_and_useless_headers_are_refused(tmp_path):
    with pytest.raises(DataError, match="greyscale"):
        read_volume(save_nifti(tmp_path / "c.nii", np.zeros((3, 3, 3), np.complex64)))
    path = save_nifti(tmp_path / "flat.nii", np.zeros((3, 3, 3)))
    image = nib.load(path)
    image.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), 1)
    image.header["pixdim"][3] = 0
    nib.Nifti1Image(np.zeros((3, 3, 3)), None, image.header).to_filename(path)
    with pytest.raises(DataError, match="no usable geometry"):
        read_volume(path)


def test_masks_of_other_geometry_are_refused():
    shape = (4, 4, 4)
    first = read_geometry(shape, RAS)

    def lay(size, affine):
        second = read_geometry(size, affine)
        return lay_on_image("m", second.to_slices(np.zeros(size)), second, "i", first)

    assert lay(shape, RAS + 1e-5).shape == shape
    with pytest.raises(DataError, match=r"m: has \(4, 4, 5\) voxels, its image i"):
        lay((4, 4, 5), RAS)
    for other in (np.diag([-1.5, 2, 3, 1]), RAS * 1.1, np.eye(4)):
        with pytest.raises(DataError, match="mm away from its image i"):
            lay(shape, other)


def test_masks_follow_their_image_where_the_nearest_axis_is_a_matter_of_rounding():
    shape, rng = (3, 4, 5), np.random.default_rng(0)
    voxels = rng.integers(0, 4, shape)
    for turn in ((np.pi / 4, 0, 0), (0, np.pi / 4, 0), (np.pi / 4, np.pi / 2, np.pi / 4)):
        affine = np.eye(4)
        affine[:3, :3] = nib.eulerangles.euler2mat(*turn) @ np.diag([1, 1, 3])
        first = read_geometry(shape, affine)
        for _ in range(20):
            second = read_geometry(shape, affine + rng.normal(size=(4, 4)) * 1e-6 * (np.arange(4) < 3)[:, None])
            laid = lay_on_image("m", second.to_slices(voxels), second, "i", first)
            assert np.array_equal(first.from_slices(laid), voxels)


def read_geometry(shape, affine):
    from data_modules.volumes import Geometry

    return Geometry(shape, tuple(map(tuple, affine)), "axial")


@pytest.mark.parametrize("strange", [3, 0.5, -1, 300, np.nan])
def test_unknown_label_values_are_named(tmp_path, strange):
    mask = draw_scan(0)[1].astype(np.float32)
    mask[0, 0, 0] = strange
    path = save_nifti(tmp_path / "mask.nii.gz", mask)
    with pytest.raises(DataError, match=rf"mask\.nii\.gz: holds unknown label values {strange:g}; expected \[0, 1"):
        read_classes(str(path), "axial", {1: 1}, known=(2,))


def test_known_values_that_are_not_chosen_become_background(tmp_path):
    mask = draw_scan(0, (1, 2, 4))[1]
    path = save_nifti(tmp_path / "mask.nii.gz", mask)
    classes, geometry = read_classes(str(path), "axial", {4: 1, 1: 2}, known=(1, 2, 4))
    wanted = np.select([mask == 4, mask == 1], [1, 2], 0)
    np.testing.assert_array_equal(geometry.from_slices(classes), wanted)
