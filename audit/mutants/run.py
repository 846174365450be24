"""Runs the suite on the mutants: each must be killed in every clause that it declares.

One pool of ranks serves all mutants of a framework, because the constructor argument `mutant`
selects the mutant. Each case runs on all mutants that its clause has not killed yet, so that the
reference computes the expected results of a case once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from rich.console import Console

from audit.mutants import CONTROL, MUTANTS, show
from audit.mutants.results import FRAMEWORKS, MARKS, NO_CASE, Result, Row
from syncbn.conformance import targets, verdict
from syncbn.conformance.case import Case
from syncbn.conformance.cases import catalogue
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.expected import Expectations, expect
from syncbn.conformance.pool import RankPool
from syncbn.conformance.targets import TargetError

# A mutant hangs if it takes longer than this, and also many times longer than the control.
_HANG_SECONDS = 3.0
_HANG_FACTOR = 20.0
_TRIES = 3

_CASE_SEEDS_PER_SEED = 1000


Progress: TypeAlias = Callable[[Row, str, int], None]  # the row, the clause and the seed


def run(
    framework: str,
    names: Sequence[str],
    *,
    ranks: int,
    seeds: Sequence[int],
    only_declared: bool,
    profile: str,
    progress: Progress,
) -> list[Row]:
    """The rows of the control and of the named mutants that the framework has.

    With the first seed every clause runs on every mutant, unless only_declared. With the other
    seeds only the declared clauses run, and the case that killed a mutant before comes first. A
    case that the control does not pass kills no mutant.
    """
    rows = [
        Row(name, framework, MUTANTS[name].dies_in)
        for name in names
        if framework in MUTANTS[name].frameworks
    ]
    control = Row(CONTROL, framework, ())
    target = targets.parse(f"{framework}:audit.mutants.{framework}:SyncBatchNorm")
    by_clause = _by_clause(ranks, profile)
    with RankPool(target, ranks) as pool:
        suite = _Suite(pool, control, by_clause["GRAD-1"][0], progress)
        for seed in seeds:
            everywhere = seed == seeds[0] and not only_declared
            for clause, cases in by_clause.items():
                chosen = [row for row in rows if everywhere or clause in row.dies_in]
                for row in chosen:
                    row.results[clause, seed] = Result(".") if cases else NO_CASE
                if seed != seeds[0]:
                    for row in chosen:
                        killer = row.results[clause, seeds[0]].case
                        if killer is not None:
                            suite.run_case(killer, seed, [row])
                for case in cases:
                    suite.run_case(case, seed, chosen)
                    if everywhere:
                        suite.control_passes(case, seed)
    return [control, *rows]


def _by_clause(ranks: int, profile: str) -> dict[str, list[Case]]:
    by_clause: dict[str, list[Case]] = {clause: [] for clause in CLAUSES}
    for case in catalogue(ranks, profile):
        # The framework checks rank ids: a mutant is given a process group.
        if "process_group" not in case.layer:
            by_clause[case.clause].append(case)
    return by_clause


class _Proof(NamedTuple):
    """The control passes a case on these ranks."""

    case: Case
    seed: int
    starts: int  # of the pool
    seconds: float  # that a mutant may take


class _Suite:
    """Runs cases on the mutants of one pool of ranks, and on the control before them.

    warm_up: a case of a whole training step, which fresh ranks run first.
    """

    def __init__(self, pool: RankPool, control: Row, warm_up: Case, progress: Progress) -> None:
        self.pool = pool
        self.control = control
        self.warm_up = warm_up
        self.progress = progress
        self._warm_start: int | None = None  # the start of the pool whose ranks are warm
        self._proof: _Proof | None = None
        self._latest: tuple[str, Expectations] = "", []

    def run_case(self, case: Case, seed: int, rows: Sequence[Row]) -> None:
        """Run a case on the mutants that have not been killed in its clause."""
        clause = case.clause
        for row in rows:
            if row.killed(clause, seed) or (_is_slow(case) and clause not in row.dies_in):
                continue
            result = self._run_on_proven_ranks(row, case, seed)
            if result is None:
                return
            if result.mark in ("h", "c"):  # the pool starts fresh ranks for the next mutant
                self._warm_start = self._proof = None
            if result.mark != ".":
                row.results[clause, seed] = result._replace(case=case)  # without the seed's shift
            self.progress(row, clause, seed)

    def control_passes(self, case: Case, seed: int) -> bool:
        result = self._judge(self.control, case, seed)
        if self.control.results.get((case.clause, seed), Result(".")).mark == ".":
            self.control.results[case.clause, seed] = result
        return result.mark == "."

    def _run_on_proven_ranks(self, row: Row, case: Case, seed: int) -> Result | None:
        """The result of a mutant on ranks on which the control passes; None if it never does."""
        result = None
        for _ in range(_TRIES):
            proof = self._prove(case, seed)
            if proof is None:
                return None
            result = self._judge(row, replace(case, deadline=proof.seconds), seed)
            if self.pool.starts == proof.starts:
                break  # otherwise the mutant ran on fresh ranks
        return result

    def _prove(self, case: Case, seed: int) -> _Proof | None:
        """Run the control twice: the first run imports what it needs, the second is timed."""
        if self._proof and self._proof[:3] == (case, seed, self.pool.starts):
            return self._proof
        if self._warm_start != self.pool.starts:
            self._judge(self.control, self.warm_up, seed=0)
            self._warm_start = self.pool.starts
        seconds = case.deadline
        for _ in range(1 if _is_slow(case) else 2):
            start = time.monotonic()
            if not self.control_passes(case, seed):
                return None
            if not _is_slow(case):
                seconds = max(_HANG_SECONDS, _HANG_FACTOR * (time.monotonic() - start))
        self._proof = _Proof(case, seed, self.pool.starts, seconds)
        return self._proof

    def _judge(self, row: Row, case: Case, seed: int) -> Result:
        seeded = replace(case, seed=case.seed + _CASE_SEEDS_PER_SEED * seed)
        outcome = self.pool.run(replace(seeded, layer={**case.layer, "mutant": row.mutant}))
        judged = verdict.judge(seeded, outcome, lambda: self._expected(seeded))
        marks = {"pass": ".", "unsupported": ".", "hang": "h", "crash": "c", "error": "r"}
        mark = marks.get(judged.verdict, "r" if judged.raised else "X")
        return Result(mark, seeded, judged.message)

    def _expected(self, case: Case) -> Expectations:
        """The expected results, computed once for all mutants that run the case."""
        key = replace(case, deadline=Case.deadline).id
        if key != self._latest[0]:
            self._latest = key, expect(case)
        return self._latest[1]


def _is_slow(case: Case) -> bool:
    """Whether the case has a long deadline; it runs only where a mutant must be killed."""
    return case.deadline > Case.deadline


def main(
    *,
    frameworks: Sequence[str],
    names: Sequence[str],
    ranks: int,
    seeds: int,
    only_declared: bool,
    profile: str,
    out: Path | None,
    page: Path | None,
    console: Console,
) -> int:
    """Run, print the table, write the document to `out` and the table into `page`.

    names: the mutants; all if it is empty.

    Returns:
        The exit status: 0 if every mutant was killed where it declares and the control passed.

    Raises:
        TargetError: there is no mutant or framework of that name.
        PageError: the page has no place for the table.
    """
    check_names("framework", frameworks, FRAMEWORKS)
    check_names("mutant", names, MUTANTS)
    start = time.monotonic()
    rows: list[Row] = []
    for framework in frameworks:
        with console.status(f"{framework}: starting {ranks} ranks") as status:

            def progress(row: Row, clause: str, seed: int, framework: str = framework) -> None:
                status.update(f"{framework}: seed {seed}, {clause}, {row.mutant}")

            rows += run(
                framework,
                names or list(MUTANTS),
                ranks=ranks,
                seeds=range(seeds),
                only_declared=only_declared,
                profile=profile,
                progress=progress,
            )
    seconds = time.monotonic() - start
    for framework in frameworks:
        console.print(f"\n{framework}, {ranks} ranks, {seeds} seeds", highlight=False)
        console.print(show.table([row for row in rows if row.framework == framework]))
    console.print(", ".join(f"{mark} {meaning}" for mark, meaning in MARKS.items()))
    for line in show.summary(rows):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"{seconds:.0f} s", highlight=False)
    if out:
        text = json.dumps(show.document(rows, ranks, list(range(seeds)), seconds), indent=1)
        out.write_text(text + "\n")
    if page:
        show.fill(rows, ranks, seeds, page)
    return 1 if any(row.wrong for row in rows) else 0


def check_names(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise TargetError for a name that is not known."""
    for name in names:
        if name not in known:
            raise TargetError(f"{kind} must be one of {', '.join(known)}, got {name!r}")
