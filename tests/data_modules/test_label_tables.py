"""Tables of labels by ranges of slices and by scans; those by slice are in test_folder.py and test_tables.py."""

import pytest
from data_settings import data_settings
from fakes import SHAPE, fake_folder

from data_modules.folder import Folder
from data_modules.label_tables import read_labels
from weakmedsam.contracts import SOMEWHERE
from weakmedsam.errors import DataError

CLASSES = ["tumour", "cyst"]


def read(path, rows, cases=("a", "b")):
    (path / "labels.csv").write_text("case,from,to,class\n" + rows)
    return read_labels(path / "labels.csv", CLASSES, cases)


def test_ranges_become_labels_of_slices(tmp_path):
    found = read(tmp_path, "a,1,2,tumour\na,2,3,cyst\na,0,0,none\nb,0,4,none\n")
    assert found["a"].by_slice(5) == {0: (0, 0), 1: (1, 0), 2: (1, 1), 3: (0, 1), 4: (0, 0)}
    assert found["b"].by_slice(5) == dict.fromkeys(range(5), (0, 0))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a,3,1,tumour\n", "line 2: the range 3 to 1 ends before it begins"),
        ("a,x,1,tumour\n", "line 2, column from: 'x' is no slice"),
        ("a,1,1.5,tumour\n", "line 2, column to: '1.5' is no slice"),
        ("a,1,2,lesion\n", "line 2, column class: 'lesion' is none of tumour, cyst; none is for slices without any"),
        ("a,1,4,tumour\na,4,5,tumour\n", "line 3: 4 to 5, tumour, overlaps line 2"),
        ("a,1,4,tumour\na,0,1,none\n", "line 3: 0 to 1, none, contradicts line 2"),
        ("c,1,4,tumour\n", r"1 case\(s\) of its rows are not there: 'c' \(line 2\)"),
        ("a,1,,tumour\n", "line 2, column to: is empty"),
    ],
)
def test_rows_that_cannot_be_are_refused_with_their_line(tmp_path, rows, said):
    with pytest.raises(DataError, match=rf"labels\.csv: {said}") as told:
        read(tmp_path, rows)
    assert "\n" not in str(told.value)


def test_slices_out_of_range_are_refused_with_their_line(tmp_path):
    with pytest.raises(DataError, match=r"labels\.csv: line 3: slices 4 to 5, but the scan has slices 0 to 4"):
        read(tmp_path, "a,1,2,tumour\na,4,5,cyst\n")["a"].by_slice(5)


def read_scans(path, rows, cases=("a", "b")):
    (path / "labels.csv").write_text("case,class,remark\n" + "".join(f"{row},x\n" for row in rows))
    return read_labels(path / "labels.csv", CLASSES, cases)


def test_labels_of_scans_say_nothing_of_slices(tmp_path):
    found = read_scans(tmp_path, ["a,tumour", "b,none"], "abc")
    assert found["a"].by_slice(3) == dict.fromkeys(range(3), (SOMEWHERE, 0))
    assert found["b"].by_slice(2) == dict.fromkeys(range(2), (0, 0))
    assert "c" not in found  # nobody has said what it shows
    both = read_scans(tmp_path, ["a,tumour", "a,cyst"])
    assert both["a"].present == (1, 1)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["a,lesion"], "line 2, column class: 'lesion' is none of tumour, cyst; none is for a scan without any"),
        (["a,tumour", "b,none", "a,tumour"], "line 4: case 'a', tumour, has a row already, line 2. Keep one"),
        (["a,tumour", "a,none"], "line 3: none contradicts line 2. Correct one of them"),
        (["a,none", "a,cyst"], "line 3: cyst contradicts line 2. Correct one of them"),
        (["c,tumour"], r"1 case\(s\) of its rows are not there: 'c' \(line 2\)"),
        (["a,"], "line 2, column class: is empty"),
    ],
)
def test_rows_of_scans_that_cannot_be_are_refused_with_their_line(tmp_path, rows, said):
    with pytest.raises(DataError, match=rf"labels\.csv: {said}") as told:
        read_scans(tmp_path, rows)
    assert "\n" not in str(told.value)


def test_half_a_range_is_no_label_of_a_scan(tmp_path):
    (tmp_path / "labels.csv").write_text("case,from,class\na,1,tumour\n")
    with pytest.raises(DataError, match=r"labels\.csv: line 1: lacks the column\(s\) \['to'\]"):
        read_labels(tmp_path / "labels.csv", CLASSES, ["a"])


def test_masks_of_validation_and_test_say_what_a_table_of_scans_leaves_open_and_training_never_asks_them(tmp_path):
    root = fake_folder(tmp_path, 6)
    rows = [f"scan{n},{'tumour' if n % 2 else 'none'}" for n in range(6)]
    (root / "labels.csv").write_text("\n".join(["case,class", *rows]))
    (root / "split.csv").write_text("case,split\n" + "\n".join(
        f"scan{n},{split}" for n, split in enumerate(["train", "train", "train", "val", "val", "test"])
    ))  # fmt: skip
    settings = data_settings(
        prepare__store_dir=str(tmp_path / "s"), prepare__workers=1, split__file=str(root / "split.csv"), image_size=32
    )
    module = Folder(str(root), {"tumour": [1]}, num_workers=0, **settings)
    module.prepare_data()
    module.setup("fit")
    depth = SHAPE[2]
    assert module.train_labels()[:, 0].tolist() == [0] * depth + [SOMEWHERE] * depth + [0] * depth
    assert module.val_labels()[:, 0].tolist() == [0, *[1] * (depth - 2), 0] + [0] * depth
    (volume,) = module.test_dataloader()
    assert volume["label"][:, 0].tolist() == [0, *[1] * (depth - 2), 0]
    assert [batch["label"].unique().tolist() for batch in module.predict_dataloader()] == [[0], [SOMEWHERE], [0]]
    assert module.summary()["splits"]["train"]["positive_scans"] == {"tumour": 1}
    assert "positive_scans" not in module.summary()["splits"]["val"]


def test_a_class_that_every_training_scan_shows_cannot_be_learnt_from_scans(tmp_path):
    root = fake_folder(tmp_path)
    (root / "labels.csv").write_text("\n".join(["case,class", *(f"scan{n},tumour" for n in range(5))]))
    settings = data_settings(prepare__store_dir=str(tmp_path / "s"), prepare__workers=1, image_size=32)
    module = Folder(str(root), {"tumour": [1]}, num_workers=0, **settings)
    module.prepare_data()
    with pytest.raises(DataError, match=r"Every training scan of folder shows tumour, .* Add scans without it, or say"):
        module.setup("fit")


def test_a_data_set_trains_on_ranges_alone(tmp_path):
    root = fake_folder(tmp_path, masks=False)
    rows = [f"scan{n},1,{SHAPE[2] - 2},tumour" for n in range(4)]
    (root / "labels.csv").write_text("\n".join(["case;from;to;class", *(row.replace(",", ";") for row in rows)]))
    settings = data_settings(
        prepare__store_dir=str(tmp_path / "s"), prepare__workers=1, prepare__on_bad_case="skip", image_size=32
    )
    module = Folder(str(root), {"tumour": [1]}, num_workers=0, **settings)
    module.prepare_data()
    module.setup("fit")
    assert sorted(module.split) == [f"scan{n}" for n in range(4)]  # scan4 has neither mask nor rows
    assert module.train_labels().sum() == 4 * len(module.cases("train"))
