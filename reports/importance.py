"""Which failing clause a reader should look at first."""

from __future__ import annotations

# Clauses whose cases repeat the questions of others in a special setting, such as another layout.
# A fault of a step fails them as well, so they come after the clause that the fault is about.
_REPEATING = {
    *("CTOR-5", "CTOR-6", "CTOR-8", "ERR-7", "ERR-8", "ERR-9", "FWD-6", "FWD-7", "FWD-8"),
    *("STAT-7", "NUM-1", "NUM-2", "NUM-3", "NUM-4"),
}
_MOST, _SOME = 2 / 3, 1 / 3


def importance(
    clause: str, failing: int, cases: int, required: bool, place: int
) -> tuple[bool, int, bool, int]:
    """A key that sorts clauses, the most important first.

    Clauses that count come before others, then those of which more than two thirds of the cases
    fail, more than one third, some, none. Among these, clauses that repeat the questions of others
    come last, and otherwise the order of the contract decides: a wrong output comes before the
    gradients and statistics that it spoils.

    Args:
        failing: the number of cases that fail, of `cases`.
        required: whether the clause counts for the verdict.
        place: of the clause in the contract.
    """
    share = failing / cases if cases else 0.0
    level = 0 if share > _MOST else 1 if share > _SOME else 2 if failing else 3
    return not required, level, clause in _REPEATING, place
