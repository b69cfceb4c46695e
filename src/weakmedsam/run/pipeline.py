"""Chains the stages of a run: ``python -m weakmedsam.run.pipeline train --dataset phantom``.

Every stage is a LightningCLI command of its own; this file decides which are out of date and where an
interrupted one continues. It imports neither torch nor Lightning, so a run that is up to date says so at
once.

A stage's folder holds ``settings.json`` from its start and ``stage.json`` from its end. It is up to date
when its settings and the results before it are those it was made with, and its own are what was written
(``results.py``); interrupted when only the first is there. Settings are compared as parsed values: a
comment in a YAML changes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from weakmedsam.config_diff import changes
from weakmedsam.errors import DIVERGED, LESS_MEMORY, ConfigError, DataError
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.run.overrides import check_rounds, options_for, parse_options, wanted_settings
from weakmedsam.run.stage_results import find_broken, mark_results, name_result
from weakmedsam.run.stage_state import digest_inputs
from weakmedsam.run.stages import (
    TARGETS,
    Request,
    Stage,
    chosen_stages,
    stage_configs,
)
from weakmedsam.system.atomic_io import put_away
from weakmedsam.system.file_lock import LOCK, alone
from weakmedsam.system.json_files import MEND, read_object, write_object
from weakmedsam.system.signals import KILLED, REQUEUE, Relay

console = Console(highlight=False)

BEST, LAST = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
"""Of a stage that trains."""

HELD: dict[str, tuple[str, type]] = {"settings.json": ("configs", dict), "clock.json": ("seconds", float)}
"""Note of a stage -> what it has to hold."""
PROVENANCE = ("versions", "git", "command", "data")
"""What ``stage.json`` takes over from ``provenance.json``."""


def run_stage(stage: Stage, request: Request, number: str, relay: Relay) -> None:
    """Skip, continue or start one stage.

    Args:
        stage: what is run.
        request: what the user asked for.
        number: of the stage, for the terminal.
        relay: runs its commands.

    Raises:
        ConfigError: see ``wanted_settings``; or its command has left no result.
        SystemExit: the stage's command failed; its own message has been printed.
    """
    folder = request.folder / stage.name
    head = f"[bold]\\[{number}] {stage.name}[/bold]"
    if stage.needs_test_masks and _test_masks(request) == 0:
        console.print(f"{head}: no test case has an expert mask, so there is nothing to score")
        return
    if folder.exists() and not folder.is_dir():
        _set_aside(folder, "it is a file, not a folder")
    wanted = wanted_settings(stage, request) | {"after": _stamps(stage, request)}
    in_place = stage.name == "prepare"  # its result lies in the store, under a name of its own
    kept = None if in_place else _make_room(folder, wanted)
    done = _read(folder / "stage.json")
    if done is not None and done.get("settings") == wanted:
        broken = find_broken(folder, done.get("results")) or (_broken_store(folder) if in_place else {})
        if in_place and broken:  # what lies in the store is looked at by the command
            _clear_away(folder, broken, head)
        elif done.get("inputs") != _inputs(stage, request, wanted):
            kept = None if in_place else _set_aside(folder, "files it was made from have changed")
        elif broken:
            _clear_away(folder, broken, head)
        else:
            console.print(f"{head}: up to date")
            if _read(folder / "settings.json") is None:
                write_object(folder / "settings.json", wanted)
            return
    begun = _read(folder / "settings.json")
    console.print(f"{head}: {stage.title}{' (continued)' if begun else ''}")
    write_object(folder / "settings.json", wanted)
    spent = (_read(folder / "clock.json") or {}).get("seconds", 0.0) if begun else 0.0
    _carry_out(stage, request, wanted, spent, kept, relay)


def _clear_away(folder: Path, broken: Mapping[str, str], head: str) -> None:
    """Say what of a result is lost or damaged, and make room for it; the stage is then one that was interrupted.

    Args:
        folder: of the stage; what lies elsewhere stays.
        broken: file -> what is wrong.
        head: of a line on the terminal.
    """
    name, what = next(iter(broken.items()))
    more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
    console.print(f"{head}: {escape(f'{name} of its result {what}{more}')}: made again", soft_wrap=True)
    for name in broken:
        if not Path(name).is_absolute():
            put_away(folder / name)
    if BEST in broken:  # all epochs are over, and none would bring it back
        put_away(folder / LAST)
    (folder / "stage.json").unlink()


def _carry_out(
    stage: Stage, request: Request, wanted: dict[str, Any], spent: float, kept: Path | None, relay: Relay
) -> None:
    """Run the stage's commands and put the stamp of a finished stage.

    Args:
        stage: what is run.
        request: what the user asked for.
        wanted: its settings.
        spent: seconds that earlier, interrupted calls took.
        kept: where an earlier result was moved to; it comes back if the command leaves nothing.
        relay: runs its commands.
    """
    folder = request.folder / stage.name
    for part in folder.rglob(".*.part"):  # of a call that was killed
        part.unlink(missing_ok=True)
    common = [word for path in stage_configs(stage, request) for word in ("--config", str(path))]
    if request.data_dir is not None:
        common += ["--data.data_dir", request.data_dir]
    started = time.monotonic()
    commands = stage.command(request, [*common, *options_for(stage, request.options)])
    launcher = request.launcher if "trainer" in stage.takes else ()
    for arguments in commands:
        code = relay.run([*(launcher or (sys.executable,)), "-m", "weakmedsam", *arguments])
        write_object(folder / "clock.json", {"seconds": spent + time.monotonic() - started})
        if code in KILLED:
            console.print(f"[bold]{stage.name}[/bold]: its process was killed: {LESS_MEMORY}")
        if code:
            # After a signal launchers give a status of their own.
            _stop(stage, folder, kept, REQUEUE if relay.asked else code)
        if relay.asked and arguments != commands[-1]:
            raise SystemExit(REQUEUE)
    inputs, results = _inputs(stage, request, wanted), mark_results(stage, folder)
    write_object(
        folder / "stage.json",
        {
            "stage": stage.name,
            # Of scans that were copied or touched the same slices come out: what follows stays.
            "made": name_result(stage, wanted, "" if stage.name == "prepare" else inputs, results),
            "settings": wanted,
            "inputs": inputs,
            "results": results,
            "command": " && ".join(f"python -m weakmedsam {shlex.join(words)}" for words in commands),
            "seconds": round(spent + time.monotonic() - started, 1),
            "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            **{
                key: value
                for key, value in (_read(folder / "provenance.json") or {}).items()
                if key in PROVENANCE
            },
        },
    )
    if relay.asked:
        console.print("stopped by a signal. The same command continues with what is not done.")
        raise SystemExit(REQUEUE)


def _stop(stage: Stage, folder: Path, kept: Path | None, code: int) -> NoReturn:
    """Leave after a command that failed; a folder that holds our own notes only is as if it had not been."""
    if {path.name for path in folder.iterdir()} <= {"settings.json", "clock.json", LOCK}:
        shutil.rmtree(folder)
        if kept is not None:
            kept.rename(folder)
            console.print(f"  the earlier result is {folder.name} again")
        console.print(f"[bold]{stage.name}[/bold] did not start.")
    else:
        console.print(f"[bold]{stage.name}[/bold] stopped. {_advice(code)}", soft_wrap=True)
    raise SystemExit(code)


def _advice(code: int) -> str:
    """What to do after a stage's command has ended with a status other than 0."""
    if code == DIVERGED:
        return (
            "The same command would diverge again: change a setting that the message names, and the stage is trained "
            "anew with it."
        )
    if code < 0 or code in (REQUEUE, *KILLED):
        return "The same command continues where it was."
    return "Once that is mended, the same command continues where it was."


