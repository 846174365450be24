"""Run cases with a progress bar on a terminal, or with a line now and then elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from syncbn.conformance import runner
from syncbn.conformance.case import Case
from syncbn.conformance.pool import RankPool
from syncbn.conformance.runner import Recorder, Result
from syncbn.reports.console import PatientConsole

_CASES_A_LINE = 50


class Enough(Exception):
    """Raised by `keep` to end a run."""


def run(
    pool: RankPool,
    cases: Sequence[Case],
    oracle: RankPool | str,
    max_hangs: int,
    keep: Callable[[Result], None],
    record: Recorder | None = None,
) -> None:
    """Start the ranks and run the cases.

    Args:
        pool: the ranks of the target.
        cases: in the order of the run.
        oracle: the ranks of the oracle, or why there is none.
        max_hangs: see syncbn.conformance.runner.run.
        keep: called with each result as it comes; Enough from it ends the run.
        record: see syncbn.conformance.runner.run.
    """
    console = PatientConsole(stderr=True, highlight=False)
    console.print(f"{pool.target.name}: starting {pool.ranks} ranks")
    pool.start()
    if isinstance(oracle, RankPool):
        console.print(f"oracle {oracle.target.name}: starting {oracle.ranks} ranks")
        oracle.start()
    else:
        console.print(f"no oracle: {oracle}")
    bar = Progress(
        TextColumn("{task.fields[clause]:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} not passed"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    failed = done = 0
    with bar:
        task = bar.add_task("", total=len(cases), clause="", failed=0)

        def progress(result: Result) -> None:
            nonlocal failed, done
            done += 1
            failed += result.verdict.verdict != "pass"
            keep(result)
            bar.update(task, advance=1, clause=result.case.clause, failed=failed)
            if not console.is_terminal and done % _CASES_A_LINE == 0:
                console.print(f"{done} of {len(cases)} cases, {failed} not passed")

        ranks_of_oracle = oracle if isinstance(oracle, RankPool) else None
        with contextlib.suppress(Enough):
            runner.run(pool, cases, progress, ranks_of_oracle, max_hangs, record)
