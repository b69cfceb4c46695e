"""Reading YAML: every file of settings by one strict reader, whose errors name file, line and column. Without torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from weakmedsam.errors import ConfigError

DEEPEST = 64
"""Levels of nesting; the deepest file of ``experiments/`` has six. The libraries behind recurse and would give up."""
MOST_NODES = 1_000_000
"""Of a file whose aliases are written out: a few lines of aliases of aliases would fill the memory."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's, but a key that stands twice or is no text is an error, and so is endless nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node and what is below it."""
        self._depth += 1
        mark = self.peek_event().start_mark
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"it is nested deeper than {DEEPEST} levels", problem_mark=mark)
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._measure(node, alias, mark)
        return node

    def _measure(self, node: yaml.Node, alias: bool, mark: yaml.Mark) -> None:
        if alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias stands within what it is an alias of", problem_mark=mark)
        if not alias:
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        if self._sizes[id(node)] > MOST_NODES:
            raise yaml.MarkedYAMLError(problem=f"it has more than {MOST_NODES:,} values", problem_mark=mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; one that is none of its kind, such as the date 2001-13-45, is named with its place."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, OverflowError) as error:
            shown = f"{str(node.value)[:40]!r}: {error}"
            raise yaml.MarkedYAMLError(problem=shown, problem_mark=node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping, each key once; what ``<<`` brings may be overridden."""
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value} is read as {key!r}, which is no text; put quotes around it",
                    problem_mark=key_node.start_mark,
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands here again; it stands in line {seen[key].line + 1} already",
                    problem_mark=key_node.start_mark,
                )
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a YAML (or JSON) file holds.

    Raises:
        ConfigError: it is not there, no UTF-8, no valid YAML, or a key stands twice; names file, line and column.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a YAML file that is there") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = len(raw[raw.rfind(b"\n", 0, error.start) + 1 : error.start].decode()) + 1
        raise ConfigError(
            f"{path}, line {line}, column {column}: the byte 0x{raw[error.start]:02x} is no UTF-8; save the file as "
            "UTF-8 (it may be in Latin-1, a Windows code page or UTF-16)"
        ) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """What a YAML text holds.

    Args:
        text: without a byte-order mark.
        name: of the file, for messages.

    Raises:
        ConfigError: as of ``read_yaml``.
    """
    return deepcopy(_parse_once(text, name))


@lru_cache(256)
def _parse_once(text: str, name: str) -> Any:
    """A run's stages share their files, and parsing them is most of what a run costs that is up to date."""
    loader: _StrictLoader | None = None
    try:
        loader = _StrictLoader(text)
        return loader.get_single_data()
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        raise ConfigError(f"{name}, line {line}, column {column}: {error.reason}; remove the character") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_say(error, text, name)) from error
    except (ValueError, TypeError, OverflowError) as error:  # of a value: 2001-13-45 is no date
        raise ConfigError(f"{name}: a value is not valid YAML ({error})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _say(error: yaml.MarkedYAMLError, text: str, name: str) -> str:
    """PyYAML's message in a line, with the mend where it is one of the usual slips."""
    mark = error.problem_mark or error.context_mark
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = " ".join(part for part in (error.context, error.problem) if part)
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    hint = ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in problem:
        hint = "; indent with blanks, not with a tab"
    elif "mapping values are not allowed" in problem:
        hint = "; put quotes around a value that holds a colon and a blank"
    return f"{name}{place}: is not valid YAML ({problem}){hint}"


def read_settings_file(path: Path) -> dict[str, Any]:
    """A YAML file of settings, as plain values by key.

    Raises:
        ConfigError: as of ``read_yaml``, or it is empty or holds no ``key: value``.
    """
    held = read_yaml(path)
    if held is None:
        raise ConfigError(f"{path} is empty; a file of settings has lines like 'key: value'")
    if not isinstance(held, dict):
        kind = "a list" if isinstance(held, list) else f"{str(held)[:40]!r}"
        raise ConfigError(f"{path}, line 1, column 1: holds {kind} where settings (key: value) belong")
    return held


def check_words(words: Sequence[str]) -> None:
    """See that the YAML of a command line can be read: its files, and values that are YAML themselves.

    The command line's own libraries read them too, and would answer with a trace-back or without the file's name.

    Raises:
        ConfigError: names file, line and column, or the option.
    """
    option = ""
    for word in words:
        key, equals, rest = word.partition("=") if word.startswith("--") else ("", "", word)
        option = key or option
        value = rest if equals or not key else ""
        is_file = value.endswith((".yaml", ".yml")) and Path(value).is_file()
        if option == "--config" and value.lstrip().startswith("{"):  # settings, not the name of their file
            check_depth(option, value)
            parse_yaml(value, option)
        elif (option == "--config" and value) or is_file:
            read_settings_file(Path(value))
        elif sum(map(value.count, "[{")) > DEEPEST:
            check_depth(option, value)


def check_depth(option: str, value: str) -> None:
    """See that the value of an option is not nested too deeply.

    Raises:
        ConfigError: it is; names the option.
    """
    depth = deepest = 0
    for letter in value:
        depth += (letter in "[{") - (letter in "]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise ConfigError(f"{option} is nested {deepest} levels deep; no setting needs more than {DEEPEST}")
