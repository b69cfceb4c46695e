"""The stages of a run, which are done and which not, and why: ``weakmedsam status --dataset cardiac``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weakmedsam.run.cli_errors import ending_in_a_message
from weakmedsam.run.request import Request, recorded_request
from weakmedsam.run.stage_state import DONE, NOT_NEEDED, NOT_RUN, read_note, states_of
from weakmedsam.run.stages import STAGES, Stage, another_round, chosen_stages

_STYLES = {DONE: "green", NOT_NEEDED: "green", NOT_RUN: "dim"}
STATUS_REASONS = 5
"""How many reasons of a stage are shown; ``stage.json`` keeps those for which it was run."""


def known_stages(request: Request) -> list[Stage]:
    """The stages that ``make train`` runs, and others that the run has."""
    chosen = chosen_stages("train", request.rounds)
    beside = [stage for stage in STAGES if stage not in chosen and (request.folder / stage.name).exists()]
    number = request.rounds + 1
    while any((request.folder / stage.name).exists() for stage in another_round(number)):
        beside += another_round(number)
        number += 1
    return [*chosen, *beside]


def status_table(request: Request) -> Table:
    """Every stage's state, when it finished, and why it is to be run, or, of a finished one, why it was run again."""
    table = Table(title=f"{request.dataset} / {request.experiment}", title_justify="left")
    for column in ("stage", "state", "finished", "reason"):
        table.add_column(column, overflow="fold")
    for name, (state, reasons, _) in states_of(known_stages(request), request).items():
        note = read_note(request.folder / name / "stage.json")
        shown = reasons or tuple(note.get("reasons") or ())
        more = [f"and {len(shown) - STATUS_REASONS} more"] if len(shown) > STATUS_REASONS else []
        finished = str(note.get("finished") or "")[:16].replace("T", " ")
        text = escape("\n".join([*shown[:STATUS_REASONS], *more]))
        table.add_row(name, state, finished, text, style=_STYLES.get(state, "yellow"))
    return table


def main(words: list[str] | None = None) -> None:
    """Print the table, under the options of the run's last command."""
    parser = argparse.ArgumentParser(prog="weakmedsam status", description="Show the state of a run's stages.")
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--experiment", default="default")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args(words)
    with ending_in_a_message("from the start"):
        Console(highlight=False).print(status_table(recorded_request(args.runs, args.dataset, args.experiment)))


if __name__ == "__main__":
    main()
