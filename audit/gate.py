"""Puts each mutant in the place of a layer and gates it: all must be red, the control green.

The baseline is the report of the control on the same cases. The table also shows which clause
comes first in the summary of the gate, and whether the mutant must die in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from audit.mutants import CONTROL, MUTANTS
from audit.mutants.run import check_names
from syncbn import reports
from syncbn.conformance import report, targets, verdict
from syncbn.conformance.case import Case
from syncbn.conformance.cases import catalogue
from syncbn.conformance.expected import Expectations, expect
from syncbn.conformance.pool import RankPool
from syncbn.conformance.runner import Result
from syncbn.conformance.verdict import Verdict
from syncbn.reports.baseline import baseline
from syncbn.reports.gate import Gated, gate

_MAX_HANGS = 10  # of one mutant; each costs seconds
# A mutant hangs if it takes longer than this, and also many times longer than the control.
_HANG_SECONDS = 3.0
_HANG_FACTOR = 20.0


@dataclass(frozen=True)
class Row:
    """The gate of a mutant.

    first: the clause that comes first in the summary; "" if nothing changed.
    """

    mutant: str
    red: bool
    first: str

    @property
    def right(self) -> bool:
        """Whether the first clause is one in which the mutant must die."""
        return self.first in MUTANTS[self.mutant].dies_in


class Judge:
    """Judges mutants on the cases of a profile, with expected results that are computed once."""

    def __init__(self, pool: RankPool, profile: str) -> None:
        self.pool = pool
        self.profile = profile
        # The framework checks rank ids: a mutant is given a process group. Slow cases take minutes.
        self.cases = [
            case
            for case in catalogue(pool.ranks, profile)
            if "process_group" not in case.layer and case.deadline <= Case.deadline
        ]
        self._expected: dict[str, Expectations] = {}
        self._deadlines: dict[str, float] = {}

    def control(self) -> reports.Report:
        """The report of the control, whose times are the deadlines of the mutants."""
        found = self.report(CONTROL)
        self._deadlines = {
            row["id"]: max(_HANG_SECONDS, _HANG_FACTOR * row["seconds"]) for row in found["cases"]
        }
        return found

    def report(self, mutant: str) -> reports.Report:
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        start = time.monotonic()
        rows = [report.row(result) for result in self._results(mutant)]
        return report.build(
            self.pool,
            rows,
            profile=self.profile,
            level="decided",
            seconds=time.monotonic() - start,
            oracle="the mutants have none",
            run={
                "id": f"{0:016x}",
                "started": started,
                "command": ["python", "-m", "audit", "gate", mutant],
            },
        )

    def _results(self, mutant: str) -> Iterator[Result]:
        hangs = self.pool.hangs
        for case in self.cases:
            if self.pool.hangs - hangs >= _MAX_HANGS:
                reason = f"not run after {_MAX_HANGS} hangs"
                yield Result(case, Verdict("not-run", None, reason), 0.0)
                continue
            start = time.monotonic()
            deadline = self._deadlines.get(case.id, case.deadline)
            layer = {**case.layer, "mutant": mutant}
            outcome = self.pool.run(replace(case, layer=layer, deadline=deadline))
            judged = verdict.judge(case, outcome, partial(self._expect, case))
            yield Result(case, judged, time.monotonic() - start)

    def _expect(self, case: Case) -> Expectations:
        if case.id not in self._expected:
            self._expected[case.id] = expect(case)
        return self._expected[case.id]


def main(
    *,
    framework: str,
    names: Sequence[str],
    ranks: int,
    profile: str,
    out: Path,
    console: Console,
) -> int:
    """Gate the control and each mutant, print a table, and keep their reports.

    Args:
        names: the mutants; all of the framework if it is empty.
        out: the folder of the reports.

    Returns:
        The exit status: 0 if every mutant is red, and the control is green and fails no case.

    Raises:
        TargetError: there is no mutant of that name.
    """
    check_names("mutant", names, MUTANTS)
    mutants = [name for name in names or MUTANTS if framework in MUTANTS[name].frameworks]
    target = targets.parse(f"{framework}:audit.mutants.{framework}:SyncBatchNorm")
    today = datetime.now(timezone.utc).date()
    rows = []
    with RankPool(target, ranks) as pool, console.status(CONTROL) as status:
        judge = Judge(pool, profile)
        pool.start()
        right = judge.control()
        reports.save(right, out / f"{CONTROL}.json")
        expected = baseline(right)
        control = gate(expected, judge.report(CONTROL), today=today)
        for name in mutants:
            status.update(name)
            document = judge.report(name)
            reports.save(document, out / f"{name}.json")
            rows.append(_row(name, gate(expected, document, today=today)))
    console.print(_table(rows))
    failing = sum(row["verdict"] not in ("pass", "unsupported") for row in right["cases"])
    verdict_of_control = "RED" if control.red else "green"
    console.print(f"{CONTROL}: {verdict_of_control}, {failing} cases failed", highlight=False)
    red, declared = sum(row.red for row in rows), sum(row.right for row in rows)
    console.print(
        f"{framework}, {ranks} ranks, {profile}: {red} of {len(rows)} mutants are red; a clause in "
        f"which it must die comes first in {declared}",
        highlight=False,
        soft_wrap=True,
    )
    return 0 if red == len(rows) and not control.red and not failing else 1


def _row(mutant: str, gated: Gated) -> Row:
    return Row(mutant, gated.red, gated.clauses[0].id if gated.clauses else "")


def _table(rows: Sequence[Row]) -> Table:
    table = Table("mutant", "gate", "first clause", "must die in", box=None, pad_edge=False)
    for row in rows:
        first = row.first if row.right else f"{row.first} (not declared)"
        declared = ", ".join(MUTANTS[row.mutant].dies_in)
        table.add_row(row.mutant, "red" if row.red else "GREEN", first, declared)
    return table
