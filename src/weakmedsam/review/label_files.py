"""Files of a review: the pseudo-labels of a run, and the corrected ones beside them. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data_modules.pseudo_labels import CERTAIN
from weakmedsam.contracts import SOMEWHERE, CorrectionKeys, PseudoLabelKeys
from weakmedsam.errors import DataError
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


def unsure_slices(path: Path, labels: NDArray[np.float32]) -> NDArray[np.float64]:
    """How unsure a pseudo-label is, slice by slice: 1 - the mean confidence of the pixels of its classes.

    Slices of the phantom: correlation with Dice 0.71 (Spearman, 206 slices and classes), of ``quality`` -0.07.

    Args:
        path: of the file.
        labels: (D, C) image-level labels, ``SOMEWHERE`` where only the scan's is known.

    Returns:
        (D,) in [0, 1]: 1 where a class that is there has no pixel; NaN in slices without a class.

    Raises:
        DataError: the file is damaged.
    """
    found = np.full(len(labels), np.nan)
    try:
        with safe_open(path, framework="numpy") as file:
            ids, confidences = (file.get_slice(key) for key in (PseudoLabelKeys.label, PseudoLabelKeys.confidence))
            for z in np.flatnonzero(labels.any(axis=1)).tolist():
                pixels, confidence = ids[z], confidences[z]
                parts = [(c, confidence[pixels == 1 + c]) for c in np.flatnonzero(labels[z])]
                sure = [
                    float(part.mean()) if part.size else 0.0
                    for c, part in parts
                    if part.size or labels[z, c] != SOMEWHERE
                ]
                found[z] = 1 - min(sure) / CERTAIN if sure else np.nan
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged ({error}): {command('train')} makes it anew") from error
    return found


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
