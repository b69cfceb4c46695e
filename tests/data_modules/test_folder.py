from pathlib import Path

import numpy as np
import pytest
from data_settings import data_settings
from PIL import Image

from data_modules.folder import Folder
from data_modules.label_tables import read_labels
from data_modules.sources import source_files
from data_modules.store import read_case
from tests.fakes import draw_scan, fake_folder, save_nifti, write_table
from weakmedsam.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "lgg-flair-64"


def make(root: Path, **changes) -> Folder:
    settings = {
        "classes": {"tumour": [1]},
        "prepare__store_dir": str(root / "s"),
        "image_size": 32,
        "num_workers": 0,
    }
    return Folder(str(root), **data_settings(**{**settings, "prepare__workers": 1, **changes}))


def test_a_table_alone_is_enough(tmp_path):
    module = make(fake_folder(tmp_path, table=True, masks=False))
    module.prepare_data()
    module.setup("fit")
    assert not module.has_val_masks
    assert module.train_labels().sum() == 3 * 4
    batch = next(iter(module.val_dataloader()))
    assert "mask" not in batch
    assert {b["case"] for b in module.predict_dataloader()} == {
        e.name for e in (*module.cases("train"), *module.cases("val"))
    }
    with pytest.raises(DataError, match="nothing to score"):
        module.setup("test")


