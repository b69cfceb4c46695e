"""Tables of labels by ranges of slices; those by slice are in test_folder.py and test_tables.py."""

import pytest
from data_settings import data_settings
from fakes import SHAPE, fake_folder

from data_modules.folder import Folder
from data_modules.label_tables import read_labels
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


def test_labels_of_whole_scans_are_refused_in_one_line(tmp_path):
    (tmp_path / "labels.csv").write_text("case,class\na,tumour\n")
    with pytest.raises(DataError, match=r"Labels of whole scans are not read yet: give ranges of slices, case,from,to"):
        read_labels(tmp_path / "labels.csv", CLASSES, ["a"])


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
