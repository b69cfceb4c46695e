"""Chains the stages of a run: ``weakmedsam train --dataset phantom``.

Every stage is a LightningCLI command of its own; ``stage_state`` decides which are out of date, this file runs them.
It imports neither torch nor Lightning, so a run that is up to date says so at once.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from weakmedsam.errors import DIVERGED, LESS_MEMORY, ConfigError, DataError
from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.run.overrides import check_rounds, options_for, parse_options, wanted_settings
from weakmedsam.run.request import CHECK, Request, keep_request
from weakmedsam.run.stage_state import (
    DONE,
    INTERRUPTED,
    NOT_NEEDED,
    OUT_OF_DATE,
    StageState,
    finished_note,
    read_note,
    settings_of,
    state_of,
)
from weakmedsam.run.stages import TARGETS, Stage, chosen_stages, stage_configs
from weakmedsam.system.atomic_io import put_away
from weakmedsam.system.file_lock import LOCK, alone
from weakmedsam.system.json_files import REMOVE_STATE, write_object
from weakmedsam.system.progress import VERBOSE
from weakmedsam.system.signals import KILLED, REQUEUE, Relay

console = Console(highlight=False)

BEST, LAST = "checkpoints/best.ckpt", "checkpoints/last.ckpt"
"""Of a stage that trains."""

PROVENANCE = ("versions", "git", "command", "data")
"""What ``stage.json`` takes over from ``provenance.json``."""
SHOWN_REASONS = 5
"""How many reasons the terminal shows; ``stage.json`` keeps all."""


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
    for name in ("stage.json", "settings.json", "clock.json"):
        _read(folder / name)  # names and puts away what is damaged
    state, kept = state_of(stage, request), None
    reasons = state.reasons
    if state.state == OUT_OF_DATE and not state.broken and not (stage.in_place and folder.is_dir()):
        kept = _set_aside(folder, state.reasons)
        state = _take_up_earlier(stage, request)
    if state.state in (DONE, NOT_NEEDED):
        console.print(f"{head}: {'; '.join(state.reasons) or 'up to date'}")
        if state.state == DONE and not read_note(folder / "settings.json"):
            write_object(folder / "settings.json", settings_of(stage, request))
        return
    begun = state.state == INTERRUPTED or (state.state == OUT_OF_DATE and kept is None)
    console.print(f"{head}: {stage.title}{' (continued)' if begun else ''}")
    if kept is None:
        _say(_shorten(reasons))
    if state.broken:
        _clear_away(folder, state)
    clock = read_note(folder / "clock.json") if begun else {}
    reasons = reasons or tuple(clock.get("reasons", ()))
    wanted = settings_of(stage, request)
    write_object(folder / "settings.json", wanted)
    spent = clock.get("seconds", 0.0)
    write_object(folder / "clock.json", {"seconds": spent, "reasons": reasons})
    _carry_out(stage, request, wanted, kept, relay)


def _clear_away(folder: Path, state: StageState) -> None:
    """Make room for what of a result is lost or damaged; the stage is then one that was interrupted."""
    for name in state.broken:
        if not Path(name).is_absolute():  # what lies in the store is looked at by the command
            put_away(folder / name)
    if BEST in state.broken:  # all epochs are over, and none would bring it back
        put_away(folder / LAST)
    (folder / "stage.json").unlink()


def _carry_out(stage: Stage, request: Request, wanted: dict[str, Any], kept: Path | None, relay: Relay) -> None:
    """Run the stage's commands and put the stamp of a finished stage.

    Args:
        stage: what is run.
        request: what the user asked for.
        wanted: its settings.
        kept: where an earlier result was moved to; it comes back if the command leaves nothing.
        relay: runs its commands.
    """
    folder = request.folder / stage.name
    for part in folder.rglob(".*.part"):  # of a call that was killed
        part.unlink(missing_ok=True)
    common = [word for path in stage_configs(stage, request) for word in ("--config", str(path))]
    if request.data_dir is not None:
        common += ["--data.data_dir", request.data_dir]
    clock = read_note(folder / "clock.json")
    started = time.monotonic() - clock["seconds"]  # as if the earlier, interrupted calls had gone before
    commands = stage.command(request, [*common, *options_for(stage, request.options)])
    launcher = request.launcher if "trainer" in stage.takes else ()
    for arguments in commands:
        starts = launcher if launcher and arguments[0] != "review" else (sys.executable,)
        code = relay.run([*starts, "-m", "weakmedsam", *arguments])
        write_object(folder / "clock.json", clock | {"seconds": time.monotonic() - started})
        if code and console.is_terminal:
            console.print()  # its process may have ended within the line of its bar
        if code in KILLED:
            console.print(f"[bold]{stage.name}[/bold]: its process was killed: {LESS_MEMORY}")
        if code:
            # After a signal launchers give a status of their own.
            _stop(stage, folder, kept, REQUEUE if relay.asked else code)
        if relay.asked and arguments != commands[-1]:
            raise SystemExit(REQUEUE)
    write_object(
        folder / "stage.json",
        {
            "stage": stage.name,
            **finished_note(stage, folder, wanted),
            "reasons": clock["reasons"],
            "command": " && ".join(f"python -m weakmedsam {shlex.join(words)}" for words in commands),
            "seconds": round(time.monotonic() - started, 1),
            "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            **{key: value for key, value in _read(folder / "provenance.json").items() if key in PROVENANCE},
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


def _take_up_earlier(stage: Stage, request: Request) -> StageState:
    """Where a result that was set aside earlier is of the settings and inputs of now, it comes back.

    Returns:
        The state of the stage's folder, which is not there.
    """
    folder = request.folder / stage.name
    for earlier in sorted(folder.parent.glob(f"{folder.name}.old*")):
        state = state_of(stage, request, earlier)
        if state.state in (DONE, INTERRUPTED) and (earlier / "settings.json").is_file():
            console.print(f"  {earlier.name} is of these settings and is taken up again")
            earlier.rename(folder)
            return state
    return state_of(stage, request)


def _set_aside(folder: Path, reasons: tuple[str, ...]) -> Path:
    """Keep a result under another name, and say what has changed; returns the new place."""
    number = 1
    while (kept := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    folder.rename(kept)
    _say([f"{folder.name} is out of date ({'; '.join(_shorten(reasons))}): the earlier result is kept as {kept.name}"])
    return kept


def _shorten(reasons: tuple[str, ...]) -> list[str]:
    more = len(reasons) - SHOWN_REASONS
    return [*reasons[:SHOWN_REASONS], *([f"and {more} more"] if more > 0 else [])]


def _say(lines: list[str]) -> None:
    for line in lines:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _read(path: Path) -> dict[str, Any]:
    """What a stage says of itself, nothing where it says nothing; a damaged file is named and removed."""
    try:
        return read_note(path, strict=True)
    except DataError as error:
        said = str(error).removesuffix(f". {REMOVE_STATE}")
        _say([f"{said}: it is put away, and its stage looked at anew"])
        put_away(path)
        return {}


def run(target: str, request: Request, relay_class: Callable[[Sequence[int]], Relay] = Relay) -> None:
    """Bring a target up to date, stage by stage; ``train`` and ``report`` end with the report.

    ``train`` leaves a report that shows the run as it is; ``report`` always writes it.

    Args:
        target: one of ``TARGETS``.
        request: what the user asked for.
        relay_class: makes what runs the stages' commands, of the locks that these keep.

    Raises:
        WeakMedSAMError: a setting or file that is wrong.
        SystemExit: a stage failed, with its status; or a signal has come, with ``REQUEUE``.
    """
    if request.experiment in ("sweeps", CHECK):
        what = "the check lies" if request.experiment == CHECK else "sweeps lie"
        raise ConfigError(f"EXPERIMENT={request.experiment}: {what} in a folder of that name; choose another")
    check_rounds(request.options, request.rounds)
    chosen = chosen_stages(target, request.rounds)
    for stage in chosen:  # a file that cannot be read ends the run before the first stage, not before its own
        wanted_settings(stage, request)
    with alone(request.folder) as lock, relay_class([lock]).listening() as relay:
        if chosen:
            keep_request(request)
        for i, stage in enumerate(chosen, start=1):
            run_stage(stage, request, f"{i}/{len(chosen)}", relay)
        if target in ("train", "report"):
            from weakmedsam.report.cli import REPORT, summary_table, write_report
            from weakmedsam.report.page_mark import is_up_to_date

            if target == "report" or not is_up_to_date(request.folder / REPORT):
                write_report(request.folder)
            summary_table(request.folder)


def main(words: list[str] | None = None, relay_class: type[Relay] = Relay) -> None:
    """Parse the command line and run the target; see ``run``."""
    words = sys.argv[1:] if words is None else words
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="weakmedsam", description="Run the stages of an experiment.")
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
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show model summaries and the libraries' notices, too"
    )
    args = parser.parse_args(words[:split])
    os.environ[VERBOSE] = "1" if args.verbose else os.environ.get(VERBOSE, "0")
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
        run(args.target, request, relay_class)


if __name__ == "__main__":
    main()
