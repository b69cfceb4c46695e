"""Files of settings: what cannot be read ends in one message with file, line and column."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from weakmedsam.errors import ConfigError
from weakmedsam.system.yaml_files import check_words, parse_yaml, read_settings_file

ROOT = Path(__file__).parents[2]
BROKEN = {
    "tab": (b"data:\n\tsize: 64\n", "line 2, column 1: .*indent with blanks, not with a tab"),
    "colon": (b"data:\n  size: 64: 3\n", "line 2, column 11: .*put quotes around"),
    "latin": ("größe: 1\n# Größe\n".encode("latin-1"), "line 1, column 3: the byte 0xf6 is no UTF-8"),
    "behind": ("a: größe # ".encode() + b"\xe4\n", "line 1, column 12: the byte 0xe4"),
    "twice": (b"a: 1\nb:\n  c: 1\n  c: 2\n", "line 4, column 3: .*'c' stands here again; it stands in line 3"),
    "empty": (b"", "is empty"),
    "comment": (b"# nothing\n", "is empty"),
    "list": (b"- a\n- b\n", "line 1, column 1: holds a list where settings"),
    "word": (b"hello\n", "holds 'hello' where settings"),
    "utf16": ("a: 1\n".encode("utf-16"), "line 1, column 1: the byte 0xff"),
    "nul": (b"a: \x00\n", "line 1, column 4: "),
    "open": (b"a: {b: 1\n", "line 2, column 1: is not valid YAML"),
    "alias": (b"a: *b\n", "line 1, column 4: .*undefined alias 'b'"),
    "code": (b"a: !!python/object/apply:os.getcwd []\n", "line 1, column 4: "),
    "deep": (b"a: " + b"[" * 3000 + b"]" * 3000, "line 1, column 67: .*nested deeper than 64"),
    "itself": (b"a: &a {b: *a}\n", "line 1, column 11: .*an alias stands within"),
    "many": (b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
             + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 10)) for n in range(98, 105)),
             "it has more than 1,000,000 values"),
    "date": (b"b: 1\na: 2001-13-45\n", "line 2, column 4: is not valid YAML .'2001-13-45': month must be in 1..12"),
    "long": (b"a: " + b"9" * 5000, "line 1, column 4: is not valid YAML .'9999"),
    "number": (b"a:\n  1: 2\n", "line 2, column 3: is not valid YAML .the key 1 is read as 1, which is no text; put"),
    "truth": (b"on: 2\n", "the key on is read as True, which is no text; put quotes around it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_with_its_place(tmp_path, name):
    content, said = BROKEN[name]
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}.*{said}") as found:
        read_settings_file(path)
    assert len(str(found.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        check_words(["fit", "--config", str(path)])
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        check_words(["fit", f"--config={path}"])


def test_what_is_sound_is_read_as_pyyaml_reads_it(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xef\xbb\xbfbase: &b {a: 1, b: [1, null]}\r\nmore: {<<: *b, a: 2}\r\n")
    assert read_settings_file(path) == {"base": {"a": 1, "b": [1, None]}, "more": {"a": 2, "b": [1, None]}}
    for file in (ROOT / "experiments").rglob("*.yaml"):
        assert read_settings_file(file) == yaml.safe_load(file.read_text(encoding="utf-8"))


def test_a_file_that_is_not_there_and_a_folder_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(ConfigError, match=f"{re.escape(str(path))} cannot be read"):
            read_settings_file(path)


def test_a_value_that_is_nested_too_deeply_is_refused_by_its_option():
    with pytest.raises(ConfigError, match=r"--data\.classes is nested 2000 levels deep"):
        check_words(["fit", "--data.classes", "[" * 2000])
    with pytest.raises(ConfigError, match=r"--trainer\.devices is nested 70 levels deep"):
        check_words(["fit", "--trainer.devices=" + "{a: " * 70 + "1" + "}" * 70])
    check_words(["fit", "--data.classes", "{a: [1]}", "--x", "[1]," * 100, "--flag", "word"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=60), st.text("{}[]:,&*- \n\t#'\"!|>?%@a1", max_size=60)))
def test_any_text_is_read_as_pyyaml_does_or_refused_in_one_line(text):
    found, refused = None, ""
    try:
        found = parse_yaml(text, "own.yaml")
    except ConfigError as error:
        refused = str(error)
    if refused:
        assert refused.startswith("own.yaml")
        assert len(refused.splitlines()) == 1
    else:
        assert repr(found) == repr(yaml.safe_load(text))


def test_settings_in_the_place_of_their_files_name_are_read():
    check_words(["fit", "--config", '{"model": {"learning_rate": 1}}'])
    with pytest.raises(ConfigError, match="--config, line 1, column"):
        check_words(["fit", "--config={a: ["])


def test_who_changes_what_was_read_changes_nobody_elses():
    first = parse_yaml("a: {b: [1]}", "file")
    first["a"]["b"].append(2)
    assert parse_yaml("a: {b: [1]}", "file") == {"a": {"b": [1]}}