def _test_masks(request: Request) -> int | None:
    """How many test cases have an expert mask; None where that is not known."""
    summary = _read(request.folder / "prepare/data.json") or {}
    return summary.get("splits", {}).get("test", {}).get("masked")


def _stamps(stage: Stage, request: Request) -> dict[str, Any]:
    """Which results it reads: others put this one out of date."""
    stamps = {name: _read(request.folder / name / "stage.json") for name in stage.after}
    return {name: stamp.get("made") if stamp else None for name, stamp in stamps.items()}


def _broken_store(folder: Path) -> dict[str, str]:
    """What of the slice store is lost or damaged, and in which way."""
    from data_modules.wholeness import find_broken_files

    summary = _read(folder / "data.json") or {}
    return find_broken_files(Path(summary["store"]).absolute()) if "store" in summary else {}


def _inputs(stage: Stage, request: Request, wanted: dict[str, Any]) -> str:
    summary = _read(request.folder / "prepare/data.json") if stage.name == "prepare" else None
    return digest_inputs(wanted, summary)


def _make_room(folder: Path, wanted: dict[str, Any]) -> Path | None:
    """Move what is there of other settings aside; what was moved aside earlier, of these, comes back.

    Returns:
        Where a result was moved to; None where nothing had to be.
    """
    begun = _read(folder / "settings.json") or (_read(folder / "stage.json") or {}).get("settings")
    if begun is None or begun == wanted:
        return None
    what = "; ".join(changes(begun, wanted)[:5]) or "the stages before it were made anew"
    kept = _set_aside(folder, what)
    for earlier in sorted(folder.parent.glob(f"{folder.name}.old*")):
        if _read(earlier / "settings.json") == wanted:
            console.print(f"  {earlier.name} is of these settings and is taken up again")
            earlier.rename(folder)
            break
    return kept


