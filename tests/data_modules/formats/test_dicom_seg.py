"""DICOM segmentation objects: each voxel lies where it does in the NIfTI file, and the series is named."""

import highdicom as hd
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scan_formats import LPS, SECONDARY, save, save_dicom, save_enhanced, seg_on, slice_of

from data_modules.formats.dicom_seg import read_seg_mark, write_seg
from data_modules.formats.read import READING, read_scan
from data_modules.formats.volume import Reading
from weakmedsam.errors import DataError

RAS = np.array([[0.8, 0, 0, -20], [0, 0.7, 0, 30], [0, 0, 2.5, 12], [0, 0, 0, 1.0]])
NAMES = ["lesion", "left/right\\ cyst " + "x" * 80, "Zyste größer 囊肿"]
MARK = "weakmedsam 0123456789abcdef"
FRAME = {"FrameOfReferenceUID": "1.2.840.9"}


def draw(shape=(5, 4, 6), seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.int16)


def segment(folder, paths, names=NAMES, reading=READING):
    """(path of the object, class ids, affine of the scan)."""
    files = [str(path) for path in paths]
    found = read_scan(folder, files, reading)
    ids = (found.voxels % (len(names) + 1)).astype(np.uint8)
    write_seg(folder / "out/seg.dcm", ids, (str(folder), files, reading), names, MARK)
    return folder / "out/seg.dcm", ids, found.affine


