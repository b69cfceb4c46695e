"""A run's folder as plain data: what the report shows, read from JSON, CSV and YAML files.

Every part may be missing, so that a half-finished run can be read; what is there but damaged is an
error that names the file. Neither torch nor Lightning is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weakmedsam.contracts import in_round, split_round
from weakmedsam.errors import DataError
from weakmedsam.report.readers import (
    NAN,
    EpochTable,
    Row,
    read_history,
    read_rows,
)
from weakmedsam.run.clicks import Reviewed, read_reviewed
from weakmedsam.run.stage_state import DONE, INTERRUPTED, NOT_NEEDED, NOT_RUN, OUT_OF_DATE, read_note, recorded_state
from weakmedsam.system.commands import command
from weakmedsam.system.json_files import parse_mapping, read_object, read_text

REPORTED_STAGES = ("prepare", "classify", "pseudo_labels", "segment", "test", "threshold", "refined")
"""A run's stages in order; each has a folder of that name."""

LATER = ("pseudo_labels", "segment", "test_maps", "test", "threshold", "refined")
"""What another round makes anew."""

BESIDE = ("test_maps", "upper_bound")
"""Stages that nothing builds on: scores of activation maps, and the network trained on expert masks."""

_SCORED = ("test_maps", "test", "refined", "upper_bound")
"""What needs expert masks of test cases."""

_CLASS_METRICS = ("val/auroc/", "val/ap/", "val/cam_dice/", "val/pam_dice/", "val/dice/", "val/agreement/")


@dataclass(frozen=True)
class StageRecord:
    """What one stage left behind.

    Attributes:
        name: one of ``REPORTED_STAGES``, or of a later round.
        state: as of ``stage_state``: done, interrupted, out of date, not run or not needed.
        reasons: why it is out of date.
        settings: resolved options, nested.
        command: the command that ran it.
        seconds: how long it took; NaN where unknown.
        finished: ISO time of its end.
        versions: versions of the packages it used.
        git: the commit of the source.
    """

    name: str
    state: str = NOT_RUN
    reasons: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    seconds: float = NAN
    finished: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    git: str = ""


@dataclass(frozen=True)
class Monitor:
    """What chooses the checkpoint of a training stage: a metric, and "min" or "max"."""

    metric: str
    mode: str

    def kept_epoch(self, history: EpochTable) -> float:
        """Epoch of the best value so far; NaN where there is none."""
        sign = -1.0 if self.mode == "min" else 1.0
        pairs = zip(history.epochs, history.series.get(self.metric, ()), strict=False)
        values = [(sign * value, -epoch) for epoch, value in pairs if not math.isnan(value)]
        return -max(values)[1] if values else NAN


