import csv

import pytest

from weakmedsam.files import replacing, write_table, write_whole


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "folder" / "file"
    for content in (b"a long first content", "kürzer"):
        write_whole(path, content)
    assert [other.name for other in path.parent.iterdir()] == ["file"]
    assert path.read_bytes() == "kürzer".encode()


def test_what_fails_half_way_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "whole")

    def fail():
        with replacing(path) as part:
            part.write_text("ha")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert [other.name for other in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "whole"


def test_a_table_leaves_empty_what_a_row_lacks(tmp_path):
    path = tmp_path / "table.csv"
    write_table(path, ["case", "dice"], [{"case": "a, b", "dice": 0.5}, {"case": "c"}])
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"case": "a, b", "dice": "0.5"}, {"case": "c", "dice": ""}]