def test_a_table_wins_over_masks(tmp_path):
    root = fake_folder(tmp_path)
    write_table(root, [(f"scan{n}", k, int(k == 0)) for n in range(5) for k in range(6)])
    module = make(root)
    module.prepare_data()
    module.setup("fit")
    assert module.train_labels()[:6, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert "mask" in next(iter(module.val_dataloader()))


def test_patients_file_keeps_scans_together(tmp_path):
    root = fake_folder(tmp_path, 6)
    rows = "".join(f"scan{n},patient{n // 2}\n" for n in range(6))
    (root / "patients.csv").write_text("case,patient\n" + rows)
    module = make(root)
    module.prepare_data()
    module.setup("fit")
    assert all(module.split[f"scan{n}"] == module.split[f"scan{n + 1}"] for n in (0, 2, 4))
    (root / "patients.csv").write_text("case,person\na,b\n")
    with pytest.raises(DataError, match=r"lacks the column\(s\) \['patient'\]"):
        Folder(str(root), {"tumour": [1]}).find_cases()


@pytest.mark.parametrize(
    ("table", "text", "said"),
    [
        (
            "patients.csv",
            "case,patient\n1,P\n2,P\n3,Q\n",
            r"'1' \(line 2\).*have no row: '001'.*Leading zeros",
        ),
        ("patients.csv", "case,patient\n001,P\n002,P\n", r"1 case\(s\) have no row: '003'"),
        (
            "patients.csv",
            "case,patient\n001,P\n002,P\n003,P\n003,Q\n",
            "line 5, column case: '003' has a row already",
        ),
        (
            "patients.csv",
            "case,patient\n001,01\n002,1\n003,2\n",
            "line 3, column patient: '1' is '01' in line 2",
        ),
        (
            "patients.csv",
            "case,patient\n001,P1\n002,P2\n003,p1\n",
            "line 4, column patient: 'p1' is 'P1' in line 2",
        ),
        ("labels.csv", "case,slice,tumour\n1,0,1\n", "'1'.*Leading zeros"),
        ("labels.csv", "case,slice,tumour\n001.nii.gz,0,1\n", "no ending: '001'"),
    ],
)
@pytest.mark.parametrize("on_bad_case", ["raise", "skip"])
def test_tables_that_do_not_fit_the_cases_are_refused(tmp_path, table, text, said, on_bad_case):
    for number in range(1, 4):
        save_nifti(tmp_path / "images" / f"{number:03d}.nii.gz", draw_scan(number)[0])
        save_nifti(tmp_path / "masks" / f"{number:03d}.nii.gz", draw_scan(number)[1])
    (tmp_path / table).write_text(text)
    with pytest.raises(DataError, match=rf"{table}: .*{said}") as found:
        make(tmp_path, prepare__on_bad_case=on_bad_case).prepare_data()
    assert "\n" not in str(found.value)


def test_a_split_file_is_checked_before_volumes_are_read(tmp_path):
    root = fake_folder(tmp_path, 5)
    (root / "images/scan0.nii.gz").write_bytes(b"damaged")
    path = tmp_path / "split.csv"
    rows = [f"scan{n},{split}" for n, split in enumerate(["train", "train", "train", "val", "test"])]
    path.write_text("\n".join(["case,split", *rows, "scan7,test"]))
    with pytest.raises(DataError, match=r"^data.split.file: .*'scan7' \(line 7\)"):
        make(root, split__file=str(path)).prepare_data()
    assert not (tmp_path / "s").exists()
    # A case that is left out may have a row, and needs none.
    for given in (rows, rows[1:]):
        path.write_text("\r\n".join(["case;split", *(row.replace(",", " ; ") for row in given)]), "utf-8-sig")
        module = make(root, split__file=str(path), prepare__on_bad_case="skip")
        module.prepare_data()
        module.setup("fit")
        assert sorted(module.split) == ["scan1", "scan2", "scan3", "scan4"]


def test_a_table_of_nearly_the_right_name_or_place_is_listed(tmp_path, caplog):
    caplog.set_level("INFO")
    root = fake_folder(tmp_path, 5)
    names = ["labels.csv.csv", "patient.csv", "patients (1).csv", "Patients.xlsx", "images/patients.csv"]
    for name in [*names, "patientsafety.txt"]:
        (root / name).touch()
    make(root).prepare_data()
    listed = ", ".join(sorted(names, key=lambda name: (name.startswith("images/"), root / name)))
    assert f"5 name(s): {listed}. Read are" in caplog.text


def test_one_scan_is_not_two_patients(tmp_path):
    root = fake_folder(tmp_path, 5)
    for part in ("images", "masks"):
        (root / part / "other.nii.gz").symlink_to("scan0.nii.gz")
    with pytest.raises(DataError, match=r"other\.nii\.gz and .*scan0\.nii\.gz are links to one scan, .* Remove one"):
        make(root).prepare_data()
    rows = [f"scan{n},P{n}" for n in range(5)]
    (root / "patients.csv").write_text("\n".join(["case,patient", "other,P0", *rows]))
    module = make(root)
    module.prepare_data()
    module.setup("fit")
    assert module.split["other"] == module.split["scan0"]


def test_files_as_windows_and_datalad_leave_them(tmp_path, caplog):
    caplog.set_level("INFO")
    root = fake_folder(tmp_path / "unpacked/scans", 5)
    for part in ("images", "masks"):
        (root / part / "scan0.nii.gz").rename(root / part / "scan0.NII.GZ")
        (root / part / "scan1.nii.gz").unlink()
        (root / part / "scan1.nii.gz").symlink_to("../.git/annex/objects/1")
    save_nifti(root / "masks/scan2.nii", draw_scan(0)[1])
    (root / "images/scan9.mgz").touch()
    (root / "Labels.xlsx").touch()
    (root / "images").rename(root / "Images")
    with pytest.raises(DataError, match=r"(?s)2 of 5 .*scan1\.nii\.gz: is a link to .*masks/scan2\.nii has the same"):
        make(tmp_path / "unpacked").prepare_data()
    assert "2 name(s): Images/scan9.mgz, Labels.xlsx" in caplog.text
    module = make(tmp_path / "unpacked", prepare__on_bad_case="skip")
    module.prepare_data()
    module.setup("fit")
    assert sorted(module.split) == ["scan0", "scan3", "scan4"]


def test_a_patients_file_that_comes_after_the_first_preparation_moves_the_split(tmp_path):
    root = fake_folder(tmp_path, 6)
    contents = []
    for rows in (
        None,
        [(f"scan{n}", f"patient{n // 2}") for n in range(6)],
        [(f"scan{n}", f"p{n % 3}") for n in range(6)],
    ):
        if rows is not None:
            text = "".join(f"{case},{patient}\n" for case, patient in rows)
            (root / "patients.csv").write_text(f"case,patient\n{text}")
        module = make(root)
        module.prepare_data()
        module.setup("fit")
        patients = {name: entry.patient for name, entry in module.entries.items()}
        assert patients == (dict(rows) if rows is not None else {name: name for name in patients})
        assert len({(patient, module.split[name]) for name, patient in patients.items()}) == len(set(patients.values()))
        contents.append(module.summary()["content"])
    assert len(set(contents)) == 3  # what follows is trained anew


def test_what_lacks_its_other_half_is_named(tmp_path):
    root = fake_folder(tmp_path, 3)
    (root / "masks" / "scan0.nii.gz").unlink()
    (root / "images" / "scan1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"(?s)scan0\.nii\.gz: has neither.*scan1\.nii\.gz: has no image"):
        make(root).prepare_data()


def harm(root: Path, kind: str) -> None:
    """Spoil scan1."""
    image, mask = root / "images" / "scan1.nii.gz", root / "masks" / "scan1.nii.gz"
    voxels, classes = draw_scan(1)
    if kind == "truncated":
        image.write_bytes(image.read_bytes()[:-200])
    elif kind == "no image at all":
        image.write_bytes(b"<html>404</html>")
    elif kind == "NaN":
        save_nifti(image, np.where(voxels == voxels.max(), np.nan, voxels))
    elif kind == "constant":
        save_nifti(image, np.full_like(voxels, 7))
    elif kind == "four axes":
        save_nifti(image, np.stack([voxels, voxels], axis=-1))
    elif kind == "other shape":
        save_nifti(mask, classes[:-1])
    else:
        save_nifti(mask, np.where(classes == 1, 5, 0).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "named", "said"),
    [
        ("truncated", "images/scan1", "cannot be read"),
        ("no image at all", "images/scan1", "cannot be read"),
        ("NaN", "images/scan1", "holds NaN"),
        ("constant", "images/scan1", "constant"),
        ("four axes", "images/scan1", "has 4 axes"),
        ("other shape", "masks/scan1", "has .* voxels, its image"),
        ("unknown value", "masks/scan1", r"unknown label values 5; expected \[0, 1\]"),
    ],
)
def test_a_bad_scan_ends_the_run_before_training_or_is_left_out_and_listed(tmp_path, kind, named, said):
    root = fake_folder(tmp_path, 6)
    harm(root, kind)
    with pytest.raises(DataError, match=rf"(?s)1 of 6 .*{named}\.nii\.gz: .*{said}.*on_bad_case.*skip"):
        make(root).prepare_data()
    module = make(root, prepare__on_bad_case="skip")
    module.prepare_data()
    module.setup("fit")
    assert sorted(module.split) == ["scan0", "scan2", "scan3", "scan4", "scan5"]
    (_, listed) = (module.store / "skipped.csv").read_text().splitlines()
    assert listed.startswith("scan1,")
    assert named in listed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("case,slice,lesion\na,0,1\n", r"lacks the column\(s\) \['tumour'\]"),
        ("case,slice,tumour\na,0,yes\n", "line 2, column tumour: 'yes'"),
        ("case,slice,tumour\na,0,\u2460\n", "line 2, column tumour"),
        ("case,slice,tumour\na,-1,1\n", "line 2, column slice: '-1'"),
        ("case,slice,tumour\na,\u2460,1\n", "line 2, column slice"),
        ("case,slice,tumour\na,\uff11,1\n", "line 2, column slice"),
        ("case,slice,tumour\na,1.0,1\n", "line 2, column slice"),
        (f"case,slice,tumour\na,{'1' * 450},1\n", "line 2, column slice"),
        (f"case,slice,tumour\na,{'1' * 5000},1\n", "line 2, column slice"),
        ("case,slice,tumour\nb,0,1\n", "'b' .line 2"),
        ("case,slice,tumour,tumour\na,0,1,1\n", "stands twice"),
        ("case,slice,tumour\na,0,1\na,0,0\n", "line 3.*two rows"),
        ("case,slice,tumour\na,0\n", "line 2"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, said):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        read_labels(tmp_path / "labels.csv", ["tumour"], ["a"])


def test_a_spreadsheets_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "labels.csv").write_text("case,slice,tumour\na,0, 1\n", encoding="utf-8-sig")
    assert read_labels(tmp_path / "labels.csv", ["tumour"], ["a"]) == {"a": {0: (1,)}}


