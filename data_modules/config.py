"""Settings of a data module: one frozen dataclass per concept, each with its range and its check.

YAML nests in the same way: ``data: {slices: {plane: coronal}, split: {seed: 1}}``. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_modules.cases import Intensity
from data_modules.volumes import Plane, check_plane
from weakmedsam.errors import ConfigError, check_range

Supervision = Literal["image", "pseudo", "expert"]
Scored = Literal["test", "val"]
OnBadCase = Literal["raise", "skip"]


@dataclass(frozen=True)
class Slices:
    """Which slices are taken of a volume, what counts as present in one, how intensities become [0, 1].

    Attributes:
        plane: axial, coronal or sagittal.
        min_pixels: a class counts as present in a slice if its mask has at least so many pixels of it on the scan's own
            slice, 1 to 2,147,483,648. Fewer than about ten are the blurred end of an organ, which a reader does not
            name, and less than three pixels once 512 are resized to 256. A label table wins over it.
        window: (level, width) in the file's units, HU for CT; null takes the data set's rule.
        percentiles: (lower, upper) in percent of the voxels above the volume's minimum; null takes the data set's rule.
            Only one of window and percentiles can be given.
    """

    plane: Plane = "axial"
    min_pixels: int = 10
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_plane(self.plane)
        check_range("data.slices.min_pixels", self.min_pixels, 1, 2**31)
        if self.window is not None and self.percentiles is not None:
            raise ConfigError("data.slices.window and data.slices.percentiles are both given; set one of them to null.")
        self.intensity(Intensity())

    def intensity(self, default: Intensity) -> Intensity:
        """The rule of these settings, or the data set's where they give none."""
        if self.window is not None:
            return Intensity(window=(self.window[0], self.window[1]))
        if self.percentiles is not None:
            return Intensity(percentiles=(self.percentiles[0], self.percentiles[1]))
        return default


@dataclass(frozen=True)
class Split:
    """Which patients train, validate and test.

    Attributes:
        file: CSV (case, split) with split train, val or test; null takes the published split, if there is one and all
            its cases are there, else a seeded hash of the patient.
        fractions: of patients in train, val and test, for the hash; they sum to 1.
        seed: of the hash, 0 to 4,294,967,295.
        scored: whose volumes ``weakmedsam test`` scores: ``test``; or ``val``, to choose settings by.
    """

    file: str | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0
    scored: Scored = "test"

    def __post_init__(self) -> None:
        _check_fractions(self.fractions)
        check_range("data.split.seed", self.seed, 0, 2**32 - 1)


@dataclass(frozen=True)
class Labels:
    """What training slices are labelled with, and which slices train.

    Attributes:
        supervision: what a training batch holds beside the image-level label: ``image``, nothing; ``pseudo``,
            ``target`` and ``confidence`` from ``pseudo_labels_dir``; ``expert``, the EXPERT MASK as ``target``: no
            longer weak supervision, for the fully supervised upper bound only.
        pseudo_labels_dir: folder of pseudo-label files, ``<case>.safetensors``.
        only_positive: train only on slices in which some class is present.
        corrected_dir: folder of pseudo-labels that a person has corrected (``weakmedsam review``), of some cases or
            none: slices that are trusted are taken from there, those that are left out train nothing; null: there are
            none. `make train` sets it by itself.
        trim_unsure: pseudo-labels of scans that PAM is unsure of lose their least confident pixels where they are
            larger than those of other scans (``label_sizes.py``); published: no.
    """

    supervision: Supervision = "image"
    pseudo_labels_dir: str | None = None
    only_positive: bool = False
    corrected_dir: str | None = None
    trim_unsure: bool = True

    def __post_init__(self) -> None:
        if self.supervision == "pseudo" and self.pseudo_labels_dir is None:
            raise ConfigError(
                "data.labels.supervision: pseudo needs data.labels.pseudo_labels_dir, the folder of pseudo-label files."
            )


@dataclass(frozen=True)
class Preparation:
    """How volumes become a slice store, and where it lies; nothing of it changes a result.

    Attributes:
        store_dir: folder of the stores, one per data set and settings.
        workers: processes that prepare volumes, 1 to 256; null takes one per processor.
        on_bad_case: ``raise`` ends with one error that lists all bad cases; ``skip`` leaves them out and lists them in
            the log and in the store's ``skipped.csv``.
    """

    store_dir: str = "data"
    workers: int | None = None
    on_bad_case: OnBadCase = "raise"

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_range("data.prepare.workers", self.workers, 1, 256)


def _check_fractions(fractions: Sequence[float]) -> None:
    """See that parts for train, val and test are given.

    Raises:
        ConfigError: they are not three, one is negative or no number, or they do not sum to 1.
    """
    # Written so that NaN fits nothing.
    if len(fractions) != 3 or not all(part >= 0 for part in fractions) or not abs(sum(fractions) - 1) <= 1e-6:
        raise ConfigError(f"data.split.fractions: {fractions} are not three parts (train, val, test) that sum to 1.")
