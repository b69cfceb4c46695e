"""The settings of PAM: all that decides a pseudo-label but the network."""

from __future__ import annotations

from dataclasses import dataclass

from weakmedsam.errors import ConfigError, check_range
from weakmedsam.pam.affinity import AFFINITIES, PROMPTED
from weakmedsam.pam.mask_voting import NORMALISATIONS, VOTES
from weakmedsam.pam.point_prompts import PLACEMENTS
from weakmedsam.pam.volume_affinity import WALKS

COMPETITIONS = ("none", "share")
THRESHOLD_RULES = ("fixed", "otsu")


@dataclass(frozen=True)
class Refinement:
    """The numbers of PAM; docs/pam.md has formulas and sources. Without a word: as in the paper.

    Attributes:
        grid: points a side, 1 to 128; the paper uses 4.
        affinity: what two pixels are compared by: ``per_prompt`` each prompt's mask (not in the paper),
            ``with_intensity`` by these and the image's grey values (not in the paper),
            ``summed_masks`` their mean, ``summed`` the summed logits as published, ``intensity`` the
            image's grey values (no prompt is asked), ``none`` (no walk).
        intensity_share: weight of the grey values in ``with_intensity``, that of all masks together being
            the rest, in [0, 1].
        radius: of the neighbourhood, cells of the map, above 1, at most 64 and at most ``map_size``; the paper uses 5.
        beta: exponent of the affinity, 0 to 1,000; the paper uses 4.
        contrast: scale of differences before the exponent, 0 to 1,000,000; published: 1, on summed logits.
        steps: of the random walk, 0 to 100,000; the paper uses 4. None: to the steady state, which needs
            ``restart``.
        map_size: side of the map that is walked on, cells, 2 to 512; the paper uses 64.
        threshold: score above which a pixel belongs to a class, in (0, 1); the paper uses 0.5.
        sigma: of the smoothing before the threshold, pixels of the frame, at most 256; 0 = none.
        rescale: scale each slice's map to [0, 1] before the walk and after each step (at the end for ``steps``
            None), as published. Without it a slice's map keeps its height, which of a probability means
            something; but ``erasing`` and votes scale to a maximum of 1 all the same.
        restart: probability of going back to the start at each step, in [0, 1); published: 0.
        prompts: where prompts are: ``grid``; ``content``, grid points on the scan and not in the dark;
            ``peaks`` of the activation of each present class. The latter two are not in the paper.
        content_share: of the slice's brightest grid cell that a cell of ``content`` must reach, in [0, 1].
        peaks: of each class, at most so many, 1 to 1,024.
        min_quality: masks whose predicted IoU is lower count nowhere, in [0, 1]; 0 = all count.
        weigh_by_quality: masks count by their predicted IoU.
        walk: ``slice``, or ``volume`` with neighbours in adjacent slices where whole volumes are there
            (pseudo-labels and test; validation has slices and walks on each).
        slice_reach: slices either way that ``volume`` looks, 1 to 64.
        erasing: weight in the walk's start of the smallest mask without which a class loses most of its evidence,
            in [0, 1]; 0 as published: the activation alone. Asks the classifier once for each mask.
        erasing_share: of the most that any mask takes from the evidence, what that mask has to take, in (0, 1].
        vote: masks weighted by their agreement with the activation: ``none`` as published; ``alone``
            instead of the walk, ``before`` or ``after`` it.
        vote_power: exponent of the agreement, 0 to 1,000.
        vote_normalise: ``none``, or ``coverage``: by how many masks cover a pixel.
        competition: ``none`` as published, or ``share``: classes and background share a pixel.
        background_power: exponent of the background's score in ``share``, above 0 and at most 1,000.
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
            ("prompts", self.prompts, PLACEMENTS),
            ("walk", self.walk, WALKS),
            ("vote", self.vote, VOTES),
            ("vote_normalise", self.vote_normalise, NORMALISATIONS),
            ("competition", self.competition, COMPETITIONS),
            ("threshold_rule", self.threshold_rule, THRESHOLD_RULES),
        ):
            if word not in known:
                raise ConfigError(f"model.pam.{key}: {word!r} is unknown; choose one of {', '.join(known)}")

    def _check_numbers(self) -> None:
        # Upper bounds where memory or time grows with a number.
        for key, low, high in (
            ("grid", 1, 128),
            ("map_size", 2, 512),
            ("intensity_share", 0, 1),
            ("beta", 0, 1000),
            ("contrast", 0, 1_000_000),
            ("sigma", 0, 256),
            ("content_share", 0, 1),
            ("peaks", 1, 1024),
            ("min_quality", 0, 1),
            ("slice_reach", 1, 64),
            ("erasing", 0, 1),
            ("vote_power", 0, 1000),
        ):
            check_range(f"model.pam.{key}", getattr(self, key), low, high)
        if self.steps is not None:
            check_range("model.pam.steps", self.steps, 0, 100_000)
        # Within a radius of 1 a cell has no neighbour.
        check_range("model.pam.radius", self.radius, 1, 512, above=True)
        if self.radius > self.map_size:
            raise ConfigError(
                f"model.pam.radius is {self.radius}; it must be above 1 and at most map_size, {self.map_size}"
            )
        check_range("model.pam.radius", self.radius, 1, 64, above=True)
        check_range("model.pam.threshold", self.threshold, 0, 1, above=True, below=True)
        check_range("model.pam.restart", self.restart, 0, 1, below=True)
        check_range("model.pam.erasing_share", self.erasing_share, 0, 1, above=True)
        check_range("model.pam.background_power", self.background_power, 0, 1000, above=True)
