"""Runs a study: its runs one after another, each by the pipeline, and the page after each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from rich.console import Console

from weakmedsam.report.summary import DASH
from weakmedsam.run import pipeline
from weakmedsam.study.definition import Plan, StudyRun
from weakmedsam.study.page import PAGE, Shown, write_study
from weakmedsam.study.results import RunResult, is_finished, read_result
from weakmedsam.system.file_lock import alone
from weakmedsam.system.library_errors import explain
from weakmedsam.system.signals import REQUEUE, Relay

console = Console(highlight=False)

Starter = Callable[[Sequence[int]], Relay]
"""Makes what runs the stages' commands, of the locks that these keep."""


def run_study(plan: Plan, seeds: Collection[int], relay_class: Starter = Relay) -> list[RunResult]:
    """Bring the runs of a study up to date and its page with them; a run that fails does not keep up the others.

    Args:
        plan: of the study.
        seeds: of the runs that are run now; the page shows those of other seeds as they are.
        relay_class: what runs the stages' commands.

    Returns:
        The runs that failed.

    Raises:
        WeakMedSAMError: another process runs the study, or its page cannot be written.
        SystemExit: a signal has come; status ``REQUEUE``.
    """
    with alone(plan.folder) as lock, relay_class([lock]).listening() as relay:

        def starter(held: Sequence[int]) -> Relay:
            return relay_class([*held, lock])  # a stage that outlives this process keeps the study, too

        for said in plan.left_out:
            console.print(said, markup=False, soft_wrap=True)
        results = {run.name: read_result(run) for run in plan.runs}
        shown = write_study(plan, list(results.values()))
        chosen = [run for run in plan.runs if run.seed in seeds]
        for number, run in enumerate(chosen, start=1):
            if relay.asked:  # it came between two runs
                raise SystemExit(REQUEUE)
            head = f"{number}/{len(chosen)} {run.name}"
            if is_finished(results[run.name]):
                console.print(f"{head}: up to date", markup=False, soft_wrap=True)
                continue
            console.print(f"\n[bold]{head}[/bold]", soft_wrap=True)
            failed = _run_targets(run, starter)
            results[run.name] = read_result(run, failed)
            shown = write_study(plan, list(results.values()))
    _summarise(plan, shown)
    return [one for one in results.values() if one.failed]


def _run_targets(run: StudyRun, starter: Starter) -> str:
    """Run the targets of a run; returns how it failed, empty where it did not.

    Raises:
        SystemExit: a signal has come; status ``REQUEUE``.
    """
    failures = []
    for target in run.targets:
        try:
            pipeline.run(target, run.request, starter)
        except SystemExit as left:
            if left.code == REQUEUE:
                raise
            failures.append(f"{target}: exit status {left.code}")
        except Exception as error:
            meant = explain(error, {})
            if meant is None:
                raise
            failures.append(f"{target}: {meant}")
    for said in failures:
        console.print(f"{run.name} failed, {said}", markup=False, soft_wrap=True)
    return "; ".join(failures)


def _summarise(plan: Plan, shown: Sequence[Shown]) -> None:
    """Print the final Dice of the first variant, and where the page is."""
    first = next(iter(plan.study.variants))
    console.print()
    for one in shown:
        if one.row.variant == first and one.row.final:
            share = f", {one.share} % of the upper bound" if one.share != DASH else ""
            dice = f"{one.row.final} {one.cells[one.row.final]}{share}"
            console.print(f"{one.row.set_name}, {one.row.name}: {dice}", markup=False)
    console.print(f"study: {plan.folder / PAGE}", style="bold", markup=False, soft_wrap=True)