def _set_aside(folder: Path, what: str) -> Path:
    """Keep a result under another name, and say what has changed; returns the new place."""
    number = 1
    while (kept := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    folder.rename(kept)
    console.print(f"  {folder.name} is out of date ({what}): the earlier result is kept as {kept.name}")
    return kept


def _read(path: Path) -> dict[str, Any] | None:
    """What a stage says of itself, None where it says nothing; a damaged file is named and removed."""
    try:
        found = read_object(path)
        key, kind = HELD.get(path.name, ("", object))
        if found and not isinstance(found.get(key), kind):
            raise DataError(f"{path}: does not hold the {key} of a stage")
    except DataError as error:
        said = str(error).removesuffix(f". {MEND}")
        console.print(f"  {said}: it is put away, and its stage looked at anew", markup=False, soft_wrap=True)
        put_away(path)
        return None
    return found or None


def run(target: str, request: Request) -> None:
    """Bring a target up to date, stage by stage; ``train`` and ``report`` end with the report.

    Raises:
        WeakMedSAMError: a setting or file that is wrong.
        SystemExit: a stage failed, with its status; or a signal has come, with ``REQUEUE``.
    """
    if request.experiment == "sweeps":
        raise ConfigError("EXPERIMENT=sweeps: sweeps lie in a folder of that name; choose another")
    check_rounds(request.options, request.rounds)
    chosen = chosen_stages(target, request.rounds)
    for stage in chosen:  # a file that cannot be read ends the run before the first stage, not before its own
        wanted_settings(stage, request)
    with alone(request.folder) as lock, Relay([lock]).listening() as relay:
        for i, stage in enumerate(chosen, start=1):
            run_stage(stage, request, f"{i}/{len(chosen)}", relay)
        if target in ("train", "report"):
            from weakmedsam.report.cli import summary_table, write_report

            write_report(request.folder)
            summary_table(request.folder)


def main(words: list[str] | None = None) -> None:
    """Parse the command line and run the target."""
    words = sys.argv[1:] if words is None else words
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m weakmedsam.run.pipeline", description="Run the stages of an experiment."
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--experiment", default="default")
    parser.add_argument("--backbone", default="pocket")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--trainer", default=None, help="experiments/trainer/<TRAINER>.yaml")
    parser.add_argument("--logger", default=None, help="experiments/logger/<LOGGER>.yaml")
    parser.add_argument("--rounds", type=int, default=1, help="of pseudo-labels and segmentation network")
    parser.add_argument("--launcher", default="", help="starts a stage's processes, e.g. 'srun python'")
    args = parser.parse_args(words[:split])
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    with ending_in_a_message("where it was", vars(args)):
        options = parse_options(words[split + 1 :])
        request = Request(
            args.dataset,
            args.experiment,
            args.backbone,
            args.data_dir,
            args.runs,
            options,
            args.trainer,
            args.logger,
            tuple(shlex.split(args.launcher)),
            args.rounds,
        )
        run(args.target, request)


if __name__ == "__main__":
    main()
