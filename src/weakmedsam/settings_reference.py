"""The reference of all settings, written from the code: ``python -m weakmedsam.settings_reference`` (``make docs``).

What can be set is what the constructors take that the files in ``experiments/`` name, so a new data set or
backbone appears by itself. Defaults are the code's; the YAML files that set another value are named.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from docstring_parser import parse

from weakmedsam.callbacks import Preemption, Throughput
from weakmedsam.cli_parser import constructor_arguments
from weakmedsam.errors import ConfigError
from weakmedsam.pam.affinity import AFFINITIES
from weakmedsam.run.request import EXPERIMENTS
from weakmedsam.run.stages import STAGES
from weakmedsam.system.atomic_io import write_whole
from weakmedsam.system.yaml_files import read_yaml

PAGE = Path("docs/configuration.md")
PAGES = {Path("docs/pam.md"): "model.pam", Path("docs/sce.md"): "model.sce"}
"""Pages with option tables -> the key whose class they are of."""
OPTIONS = re.compile(r"<!-- options: (\w+) -->\n.*?(?=<!-- end options -->)", re.DOTALL)
"""A table of such a page: of that class itself, of the data class of that name among its arguments, or of all
affinities."""

SEGMENT = "weakmedsam.segmentation.module."
MODEL = ("model", "model.local_encoder", "model.sce", "model.pam")
DOCUMENTED = ("weakmedsam", "data_modules")
LONG = 500
"""Characters from which on a mapping is counted, not shown: the file it stands in is named beside it."""

INTRODUCTION = """# Settings

Written by `make docs` from the code and the files in `experiments/`; a test holds it up to date. Each table is
what one class takes. Options on the command line are the keys joined by dots, without `init_args`:
`--model.pam.affinity.beta 2`, `--data.augment.rotation 5`. Before an option a stage's name keeps it to that stage:
`--segment.trainer.max_epochs 20`. The last column names the files that set another value than the code.

Stages, in order: {stages}.

"""


@dataclass(frozen=True)
class Named:
    """A class that some file of ``experiments/`` names.

    Attributes:
        key: where its options stand on the command line, e.g. ``model.pam``.
        path: its import path.
        values: file -> the values it sets, by argument.
    """

    key: str
    path: str
    values: dict[str, dict[str, Any]]


def find_named(folder: Path) -> list[Named]:
    """Every class of this project that a YAML under ``folder`` names, in the files' order.

    Raises:
        ConfigError: a file that is not valid YAML.
    """
    found: dict[tuple[str, str], Named] = {}
    paths: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        for key, path, values in _walk(read_yaml(file), ""):
            if path is None:  # a file on top of another one, which names the class
                for known in paths.get(key, []):
                    found[key, known].values[str(file)] = values
            elif path.startswith(DOCUMENTED):
                if path not in paths.setdefault(key, []):
                    paths[key].append(path)
                named = found.setdefault((key, path), Named(key, path, {}))
                named.values[str(file)] = values
    return list(found.values())


def _walk(content: Any, key: str) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """(key, class or None, values) of each place where a class is set up."""
    if isinstance(content, list):
        for item in content:
            yield from _walk(item, key)
    if not isinstance(content, dict):
        return
    if "class_path" in content or "init_args" in content:
        values = content.get("init_args") or {}
        yield key, content.get("class_path"), values
        content = values
    for name, value in content.items():
        yield from _walk(value, f"{key}.{name}" if key else name)


def type_words(annotation: Any) -> str:
    """A type in the words of a YAML file."""
    if isinstance(annotation, str):
        return annotation
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in inside)
    if annotation is type(None):
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(part) for part in inside))
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "any"}
    if annotation in names:
        return names[annotation]
    if origin in (list, tuple, dict):
        parts = [type_words(part) for part in inside if part is not Ellipsis]
        word = {list: "list of", tuple: "list:", dict: "mapping:"}[origin]
        return f"{word} {(', ' if origin is tuple else ' -> ').join(parts)}"
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return " \\| ".join(f"`{item.value}`" for item in annotation)
    return f"`{annotation.__name__}`" if inspect.isclass(annotation) else str(annotation)


def load(path: str) -> type:
    """A class by its import path.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"experiments/ names {path}, which is not there ({error})") from error


def arguments(kind: type) -> dict[str, str]:
    """Argument -> its words in the docstring of the class, or of a base that takes it too."""
    words: dict[str, str] = {}
    for cls in kind.__mro__:
        if cls.__module__.startswith(DOCUMENTED) and cls.__doc__:
            for entry in parse(cls.__doc__).params:
                words.setdefault(entry.arg_name, " ".join((entry.description or "").split()))
    return words


def table(named: Named) -> list[str]:
    """A class as a heading, its sentence and a row an argument; nested data classes get their own."""
    kind = load(named.path)
    lines = [f"### `{named.key}`: {named.path}", "", _sentence(kind), ""]
    rows, nested = _rows(kind, named.values)
    lines += [*rows, ""] if rows else ["Takes nothing.", ""]
    for name, inner in nested.items():
        lines += [f"`{named.key}.{name}`: {_sentence(inner)}", "", *_group(named, name, inner), ""]
    return lines


def _group(named: Named, name: str, kind: type) -> list[str]:
    """Rows of the table of an argument that is a data class."""
    values = {file: v[name] for file, v in named.values.items() if isinstance(v.get(name), dict)}
    return _rows(kind, values)[0]


