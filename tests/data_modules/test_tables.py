"""Tables as people save them: read as csv reads them, or refused in one line that says where."""

import csv
import io
import os
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_modules.case_tables import check_cases, read_pairs
from data_modules.folder_files import read_patients
from data_modules.label_tables import read_labels
from data_modules.splits import read_split
from data_modules.tables import LARGEST, open_table
from weakmedsam.errors import DataError

COLUMNS = ("case", "patient")
quick = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read(path, content: bytes | str, columns=COLUMNS):
    path = path / "table.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(line, *cells) for line, cells in open_table(path, columns).rows]


def refusal(path, content, columns=COLUMNS) -> str:
    with pytest.raises(DataError) as found:
        read(path, content, columns)
    return one_line(str(found.value))


def read_or_refused(path, content: bytes) -> list | str:
    try:
        return read(path, content)
    except DataError as error:
        return one_line(str(error))


def one_line(said: str) -> str:
    assert said.isprintable()
    assert len(said) < 1500
    assert "table.csv" in said
    return said


ROWS = [(2, "a", "P1"), (3, "b", "Müller")]
PLAIN = "case,patient\na,P1\nb,Müller\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_spreadsheets_write_is_read(tmp_path, encoding, separator, end):
    text = PLAIN.replace(",", separator).replace("\n", end)
    assert read(tmp_path, text.encode(encoding)) == ROWS


def test_utf_16_is_read_in_both_orders_and_excels_own_line_on_the_separator_is_heeded(tmp_path):
    assert read(tmp_path, b"\xfe\xff" + PLAIN.encode("utf-16-be")) == ROWS
    assert read(tmp_path, "sep=;\r\ncase;patient\r\na;P1\r\n") == [(3, "a", "P1")]


def test_blanks_empty_lines_and_further_columns_do_no_harm(tmp_path):
    text = '\n case ; "remarks, dates" ;patient;\n\n a ;"one; ""two""\nthree"; P1\u00a0;\n;;;\n   \nb;;P2;'
    assert read(tmp_path, text) == [(4, "a", "P1"), (8, "b", "P2")]


def test_quotes_after_a_blank_are_quotes(tmp_path):
    text = '"case", "patient"\n"a", "P 1"\n b , "say ""so""" \n'
    assert read(tmp_path, text) == [(2, "a", "P 1"), (3, "b", 'say "so"')]
    assert read(tmp_path, 'case,patient\n"a","""P"""\n') == [(2, "a", '"P"')]


def test_only_the_header_decides_the_separator(tmp_path):
    assert read(tmp_path, "case;patient\na,1;P,1\n") == [(2, "a,1", "P,1")]
    assert read(tmp_path, '"case";"patient"\n"a;1";P1\n') == [(2, "a;1", "P1")]
    assert read(tmp_path, "case,patient,a;b\nx,y,z\n") == [(2, "x", "y")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("case\na\n", "line 1 is no header.*comma, semicolon or tab"),
        ("case,patient\n", "a header and no row"),
        ("case,person\na,P\n", r"line 1: lacks the column\(s\) \['patient'\]; separated by comma .*'person'"),
        ("\nCase;patient\na;P\n", r"line 2: lacks .*\['case'\]; separated by semicolon"),
        ("case,person;x\na,P;x\n", "line 1: it is not clear what separates.*by comma.*by semicolon"),
        ("case,patient,case\na,P,b\n", "line 1: the column 'case' stands twice"),
        ("case,patient,note,note\na,P,x,y\n", "line 1: the column 'note' stands twice"),
        ("case,patient\na,P\nb,P,x\n", r"line 3 has 3 cell\(s\), the header 2, separated by comma"),
        ("case,patient\na,P\n\nb\n", r"line 4 has 1 cell\(s\), the header 2"),
        ("case,patient\na;P\n", r"line 2 has 1 cell\(s\).*comma"),
        ("case,patient\na,\n", "line 2, column patient: is empty"),
        ("case,patient\n,P\n", "line 2, column case: is empty"),
        ('case,patient\na,P\n"b,P\nc,P\n', "line 3: a quote .* never closed"),
        ('case,patient\n"a"x,P\n', "line 2: text follows a closing quote"),
        ('"case,patient\na,P\n', "line 1: a quote .* never closed"),
        ('case,patient\n"a\nb",P\n', r"line 2, column case: .*holds U\+000A"),
        ("case,patient\na,P\u200b1\n", r"line 2, column patient: .*holds U\+200B"),
        ("case,patient\na,P\0\n", r"line 2 holds the control character U\+0000"),
        ("case,patient\na,P\nb,\x1bP\n", r"line 3 holds the control character U\+001B"),
        ("case,patient\n" + "a" * 1000 + ",P\n", "line 2, column case: has 1,000 characters"),
        ("case,patient,note\na,P," + "x" * 140_000, "line 2: a cell has more than 131,072 characters"),
        ("case,patient\na,P\n".encode("utf-16-le"), r"U\+0000"),
        (b"\xff\xfec\0a", "begins as UTF-16"),
        ("case,patient\na,é\n".encode() + b"b,\xe9\n", "line 3 holds the byte 0xE9.*though other lines are"),
        (b"case,patient\r\na,\x81\r\n", "line 2 holds the byte 0x81.*nor .*Windows-1252"),
        (b"\xef\xbb\xbfcase,patient\na,\xe9\n", "line 2 holds the byte 0xE9"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused_with_its_place(tmp_path, content, said):
    assert re.search(said, refusal(tmp_path, content))


def test_what_is_no_table_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(DataError, match="no file that can be read"):
        open_table(tmp_path, COLUMNS)
    with pytest.raises(DataError, match="there is no such file"):
        open_table(tmp_path / "nowhere.csv", COLUMNS)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="no file that can be read"):
        open_table(tmp_path / "pipe.csv", COLUMNS)
    with (tmp_path / "huge.csv").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(DataError, match="more than 32 MB"):
        open_table(tmp_path / "huge.csv", COLUMNS)
    with pytest.raises(DataError, match="File name too long"):
        open_table(tmp_path / ("x" * 300), COLUMNS)


cell = st.text(st.characters(codec="cp1252", exclude_categories=("Cc", "Cf")) | st.sampled_from(',;\t" \n'), max_size=6)


@quick
@given(
    rows=st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=5),
    separator=st.sampled_from([",", ";", "\t"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_a_table_is_read_as_csv_reads_it_or_refused(tmp_path, rows, separator, encoding, end, quoting):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerows([("case", "note", "patient"), *rows])
    lines = csv.reader(io.StringIO(stream.getvalue(), newline=""), delimiter=separator, strict=True)
    full = [[part.strip() for part in row] for row in lines][1:]
    full = [row for row in full if any(row)]
    wanted = [(row[0], row[-1]) for row in full]
    found = read_or_refused(tmp_path, stream.getvalue().encode(encoding))
    if isinstance(found, str):
        usable = all(part and "\n" not in part and "\t" not in part for row in wanted for part in row)
        # Nothing is refused without need but what is also UTF-8 by chance.
        assert not wanted or not usable or {len(row) for row in full} != {3} or "UTF-8" in found
    else:
        assert [row[1:] for row in found] == wanted


@quick
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda end: b"case,patient\n" + end))
@example(b"case,patient\na,\xe2\x91\xa0\n")
@example(b"\xff\xfe")
@example(b"sep=,\n")
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, content):
    read_or_refused(tmp_path, content)