def test_other_values_must_be_named(tmp_path):
    root = fake_folder(tmp_path, 3)
    save_nifti(root / "masks" / "scan0.nii.gz", draw_scan(0, (1, 7))[1])
    with pytest.raises(DataError, match=r"scan0\.nii\.gz: holds unknown label values 7"):
        make(root).prepare_data()
    module = make(root, background_values=(7,))
    arrays = read_case(module.find_cases()[0], module.spec)
    assert arrays.mask_native is not None
    assert int(arrays.mask_native.sum()) == int((draw_scan(0, (1, 7))[1] == 1).sum())


def test_the_real_table_agrees_with_the_real_masks():
    if not SHARED.is_dir():
        pytest.skip("no real scans in ../shared/data")
    module = Folder(str(SHARED), {"tumour": [1]}, image_size=64)
    for case in module.find_cases()[::20]:
        entry = read_case(case, module.spec).entry
        assert case.table is not None
        assert entry.counts is not None
        # These files' third axis runs feet to head, as the store counts.
        assert entry.geometry.slice_axis == (2, False)
        assert [int(n > 0) for (n,) in entry.counts] == [case.table[k][0] for k in range(entry.depth)]


def test_no_data_says_the_layout(tmp_path):
    (tmp_path / "scans.zip").touch()
    with pytest.raises(DataError, match=r"(?s)there is: scans\.zip.*images/<case>.*labels\.csv"):
        Folder(str(tmp_path), {"tumour": [1]}).find_cases()


