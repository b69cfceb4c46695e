"""The settings of PAM: all that decides a pseudo-label but the network."""

from __future__ import annotations

from dataclasses import dataclass

from weakmedsam.affinity import AFFINITIES, PROMPTED
from weakmedsam.contracts import ConfigError
from weakmedsam.prompts import PLACES
from weakmedsam.volume_walk import WALKS
from weakmedsam.voting import NORMALISATIONS, VOTES

COMPETITIONS = ("none", "share")
THRESHOLD_RULES = ("fixed", "otsu")


@dataclass(frozen=True)
class Refinement:
    """The numbers of PAM; docs/pam.md has formulas and sources. Without a word: as in the paper.

    Attributes:
        grid: points a side, 1 or more; the paper uses 4.
        affinity: what two pixels are compared by: ``per_prompt`` each prompt's mask (not in the paper),
            ``with_intensity`` by these and the image's grey values (not in the paper),
            ``summed_masks`` their mean, ``summed`` the summed logits as published, ``intensity`` the
            image's grey values (no prompt is asked), ``none`` (no walk).
        intensity_share: weight of the grey values in ``with_intensity``, that of all masks together being
            the rest, in [0, 1].
        radius: of the neighbourhood, cells of the map, above 1 and at most ``map_size``; the paper uses 5.
        beta: exponent of the affinity, 0 or more; the paper uses 4.
        contrast: scale of differences before the exponent, 0 or more; published: 1, on summed logits.
        steps: of the random walk, 0 or more; the paper uses 4. None: to the steady state, which needs
            ``restart``.
        map_size: side of the map that is walked on, cells; the paper uses 64.
        threshold: score above which a pixel belongs to a class, in (0, 1); the paper uses 0.5.
        sigma: of the smoothing before the threshold, pixels of the frame; 0 = none.
        rescale: scale each slice's map to [0, 1] before the walk and after each step (at the end for ``steps``
            None), as published. Without it a slice's map keeps its height, which of a probability means
            something; but ``erasing`` and votes scale to a maximum of 1 all the same.
        restart: probability of going back to the start at each step, in [0, 1); published: 0.
        prompts: where prompts are: ``grid``; ``content``, grid points on the scan and not in the dark;
            ``peaks`` of the activation of each present class. The latter two are not in the paper.
        content_share: of the slice's brightest grid cell that a cell of ``content`` must reach, in [0, 1].
        peaks: of each class, at most so many, 1 or more.
        min_quality: masks whose predicted IoU is lower count nowhere, in [0, 1]; 0 = all count.
        weigh_by_quality: masks count by their predicted IoU.
        walk: ``slice``, or ``volume`` with neighbours in adjacent slices where whole volumes are there
            (pseudo-labels and test; validation has slices and walks on each).
        slice_reach: slices either way that ``volume`` looks, 1 or more.
        erasing: weight in the walk's start of the smallest mask without which a class loses most of its evidence,
            in [0, 1]; 0 as published: the activation alone. Asks the classifier once for each mask.
        erasing_share: of the most that any mask takes from the evidence, what that mask has to take, in (0, 1].
        vote: masks weighted by their agreement with the activation: ``none`` as published; ``alone``
            instead of the walk, ``before`` or ``after`` it.
        vote_power: exponent of the agreement, 0 or more.
        vote_normalise: ``none``, or ``coverage``: by how many masks cover a pixel.
        competition: ``none`` as published, or ``share``: classes and background share a pixel.
        background_power: exponent of the background's score in ``share``, above 0.
        threshold_rule: ``fixed``, or ``otsu``: each class's own, of the volume (of the slice in
            validation), by Otsu's criterion; ``threshold`` is then where none is found.
        flips: measure the stability of pseudo-labels on mirrored images; two more encodings of each slice
            with a class, in the pseudo-label stage only.

    Raises:
        ConfigError: an unknown word, or a number out of its range; names the key.
    """

    grid: int = 4
    affinity: str = "per_prompt"
    intensity_share: float = 0.5
    radius: float = 5.0
    beta: float = 4.0
    contrast: float = 10.0
    steps: int | None = 4
    map_size: int = 64
    threshold: float = 0.5
    sigma: float = 1.0
    rescale: bool = True
    restart: float = 0.0
    prompts: str = "grid"
    content_share: float = 0.1
    peaks: int = 8
    min_quality: float = 0.0
    weigh_by_quality: bool = False
    walk: str = "slice"
    slice_reach: int = 1
    erasing: float = 0.0
    erasing_share: float = 0.7
    vote: str = "none"
    vote_power: float = 4.0
    vote_normalise: str = "none"
    competition: str = "none"
    background_power: float = 1.0
    threshold_rule: str = "fixed"
    flips: bool = False

    def __post_init__(self) -> None:
        self._check_words()
        self._check_numbers()
        if self.steps is None and self.restart == 0:
            raise ConfigError(
                "model.pam.steps is null, but without restart every map ends as a constant: set "
                "model.pam.restart above 0, or a number of steps"
            )
        if self.volumetric and self.prompts == "peaks" and self.affinity in PROMPTED:
            raise ConfigError(
                "model.pam.walk: volume compares what a prompt says of adjacent slices, but each slice has "
                "peaks of its own: choose prompts grid or content, or affinity intensity"
            )

    @property
    def prompted(self) -> bool:
        """Whether prompts are asked at all."""
        return self.affinity in PROMPTED or self.vote != "none" or self.erasing > 0

    @property
    def walks(self) -> bool:
        """Whether there is a walk."""
        return self.affinity != "none" and self.vote != "alone"

    @property
    def volumetric(self) -> bool:
        """Whether whole volumes are walked as such."""
        return self.walk == "volume" and self.walks

    @property
    def rated(self) -> bool:
        """Whether the predicted quality of masks counts."""
        return self.min_quality > 0 or self.weigh_by_quality

    def _check_words(self) -> None:
        for key, word, known in (
            ("affinity", self.affinity, AFFINITIES),
            ("prompts", self.prompts, PLACES),
            ("walk", self.walk, WALKS),
            ("vote", self.vote, VOTES),
            ("vote_normalise", self.vote_normalise, NORMALISATIONS),
            ("competition", self.competition, COMPETITIONS),
            ("threshold_rule", self.threshold_rule, THRESHOLD_RULES),
        ):
            if word not in known:
                raise ConfigError(f"model.pam.{key}: {word!r} is unknown; choose one of {', '.join(known)}")

    def _check_numbers(self) -> None:
        for key, value, fits, range_ in (
            ("grid", self.grid, self.grid >= 1, "1 or more"),
            ("map_size", self.map_size, self.map_size >= 2, "2 or more"),
            # Within a radius of 1 a cell has no neighbour.
            ("radius", self.radius, 1 < self.radius <= self.map_size, "above 1 and at most map_size"),
            ("intensity_share", self.intensity_share, 0 <= self.intensity_share <= 1, "in [0, 1]"),
            ("beta", self.beta, self.beta >= 0, "0 or more"),
            ("contrast", self.contrast, self.contrast >= 0, "0 or more"),
            ("steps", self.steps, self.steps is None or self.steps >= 0, "0 or more, or null"),
            ("threshold", self.threshold, 0 < self.threshold < 1, "between 0 and 1"),
            ("sigma", self.sigma, self.sigma >= 0, "0 or more"),
            ("restart", self.restart, 0 <= self.restart < 1, "0 or more and below 1"),
            ("content_share", self.content_share, 0 <= self.content_share <= 1, "in [0, 1]"),
            ("peaks", self.peaks, self.peaks >= 1, "1 or more"),
            ("min_quality", self.min_quality, 0 <= self.min_quality <= 1, "in [0, 1]"),
            ("slice_reach", self.slice_reach, self.slice_reach >= 1, "1 or more"),
            ("erasing", self.erasing, 0 <= self.erasing <= 1, "in [0, 1]"),
            ("erasing_share", self.erasing_share, 0 < self.erasing_share <= 1, "above 0 and at most 1"),
            ("vote_power", self.vote_power, self.vote_power >= 0, "0 or more"),
            ("background_power", self.background_power, self.background_power > 0, "above 0"),
        ):
            if not fits:
                raise ConfigError(f"model.pam.{key} is {value}; it must be {range_}")
