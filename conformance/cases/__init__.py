"""The cases of the suite, clause by clause, for any number of ranks.

Shards differ between ranks, dy is random, uneven and empty shards are ordinary. A case checks what
its clause says and no more, so that a layer with one fault fails the clauses of that fault.
"""

from __future__ import annotations

import json
from pathlib import Path

from syncbn.conformance.case import Case, of_document
from syncbn.conformance.cases import (  # noqa: F401  # importing them registers their cases
    construction,
    errors,
    evaluation,
    forward,
    gradients,
    numerics,
    statistics,
    sweeps,
)
from syncbn.conformance.cases.build import BUILDERS, SWEEPS
from syncbn.conformance.clauses import CLAUSES

# Each profile holds the ones before it.
PROFILES = ("smoke", "certify", "full")

REGRESSIONS = Path(__file__).resolve().parent.parent / "regressions"


def catalogue(ranks: int, profile: str = "full") -> list[Case]:
    """The cases of a profile, clause by clause.

    Args:
        ranks: the number of ranks.
        profile: "smoke" is the first case of each clause. "certify" is every case that was written
            by hand, and the regressions. "full" adds sweeps over all combinations of shapes,
            dtypes, layouts and more.
    """
    all_regressions = regressions(ranks)
    by_id: dict[str, Case] = {}  # on few ranks, different builders make the same case
    for clause in CLAUSES:
        drafts = list(BUILDERS[clause](ranks)) if clause in BUILDERS else []
        if profile == "full" and clause in SWEEPS:
            drafts += SWEEPS[clause](ranks)
        cases = [Case(clause=clause, ranks=ranks, **draft) for draft in drafts]
        cases += [case for case in all_regressions if case.clause == clause]
        for case in cases[:1] if profile == "smoke" else cases:
            by_id.setdefault(case.id, case)
    return list(by_id.values())


def regressions(ranks: int) -> list[Case]:
    """The cases on this many ranks that syncbn.conformance.explore found; each showed a fault."""
    cases = [
        of_document(json.loads(path.read_text())) for path in sorted(REGRESSIONS.glob("*.json"))
    ]
    return [case for case in cases if case.ranks == ranks]


def why_none(clause: str, ranks: int) -> str:
    """Why a clause has no case on this many ranks."""
    return CLAUSES[clause].not_run or f"needs more than {ranks} rank{'s' * (ranks > 1)}"
