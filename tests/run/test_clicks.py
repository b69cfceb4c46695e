"""The tables of a review."""

import pytest

from weakmedsam.errors import DataError
from weakmedsam.run.clicks import (
    ACCEPTED,
    REJECTED,
    Click,
    Decision,
    Extent,
    Reviewed,
    is_reviewed,
    read_reviewed,
    write_clicks,
    write_decisions,
)

TIME = "2025-01-31T12:00:00+01:00"
CLICKS = [Click("a, b", 3, 10, 20, 1, "lesion", TIME), Click("c", 0, 0, 31, -1, "cyst", TIME)]
DECISIONS = [Decision("a, b", None, ACCEPTED, TIME), Decision("a, b", 2, REJECTED, TIME)]
CASES = {"a, b": Extent(4, 32), "c": Extent(1, 32)}
HEADER = "case,slice,x,y,sign,class,time\n"


def test_tables_come_back_as_they_were_written_and_go_when_empty(tmp_path):
    assert not is_reviewed(tmp_path)
    assert read_reviewed(tmp_path) == Reviewed((), ())
    write_clicks(tmp_path, CLICKS)
    write_decisions(tmp_path, DECISIONS)
    found = read_reviewed(tmp_path, CASES, ["lesion", "cyst"])
    assert found == Reviewed(tuple(CLICKS), tuple(DECISIONS))
    assert found.cases() == ["a, b", "c"]
    assert found.of_case("c") == Reviewed(tuple(CLICKS[1:]), ())
    write_clicks(tmp_path, [])
    write_decisions(tmp_path, [])
    assert not is_reviewed(tmp_path)
    assert list((tmp_path / "review").iterdir()) == []


def test_what_counts_is_told_apart_and_time_does_not_count():
    digest = Reviewed(tuple(CLICKS), ()).digest()
    assert Reviewed((), ()).digest() is None
    assert Reviewed(tuple(click._replace(time="") for click in CLICKS), ()).digest() == digest
    others = [tuple(CLICKS[::-1]), tuple(CLICKS[:1]), (CLICKS[0]._replace(sign=-1), CLICKS[1])]
    assert len({digest, *(Reviewed(other, ()).digest() for other in others)}) == 4
    assert Reviewed((), tuple(DECISIONS)).digest() == Reviewed((), tuple(DECISIONS[::-1])).digest()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("c,0,1,2,1,lesion", r"line 3 has 6 cell\(s\)"),
        ("c,zero,1,2,1,lesion,T", r"line 3, column slice: 'zero' is no whole number"),
        ("c,0,-1,2,1,lesion,T", r"line 3, column x: '-1' is no whole number"),
        ("c,0,1,2,+,lesion,T", r"line 3, column sign: '\+' is neither 1"),
        ("c,0,1,2,1,lesion,noon", r"line 3, column time: 'noon' is no time"),
        ("d,0,1,2,1,lesion,T", r"line 3, column case: 'd' has no pseudo-label in this run"),
        ("c,1,1,2,1,lesion,T", r"line 3, column slice: 1, but c has the slices 0 to 0"),
        ("c,0,1,32,1,lesion,T", r"line 3: pixel \(1, 32\) lies outside the frame of 32"),
        ("c,0,1,2,1,liver,T", r"line 3, column class: 'liver' is none of the run's classes"),
        ('c,0,1,2,1,"lesion,T', r"line 3: a quote"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, row, said):
    (tmp_path / "review").mkdir()
    (tmp_path / "review/clicks.csv").write_text(HEADER + f"c,0,1,2,1,lesion,{TIME}\n" + row.replace("T", TIME) + "\n")
    with pytest.raises(DataError, match=rf"clicks\.csv: {said}"):
        read_reviewed(tmp_path, CASES, ["lesion", "cyst"])


def test_a_damaged_decision_is_named(tmp_path):
    (tmp_path / "review").mkdir()
    path = tmp_path / "review/decisions.csv"
    path.write_text(f"case,slice,decision,time\nc,all,maybe,{TIME}\n")
    with pytest.raises(DataError, match=r"decisions\.csv: line 2, column decision: 'maybe' is neither"):
        read_reviewed(tmp_path)
    path.write_text(f"case,slice,decision,time\nc,all,accepted,{TIME}\nc,all,rejected,{TIME}\n")
    with pytest.raises(DataError, match=r"decisions\.csv: line 3: decides a second time"):
        read_reviewed(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"decisions\.csv"):
        read_reviewed(tmp_path)