@dataclass(frozen=True)
class Round:
    """What was measured of one round's pseudo-labels and network.

    Attributes:
        number: 1 or more.
        quality: rows of pseudo_labels/quality.csv; from round 2 on that of pseudo_labels_2, and so with the others.
        cases: rows of test/cases.csv.
        map_cases: rows of cam_cases.csv, of test_maps/ (the first round's also of test/): Dice of what PAM started
            from and of what it made of that, on the test cases.
        refined: rows of refined/cases.csv.
        summary: test/summary.json.
        threshold: threshold/threshold.json.
    """

    number: int
    quality: list[Row]
    cases: list[Row]
    refined: list[Row]
    map_cases: list[Row]
    summary: dict[str, Any]
    threshold: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """All that a report says of a run.

    Attributes:
        folder: the run's directory, ``runs/<dataset>/<experiment>``.
        stages: stage name -> ``StageRecord``, all of ``REPORTED_STAGES`` and of the rounds, and of ``BESIDE`` what was
            run.
        histories: "classify", "segment", "segment_2", ... -> ``EpochTable``.
        configs: the same, and "pseudo_labels", "refined", "pseudo_labels_2", ... -> text of config.yaml, where there is
            one.
        monitors: of trained stages -> what chooses the checkpoint, where the config names it.
        rounds: one or more, begun or done.
        upper_bound: rows of upper_bound/test/cases.csv.
        expert: the segmentation network was trained on expert masks (``supervision: expert``).
        random: the backbone started from random numbers (``weights: none``).
        unmasked: no test case has an expert mask, so that there is nothing to score.
        reviewed: clicks and decisions on its pseudo-labels.
        label_warnings: what ``prepare`` has found that the labels say too little of, a sentence each.
    """

    folder: Path
    stages: dict[str, StageRecord]
    histories: dict[str, EpochTable]
    configs: dict[str, str]
    monitors: dict[str, Monitor]
    rounds: tuple[Round, ...]
    upper_bound: list[Row]
    expert: bool
    random: bool
    unmasked: bool
    reviewed: Reviewed
    label_warnings: tuple[str, ...]

    @property
    def waiting(self) -> list[StageRecord]:
        """The stages that are still to be run."""
        return [stage for stage in self.stages.values() if stage.state not in (DONE, NOT_NEEDED)]

    @property
    def finished(self) -> str:
        """ISO time of the end of the last stage; empty where none has ended."""
        return max((stage.finished for stage in self.stages.values()), default="")

    @property
    def dataset(self) -> str:
        """Name of the data set: the folder above."""
        return self.folder.parent.name

    @property
    def experiment(self) -> str:
        """Name of the experiment: the run's own folder."""
        return self.folder.name

    @property
    def last(self) -> Round:
        """The round whose figures are the run's: the last that is scored; where none is, the last that is trained."""
        trained = [one for one in self.rounds if self.stages[in_round("segment", one.number)].state == DONE]
        return ([one for one in self.rounds if one.cases] or trained or self.rounds[:1])[-1]

    def latest(self, kind: str) -> str:
        """Name of that round's ``pseudo_labels``, ``segment``, ``test`` or ``refined``; of another stage its own."""
        return in_round(kind, self.last.number) if kind in LATER else kind

    @property
    def classes(self) -> list[str]:
        """Class names, in the order in which the files name them."""
        columns = (name for history in self.histories.values() for name in history.series)
        named = [name[len(stem) :] for name in columns for stem in _CLASS_METRICS if name.startswith(stem)]
        named += [str(row["class"]) for row in (*self.last.cases, *self.rounds[0].quality)]
        return list(dict.fromkeys(named))


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Args:
        folder: ``runs/<dataset>/<experiment>``; may be empty.

    Raises:
        DataError: there is no such folder, or a file in it cannot be read; the message names it.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such run. A run lies in runs/<dataset>/<experiment>; `{command('train')}` makes one."
        )
    numbers = range(1, _count_rounds(folder) + 1)
    names = (*REPORTED_STAGES, *(in_round(kind, n) for n in numbers[1:] for kind in LATER))
    trained = ("classify", *(in_round("segment", n) for n in numbers))
    mined = tuple(in_round(kind, n) for kind in ("pseudo_labels", "refined") for n in numbers)
    texts = {name: read_text(_within(folder, name) / "config.yaml") for name in (*trained, *mined)}
    configs = {name: parse_mapping(folder / name / "config.yaml", text) for name, text in texts.items()}
    monitors = {name: _find_monitor(configs[name]) for name in trained}
    prepared = read_note(folder / "prepare" / "data.json")
    unmasked = _count_masked(prepared, "test") == 0
    idle = {*(_SCORED if unmasked else ()), *(("threshold",) if _count_masked(prepared, "val") == 0 else ())}
    stages = {name: _read_stage(folder, name, split_round(name)[0] in idle) for name in (*names, *BESIDE)}
    beside = {name for name in BESIDE if stages[name].state not in (NOT_RUN, NOT_NEEDED)}
    stages = {name: found for name, found in stages.items() if name in names or name in beside}
    return Run(
        folder=folder,
        stages=stages,
        histories={name: read_history(_within(folder, name) / "history.csv") for name in trained},
        configs={name: text for name, text in texts.items() if text},
        monitors={name: monitor for name, monitor in monitors.items() if monitor},
        rounds=tuple(_read_round(folder, n) for n in numbers),
        upper_bound=read_rows(folder / "upper_bound" / "test" / "cases.csv", ("dice",)),
        expert=any(_supervised_by_experts(c) for c in (configs["segment"], stages["segment"].settings)),
        # From the configuration: a stage's settings hold YAML values that an option may have overruled.
        random=_backbone_options(configs["classify"]).get("weights") == "none",
        unmasked=unmasked,
        reviewed=read_reviewed(folder),
        label_warnings=_label_warnings(prepared),
    )