def draw_pictures(root: Path, cases: int = 4) -> None:
    """Colour pictures in a folder a case, and masks as pages of a TIFF."""
    for number in range(cases):
        image, mask = draw_scan(number)
        (root / f"images/scan{number}").mkdir(parents=True)
        (root / "masks").mkdir(exist_ok=True)
        pages = [Image.fromarray(page) for page in mask.T]
        pages[0].save(root / f"masks/scan{number}.tiff", save_all=True, append_images=pages[1:])
        for place, page in enumerate((image.T // 4).astype(np.uint8)):
            colours = np.stack([page, page // 2, 255 - page], axis=-1)
            Image.fromarray(colours).save(root / f"images/scan{number}/{place}.png")


def test_pictures_train_as_volumes_and_a_channel_and_a_spacing_are_taken(tmp_path, caplog):
    draw_pictures(tmp_path)
    with pytest.raises(DataError, match=r"(?s)4 of 4 .*0\.png: has 3 channels of colour"):
        make(tmp_path).prepare_data()
    module = make(tmp_path, channel=0, slices__min_pixels=1)
    module.prepare_data()
    module.setup("fit")
    assert "4 scan(s) state no size of a voxel, taken as 1 mm (data.spacing tells it): scan0, scan1" in caplog.text
    assert module.train_labels().sum() == 4 * len(module.cases("train"))
    placed = make(tmp_path, channel=0, spacing=(0.5, 0.6, 3))
    assert placed.store != module.store
    placed.prepare_data()
    placed.setup("fit")
    assert placed.cases("val")[0].geometry.spacing == pytest.approx((3, 0.6, 0.5))
    assert make(tmp_path).spec.key == Folder(str(tmp_path), {"tumour": [1]}, image_size=32).spec.key
    save_nifti(tmp_path / "images/scan9.nii.gz", draw_scan(0)[0])
    (tmp_path / "masks/scan0.tiff").rename(tmp_path / "masks/scan9.tiff")
    with pytest.raises(DataError, match=r"scan9\.tiff: lies up to .* A picture has no place: save it as NIfTI"):
        make(tmp_path, channel=0).prepare_data()


def test_images_and_masks_by_patterns(tmp_path):
    for number in range(4):
        image, mask = draw_scan(number)
        save_nifti(tmp_path / f"p{number}/p{number}_t1.nii.gz", image)
        save_nifti(tmp_path / f"p{number}/p{number}_t2.nii.gz", image + 1)
        save_nifti(tmp_path / f"p{number}/p{number}_seg.nii.gz", mask)
    first, second = (make(tmp_path, images=f"*/*_{part}.nii.gz", masks="*/*_seg.nii.gz") for part in ("t1", "t2"))
    assert [case.name for case in first.find_cases()] == ["p0", "p1", "p2", "p3"]
    assert first.store != second.store
    first.prepare_data()
    assert {path.name[3:] for path in source_files(first.sources())} == {"t1.nii.gz", "seg.nii.gz"}
    with pytest.raises(ConfigError, match=r"data\.masks: \.\./x is not below data_dir"):
        make(tmp_path, masks="../x")
