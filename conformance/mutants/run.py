"""Runs the suite against the mutants: each must be found, by numbers or facts, in what it declares.

One pool of ranks serves all mutants of a framework: which one a layer is, is one more argument of
its constructor, `mutant` (see torch.py). So the cases come one after the other, each is put to all
mutants that are still to be found in its clause, and the reference is asked once for all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance import targets, verdict
from conformance.case import Case
from conformance.cases import catalogue
from conformance.clauses import CLAUSES
from conformance.expected import Expectations, expect
from conformance.mutants import CONTROL, MUTANTS
from conformance.pool import RankPool
from conformance.targets import TargetError

FRAMEWORKS = ("torch", "mindspore")

# What came of a mutant in a clause, weakest first. A kill is one of KILLS: an exception alone may
# be any layer's, and a crash anybody's.
MARKS = {
    ".": "passed",
    "-": "not asked",
    "r": "only raised",
    "c": "crash",
    "h": "hang",
    "X": "killed",
}
KILLS = ("h", "X")

# What takes longer than this, and many times longer than the control, hangs.
_HANG_SECONDS = 3.0
_HANG_FACTOR = 20.0
_TRIES = 3

_SEEDS_APART = 1000


class Found(NamedTuple):
    """What came of a mutant in a clause with one seed: a mark, and the case that decided it."""

    mark: str
    case: Case | None = None
    message: str | None = None


NOTHING = Found("-")


@dataclass
class Row:
    """A mutant, or the control, and what came of it by clause and seed."""

    mutant: str
    framework: str
    dies_in: tuple[str, ...]
    found: dict[tuple[str, int], Found] = field(default_factory=dict)

    @property
    def wrong(self) -> list[tuple[str, int]]:
        """Where a mutant was not killed and should have been, or the control did not pass."""
        if self.mutant == CONTROL:
            return [at for at, found in self.found.items() if found.mark != "."]
        seeds = sorted({seed for _, seed in self.found})
        return [
            (clause, seed)
            for seed in seeds
            for clause in self.dies_in
            if not self.killed(clause, seed)
        ]

    def killed(self, clause: str, seed: int) -> bool:
        return self.found.get((clause, seed), NOTHING).mark in KILLS

    def mark(self, clause: str) -> str:
        """The weakest mark of all seeds, or nothing if the clause was not asked."""
        marks = [found.mark for (name, _), found in self.found.items() if name == clause]
        return min(marks, key=list(MARKS).index, default="")


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
    target = targets.parse(f"{framework}:conformance.mutants.{framework}:SyncBatchNorm")
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


def table(rows: Sequence[Row]) -> Table:
    """Mutant x clause."""
    asked = [clause for clause in CLAUSES if any(row.mark(clause) for row in rows)]
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("mutant", vertical="bottom", no_wrap=True)
    for clause in asked:
        shown.add_column("\n".join(clause), width=1, vertical="bottom")
    for row in rows:
        marks = (_colored(row, clause) for clause in asked)
        shown.add_row(Text(row.mutant, style="bold red" if row.wrong else ""), *marks)
    return shown


def _colored(row: Row, clause: str) -> Text:
    declared = clause in row.dies_in
    mark = row.mark(clause)
    bad = any(at == clause for at, _ in row.wrong)
    return Text(mark, style="bold red" if bad else "bold green" if declared else "dim")


def summary(rows: Sequence[Row]) -> list[str]:
    """How many were killed in each framework, and every one that was not as it should be."""
    lines = []
    for framework in FRAMEWORKS:
        mine = [row for row in rows if row.framework == framework and row.mutant != CONTROL]
        if mine:
            dead = sum(not row.wrong for row in mine)
            lines.append(f"{framework}: {dead} of {len(mine)} mutants killed")
    for row in rows:
        for clause, seed in row.wrong:
            found = row.found.get((clause, seed), NOTHING)
            what = "CONTROL FAILS" if row.mutant == CONTROL else "SURVIVES"
            detail = f": {found.message}" if found.message else ""
            lines.append(
                f"{what} {row.framework} {row.mutant}, {clause}, seed {seed}: "
                f"{MARKS[found.mark]}{detail}"
            )
    return lines


def document(rows: Sequence[Row], ranks: int, seeds: Sequence[int], seconds: float) -> Any:
    """The rows as JSON values."""
    return {
        "ranks": ranks,
        "seeds": list(seeds),
        "seconds": round(seconds, 1),
        "mutants": [
            {
                "name": row.mutant,
                "framework": row.framework,
                "fault": None if row.mutant == CONTROL else MUTANTS[row.mutant].__doc__,
                "dies_in": list(row.dies_in),
                "as_declared": not row.wrong,
                "found": [
                    {
                        "clause": clause,
                        "seed": seed,
                        "result": MARKS[found.mark],
                        "case": found.case.id if found.case else None,
                        "message": found.message,
                    }
                    for (clause, seed), found in row.found.items()
                ],
            }
            for row in rows
        ],
    }


def main(
    frameworks: Sequence[str],
    names: Sequence[str],
    ranks: int,
    seeds: int,
    only_declared: bool,
    profile: str,
    out: Path | None,
    console: Console,
) -> int:
    """Run, print the table, and write the document to `out`.

    names: of mutants; none are all of them.

    Returns:
        The exit status: 0 if every mutant was killed wherever it should be and the control passed.

    Raises:
        TargetError: there is no mutant or framework of that name.
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
        console.print(table([row for row in rows if row.framework == framework]))
    console.print(", ".join(f"{mark} {meaning}" for mark, meaning in MARKS.items()))
    for line in summary(rows):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"{seconds:.0f} s", highlight=False)
    if out:
        text = json.dumps(document(rows, ranks, list(range(seeds)), seconds), indent=1)
        out.write_text(text + "\n")
    return 1 if any(row.wrong for row in rows) else 0
