"""What a run says of itself, damaged in the ways in which disks, copies and editors damage files."""

import json
import math

import pytest

from weakmedsam.errors import DataError
from weakmedsam.system.atomic_io import put_away
from weakmedsam.system.json_files import parse_mapping, read_object, read_text, write_object

CONTENT = {"a": [1, 2.5, None, "ü"], "b": {"1": math.pi}, "configs": {}}


def test_a_note_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "folder/note.json"
    assert read_object(path) == {}
    write_object(path, CONTENT)
    assert read_object(path) == CONTENT
    path.write_text(json.dumps({"of": "an earlier version"}))  # without a seal
    assert read_object(path) == {"of": "an earlier version"}
    write_object(path, {"numbers": {1: 2, "10": 3}})
    assert read_object(path) == {"numbers": {"1": 2, "10": 3}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": ', "is not valid JSON"),
        (b"null", "should hold one JSON object, holds a NoneType"),
        (b"[1]", "holds a list"),
        (b"NaN", "holds a float"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"[" * 100_000, "is not valid JSON"),
        (None, "a folder lies in its place"),
    ],
)
def test_a_damaged_note_is_named_with_its_mend(tmp_path, content, said):
    path = tmp_path / "stage.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"stage\.json: .*{said}.* Remove it, and `make train` looks at its stage anew"
    ):
        read_object(path)


def test_any_changed_byte_of_a_note_is_noticed(tmp_path):
    path = tmp_path / "stage.json"
    write_object(path, {"made": "abc", "seconds": 1.5})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert read_object(path) == {"made": "abc", "seconds": 1.5, **read_object(path)}
        except DataError:
            continue
        # What is read all the same is the key of the seal, or blanks, that came out otherwise.
        assert place > whole.index(b'"seal') - 2 or whole[place : place + 1].isspace()


def test_a_folder_in_the_place_of_a_note_is_kept_aside(tmp_path):
    path = tmp_path / "note.json"
    for _ in range(2):
        path.mkdir()
        (path / "mine.txt").write_text("mine")
        write_object(path, CONTENT)
        assert read_object(path) == CONTENT
        path.unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note.json.old1", "note.json.old2"]
    put_away(path)  # nothing there


def test_a_damaged_yaml_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    assert read_text(path) == ""
    assert parse_mapping(path, "- 1") == {}
    for text in ("a: [", "a: \x07", "a: 2026-13-45", "[" * 5000):
        with pytest.raises(DataError, match=r"config\.yaml.*(YAML|remove the character).*\. Remove it"):
            parse_mapping(path, text)
