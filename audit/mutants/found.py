"""What came of a mutant: a mark for each clause and seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from audit.mutants import CONTROL
from syncbn.conformance.case import Case

FRAMEWORKS = ("torch", "mindspore")

# What came of a mutant in a clause, weakest first. A kill is one of KILLS: an exception alone may
# be any layer's, and a crash anybody's.
MARKS = {
    ".": "passed or unsupported",
    "-": "not asked",
    "r": "only raised",
    "c": "crash",
    "h": "hang",
    "X": "killed",
}
KILLS = ("h", "X")


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
