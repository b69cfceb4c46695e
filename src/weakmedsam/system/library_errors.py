"""One place that turns what libraries and the system refuse into a message for the user. Without torch.

A fault of our own keeps its traceback. What tells the two apart is where an error was raised: a library that
refuses a setting does so before the first step, with no function of ours between it and the command line.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weakmedsam.errors import LESS_MEMORY, ConfigError, DiskError, MemoryShortError, WeakMedSAMError
from weakmedsam.system.atomic_io import says_full

OWN = ("weakmedsam", "data_modules")
ENTRIES = ("weakmedsam.cli", "weakmedsam.__main__", "weakmedsam.run.cli_errors")
"""Of ours, but only the way in."""

PATH_ERRORS = (
    *(errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.EISDIR),
)
"""What the system says of a path that cannot be what a setting wants it to be."""

SHORT = (
    *("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory"),
    *("status_alloc_failed", "calculation overflowed with sizes", "integer multiplication overflow"),
)
LOST_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+)|exited unexpectedly)"
)

MENDS = {
    "trainer.accelerator": "take cpu, or auto, which takes a GPU where there is one",
    "trainer.devices": "give a number from 1 on, auto, or a list of GPUs such as [0, 1]",
    "trainer.num_nodes": "give the number of machines, from 1 on",
    "trainer.strategy": "take auto, ddp, or a file of experiments/trainer (TRAINER=...)",
    "trainer.precision": "take 32-true or bf16-mixed",
    "trainer.max_epochs": "give a number from 1 on",
    "trainer.val_check_interval": "give a share of the epoch, (0, 1], or no more batches than it has",
    "seed_everything": "give a number from 0 to 4,294,967,295",
}
"""By setting; where there is none, the library's own words have to do."""

LONGEST = 400
"""Characters of a library's message that are shown."""


def explain(error: BaseException, settings: Mapping[str, Any]) -> WeakMedSAMError | None:
    """What an error means for the user; None where it is a fault of ours.

    Args:
        error: what was raised.
        settings: option -> value as far as they are known, for naming the one that is meant.
    """
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, WeakMedSAMError):
            return _without_worker(link)
    if says_full(error):  # of a file that is not ours: a logger's, a temporary one
        place = _place(error, settings)
        return DiskError(f"{place}the disk is full ({_first_line(error)}); free space, and the same command continues")
    for link in chain:
        if (found := LOST_WORKER.search(str(link))) is not None:
            how = f"was ended by {found[2]}" if found[2] else "ended unexpectedly"
            return MemoryShortError(f"a process that reads slices (process {found[1]}) {how}: {LESS_MEMORY}")
        if is_short_of_memory(link):
            return MemoryShortError(f"there is too little memory ({_first_line(link)}): {LESS_MEMORY}")
    return _of_place(error, settings) or _refused(error, settings)


def is_short_of_memory(error: BaseException) -> bool:
    """Whether it says that memory could not be had, on the processor or on a GPU."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORT)


def flat_settings(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their options: ``{"model": {"init_args": {"a": 1}}}`` -> ``{"model.a": 1}``."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        key = prefix if name == "init_args" else f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            found |= flat_settings(value, key)
        else:
            found[key] = value
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from: jsonargparse wraps what a constructor raises, a loader what its worker raised.

    What was being handled when a fault of ours came up is no cause of it.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        wrapped = _module(error).split(".")[0] in _LIBRARIES and not error.__suppress_context__
        error = error.__cause__ or (error.__context__ if wrapped else None)


def _without_worker(error: WeakMedSAMError) -> WeakMedSAMError:
    """As it was raised: torch hands on what a worker raised with the worker's traceback as its text."""
    text = str(error)
    if not (text.startswith("Caught ") and "Original Traceback" in text):
        return error
    return type(error)(text.rpartition(f"{type(error).__name__}: ")[2].strip())


def _of_place(error: BaseException, settings: Mapping[str, Any]) -> ConfigError | None:
    """Of a file or folder that cannot be what a setting wants it to be."""
    if not isinstance(error, OSError) or error.errno not in PATH_ERRORS or error.filename is None:
        return None
    path = os.fsdecode(error.filename)
    return ConfigError(
        f"{_place(error, settings)}{path} cannot be used ({error.strerror}); name a place where files can be written"
    )