def fill_options(page: Path, text: str, named: Named) -> str:
    """A page with its option tables written anew, each from the class that its marker names.

    Args:
        page: for messages.
        text: Markdown with ``<!-- options: Walk -->`` ... ``<!-- end options -->``.
        named: the page's class: a marker names it, for its arguments that are no data classes, or one of these.

    Raises:
        ConfigError: a marker of another class.
    """
    own, groups = _rows(load(named.path), named.values)
    plain = [row for row in own if not row.startswith(tuple(f"| `{name}` " for name in groups))]
    tables = {named.path.rpartition(".")[2]: plain, "affinities": affinity_table()}
    for name, kind in groups.items():
        rows = _group(named, name, kind)
        tables[kind.__name__] = [row.replace("| `", f"| `{name}.", 1) for row in rows]

    def fill(found: re.Match[str]) -> str:
        if found[1] not in tables:
            raise ConfigError(f"{page}: options: {found[1]} is none of {', '.join(tables)}")
        return "\n".join([f"<!-- options: {found[1]} -->", *tables[found[1]], ""])

    return OPTIONS.sub(fill, text)


def affinity_table() -> list[str]:
    """Rows of the table of affinities: a function's docstring is its row."""
    rows = [f"| `{name}` | {_sentence(kind.maps).replace(chr(96) * 2, chr(96))} |" for name, kind in AFFINITIES.items()]
    return ["| `affinity.kind` | what is compared |", "|---|---|", *rows, "| `none` | Nothing: no walk. |"]


def pages() -> dict[Path, str]:
    """All pages that are written from the code, wholly or their tables, as they should be."""
    named = {one.key: one for one in find_named(EXPERIMENTS)}
    tables = {path: fill_options(path, path.read_text(encoding="utf-8"), named[key]) for path, key in PAGES.items()}
    return {PAGE: page(), **tables}


def _sentence(kind: object) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def _rows(kind: type, values: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, type]]:
    """Rows of the table of a class's arguments, and those arguments that are data classes."""
    words = arguments(kind)
    rows, nested = [], {}
    for name, (hint, default) in constructor_arguments(kind).items():
        inner = [part for part in (hint, *typing.get_args(hint)) if is_dataclass(part)]
        if inner and isinstance(inner[0], type):
            nested[name] = inner[0]
        shown = "" if default is inspect.Parameter.empty else "see below" if name in nested else _value(default)
        elsewhere: dict[str, list[str]] = {}
        for file, held in values.items():
            if name in held and name not in nested and _value(held[name]) != shown and not _is_class(held[name]):
                elsewhere.setdefault(_value(held[name]), []).append(_short(file))
        others = "; ".join(f"{value} in {', '.join(files)}" for value, files in elsewhere.items())
        about = words.get(name, "").replace("|", "\\|").replace("``", "`")
        rows.append(f"| `{name}` | {type_words(hint)} | {shown} | {about} | {others} |")
    head = ["| key | type | default | meaning | set by |", "|---|---|---|---|---|"]
    return ([*head, *rows] if rows else []), nested


def _is_class(value: Any) -> bool:
    return isinstance(value, dict) and ("class_path" in value or "init_args" in value)


def _value(value: Any) -> str:
    """A value as YAML writes it; 1 and 1.0 are one number."""
    if value is None:
        return "`null`"
    if isinstance(value, bool | str):
        return f"`{str(value).lower() if isinstance(value, bool) else value}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, list | tuple):
        return "`[" + ", ".join(_value(part).strip("`") for part in value) + "]`"
    if isinstance(value, dict):
        written = "`{" + ", ".join(f"{key}: {_value(part).strip('`')}" for key, part in value.items()) + "}`"
        return written if len(written) < LONG else f"{len(value)} entries"
    return f"`{value}`"


def _short(file: str) -> str:
    return str(Path(file).relative_to(EXPERIMENTS).with_suffix(""))


def _values(folder: Path, key: str) -> dict[str, dict[str, Any]]:
    """What the files of ``experiments/`` set under a key of their own, by file."""
    contents = {str(path): read_yaml(path) for path in sorted(folder.rglob("*.yaml"))}
    return {file: content[key] for file, content in contents.items() if content and key in content}


def page(folder: Path = EXPERIMENTS) -> str:
    """The whole reference, Markdown."""
    stages = ", ".join(f"`{stage.name}` ({stage.title})" for stage in STAGES)
    lines = [INTRODUCTION.format(stages=stages)]
    always = {"throughput": Throughput, "preemption": Preemption}
    named = find_named(folder)
    named += [Named(key, f"{kind.__module__}.{kind.__name__}", _values(folder, key)) for key, kind in always.items()]
    groups: dict[str, Callable[[Named], bool]] = {
        "Classification, SCE and PAM": lambda n: n.key in MODEL and not n.path.startswith(SEGMENT),
        "Segmentation": lambda n: n.path.startswith(SEGMENT),
        "Backbones": lambda n: n.key == "model.backbone",
        "Data sets": lambda n: n.key == "data",
        "Strategies": lambda n: n.key == "trainer.strategy",
        "Loggers": lambda n: n.key == "trainer.logger",
        "Callbacks": lambda n: n.key in ("trainer.callbacks", *always),
    }
    for title, belongs in groups.items():
        lines.append(f"## {title}\n")
        lines += [line for item in named if belongs(item) for line in table(item)]
    return "\n".join(lines).rstrip() + "\n"


def main(words: list[str] | None = None) -> None:
    """Write the pages, or with ``--check`` see that they are up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m weakmedsam.settings_reference", description="Write the settings' page."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where it is out of date")
    check = parser.parse_args(words).check
    for path, text in pages().items():
        if not check:
            write_whole(path, text)
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} is out of date: make docs")


if __name__ == "__main__":
    main()