@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(3, 6), st.integers(3, 6), st.integers(1, 5)),
    sizes=st.tuples(*[st.floats(0.3, 6)] * 3),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    tilt=st.sampled_from([0, 0, 0.3]),
    enhanced=st.booleans(),
    classes=st.integers(1, 3),
)
def test_every_voxel_lies_where_it_does_in_the_nifti(
    tmp_path_factory, seed, shape, sizes, flips, tilt, enhanced, classes
):
    folder = tmp_path_factory.mktemp("scan")
    axes, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    axes[:, 2] += tilt * axes[:, 1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes @ np.diag(np.multiply(sizes, flips)), [-30.5, 12.25, 7]
    write = save_enhanced if enhanced else save_dicom
    made = write(folder / ("all.dcm" if enhanced else "s"), draw(shape, seed), affine, **FRAME)
    path, ids, place = segment(folder, [made] if enhanced else made, NAMES[:classes])
    assert np.array_equal(seg_on(path, ids.shape, place), ids)


def test_highdicom_finds_the_same_volume_at_the_same_place(tmp_path):
    path, ids, affine = segment(tmp_path, save_dicom(tmp_path / "s", draw(), RAS, **FRAME))
    held = hd.seg.segread(path)
    volume = held.get_volume(combine_segments=True)
    there = np.linalg.inv(LPS @ affine) @ volume.affine  # voxel of theirs -> voxel of ours
    index = (there @ np.vstack([np.indices(volume.array.shape).reshape(3, -1), np.ones(volume.array.size)]))[:3]
    assert np.array_equal(ids[tuple(np.rint(index).astype(int))], volume.array.ravel())


def test_segments_are_the_classes_and_the_sources_are_named(tmp_path):
    paths = save_dicom(
        tmp_path / "s", draw(), RAS, SeriesNumber=7, StudyDate="20201231",
        PatientSex="W", PatientBirthDate="1.1.1970", PatientName="Yamada^Tarou=山田^太郎",
        SpecificCharacterSet="ISO_IR 192", **FRAME,
    )  # fmt: skip
    path, ids, _ = segment(tmp_path, paths)
    held, source = pydicom.dcmread(path), pydicom.dcmread(paths[0])
    assert held.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4"
    assert (held.Modality, held.SegmentationType, held.SeriesNumber) == ("SEG", "BINARY", 1007)
    segments = held.SegmentSequence
    assert [part.SegmentNumber for part in segments] == [1, 2, 3]
    assert [part.SegmentLabel for part in segments] == ["lesion", NAMES[1].replace("\\", "/")[:64], NAMES[2]]
    assert {part.SegmentedPropertyTypeCodeSequence[0].CodeValue for part in segments} == {"85756007"}
    for tag in (
        "PatientName",
        "PatientSex",
        "PatientBirthDate",
        "StudyInstanceUID",
        "StudyDate",
        "FrameOfReferenceUID",
    ):
        assert held[tag].value == source[tag].value, tag
    assert held.SeriesInstanceUID != source.SeriesInstanceUID
    by_uid = {pydicom.dcmread(file).SOPInstanceUID: number for number, file in enumerate(paths)}
    for frame, groups in zip(held.pixel_array, held.PerFrameFunctionalGroupsSequence, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        (of,) = groups.DerivationImageSequence[0].SourceImageSequence
        assert np.array_equal(frame.T, ids[:, :, by_uid[of.ReferencedSOPInstanceUID]] == number)
    (series,) = held.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    assert {part.ReferencedSOPInstanceUID for part in series.ReferencedInstanceSequence} == set(by_uid)


def test_frames_of_a_file_are_named_by_their_number(tmp_path):
    path, ids, _ = segment(tmp_path, [save_enhanced(tmp_path / "all.dcm", draw(), RAS, **FRAME)])
    held = pydicom.dcmread(path)
    for frame, groups in zip(held.pixel_array, held.PerFrameFunctionalGroupsSequence, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        (of,) = groups.DerivationImageSequence[0].SourceImageSequence
        assert np.array_equal(frame.T, ids[:, :, of.ReferencedFrameNumber - 1] == number)


def test_scans_that_lack_what_may_be_empty_and_headers_rounded_differently(tmp_path):
    paths = save_dicom(tmp_path / "s", draw(), RAS, PatientID=None, SeriesNumber=None, **FRAME)
    held = pydicom.dcmread(paths[2])
    first = pydicom.dcmread(paths[0]).ImageOrientationPatient
    held.ImageOrientationPatient = [first[0], 0.00001, *first[2:]]
    held.save_as(paths[2])
    path, ids, affine = segment(tmp_path, paths)
    assert np.array_equal(seg_on(path, ids.shape, affine), ids)


def test_one_of_several_phases(tmp_path):
    paths = save_dicom(tmp_path / "a", draw(seed=1), RAS, SeriesInstanceUID="1.9", **FRAME)
    second = save_dicom(tmp_path / "b", draw(seed=2), RAS, SeriesInstanceUID="1.9", **FRAME)
    for number, path in enumerate(second):
        held = pydicom.dcmread(path)
        held.InstanceNumber = 100 + number
        held.save_as(path)
    path, ids, affine = segment(tmp_path, [*paths, *second], reading=Reading(1))
    assert np.array_equal(seg_on(path, ids.shape, affine), ids)
    uids = {pydicom.dcmread(file).SOPInstanceUID for file in second}
    named = pydicom.dcmread(path).ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {part.ReferencedSOPInstanceUID for part in named} == uids


def test_a_picture_without_a_place(tmp_path):
    held = slice_of(draw((9, 8)), SOPClassUID=SECONDARY, Modality="OT", ImagerPixelSpacing=[2, 3])
    path, ids, _ = segment(tmp_path, [save(held, tmp_path / "x.dcm")])
    frames = pydicom.dcmread(path).pixel_array
    assert np.array_equal(sum(n * frame.T for n, frame in enumerate(frames, start=1)), ids[:, :, 0])


def refused(kind, tmp_path):
    """Write what cannot be an object."""
    tags, reading = FRAME if kind != "no frame of reference" else {}, READING
    paths = save_dicom(tmp_path / "s", draw(), RAS, **tags)
    if kind == "frames without a place":
        held = slice_of(draw((3, 4, 5)), SOPClassUID=SECONDARY, Modality="US")
        paths = [save(held, tmp_path / "us.dcm")]
    if kind == "phases of frames":
        paths, reading = [save_enhanced(tmp_path / "two.dcm", draw(), np.diag([1, 1, 0, 1.0]), **FRAME)], Reading(2)
    ids = np.zeros(read_scan(tmp_path, paths, reading).voxels.shape, np.uint8)
    ids[1:3] = kind != "empty"
    if kind == "changed":
        paths = paths[1:]
    if kind == "a class that nobody knows":
        ids[0] = 9
    write_seg(tmp_path / "seg.dcm", ids, (str(tmp_path), paths, reading), NAMES, MARK)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "nothing was found"),
        ("no frame of reference", "its files state no FrameOfReferenceUID"),
        ("frames without a place", "its frames state no position"),
        ("phases of frames", "it has several frames at each position"),
        ("changed", "the series has changed: it has 5 slices"),
        ("a class that nobody knows", "segments that lack descriptions"),
    ],
)
def test_what_cannot_be_an_object_is_said_in_one_line_and_leaves_nothing(tmp_path, kind, said):
    with pytest.raises(DataError, match=said) as told:
        refused(kind, tmp_path)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("*seg*"))


def test_ours_are_known_by_their_mark(tmp_path):
    paths = save_dicom(tmp_path / "s", draw(), RAS, **FRAME)
    path, *_ = segment(tmp_path, paths)
    assert read_seg_mark(path) == MARK
    assert read_seg_mark(paths[0]) is None
    (tmp_path / "page.dcm").write_text("<html>")
    assert read_seg_mark(tmp_path / "page.dcm") is None
    held = pydicom.dcmread(path)
    held.Manufacturer = "another"
    held.save_as(path)
    assert read_seg_mark(path) is None
