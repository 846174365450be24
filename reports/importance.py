"""Which failing clause a reader should look at first: the one that explains the others."""

from __future__ import annotations

from typing import Any

from syncbn.reports.document import THRESHOLD

# What y is. A wrong y also spoils the gradients, the statistics, and every special setting.
_OUTPUT = {"FWD-1", "FWD-2", "FWD-3", "FWD-4", "FWD-5", "FWD-9", "EVAL-1"}
# Clauses whose cases repeat the questions of others in a special setting, such as another layout.
# A fault of a step fails them as well, so they come after the clause that the fault is about.
_REPEATING = {
    *("CTOR-5", "CTOR-6", "CTOR-8", "ERR-7", "ERR-8", "ERR-9", "FWD-6", "FWD-7", "FWD-8"),
    *("STAT-7", "NUM-1", "NUM-2", "NUM-3", "NUM-4"),
}
# Clauses about numbers alone, and clauses about none: dtypes, formats, names, errors, collectives.
_OF_NUMBERS = {"NUM-1", "NUM-2", "NUM-3", "NUM-4"}
_OF_FACTS = {
    *("CTOR-1", "CTOR-2", "CTOR-3", "CTOR-4", "CTOR-5", "CTOR-7", "FWD-9", "COMM-1"),
    *("ERR-1", "ERR-2", "ERR-3", "ERR-4", "ERR-5", "ERR-6", "ERR-7", "ERR-8", "ERR-9"),
}
_MOST, _SOME = 2 / 3, 1 / 3


def explained(case: Any) -> bool:
    """Whether a failing case of a report fails in something that its clause is not about.

    Then a clause that is about it explains the failure. A number is wrong in a case whose ratio is
    above the threshold; a fact is wrong, such as a dtype, in any other case that fails.
    """
    if case["verdict"] != "fail":
        return False
    number = case["ratio"] is not None and float(case["ratio"]) > THRESHOLD
    return case["clause"] in (_OF_FACTS if number else _OF_NUMBERS)


def importance(
    clause: str, failing: int, cases: int, required: bool, place: int
) -> tuple[bool, bool, int, bool, int]:
    """A key that sorts clauses, the most important first.

    Clauses that count come before others. Among these, clauses about the output come first if more
    than a third of their cases fail. Then the share decides: more than two thirds of the cases,
    more than one third, some, none. Last, clauses that repeat the questions of others come after
    these, and otherwise the order of the contract decides.

    Args:
        failing: the number of cases that fail and are not `explained`, of `cases`.
        required: whether the clause counts for the verdict.
        place: of the clause in the contract.
    """
    share = failing / cases if cases else 0.0
    level = 0 if share > _MOST else 1 if share > _SOME else 2 if failing else 3
    spoils = clause in _OUTPUT and share > _SOME
    return not required, not spoils, level, clause in _REPEATING, place