def _place(error: BaseException, settings: Mapping[str, Any]) -> str:
    """The setting in whose folder a file is that the system names, as the beginning of a message; empty if none."""
    if getattr(error, "filename", None) is None:
        return ""
    path = Path(os.fsdecode(error.filename)).resolve()  # type: ignore[attr-defined]
    texts = {key: str(value) for key, value in settings.items() if isinstance(value, (str, os.PathLike))}
    places = {key: Path(text).resolve() for key, text in texts.items() if text}
    above = [key for key, at in places.items() if path.is_relative_to(at) or _is_written_to(path, at)]
    key = max(above, key=lambda name: (len(places[name].parts), "logger" not in name), default=None)
    return f"{key} is {texts[key]}, but " if key else ""


def _is_written_to(part: Path, path: Path) -> bool:
    """Whether a file is the temporary one of another: see ``atomic_io.replacing``."""
    return part.parent == path.parent and part.name.startswith(f".{path.name}.")


def _refused(error: BaseException, settings: Mapping[str, Any]) -> ConfigError | None:
    """Of a setting that a library does not take."""
    if not isinstance(error, Exception):
        return None
    link: BaseException = error
    while _module(link).startswith("jsonargparse") and (deeper := link.__cause__ or link.__context__) is not None:
        link = deeper
    library: str | None = next((name for word, name in _LIBRARIES.items() if _module(link).startswith(word)), None)
    library = "OmegaConf" if type(link).__module__.startswith("omegaconf") else library
    said = _first_line(link)
    named = _named(said, settings)
    # Our functions ask the trainer, too; what it then says of a setting of its own is still its refusal.
    asked = library == "Lightning" and (named or "").startswith("trainer.")
    if library is None or _has_begun(link) or (_is_ours(link) and not asked):
        return None
    if isinstance(link, RecursionError):
        return ConfigError("a setting is nested too deeply, or refers to itself; look at the options and at --config")
    if library == "OmegaConf":
        path = re.sub(r"^(fit|validate|test|predict)\.", "", getattr(link, "full_key", None) or "")
        holder = path.replace("init_args.", "") or _holder(settings)
        return ConfigError(
            f"{holder or 'a setting'}: its ${{...}} cannot be resolved ({said}); refer to a key that there is, such as "
            "${data.init_args.image_size}, or write \\${ for a plain ${"
        )
    key = named or _of_value(said, settings)
    if key is None:
        return ConfigError(f"{library} does not take these settings ({type(link).__name__}: {said})")
    mend = f"; {MENDS[name]}" if (name := key.removeprefix("--")) in MENDS else ""
    return ConfigError(f"{key} is {settings[key]!r}, which {library} does not take ({said}){mend}")


_LIBRARIES = {
    "lightning": "Lightning",
    "torch": "PyTorch",
    "monai": "MONAI",
    "omegaconf": "OmegaConf",
    "jsonargparse": "jsonargparse",
    "yaml": "PyYAML",
}


def _is_ours(error: BaseException) -> bool:
    """Whether a function of ours is on the way to where an error was raised."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.split(".")[0] in OWN and module not in ENTRIES for module in modules)


def _has_begun(error: BaseException) -> bool:
    """Whether a first step has been made when an error was raised."""
    ways = ((f.f_globals.get("__name__", ""), f.f_code.co_name) for f, _ in traceback.walk_tb(error.__traceback__))
    return any(module.startswith("lightning.pytorch.loops") and name == "advance" for module, name in ways)


def _module(error: BaseException) -> str:
    """Where an error was raised; of one without a traceback, where its kind comes from."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    known = [name for name in reversed(modules) if name.split(".")[0] in _LIBRARIES or name.split(".")[0] in OWN]
    return known[0] if known else type(error).__module__


def _named(said: str, settings: Mapping[str, Any]) -> str | None:
    """The setting whose name comes first in a library's message; the trainer's before others, which may be words."""
    found = {key: re.search(rf"(?<![\w.]){re.escape(key.rpartition('.')[2])}(?!\w)", said) for key in settings}
    places = [(not key.startswith("trainer."), match.start(), key) for key, match in found.items() if match]
    return min(places)[2] if places else None


def _of_value(said: str, settings: Mapping[str, Any]) -> str | None:
    """The setting whose value stands in a library's message."""
    texts = {key: str(value) for key, value in settings.items() if type(value) in (str, int)}
    fit = [key for key, text in texts.items() if len(text) > 1 and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said)]
    return min(fit, key=lambda key: not key.startswith("trainer."), default=None)


def _holder(settings: Mapping[str, Any]) -> str | None:
    """The option whose value refers to others."""
    return next((key for key, value in settings.items() if isinstance(value, str) and "${" in value), None)


def _first_line(error: BaseException) -> str:
    """What an error says, short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
