import csv
from collections import Counter
from pathlib import Path

import pytest

import data_modules
from data_modules.config import Split
from data_modules.splits import keep_patients, read_split, split_by_hash, split_cases
from weakmedsam.errors import ConfigError, DataError


def people(number: int) -> dict[str, str]:
    """Two scans of each patient."""
    return {f"scan{n}{part}": f"patient{n}" for n in range(number) for part in "ab"}


@pytest.mark.parametrize("number", [3, 4, 5, 9, 10, 40])
@pytest.mark.parametrize("fractions", [Split().fractions, (0.7, 0.1, 0.2), (0.1, 0.1, 0.8), (0.34, 0.33, 0.33)])
def test_every_split_has_patients_and_no_patient_two_splits(number, fractions):
    split = split_by_hash(people(number), Split(fractions=fractions))
    assert set(split.values()) == {"train", "val", "test"}
    assert all(split[f"scan{n}a"] == split[f"scan{n}b"] for n in range(number))
    if number == 40:
        sizes = Counter(split.values())
        assert [sizes[s] / 80 for s in ("train", "val", "test")] == pytest.approx(fractions, abs=0.03)


def test_a_split_depends_on_seed_and_patients_only():
    patients = people(40)
    backwards = dict(reversed(patients.items()))
    assert split_by_hash(patients, Split()) == split_by_hash(backwards, Split())
    assert split_by_hash(patients, Split()) != split_by_hash(patients, Split(seed=1))


def test_a_split_does_not_change_with_the_version_of_the_program():
    split = split_by_hash({f"p{n}": f"p{n}" for n in range(6)}, Split(fractions=(0.5, 0.25, 0.25)))
    # `printf "0:p0" | sha256sum` and so on rank them p2 p4 p5 p0 p3 p1.
    assert split == {"p2": "test", "p4": "test", "p5": "val", "p0": "val", "p3": "train", "p1": "train"}


def test_fractions_of_zero_leave_a_split_empty_on_purpose():
    assert set(split_by_hash(people(2), Split(fractions=(0.0, 0.0, 1.0))).values()) == {"test"}
    assert set(split_by_hash(people(5), Split(fractions=(0.8, 0.2, 0.0))).values()) == {"train", "val"}


def test_too_few_patients_and_wrong_fractions_are_refused():
    with pytest.raises(DataError, match="2 patient"):
        split_by_hash(people(2), Split())
    for wrong in ((0.8, 0.1, 0.2), (1.2, -0.1, -0.1)):
        with pytest.raises(ConfigError, match=r"data\.split\.fractions"):
            Split(fractions=wrong)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_split_file_decides(tmp_path):
    path = write(tmp_path / "mine.csv", "case,split\na,train\nb,val\nc,test\nleft out,test\n")
    there = {"a", "b", "c", "left out"}
    split, name = split_cases({"a": "a", "b": "b", "c": "c"}, there, Split(str(path)), None)
    assert split == {"a": "train", "b": "val", "c": "test"}
    assert name == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("case,split\na,training\n", "line 2"),
        ("name,split\na,train\n", r"line 1: lacks the column\(s\) \['case'\]"),
        ("case,split\na,train\na,test\n", "line 3, column case: 'a' has a row already, line 2"),
        ("case,split\na,train\na,train\n", "line 3"),
        ("case,split\na,train,x\n", r"line 2 has 3 cell\(s\)"),
    ],
)
def test_wrong_split_files_are_refused(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        read_split(write(tmp_path / "split.csv", text))


def test_missing_file_missing_case_and_torn_patient_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.split\.file"):
        read_split(tmp_path / "nowhere.csv")
    path = write(tmp_path / "split.csv", "case,split\na,train\n1,val\n")
    with pytest.raises(DataError, match=r"'1' \(line 3\); 2 case\(s\) have no row: '001', 'b'\. Leading zeros"):
        split_cases({"a": "a", "b": "b", "001": "x"}, {"a", "b", "001"}, Split(str(path)), None)
    with pytest.raises(DataError, match="patient p is in both train"):
        keep_patients({"a": "train", "b": "test"}, {"a": "p", "b": "p"}, tmp_path)


def test_the_authors_split_holds_when_all_its_cases_are_there():
    path = Path(data_modules.__file__).with_name("brats2019_authors.csv")
    with path.open() as stream:
        rows = {row["case"]: row["split"] for row in csv.DictReader(stream)}
    assert Counter(rows.values()) == {"train": 268, "val": 33, "test": 34}
    everyone = {case: case for case in rows}
    assert split_cases(everyone, set(rows), Split(), path) == (rows, "brats2019_authors")
    good = dict(list(everyone.items())[5:])  # five were left out as bad: still the authors' split
    assert split_cases(good, set(rows), Split(), path)[0] == {case: rows[case] for case in good}
    assert split_cases(good, set(good), Split(), path)[1] == "seed0-0.8-0.1-0.1"


def test_the_authors_split_is_the_shared_one():
    shared = Path(__file__).parents[3] / "shared" / "splits" / "brats2019_authors.csv"
    if not shared.exists():
        pytest.skip("the shared split is not here")
    mine = Path(data_modules.__file__).with_name("brats2019_authors.csv")
    assert read_split(mine) == read_split(shared)
