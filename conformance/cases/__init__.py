"""The cases of the suite, clause by clause, for any number of ranks.

Shards differ per rank, dy is random, uneven and empty shards are ordinary. A case checks what its
clause says and no more, so that a layer with one fault fails the clauses of that fault.
"""

from __future__ import annotations

from conformance.case import Case
from conformance.cases import (  # noqa: F401  # importing them registers their cases
    construction,
    errors,
    evaluation,
    forward,
    gradients,
    numerics,
    statistics,
)
from conformance.cases.build import BUILDERS
from conformance.clauses import CLAUSES

PROFILES = ("smoke", "full")


def catalogue(ranks: int, profile: str = "full") -> list[Case]:
    """The cases of a profile: all of them, or (smoke) the first of each clause."""
    found = []
    for clause in CLAUSES:
        if clause in BUILDERS:
            drafts = list(BUILDERS[clause](ranks))
            chosen = drafts if profile == "full" else drafts[:1]
            found += [Case(clause=clause, ranks=ranks, **draft) for draft in chosen]
    return found


def why_none(clause: str, ranks: int) -> str:
    """Why a clause has no case on this many ranks."""
    return CLAUSES[clause].not_run or f"needs more than {ranks} rank{'s' * (ranks > 1)}"
