"""Decides whether a stage is done, interrupted or out of date, and says why; pipeline, report and prediction ask it.

A stage's folder holds ``settings.json`` from its start and ``stage.json`` from its end, with a fingerprint of each file
that the stage has read and written. Size and time of a file are looked at first, and its content only where they
differ, or where the file is small. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_modules.wholeness import find_broken_files
from weakmedsam.contracts import split_round
from weakmedsam.errors import ConfigError, DataError
from weakmedsam.run.clicks import read_reviewed
from weakmedsam.run.overrides import parse_options, wanted_settings
from weakmedsam.run.request import Request
from weakmedsam.run.stage_inputs import mark_inputs
from weakmedsam.run.stages import Stage, count_masked
from weakmedsam.system.fingerprints import Mark, find_damage, mark
from weakmedsam.system.json_files import read_object

DONE, INTERRUPTED, OUT_OF_DATE, NOT_RUN = "done", "interrupted", "out of date", "not run"
NOT_NEEDED = "not needed"

_HELD: dict[str, tuple[str, type]] = {
    "stage.json": ("settings", dict),
    "settings.json": ("configs", dict),
    "clock.json": ("seconds", float),
}
"""Note of a stage -> what it has to hold."""


class StageState(NamedTuple):
    """What ``state_of`` says of a stage.

    Attributes:
        state: ``DONE``, ``INTERRUPTED``, ``OUT_OF_DATE``, ``NOT_RUN`` or ``NOT_NEEDED``.
        reasons: why it is out of date, a text each: ``model.pam.beta: 1 -> 2``, ``input changed: images/a.nii.gz``.
        broken: files of its result that are lost or damaged -> in which way, where that alone puts it out of date.
    """

    state: str
    reasons: tuple[str, ...] = ()
    broken: Mapping[str, str] = {}


def state_of(stage: Stage, request: Request, folder: Path | None = None) -> StageState:
    """The state of a stage under the settings, inputs and upstream results of now. Reads only.

    Args:
        stage: of the run.
        request: what the user asks for.
        folder: where an earlier result of the stage lies; None = its own folder.

    Raises:
        ConfigError: see ``wanted_settings``.
    """
    folder = folder or request.folder / stage.name
    if stage.scored and count_masked(request.folder, stage.scored) == 0:
        split = {"val": "validation"}.get(stage.scored, stage.scored)
        return StageState(NOT_NEEDED, (f"no {split} case has an expert mask, so there is nothing to score",))
    if folder.exists() and not folder.is_dir():
        return StageState(OUT_OF_DATE, ("it is a file, not a folder",))
    wanted = settings_of(stage, request)
    done = read_note(folder / "stage.json")
    begun = read_note(folder / "settings.json") or done.get("settings")
    if begun is None:
        return StageState(INTERRUPTED if _holds_files(folder) else NOT_RUN)
    if begun != wanted:
        return StageState(OUT_OF_DATE, tuple(_setting_reasons(begun, wanted)))
    if done.get("settings") != wanted:
        return StageState(INTERRUPTED)
    broken = _find_broken(folder, done.get("results"))
    if stage.in_place:  # where its summary is broken, it is not known which its inputs are
        broken = broken or _find_broken_store(folder)
    reasons = [] if stage.in_place and broken else _input_reasons(stage, folder, wanted, done.get("inputs"))
    if reasons:
        return StageState(OUT_OF_DATE, tuple(reasons))
    if broken:
        return StageState(OUT_OF_DATE, tuple(_result_reason(*one) for one in broken.items()), broken)
    return StageState(DONE)


def states_of(stages: Sequence[Stage], request: Request) -> dict[str, StageState]:
    """Name -> state of stages of a run, upstream ones first; what follows from one that is to be run is out of date."""
    found: dict[str, StageState] = {}
    for stage in stages:
        state = state_of(stage, request)
        waits = [name for name in stage.after if name in found and found[name].state not in (DONE, NOT_NEEDED)]
        if waits and state.state in (DONE, OUT_OF_DATE):
            rest = [reason for reason in state.reasons if reason not in map(_rerun, waits)]
            said = [f"upstream stage {found[name].state}: {name}" for name in waits]
            state = StageState(OUT_OF_DATE, (*rest, *said))
        found[stage.name] = state
    return found


def recorded_state(run: Path, name: str) -> StageState:
    """The state of a stage by its own notes and those of its upstream stages, for whoever does not know the request.

    A stage that has been removed since, to save space, and the store, which may be filled anew without a change, put
    nothing out of date.
    """
    done, settings = read_note(run / name / "stage.json"), _recorded_settings(run / name)
    now = {other: result_name(run / other) for other in settings.get("after", {}) if _holds_files(run / other)}
    rerun = [_rerun(other) for other in now if other != "prepare" and now[other] != settings["after"][other]]
    if rerun:
        return StageState(OUT_OF_DATE, tuple(rerun))
    return StageState(DONE if done else INTERRUPTED if _holds_files(run / name) else NOT_RUN)


def is_current(run: Path, name: str) -> bool:
    """Whether a stage is finished, and follows from the stages before it as they are now; see ``recorded_state``."""
    before = _recorded_settings(run / name).get("after", {})
    return recorded_state(run, name).state == DONE and all(
        is_current(run, other) for other in before if other != "prepare" and _holds_files(run / other)
    )


def settings_of(stage: Stage, request: Request) -> dict[str, Any]:
    """All that decides a stage's result: ``wanted_settings``, and under ``after`` the upstream results of now.

    Of a segmentation network, where pseudo-labels have been reviewed, ``reviewed`` says so: see ``Reviewed.digest``.

    Raises:
        DataError: a table of the review is damaged.
    """
    after = {name: result_name(request.folder / name) for name in stage.after}
    learns = split_round(stage.name)[0] == "segment"
    reviewed = read_reviewed(request.folder).digest() if learns else None
    return wanted_settings(stage, request) | {"after": after} | ({"reviewed": reviewed} if reviewed else {})


def finished_note(stage: Stage, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``stage.json`` keeps, so that ``state_of`` knows the stage again.

    ``made`` names what was made and from what: what follows is out of date where it changes. A result that was lost and
    came out the same has the same name. The stage's written configuration does not count, a later version has more
    keys; nor do the scans: of copied or touched ones the same slices come out.

    Args:
        stage: what has ended well.
        folder: its folder.
        settings: of ``settings_of``.

    Raises:
        ConfigError: it has left no file of one of its patterns.
    """
    found = {pattern: sorted(folder.glob(pattern)) for pattern in stage.kept}
    missing = [pattern for pattern in stage.results if not found[pattern]]
    if missing:
        raise ConfigError(
            f"{folder}: the stage has ended, but left no {missing[0]}, which what follows reads. Are callbacks or "
            f"limits of the trainer set so that it is not written? Set them as in experiments/{stage.name}.yaml"
        )
    results = {str(path.relative_to(folder)): mark(path) for paths in found.values() for path in paths}
    inputs = mark_inputs(settings, _prepared(stage, folder))
    read = [] if stage.in_place else sorted((name, held.size, held.digest) for name, held in inputs.items())
    written = [(n, held.digest) for n, held in sorted(results.items()) if any(map(Path(n).match, stage.results))]
    text = json.dumps([settings, read, written], sort_keys=True)
    made = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"made": made, "settings": settings, "inputs": inputs, "results": results}


