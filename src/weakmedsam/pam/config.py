"""Settings of PAM: one frozen dataclass per concept, each with its range and its source.

``docs/pam.md`` has the formulas. Unmarked defaults follow the paper; "-" marks what is not in the paper. YAML nests
in the same way: ``pam: {prompts: {grid: 8}, walk: {steps: 32}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from weakmedsam.errors import ConfigError, check_choice, check_range
from weakmedsam.pam.affinity import AFFINITIES
from weakmedsam.pam.mask_voting import NORMALISATIONS, VOTES
from weakmedsam.pam.point_prompts import PLACEMENTS
from weakmedsam.pam.volume_affinity import EXTENTS

COMPETITIONS = ("none", "share")
THRESHOLD_RULES = ("fixed", "profile")
VIEWS = ("plain", "mirrored")
PRESENCE = ("given", "predicted")


@dataclass(frozen=True)
class Prompts:
    """Point prompts and the masks that answer them.

    Attributes:
        grid: points a side, at (i + 0.5) S / grid, 1 to 128; 4 to 32 make sense; paper: 4.
        placement: ``grid`` (paper) | ``content``: grid points on the scan and not in the dark (paper: -) | ``peaks`` of
            the activation of each present class (paper: -).
        content_share: share of the slice's brightest grid cell that a cell of ``content`` must reach, [0, 1]; paper: -.
        peaks: most points of each class for ``peaks``, 1 to 1,024; paper: -.
        min_quality: masks of a lower predicted IoU are left out, [0, 1]; paper: 0.
        weigh_by_quality: masks are weighted by their predicted IoU; paper: false.
    """

    grid: int = 4
    placement: str = "grid"
    content_share: float = 0.1
    peaks: int = 8
    min_quality: float = 0.0
    weigh_by_quality: bool = False

    def __post_init__(self) -> None:
        check_range("model.pam.prompts.grid", self.grid, 1, 128)
        check_choice("model.pam.prompts.placement", self.placement, PLACEMENTS)
        check_range("model.pam.prompts.content_share", self.content_share, 0, 1)
        check_range("model.pam.prompts.peaks", self.peaks, 1, 1024)
        check_range("model.pam.prompts.min_quality", self.min_quality, 0, 1)

    @property
    def rated(self) -> bool:
        """Whether the predicted IoU of masks counts."""
        return self.min_quality > 0 or self.weigh_by_quality


@dataclass(frozen=True)
class Affinity:
    """What two pixels are compared by, and how far apart they may be.

    Attributes:
        kind: a function of ``pam/affinity.py`` by its name (paper: ``summed``), or ``none``: no walk.
        intensity_share: weight of the grey values in ``with_intensity``, the rest is the masks', [0, 1]; paper: -.
        radius: of the neighbourhood, cells of the map, above 1, at most 64 and at most ``walk.map_size``; paper: 5.
        beta: exponent of the affinity, 0 to 1,000; paper: 4.
        contrast: scale of differences before the exponent, 0 to 1,000,000; published: 1, on summed logits.
    """

    kind: str = "per_prompt"
    intensity_share: float = 0.5
    radius: float = 5.0
    beta: float = 4.0
    contrast: float = 10.0

    def __post_init__(self) -> None:
        check_choice("model.pam.affinity.kind", self.kind, (*AFFINITIES, "none"))
        check_range("model.pam.affinity.intensity_share", self.intensity_share, 0, 1)
        check_range("model.pam.affinity.radius", self.radius, 1, 64, above=True)  # within 1 a cell has no neighbour
        check_range("model.pam.affinity.beta", self.beta, 0, 1000)
        check_range("model.pam.affinity.contrast", self.contrast, 0, 1_000_000)

    @property
    def prompted(self) -> bool:
        """Whether it needs the masks of prompts."""
        return self.kind in AFFINITIES and AFFINITIES[self.kind].prompted


@dataclass(frozen=True)
class Walk:
    """The random walk along the affinity.

    Attributes:
        steps: 0 to 100,000; null: to the steady state (until no value changes by more than
            1e-6, at most 1,000 steps), which needs ``restart``; paper: 4.
        restart: probability of going back to the start at each step, [0, 1); published: 0.
        rescale: scale each slice's map to [0, 1] before the walk and after each step (at the end for ``steps`` null),
            as published. Without it a probability keeps its height; but occlusion and votes scale to a maximum of 1.
        map_size: side of the map that is walked on, cells, 2 to 512; paper: 64.
        extent: ``slice`` (paper) | ``volume``, with neighbours in adjacent slices where whole volumes are there:
            pseudo-labels and test, not validation (paper: -).
        slice_reach: slices either way that ``volume`` looks, 1 to 64; paper: -.
    """

    steps: int | None = 4
    restart: float = 0.0
    rescale: bool = True
    map_size: int = 64
    extent: str = "slice"
    slice_reach: int = 1

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_range("model.pam.walk.steps", self.steps, 0, 100_000)
        check_range("model.pam.walk.restart", self.restart, 0, 1, below=True)
        check_range("model.pam.walk.map_size", self.map_size, 2, 512)
        check_choice("model.pam.walk.extent", self.extent, EXTENTS)
        check_range("model.pam.walk.slice_reach", self.slice_reach, 1, 64)
        if self.steps is None and self.restart == 0:
            raise ConfigError(
                "model.pam.walk.steps is null, but without restart every map ends as a constant: set "
                "model.pam.walk.restart above 0, or a number of steps"
            )


@dataclass(frozen=True)
class Occlusion:
    """The smallest mask without which a class loses most of its evidence, beside the activation (paper: -).

    Attributes:
        weight: of that mask in the walk's start, [0, 1]; 0, as published: the activation alone, no image is occluded.
            Above 0 the classifier is asked once for each mask.
        share: of the largest drop of the class logit, what that mask must reach, (0, 1].
    """

    weight: float = 0.0
    share: float = 0.7

    def __post_init__(self) -> None:
        check_range("model.pam.occlusion.weight", self.weight, 0, 1)
        check_range("model.pam.occlusion.share", self.share, 0, 1, above=True)


@dataclass(frozen=True)
class Vote:
    """Masks weighted by their agreement with the activation (paper: -).

    Attributes:
        when: ``none``, as published | ``alone``, in the place of the walk | ``before`` | ``after`` the walk.
        power: exponent of the agreement, 0 to 1,000.
        normalise: ``none`` | ``coverage``, by how many masks cover a pixel.
    """

    when: str = "none"
    power: float = 4.0
    normalise: str = "none"

    def __post_init__(self) -> None:
        check_choice("model.pam.vote.when", self.when, VOTES)
        check_range("model.pam.vote.power", self.power, 0, 1000)
        check_choice("model.pam.vote.normalise", self.normalise, NORMALISATIONS)


@dataclass(frozen=True)
class Threshold:
    """From the refined map to the classes of pixels.

    Attributes:
        value: score above which a pixel belongs to a class, (0, 1); paper: 0.5.
        rule: ``fixed`` (paper) | ``profile``, of each slice, so that the areas of a class along a volume come nearer to
            those of an ellipsoid's sections between its first and last slice (``thresholding.profile_levels``); their
            volume is that at ``value``. Fixed where the class is in all slices of the volume, and in validation,
            which takes single slices (paper: -).
        sigma: of the Gaussian smoothing before the threshold, pixels of the frame, 0 to 256; 0 = none.
        competition: ``none``, as published | ``share``, classes and background share a pixel (paper: -).
        background_power: exponent of the background's score in ``share``, above 0 and at most 1,000; paper: -.
    """

    value: float = 0.5
    rule: str = "fixed"
    sigma: float = 1.0
    competition: str = "none"
    background_power: float = 1.0

    def __post_init__(self) -> None:
        check_range("model.pam.threshold.value", self.value, 0, 1, above=True, below=True)
        check_choice("model.pam.threshold.rule", self.rule, THRESHOLD_RULES)
        check_range("model.pam.threshold.sigma", self.sigma, 0, 256)
        check_choice("model.pam.threshold.competition", self.competition, COMPETITIONS)
        check_range("model.pam.threshold.background_power", self.background_power, 0, 1000, above=True)


@dataclass(frozen=True)
class Views:
    """Mirrored images (paper: -).

    Attributes:
        activation: averaged over ``plain``, the image alone, as published | ``mirrored``, also the mirror images
            that training makes (``cam.mirror_axes``).
        stability: measure the stability of pseudo-labels on mirrored images: two more encodings of each slice with a
            class, in the pseudo-label stage only.
    """

    activation: str = "plain"
    stability: bool = False

    def __post_init__(self) -> None:
        check_choice("model.pam.views.activation", self.activation, VIEWS)


@dataclass(frozen=True)
class Start:
    """What is walked, and who says which classes a slice has (paper: -).

    Attributes:
        checkpoint: null, as published: the activation | a segmentation network's checkpoint: what that predicts
            (``self_training.py``); ``views.activation`` then has no effect.
        presence: ``given``, the image-level label | ``predicted``, by the network of ``checkpoint``, so that nothing is
            known of a scan: the test scores and draws segmentations as the segmentation network's own does
            (``cases.csv``, ``summary.json``), and prediction segments unlabelled scans (``make predict``).
        thresholds: null | thresholds in (0, 1) which a test of predicted presence compares instead; the best one stands
            in its ``threshold.json`` (``threshold_choice.py``).
    """

    checkpoint: str | None = None
    presence: str = "given"
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("model.pam.start.presence", self.presence, PRESENCE)
        if self.presence == "predicted" and self.checkpoint is None:
            raise ConfigError(
                "model.pam.start.presence: predicted is what a segmentation network says; give its best.ckpt as "
                "model.pam.start.checkpoint"
            )
        for value in self.thresholds or ():
            check_range("model.pam.start.thresholds", value, 0, 1, above=True, below=True)


@dataclass(frozen=True)
class Validation:
    """What PAM refines in the validations of a training; prompts cost several times what an encoding does.

    Attributes:
        every_n_epochs: epochs between two validations that refine, 1 or more; the last epoch's always does. No
            checkpoint is chosen by their Dice.
        slices: how many slices such a validation refines, 1 or more: of each class the same number, evenly from the
            first to the last that has it, always the same (``stratified_sample``). Both Dice are theirs. null: all.
    """

    every_n_epochs: int = 1
    slices: int | None = None

    def __post_init__(self) -> None:
        check_range("model.pam.validation.every_n_epochs", self.every_n_epochs, 1, 1_000_000)
        if self.slices is not None:
            check_range("model.pam.validation.slices", self.slices, 1, 1_000_000)


@dataclass(frozen=True)
class Refinement:
    """All settings that decide a pseudo-label, but the network.

    Raises:
        ConfigError: settings that do not go together; names their keys.
    """

    prompts: Prompts = field(default_factory=Prompts)
    affinity: Affinity = field(default_factory=Affinity)
    walk: Walk = field(default_factory=Walk)
    occlusion: Occlusion = field(default_factory=Occlusion)
    vote: Vote = field(default_factory=Vote)
    threshold: Threshold = field(default_factory=Threshold)
    views: Views = field(default_factory=Views)

    def __post_init__(self) -> None:
        if self.affinity.radius > self.walk.map_size:
            raise ConfigError(
                f"model.pam.affinity.radius is {self.affinity.radius}; it must be above 1 and at most "
                f"model.pam.walk.map_size, {self.walk.map_size}"
            )
        if self.volumetric and self.prompts.placement == "peaks" and self.affinity.prompted:
            raise ConfigError(
                "model.pam.walk.extent: volume compares what a prompt says of adjacent slices, but each slice has "
                "peaks of its own: choose model.pam.prompts.placement grid or content, or affinity.kind intensity"
            )

    @property
    def prompted(self) -> bool:
        """Whether prompts are asked at all."""
        return self.affinity.prompted or self.vote.when != "none" or self.occlusion.weight > 0

    @property
    def walks(self) -> bool:
        """Whether there is a walk."""
        return self.affinity.kind != "none" and self.vote.when != "alone"

    @property
    def volumetric(self) -> bool:
        """Whether whole volumes are walked as such."""
        return self.walk.extent == "volume" and self.walks

    def changed(self, changes: Mapping[str, object]) -> Refinement:
        """The same settings but for some, by their dotted keys: ``{"walk.steps": 16}``.

        Raises:
            ConfigError: an unknown key, or a value out of its range.
        """
        groups: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            if key not in SETTINGS:
                raise ConfigError(f"{key} is no setting of PAM; there are {', '.join(SETTINGS)}")
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = value
        return replace(self, **{group: replace(getattr(self, group), **values) for group, values in groups.items()})


def dotted(settings: Any, above: str = "") -> dict[str, Any]:
    """Values of nested dataclasses by their dotted keys: ``{"walk.steps": 4, ...}``."""
    found: dict[str, Any] = {}
    for one in fields(settings):
        value, key = getattr(settings, one.name), f"{above}{one.name}"
        found |= dotted(value, f"{key}.") if is_dataclass(value) else {key: value}
    return found


SETTINGS = tuple(dotted(Refinement()))
"""Dotted keys of all settings of PAM."""
