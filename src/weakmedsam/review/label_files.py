"""Files of a review: the pseudo-labels of a run, and the corrected ones beside them. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from weakmedsam.contracts import CorrectionKeys, PseudoLabelKeys
from weakmedsam.errors import DataError
from weakmedsam.pam.pseudo_label_io import read_quality
from weakmedsam.review.correction import Corrected
from weakmedsam.system.atomic_io import replacing
from weakmedsam.system.commands import command


class Source(NamedTuple):
    """What a corrected pseudo-label was made from.

    Attributes:
        case: whose.
        original: checksum of the original.
        reviewed: of its clicks and decisions, ``Reviewed.digest``.
        network: which answered the clicks, ``stage_state.result_name``.
    """

    case: str
    original: int
    reviewed: str | None
    network: str | None


class Original(NamedTuple):
    """A pseudo-label as PAM has made it.

    Attributes:
        label: (D, S, S) uint8 class ids.
        content: its file's checksum.
        volume: hash of the slices and labels that it was made of.
    """

    label: NDArray[np.uint8]
    content: int
    volume: str


def read_original(path: Path) -> Original:
    """A pseudo-label file.

    Raises:
        DataError: it is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = _about(file)
            return Original(file.get_tensor(PseudoLabelKeys.label), int(about["content"]), str(about["volume"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): {command('train')} makes it anew") from error


def unsure_slices(path: Path) -> NDArray[np.float32]:
    """(D,) 1 - the quality of a pseudo-label's worst class, slice by slice; NaN in slices without a class.

    Raises:
        DataError: the file is damaged.
    """
    quality = read_quality(path)
    worst = np.where(np.isnan(quality), np.inf, quality).min(axis=1)
    return np.where(np.isinf(worst), np.nan, 1 - worst).astype(np.float32)


def write_corrected(path: Path, corrected: Corrected, source: Source) -> None:
    """Write a corrected pseudo-label, whole or not at all."""
    tensors: dict[str, NDArray[Any]] = {CorrectionKeys.label: corrected.label, CorrectionKeys.state: corrected.state}
    with replacing(path) as part:
        save_file(tensors, part, {CorrectionKeys.about: json.dumps(source._asdict(), sort_keys=True)})


def read_source(path: Path) -> Source | None:
    """What a corrected pseudo-label was made from; None where there is none, or a damaged one."""
    try:
        with safe_open(path, framework="numpy") as file:
            return Source(**_about(file))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _about(file: Any) -> dict[str, Any]:
    return dict(json.loads(file.metadata()[PseudoLabelKeys.about]))
