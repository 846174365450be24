"""The results of running the suite on mutants: a mark for each clause and seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from audit.mutants import CONTROL
from syncbn.conformance import frameworks
from syncbn.conformance.case import Case

FRAMEWORKS = tuple(frameworks.FRAMEWORKS)

# The marks of a mutant in a clause, weakest first. Only the marks of KILLS count: an error alone
# may come from any layer, and a crash from anything.
MARKS = {
    ".": "passed or unsupported",
    "-": "no case",
    "r": "only raised",
    "c": "crash",
    "h": "hang",
    "X": "killed",
}
KILLS = ("h", "X")


class Result(NamedTuple):
    """The mark of a mutant in a clause with one seed, and the case that decided it."""

    mark: str
    case: Case | None = None
    message: str | None = None


NO_CASE = Result("-")


@dataclass
class Row:
    """The results of a mutant, or of the control, by clause and seed."""

    mutant: str
    framework: str
    dies_in: tuple[str, ...]
    results: dict[tuple[str, int], Result] = field(default_factory=dict)

    @property
    def wrong(self) -> list[tuple[str, int]]:
        """Where a mutant must be killed and was not, or where the control did not pass."""
        if self.mutant == CONTROL:
            return [at for at, result in self.results.items() if result.mark != "."]
        seeds = sorted({seed for _, seed in self.results})
        return [
            (clause, seed)
            for seed in seeds
            for clause in self.dies_in
            if not self.killed(clause, seed)
        ]

    def killed(self, clause: str, seed: int) -> bool:
        return self.results.get((clause, seed), NO_CASE).mark in KILLS

    def mark(self, clause: str) -> str:
        """The weakest mark of all seeds, or "" if the clause was not run."""
        marks = [result.mark for (name, _), result in self.results.items() if name == clause]
        return min(marks, key=list(MARKS).index, default="")
