"""Parsers of the stages' command line, and what they refuse before anything is built."""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, ClassVar, NoReturn, Union, cast, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader
from jsonargparse._optionals import get_omegaconf_loader
from lightning.pytorch.cli import LightningArgumentParser

from weakmedsam.errors import ConfigError, check_range
from weakmedsam.run.overrides import parse_options
from weakmedsam.system.library_errors import LONGEST

NUMBERS = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "gradient_clip_val": 0,
}
"""Of the trainer, the least of each: Lightning takes any, and divides or clips by it later."""


PRECISIONS = (None, "32-true", "32", 32, "bf16-mixed", "bf16", "16-mixed", "16", 16)
"""Weights stay in float32: what SCE and PAM compute beside the trainer's own steps is in float32, too."""

MODE = "omegaconf+"
"""YAML with interpolation, resolved after all files and options are merged."""

_load = get_omegaconf_loader(MODE)
# jsonargparse hands null on to a field of a nested data class as Python's None, which YAML takes for text.
set_loader(MODE, lambda text: None if text == "None" else _load(text), (yaml.YAMLError,))


def check_trainer(options: Any) -> None:
    """See that the trainer's settings are ones that it does not trip over late.

    Args:
        options: of a subcommand, parsed.

    Raises:
        ConfigError: one is; names its key.
    """
    for key in ("data", "trainer"):
        if not isinstance(options.get(key), Namespace):
            shown = "null" if options.get(key) is None else options.get(key)
            raise ConfigError(f"{key} is {shown}; it has to hold settings (key: value), as in experiments/")
    check_range("seed_everything", int(options.seed_everything), 0, 2**32 - 1)
    for key, low in NUMBERS.items():
        if options.trainer[key] is not None:
            check_range(f"trainer.{key}", options.trainer[key], low)
    if options.trainer.val_check_interval == 0:
        raise ConfigError("trainer.val_check_interval is 0; give a share of the epoch, (0, 1], or a number of batches")
    if options.trainer.precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision is {options.trainer.precision}; choose 32-true, bf16-mixed or 16-mixed")


def check_nulls(settings: Any, prefix: str = "") -> None:
    """See that null is given only where a setting can be null: jsonargparse takes it for every argument of a class.

    Args:
        settings: nested mappings and lists, a class as ``class_path`` and ``init_args``.
        prefix: of their keys.

    Raises:
        ConfigError: it is; names its key and the default.
    """
    if isinstance(settings, list):
        for value in settings:
            check_nulls(value, prefix)
    if not isinstance(settings, dict):
        return
    if given := settings.get("init_args"):
        _check_nulls_of(pkgutil.resolve_name(settings["class_path"]), given, prefix)
    for name, value in settings.items():
        check_nulls(value, prefix if name == "init_args" else f"{prefix}.{name}".lstrip("."))


def _check_nulls_of(kind: type, given: dict[str, Any], prefix: str) -> None:
    """``check_nulls`` of a class's arguments, and of those that are data classes."""
    known = constructor_arguments(kind)
    for name in [name for name in given if name in known]:
        value, (hint, default) = given[name], known[name]
        if value in (None, "None") and default is not inspect.Parameter.empty and not _takes_null(hint):
            raise ConfigError(f"{prefix}.{name} is null; give a value, or leave it out for {default!r}")
        if isinstance(value, dict) and is_dataclass(hint):
            _check_nulls_of(cast(type, hint), value, f"{prefix}.{name}")


def constructor_arguments(kind: type) -> dict[str, tuple[Any, Any]]:
    """Argument -> (type, default) of a class's constructor, with those of its base that ``**kwargs`` stand for."""
    found: dict[str, tuple[Any, Any]] = {}
    for cls in kind.__mro__:
        if "__init__" not in vars(cls):
            continue
        try:
            hints = get_type_hints(cls.__init__)  # type: ignore[misc]
        except NameError:  # of a class whose types are imported for type checkers only
            hints = {}
        _, *parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        for parameter in parameters:
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD or parameter.kind is parameter.KEYWORD_ONLY:
                found.setdefault(parameter.name, (hints.get(parameter.name, Any), parameter.default))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _takes_null(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(map(_takes_null, get_args(hint)))
    return hint in (Any, None, type(None))


def typed(words: Sequence[str]) -> dict[str, str]:
    """Options of a command line, by their names, with the last value of each."""
    first = next((number for number, word in enumerate(words) if word.startswith("--")), len(words))
    return {key: values[-1] for key, values in parse_options(list(words[first:])) if values}


def refuse(message: str, subcommand: str, words: Sequence[str]) -> NoReturn:
    """A wrong option is one message, not three pages of usage; leaves with status 2.

    Args:
        message: jsonargparse's.
        subcommand: whose ``--help`` is named.
        words: of the command line.
    """
    named = re.search(r'Parser key "([^"]+)"', message)
    options = [key for key in typed(words) if named and key.endswith(f".{named[1]}")]
    if named and options:  # jsonargparse names the end of a key only
        message = message.replace(named[0], f"--{options[-1]}")
    message = "\n".join(line if len(line) <= LONGEST else f"{line[:LONGEST]} ..." for line in message.splitlines())
    sys.stderr.write(f"\nweakmedsam: {message}\n(all options: python -m weakmedsam {subcommand} --help)\n")
    raise SystemExit(2)


class Parser(LightningArgumentParser):
    """Of the stages.

    Attributes:
        words: of the command line, behind the program's name. Of the class: jsonargparse makes further parsers of it,
            for the arguments of classes.
    """

    words: ClassVar[Sequence[str]] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See ``refuse``."""
        known = ("fit", "validate", "test", "predict")
        refuse(message, next((word for word in self.words[:1] if word in known), "fit"), self.words)


class PrepareParser(ArgumentParser):
    """Of ``prepare`` and ``check``; see ``Parser``."""

    words: ClassVar[Sequence[str]] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See ``refuse``."""
        refuse(message, next(iter(self.words), "prepare"), self.words)