def _input_reasons(stage: Stage, folder: Path, settings: Mapping[str, Any], held: Any) -> list[str]:
    """Which inputs were added, removed or changed since the stage has run."""
    if isinstance(held, str):  # one digest of all inputs
        raise ConfigError(
            f"{folder} was made by weakmedsam 0.1, whose settings have other names: choose another EXPERIMENT, or "
            f"remove {folder.parent} (there is no conversion)"
        )
    if not isinstance(held, Mapping):
        return [_result_reason("stage.json", "damaged")]
    prepared = _prepared(stage, folder) or {}
    root = Path(str(prepared.get("sources", {}).get("root", "")) or "/")
    before = {name: Mark(*values) for name, values in held.items()}
    now = mark_inputs(settings, prepared, before)
    kinds = [
        (name, "added" if name not in before else "removed" if name not in now else "changed")
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    short = {name: str(Path(name).relative_to(root)) for name, _ in kinds if Path(name).is_relative_to(root)}
    return [f"input {kind}: {short.get(name, name) if prepared else name}" for name, kind in kinds]


def _setting_reasons(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Which settings and upstream results differ. A file in another's place is named: ``backbone: pocket -> samus``."""
    configs = old.get("configs", {}), new["configs"]
    gone, come = ([Path(path) for path in a if path not in b] for a, b in (configs, configs[::-1]))
    swapped = [(a, b) for a in gone for b in come if a.parent == b.parent]
    passed = {str(path) for pair in swapped for path in pair}
    before, now = (_resolve(settings, passed) for settings in (old, new))
    return [
        *(f"{a.parent.name}: {a.stem} -> {b.stem}" for a, b in swapped),
        *(
            f"{key}: {before.get(key, 'default')} -> {now.get(key, 'default')}"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key)
        ),
        *(_rerun(name) for name, made in new["after"].items() if old.get("after", {}).get(name) != made),
        *(["clicks or decisions of the review changed"] if old.get("reviewed") != new.get("reviewed") else []),
    ] or ["options given in another order"]


def _resolve(settings: Mapping[str, Any], passed: set[str]) -> dict[str, str]:
    """Key -> text of its value, options over files and a later file over an earlier one; without files ``passed``."""
    found: dict[str, str] = {}
    for path, held in settings.get("configs", {}).items():
        if path not in passed:
            found |= dict(_flatten(held, "trainer" if path == "trainer" else ""))
    for key, values in parse_options(settings.get("options", [])):
        found[key.replace(".init_args", "")] = " ".join(values)
    return found | {"data_dir": str(settings.get("data_dir"))}


def _flatten(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flatten(part, key if name == "init_args" else f"{key}.{name}" if key else str(name))
    else:
        yield key, str(value)


def _result_reason(name: str, what: str) -> str:
    if what == "is gone":
        return f"result missing: {name}"
    return f"result damaged: {name} {what.removeprefix('is damaged').strip()}".rstrip()


def _rerun(name: str) -> str:
    return f"upstream stage re-run: {name}"


def read_note(path: Path, strict: bool = False) -> dict[str, Any]:
    """What a stage says of itself; empty where it says nothing.

    Args:
        path: ``stage.json``, ``settings.json``, ``clock.json`` or a summary.
        strict: raise where it is damaged; otherwise it is taken as not there.

    Raises:
        DataError: it is damaged.
    """
    try:
        found = read_object(path)
        key, kind = _HELD.get(path.name, ("", object))
        if found and not isinstance(found.get(key), kind):
            raise DataError(f"{path}: does not hold the {key} of a stage")
    except DataError:
        if strict:
            raise
        return {}
    return found


def result_name(folder: Path) -> str | None:
    """What tells a finished stage's result from another, see ``finished_note``; None where it is not finished."""
    found = read_note(folder / "stage.json")
    return found.get("made") if isinstance(found.get("settings", {}).get("after", {}), dict) else None


def _recorded_settings(folder: Path) -> dict[str, Any]:
    """Of a finished stage, or of one that has begun; what is damaged is taken as not there."""
    for name in ("stage.json", "settings.json"):
        try:
            found = read_object(folder / name)
        except DataError:
            continue
        settings = found.get("settings") if name == "stage.json" else found
        if isinstance(settings, dict) and isinstance(settings.get("after"), dict):
            return settings
    return {}


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _find_broken(folder: Path, held: Any) -> dict[str, str]:
    """Files of a result that are lost or damaged -> in which way."""
    marks = {name: Mark(*values) for name, values in held.items()} if isinstance(held, Mapping) else {}
    damage = {name: find_damage(folder / name, known) for name, known in marks.items()}
    return {name: what for name, what in damage.items() if what is not None}


def _prepared(stage: Stage, folder: Path) -> dict[str, Any] | None:
    return read_note(folder / "data.json") if stage.in_place else None


def _find_broken_store(folder: Path) -> dict[str, str]:
    summary = read_note(folder / "data.json")
    return find_broken_files(Path(summary["store"]).absolute()) if "store" in summary else {}
