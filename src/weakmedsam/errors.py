"""Errors whose message is meant for the user, and the checks of a setting's range and of its choices."""

from __future__ import annotations

import math

LESS_MEMORY = (
    "memory may be short. Less is needed with smaller --data.batch_size, --data.num_workers, --data.prepare.workers "
    "and --data.image_size; the same command continues"
)
"""What to do where a process was ended from outside or memory could not be had."""


DIVERGED = 3
"""Exit status of a training that has diverged: the same command would come to the same end."""


LARGEST_WEIGHT = 1_000_000
"""Of a loss's weight, of the learning rate and of weight decay: float32 can take its square."""


class WeakMedSAMError(Exception):
    """An error whose message is meant for the user: what is wrong, where, and the mend.

    The command line prints it without a traceback.
    """


class DataError(WeakMedSAMError):
    """Something is wrong with the user's data; the message names the file."""


class ConfigError(WeakMedSAMError):
    """Something is wrong with the settings; the message names the key."""


class CheckpointError(WeakMedSAMError):
    """A checkpoint is missing, damaged or of another model; the message names both."""


class DiskError(WeakMedSAMError):
    """A file could not be written because its disk is full, or not be read; the message names it and the mend."""


class MemoryShortError(WeakMedSAMError):
    """Memory ran short, or the system ended a process for it; the message names the settings that lower the need."""


class DivergenceError(WeakMedSAMError):
    """A training came to a loss or to weights that are no numbers; the message says where and what to lower."""


def check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    """Check that a setting is one of the known words.

    Raises:
        ConfigError: it is not; names the key and the choices.
    """
    if value not in known:
        raise ConfigError(f"{key}: {value!r} is unknown; choose one of {', '.join(known)}")


def check_range(
    key: str,
    value: float | None,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """See that a setting is a finite number within its range.

    Args:
        key: as it is typed on the command line.
        value: what was given; None is no number.
        low: the least that is allowed.
        high: the most that is allowed: a bound that no sensible setting reaches where memory or time grows with it.
        above: ``low`` itself is not allowed.
        below: ``high`` itself is not allowed.

    Raises:
        ConfigError: it is not; names the key and the range.
    """
    fits = value is not None and math.isfinite(value) and low <= value <= high
    if fits and not (above and value == low) and not (below and value == high):
        return
    shown = "null" if value is None else value
    if math.isfinite(low) and math.isfinite(high):
        range_ = f"in {'(' if above else '['}{low:,}, {high:,}{')' if below else ']'}"
    elif math.isfinite(low):
        range_ = f"above {low:,}" if above else f"{low:,} or more"
    elif math.isfinite(high):
        range_ = f"below {high:,}" if below else f"at most {high:,}"
    else:
        range_ = "a finite number"
    raise ConfigError(f"{key} is {shown}; it must be {range_}")
