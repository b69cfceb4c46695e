"""Reads pseudo-labels slice by slice, with what a person has corrected, accepted or rejected of them."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from data_modules.label_sizes import LabelSize, trim_label
from data_modules.store_index import Entry
from weakmedsam.contracts import IGNORE, CorrectionKeys, PseudoLabelKeys, SliceState
from weakmedsam.errors import DataError
from weakmedsam.system.commands import command

CERTAIN = 255
"""Confidence of 1 as it stands in a pseudo-label file."""


class SliceTarget(NamedTuple):
    """What a slice is trained on.

    Attributes:
        label: (S, S) uint8 class ids.
        confidence: (S, S) uint8, ``CERTAIN`` = 1.
        quality: of the slice's worst class, 1 where it has none.
        trusted: whether a person has corrected or accepted it.
    """

    label: NDArray[np.uint8]
    confidence: NDArray[np.uint8]
    quality: float
    trusted: bool


class PseudoLabelReader:
    """Reads single slices of pseudo-label files, ``<folder>/<case>.safetensors``.

    A slice that a person has corrected or accepted is certain; of one that is left out, nothing is learnt. One that was
    changed only because its neighbour was corrected counts where it was made from these very pseudo-labels: those of a
    later round are newer. What nobody has looked at is trimmed to ``least``.

    Args:
        folder: where the files are.
        corrected: folder of corrected ones, see ``CorrectionKeys``; None: there are none.
        least: by case, of ``least_confidences``; a case that is not there is not trimmed.
        max_open: how many files are kept open.
    """

    def __init__(
        self,
        folder: Path,
        corrected: Path | None = None,
        least: Mapping[str, NDArray[np.uint8]] | None = None,
        max_open: int = 256,
    ) -> None:
        self.folder = folder
        self.corrected = corrected
        self.least = dict(least or {})
        self.max_open = max_open
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def check(self, entries: Sequence[Entry]) -> None:
        """Raise DataError if a file is missing, unreadable, of another case or of another working frame."""
        missing = [entry.name for entry in entries if not (self.folder / f"{entry.name}.safetensors").exists()]
        if missing:
            raise DataError(
                f"{self.folder}: {len(missing)} of {len(entries)} cases have no pseudo-label: {missing[:5]}. "
                "Run the pseudo-label stage first, or correct pseudo_labels_dir."
            )
        for entry in entries:
            self._check(self._path(entry.name), entry)
            path = self._correction(entry.name)
            if path is not None:
                self._check(path, entry)

    def size(self, case: str) -> LabelSize:
        """What the pseudo-label of a volume says of its classes' sizes."""
        file = self._file(self._path(case))
        slices = np.isfinite(file.get_tensor(PseudoLabelKeys.quality)).sum(axis=0)
        return LabelSize(file.get_tensor(PseudoLabelKeys.histogram), slices)

    def _check(self, path: Path, entry: Entry) -> None:
        corrected = path.parent == self.corrected
        mend = (
            "weakmedsam review --replay makes it anew" if corrected else f"{command('train')} makes it anew by itself"
        )
        case = self._about(path).get("case", entry.name)
        if case != entry.name:
            raise DataError(f"{path}: is of case {case}. Remove it: {mend}.")
        file = self._file(path)
        needed = {
            PseudoLabelKeys.label,
            PseudoLabelKeys.confidence,
            PseudoLabelKeys.quality,
            PseudoLabelKeys.histogram,
        }
        if not (CorrectionKeys.needed if corrected else needed) <= set(file.keys()):
            raise DataError(f"{path}: is no pseudo-label. Delete it: {mend}.")
        shape = tuple(file.get_slice(PseudoLabelKeys.label).get_shape())
        wanted = (entry.depth, entry.frame.size, entry.frame.size)
        if shape != wanted:
            raise DataError(
                f"{path}: is {shape}, the slices are {wanted}. "
                f"It was made with another image_size or other data. Remove it: {mend}."
            )

    def read(self, case: str, number: int) -> SliceTarget:
        """What a slice is trained on; reads this slice only."""
        file = self._file(self._path(case))
        label = file.get_slice(PseudoLabelKeys.label)[number]
        confidence = file.get_slice(PseudoLabelKeys.confidence)[number]
        quality = _worst(file.get_slice(PseudoLabelKeys.quality)[number])
        path = self._correction(case)
        if path is not None:
            held = self._file(path)
            state = int(held.get_slice(CorrectionKeys.state)[number])
            corrected = held.get_slice(CorrectionKeys.label)[number]
            if state == SliceState.left_out:
                return SliceTarget(np.full_like(label, IGNORE), np.zeros_like(confidence), quality, False)
            if state == SliceState.trusted:
                return SliceTarget(corrected, np.full_like(confidence, CERTAIN), 1.0, True)
            if state == SliceState.changed and self._is_of_these(path, case):
                return SliceTarget(corrected, confidence, quality, False)
        if case in self.least:
            label, confidence = trim_label(label, confidence, self.least[case])
        return SliceTarget(label, confidence, quality, False)

    def _is_of_these(self, path: Path, case: str) -> bool:
        """Whether a corrected file was made from the pseudo-label that is read."""
        return bool(self._about(path).get("original") == self._about(self._path(case)).get("content"))

    def _path(self, case: str) -> Path:
        return self.folder / f"{case}.safetensors"

    def _correction(self, case: str) -> Path | None:
        path = None if self.corrected is None else self.corrected / f"{case}.safetensors"
        return path if path is not None and (path in self._open or path.exists()) else None

    def _about(self, path: Path) -> dict[str, Any]:
        """What a file says of itself; a case "unknown" where that is damaged."""
        about = (self._file(path).metadata() or {}).get(PseudoLabelKeys.about)
        try:
            found = {} if about is None else json.loads(about)
            return found if about is None or isinstance(found["case"], str) else {"case": "unknown"}
        except (KeyError, TypeError, ValueError):
            return {"case": "unknown"}

    def _file(self, path: Path) -> Any:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path}: cannot be read ({error}). Delete it and make it again.") from error
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)
        return self._open[path]


def _worst(classes: NDArray[np.float32]) -> float:
    """Quality of a slice: of its worst class, 1 where it has none."""
    present = classes[~np.isnan(classes)]
    return float(present.min()) if len(present) else 1.0