def _label_warnings(prepared: dict[str, Any]) -> tuple[str, ...]:
    """As ``prepare`` has left them; none of a run of an earlier version."""
    found = prepared.get("label_warnings")
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _count_masked(prepared: dict[str, Any], split: str) -> int | None:
    """How many cases of a split have an expert mask, by what ``prepare`` has counted; None where that is not known."""
    found: Any = prepared
    for key in ("splits", split, "masked"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, int) else None


def _fits(folder: Path, name: str) -> bool:
    """Whether a stage has begun, of what is there now."""
    return recorded_state(folder, name).state in (DONE, INTERRUPTED)


def _count_rounds(folder: Path) -> int:
    """How many rounds there are of the network that is there now; later ones of an earlier network do not count."""
    number = 1
    while _fits(folder, in_round("pseudo_labels", number + 1)):
        number += 1
    return number


def _within(folder: Path, name: str) -> Path:
    """A stage's folder; of a later round's that is out of date one that is not there, so that nothing is read of it."""
    stale = split_round(name)[1] > 1 and recorded_state(folder, name).state == OUT_OF_DATE
    return folder / name / "out of date" if stale else folder / name


def _read_round(folder: Path, number: int) -> Round:
    kinds = ("pseudo_labels", "test_maps", "test", "threshold", "refined")
    labels, maps, test, threshold, refined = (_within(folder, in_round(kind, number)) for kind in kinds)
    tables = (read_rows(place / "cam_cases.csv", ("cam_dice", "pam_dice")) for place in (maps, test))
    return Round(
        number,
        quality=read_rows(labels / "quality.csv", ("quality",)),
        cases=read_rows(test / "cases.csv", ("dice",)),
        refined=read_rows(refined / "cases.csv", ("dice",)),
        map_cases=next((rows for rows in tables if rows), []),
        summary=read_object(test / "summary.json"),
        threshold=read_object(threshold / "threshold.json"),
    )


def _supervised_by_experts(options: Any) -> bool:
    """Whether ``supervision: expert`` stands anywhere in nested options."""
    if not isinstance(options, dict):
        return False
    return options.get("supervision") == "expert" or any(map(_supervised_by_experts, options.values()))


def _backbone_options(config: Any) -> dict[str, Any]:
    """``model.init_args.backbone.init_args``; empty where it is not there."""
    for key in ("model", "init_args", "backbone", "init_args"):
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def _read_stage(run: Path, name: str, idle: bool) -> StageRecord:
    path = run / name / "stage.json"
    state, reasons, _ = recorded_state(run, name)
    if idle and state == NOT_RUN:
        state = NOT_NEEDED
    facts = read_object(path)
    if state != DONE:
        return StageRecord(name, state, reasons)
    settings, versions = (facts.get(key) or {} for key in ("settings", "versions"))
    if not isinstance(settings, dict) or not isinstance(versions, dict):
        raise DataError(f"{path}: `settings` and `versions` must be objects")
    seconds = facts.get("seconds")
    return StageRecord(
        name=name,
        state=state,
        settings=settings,
        command=str(facts.get("command") or ""),
        seconds=float(seconds) if isinstance(seconds, int | float) else NAN,
        finished=str(facts.get("finished") or ""),
        versions=versions,
        git=str(facts.get("git") or ""),
    )


def _find_monitor(config: dict[str, Any]) -> Monitor | None:
    """The first ModelCheckpoint with a metric among the trainer's callbacks."""
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    for callback in callbacks if isinstance(callbacks, list) else ():
        if isinstance(callback, dict) and str(callback.get("class_path")).endswith("ModelCheckpoint"):
            options = callback.get("init_args") or {}
            if options.get("monitor"):
                return Monitor(str(options["monitor"]), str(options.get("mode") or "min"))
    return None
