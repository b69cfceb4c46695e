"""Files of pseudo-labels: one safetensors file a volume, with what it was made of."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from weakmedsam.contracts import PseudoLabelKeys
from weakmedsam.errors import DataError
from weakmedsam.pam.thresholding import PseudoLabel
from weakmedsam.system.atomic_io import replacing
from weakmedsam.system.commands import command

TENSORS = (
    PseudoLabelKeys.label,
    PseudoLabelKeys.confidence,
    PseudoLabelKeys.quality,
    PseudoLabelKeys.stability,
    PseudoLabelKeys.histogram,
)


class Origin(NamedTuple):
    """What a pseudo-label file says that it is.

    Attributes:
        case: whose slices it is of.
        settings: that made it; which network, too.
        volume: hash of the slices and labels that it was made of.
    """

    case: str
    settings: dict[str, Any]
    volume: str = ""


def write_pseudo_label(path: Path, labels: PseudoLabel, origin: Origin) -> None:
    """Write one volume's file, whole or not at all (``PseudoLabelKeys`` states its tensors)."""
    label = labels.label.cpu().numpy()
    confidence = (labels.confidence * 255).round().to(torch.uint8).cpu().numpy()
    histogram = [np.bincount(confidence[label == c + 1], minlength=256) for c in range(labels.quality.shape[1])]
    tensors: dict[str, NDArray[Any]] = {
        PseudoLabelKeys.label: label,
        PseudoLabelKeys.confidence: confidence,
        PseudoLabelKeys.quality: labels.quality.cpu().numpy().astype(np.float32),
        PseudoLabelKeys.stability: labels.stability.cpu().numpy().astype(np.float32),
        PseudoLabelKeys.histogram: np.stack(histogram).astype(np.int64),
    }
    # One entry: safetensors writes several in an order that differs from process to process.
    about = json.dumps({**origin._asdict(), "content": _checksum(tensors)}, sort_keys=True)
    with replacing(path) as part:
        save_file(tensors, part, {PseudoLabelKeys.about: about})


def read_origin(path: Path) -> Origin:
    """What a pseudo-label file was made of; its tensors are compared with their checksum.

    Raises:
        DataError: the file is not a pseudo-label file of this version, or is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = dict(json.loads(file.metadata()[PseudoLabelKeys.about]))
            found = _checksum({key: file.get_tensor(key) for key in TENSORS})
        if about.pop("content") != found:
            raise ValueError("its content is not what was written")
        return Origin(**about)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged, or not a pseudo-label file of this version ({error}): remove it, and "
            f"make the pseudo-labels again ({command('train')} does by itself)"
        ) from error


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> int:
    found = 0
    for key in TENSORS:
        found = zlib.crc32(tensors[key].tobytes(), found)
    return found


def read_quality(path: Path, key: str = PseudoLabelKeys.quality) -> NDArray[np.float32]:
    """(D, C) quality, or stability, of a file's slices, NaN where a class is absent.

    Raises:
        DataError: the file is not a pseudo-label file, or has no such part.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return np.asarray(file.get_tensor(key), np.float32)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} is not a pseudo-label file ({error}): delete it and make the pseudo-labels again"
        ) from error
