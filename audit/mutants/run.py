"""Runs the suite against the mutants: each must be found, by numbers or facts, in what it declares.

One pool of ranks serves all mutants of a framework: which one a layer is, is one more argument of
its constructor, `mutant` (see torch.py). So the cases come one after the other, each is put to all
mutants that are still to be found in its clause, and the reference is asked once for all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from rich.console import Console

from audit.mutants import CONTROL, MUTANTS, show
from audit.mutants.found import FRAMEWORKS, MARKS, NOTHING, Found, Row
from syncbn.conformance import targets, verdict
from syncbn.conformance.case import Case
from syncbn.conformance.cases import catalogue
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.expected import Expectations, expect
from syncbn.conformance.pool import RankPool
from syncbn.conformance.targets import TargetError

# What takes longer than this, and many times longer than the control, hangs.
_HANG_SECONDS = 3.0
_HANG_FACTOR = 20.0
_TRIES = 3

_SEEDS_APART = 1000


Progress: TypeAlias = Callable[[Row, str, int], None]  # who was asked, in which clause and seed


def run(
    framework: str,
    names: Sequence[str],
    ranks: int,
    seeds: Sequence[int],
    only_declared: bool,
    profile: str,
    progress: Progress,
) -> list[Row]:
    """What comes of the mutants of these names that the framework has, and of the control.

    The first seed asks every clause, unless only_declared; the others ask those that a mutant
    declares, and first the case that killed it before. A case that the control does not pass
    kills nobody.
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
                asked = [row for row in rows if everywhere or clause in row.dies_in]
                for row in asked:
                    row.found[clause, seed] = Found(".") if cases else NOTHING
                if seed != seeds[0]:
                    for row in asked:
                        killer = row.found[clause, seeds[0]].case
                        if killer is not None:
                            suite.put(killer, seed, [row])
                for case in cases:
                    suite.put(case, seed, asked)
                    if everywhere:
                        suite.passes(case, seed)
    return [control, *rows]


def _by_clause(ranks: int, profile: str) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {clause: [] for clause in CLAUSES}
    for case in catalogue(ranks, profile):
        # Rank ids are the framework's to check, whose process group a mutant is given.
        if "process_group" not in case.layer:
            found[case.clause].append(case)
    return found


class _Proof(NamedTuple):
    """That the control passes a case on these ranks, and how long a mutant may take for it."""

    case: Case
    seed: int
    starts: int  # of the pool
    seconds: float


class _Suite:
    """Puts cases to mutants on one pool of ranks, and to the control before them.

    step: any case of a whole training step, to warm up with.
    """

    def __init__(self, pool: RankPool, control: Row, step: Case, progress: Progress) -> None:
        self.pool = pool
        self.control = control
        self.step = step
        self.progress = progress
        self._warm = 0  # the start of the pool whose ranks have taken the step
        self._proof: _Proof | None = None
        self._latest: tuple[str, Expectations] = "", []

    def put(self, case: Case, seed: int, rows: Sequence[Row]) -> None:
        """Put a case to those of the mutants that have not been killed in its clause."""
        clause = case.clause
        for row in rows:
            if row.killed(clause, seed) or (_is_slow(case) and clause not in row.dies_in):
                continue
            found = self._try(row, case, seed)
            if found is None:
                return
            if found.mark in ("h", "c"):  # the next ones get fresh ranks
                self._warm, self._proof = 0, None
            if found.mark != ".":
                row.found[clause, seed] = found._replace(case=case)
            self.progress(row, clause, seed)

    def _try(self, row: Row, case: Case, seed: int) -> Found | None:
        """What comes of a mutant on the very ranks that the control passes on; None if none."""
        found = None
        for _ in range(_TRIES):
            proof = self._prove(case, seed)
            if proof is None:
                return None
            found = self._ask(row, replace(case, deadline=proof.seconds), seed)
            if self.pool.starts == proof.starts:
                break  # or the mutant was given fresh ranks
        return found

    def _prove(self, case: Case, seed: int) -> _Proof | None:
        """The control takes the case: once to import what it needs, and once to show its pace."""
        if self._proof and self._proof[:3] == (case, seed, self.pool.starts):
            return self._proof
        if self._warm != self.pool.starts or not self._warm:
            self._ask(self.control, self.step, seed=0)
            self._warm = self.pool.starts
        seconds = case.deadline
        for _ in range(1 if _is_slow(case) else 2):
            begin = time.monotonic()
            if not self.passes(case, seed):
                return None
            if not _is_slow(case):
                seconds = max(_HANG_SECONDS, _HANG_FACTOR * (time.monotonic() - begin))
        self._proof = _Proof(case, seed, self.pool.starts, seconds)
        return self._proof

    def passes(self, case: Case, seed: int) -> bool:
        """Whether the control does."""
        found = self._ask(self.control, case, seed)
        if self.control.found.get((case.clause, seed), Found(".")).mark == ".":
            self.control.found[case.clause, seed] = found
        return found.mark == "."

    def _ask(self, row: Row, case: Case, seed: int) -> Found:
        case = replace(case, seed=case.seed + _SEEDS_APART * seed)
        outcome = self.pool.run(replace(case, layer={**case.layer, "mutant": row.mutant}))
        judged = verdict.judge(case, outcome, lambda: self._expected(case))
        marks = {"pass": ".", "unsupported": ".", "hang": "h", "crash": "c"}
        mark = marks.get(judged.verdict, "r" if judged.raised else "X")
        return Found(mark, case, judged.message)

    def _expected(self, case: Case) -> Expectations:
        """The reference's, made once for all who take the case."""
        key = replace(case, deadline=Case.deadline).id
        if key != self._latest[0]:
            self._latest = key, expect(case)
        return self._latest[1]


def _is_slow(case: Case) -> bool:
    """Whether the case has a deadline of its own, and is put only where a mutant must die."""
    return case.deadline > Case.deadline


def main(
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

    names: of mutants; none are all of them.

    Returns:
        The exit status: 0 if every mutant was killed wherever it should be and the control passed.

    Raises:
        TargetError: there is no mutant or framework of that name.
        PageError: the page has no place for the table.
    """
    for what, known, given in (
        ("framework", FRAMEWORKS, frameworks),
        ("mutant", MUTANTS, names),
    ):
        if unknown := [name for name in given if name not in known]:
            raise TargetError(f"{what} must be one of {', '.join(known)}, got {unknown[0]!r}")
    start = time.monotonic()
    rows: list[Row] = []
    for framework in frameworks:
        with console.status(f"{framework}: starting {ranks} ranks") as status:

            def progress(row: Row, clause: str, seed: int, name: str = framework) -> None:
                status.update(f"{name}: seed {seed}, {clause}, {row.mutant}")

            chosen = names or list(MUTANTS)
            rows += run(framework, chosen, ranks, range(seeds), only_declared, profile, progress)
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
