"""What a run's folder says of itself, read in one place: JSON objects, YAML mappings, and what is wrong with them.

A leaf, without torch: the pipeline, the report and the sweeps read by it. A damaged file is one ``DataError`` that
names the file and the mend; who can go on without the file catches it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weakmedsam.errors import ConfigError, DataError, DiskError
from weakmedsam.system.atomic_io import put_away, write_whole
from weakmedsam.system.commands import command
from weakmedsam.system.yaml_files import parse_yaml

SEAL = "seal"
"""Key of the checksum that a note carries of the rest of itself."""

REMOVE_STATE = f"Remove it, and `{command('train')}` looks at its stage anew"


def read_text(path: Path) -> str:
    """A file as text; empty where there is none.

    Raises:
        DataError: it is no text.
        DiskError: the disk does not give it; what may be whole is not taken for damaged.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except IsADirectoryError as error:
        raise DataError(f"{path}: a folder lies in its place. {REMOVE_STATE}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as text ({error}). {REMOVE_STATE}") from error
    except OSError as error:
        raise DiskError(
            f"{path} cannot be read ({error.strerror}). Give access to it, or see to its disk; the same command "
            "continues"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, without its seal; empty where there is no file.

    Raises:
        DataError: it is no JSON, another kind of value, or not what was written (see ``write_object``).
    """
    text = read_text(path)
    if not text and not path.exists():
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error}). {REMOVE_STATE}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: should hold one JSON object, holds a {type(found).__name__}. {REMOVE_STATE}")
    if SEAL in found and found.pop(SEAL) != _seal(found):
        raise DataError(f"{path}: is not what was written into it. {REMOVE_STATE}")
    return found


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal, whole or not at all; a folder in its place is moved aside."""
    if path.is_dir():
        put_away(path)
    write_whole(path, json.dumps(seal(content), indent=2) + "\n")


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as it will be read, with a checksum by which ``read_object`` knows it."""
    plain = json.loads(json.dumps(content))
    return {**plain, SEAL: _seal(plain)}


def _seal(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def parse_mapping(path: Path, text: str) -> dict[str, Any]:
    """A YAML mapping; empty where it is of another kind.

    Args:
        path: for the message.
        text: what it holds.

    Raises:
        DataError: it is no YAML.
    """
    try:
        found = parse_yaml(text, str(path)) if text else None
    except ConfigError as error:
        raise DataError(f"{error}. {REMOVE_STATE}") from error
    return found if isinstance(found, dict) else {}