def pairs(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return read_pairs(path, "patient")


def test_a_case_has_one_row(tmp_path):
    assert pairs(tmp_path, "case,patient\na,P1\nb,P1\n")[1] == {"a": (2, "P1"), "b": (3, "P1")}
    with pytest.raises(DataError, match=r"line 4, column case: 'a' has a row already, line 2: .*'P1' there, 'P2' here"):
        pairs(tmp_path, "case,patient\na,P1\nb,P1\na,P2\n")
    with pytest.raises(DataError, match="line 3"):  # also where both rows say the same
        pairs(tmp_path, "case,patient\nM\u00fcller,P1\nMu\u0308ller,P1\n")


@pytest.mark.parametrize(
    ("rows", "cases", "said"),
    [
        (["1"], ["001"], r"1 case\(s\) of its rows are not there: '1' \(line 2\)\. Leading zeros .*'1' for '001'"),
        (["1.0"], ["001"], "Leading zeros"),
        (["p1_2"], ["p01_002"], "Leading zeros"),
        (["001.nii.gz"], ["001"], "no folder and no ending: '001', not '001.nii.gz'"),
        ([r"C:\scans\001.NII"], ["001"], "no ending: '001'"),
        (["Case1"], ["case1"], "Upper and lower case count: 'case1', not 'Case1'"),
        (["2.01901E+15"], ["20190100000123456"], "shortened long numbers"),
        (["x"], ["y"], "Correct the names"),
        ([f"x{n}" for n in range(30)], ["y"], r"30 case\(s\).*'x9' \(line 11\) and 20 more"),
    ],
)  # fmt: skip
def test_rows_of_no_case_are_named_with_what_has_happened(tmp_path, rows, cases, said):
    table, found = pairs(tmp_path, "case,patient\n" + "".join(f"{name},P\n" for name in rows))
    with pytest.raises(DataError, match=said):
        check_cases(table, {name: line for name, (line, _) in found.items()}, cases)


def test_missing_rows_are_named_beside_unknown_ones(tmp_path):
    table, _ = pairs(tmp_path, "case,patient\na,P\n")
    check_cases(table, {"a": 2}, ["a", "b"])
    with pytest.raises(DataError, match=r"1 case\(s\) of its rows.*'a'.*; 2 case\(s\) have no row: 'b', 'c'\."):
        check_cases(table, {"a": 2}, ["b", "c"], ["c", "b"])


def test_a_guessed_encoding_is_told_where_names_do_not_fit(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes("case,patient\nЖизнь,P\n".encode("cp1251"))
    table, found = read_pairs(path, "patient")
    with pytest.raises(DataError, match=r"read as Windows-1252.*save it as CSV UTF-8"):
        check_cases(table, {name: line for name, (line, _) in found.items()}, ["Жизнь"])


FOUR = {
    "labels": (
        "case,slice,tumour\na,0,1\na,1,0\nb,0,0\n",
        lambda path: read_labels(path, ["tumour"], ["a", "b"]),
    ),
    "patients": ("case;patient\na;P1\nb;P1\n", lambda path: read_patients(path, ["a", "b"])),
    "split": ("case\tsplit\na\ttrain\nb\tval\n", lambda path: read_split(path, {"a", "b"}, {"a", "b"})),
    "published": ("case,split\r\na,train\r\nb,test\r\n", read_split),
}


@pytest.mark.parametrize("name", FOUR)
@quick
@given(data=st.data())
def test_damaged_tables_are_read_or_refused_in_one_line(tmp_path, name, data):
    text, reader = FOUR[name]
    whole = text.encode(data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"])))
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 4)))
    inserted = data.draw(
        st.binary(max_size=4)
        | st.sampled_from(["\u2460", '"', ";", "a,0,1\n", "1e3", "9" * 30, "\x85", "é"]).map(str.encode)
    )
    path = tmp_path / "table.csv"
    path.write_bytes(whole[:start] + inserted + whole[end:])
    try:
        found = reader(path)
    except DataError as error:
        one_line(str(error))
    else:
        assert set(found) <= {"a", "b"} or name == "published"
