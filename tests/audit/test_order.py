"""The first clause of a gate is one that explains the others, on what mutants were seen to fail."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import pytest

from audit.mutants import MUTANTS
from syncbn.conformance.clauses import CLAUSES
from syncbn.reports.baseline import baseline
from syncbn.reports.gate import gate
from syncbn.reports.importance import explained, importance
from syncbn.reports.page import page
from tests.reports.test_reports import case, clause, report_of

# Failing cases of all cases of each clause, in `python -m audit gate` on 4 ranks of Linux x86-64:
# those in which a number is wrong, those with another failure (f), and hangs (h).
SEEN = {
    "EpsClamp": (
        "CTOR-5 1/5, CTOR-6 3/7, CTOR-8 3/7, ERR-7 1/4, ERR-9 1/17, FWD-1 1/10, FWD-2 5/10, "
        "FWD-4 1/11, FWD-5 3/7, FWD-8 13/27, FWD-9 9/20, GRAD-1 3/39, GRAD-2 3/17, GRAD-3 1/11, "
        "GRAD-5 8/30, EVAL-1 7/7, EVAL-2 2/3, EVAL-3 6/6, TRACK-2 3/3, TRACK-3 3/3, NUM-1 4/38, "
        "NUM-2 2/17, NUM-4 3/5"
    ),
    "Float32Output": (
        "CTOR-8 1/7, FWD-4 2f/11, FWD-8 4f/27, GRAD-1 1/39, GRAD-2 1/17, GRAD-5 1/30, NUM-1 "
        "3/38, NUM-2 16f/17"
    ),
    "NewGroupEveryStep": (
        "CTOR-5 1h/5, FWD-5 2h/7, GRAD-1 1h/39, GRAD-2 2h/17, GRAD-5 2h/30, STAT-2 1h/9, STAT-3 "
        "1h/12"
    ),
    "ReadsDyLikeX": ("FWD-9 7/20, GRAD-1 16/39, GRAD-2 2/17, EVAL-3 1/6, NUM-2 4/17"),
    "TracksInEval": (
        "CTOR-5 1/5, CTOR-6 2/7, CTOR-8 4/7, FWD-2 5/10, FWD-8 13/27, FWD-9 5/20, GRAD-2 2/17, "
        "GRAD-3 1/11, GRAD-5 2/30, STAT-6 1/3, EVAL-1 7/7, EVAL-2 1/3, NUM-1 1/38, NUM-2 16/17, "
        "NUM-4 3/5"
    ),
    "WeighsImages": (
        "CTOR-5 2/5, CTOR-6 6/7, CTOR-8 7/7, FWD-3 2/5, FWD-5 2f/7, FWD-6 3/4, FWD-7 5/17, "
        "FWD-8 9/27, FWD-9 3/20, GRAD-1 36+2f/39, GRAD-2 1+2f/17, GRAD-3 8/11, GRAD-4 5/6, "
        "GRAD-5 22+2f/30, STAT-1 3/4, STAT-2 8/9, STAT-3 2f/12, STAT-4 2/2, STAT-7 1/2, TRACK-1 "
        "1/2, TRACK-2 2/3, TRACK-3 2/3, NUM-1 27/38, NUM-2 13/17, NUM-3 6/6, NUM-4 2/5"
    ),
    "ZeroDebias": (
        "CTOR-5 2/5, CTOR-6 6/7, CTOR-8 7/7, ERR-9 11/17, FWD-5 1/7, FWD-8 13/27, STAT-1 2/4, "
        "STAT-2 5/9, STAT-4 2/2, STAT-6 3/3, STAT-7 2/2, NUM-1 1/38, NUM-2 17/17, NUM-4 2/5"
    ),
    "ModifiesInput": (
        "CTOR-5 2/5, CTOR-6 7/7, CTOR-8 5/7, FWD-6 3/4, FWD-8 5+11f/27, FWD-9 3+13f/20, GRAD-1 "
        "39/39, GRAD-2 17/17, GRAD-3 6/11, GRAD-4 6/6, GRAD-5 26/30, STAT-7 1/2, EVAL-2 1/3, "
        "TRACK-1 2/2, TRACK-2 3/3, TRACK-3 3/3, NUM-1 29/38, NUM-3 2/6, NUM-4 4/5"
    ),
    "ReshapesChannels": (
        "CTOR-5 2/5, CTOR-6 6/7, CTOR-8 7/7, ERR-7 1/4, ERR-8 1/16, ERR-9 11/17, FWD-1 9/10, "
        "FWD-2 5/10, FWD-3 5/5, FWD-4 8/11, FWD-5 7/7, FWD-6 3/4, FWD-7 17/17, FWD-8 19/27, "
        "FWD-9 11/20, GRAD-1 39/39, GRAD-2 15/17, GRAD-3 8/11, GRAD-4 6/6, GRAD-5 26/30, STAT-1 "
        "3/4, STAT-2 4/9, STAT-4 2/2, STAT-6 3/3, STAT-7 2/2, EVAL-2 1/3, TRACK-1 2/2, TRACK-2 "
        "3/3, TRACK-3 3/3, NUM-1 25/38, NUM-2 16/17, NUM-4 2/5"
    ),
    "CountInFloat16": ("NUM-1 2/38, NUM-2 1f/17, NUM-3 3+3f/6"),
    "OnePassInFloat16": (
        "CTOR-8 2/7, FWD-4 1/11, FWD-8 2/27, GRAD-3 3/11, GRAD-5 2/30, NUM-2 17/17, NUM-3 4/6"
    ),
    "ScaledGradWeight": (
        "CTOR-5 2/5, CTOR-6 6/7, CTOR-8 6/7, FWD-8 8/27, GRAD-2 14/17, GRAD-3 6/11, GRAD-4 5/6, "
        "STAT-7 1/2, NUM-1 26/38, NUM-2 17/17, NUM-3 6/6, NUM-4 2/5"
    ),
    "LocalBackward": (
        "CTOR-5 2/5, CTOR-6 6/7, CTOR-8 7/7, FWD-6 2/4, FWD-8 9/27, FWD-9 3/20, GRAD-1 38/39, "
        "GRAD-3 5/11, GRAD-4 5/6, GRAD-5 18/30, STAT-7 1/2, TRACK-1 2/2, NUM-1 27/38, NUM-2 "
        "17/17, NUM-3 6/6, NUM-4 2/5"
    ),
    "CountsAbortedSteps": ("ERR-6 5f/10, ERR-7 2f/4, ERR-9 15f/17, STAT-7 1f/2"),
    "StaleStatistics": (
        "CTOR-6 6/7, CTOR-8 6/7, ERR-9 7/17, FWD-8 8/27, GRAD-1 1/39, STAT-7 2/2, TRACK-1 2/2"
    ),
    "BiasedRunningVar": ("CTOR-8 3/7, FWD-8 2/27, STAT-2 9/9, NUM-1 19/38, NUM-2 9/17, NUM-3 1/6"),
    "IgnoresRecomputed": ("FWD-8 1f/27, STAT-3 1f/12, STAT-7 1f/2"),
}


def report(seen: str, fail: bool) -> dict[str, Any]:
    """A report of such cases, or the one in which they pass."""
    clauses, cases = [], []
    for name, failures, total in re.findall("([A-Z]+-[0-9]+) ([0-9+fh]+)/([0-9]+)", seen):
        rows: list[dict[str, Any]] = []
        for count, kind in re.findall("([0-9]+)([fh]?)", failures):
            fields = {"ratio": None if kind else 10.0, "message": "wrong"}
            verdict = "hang" if kind == "h" else "fail"
            rows += [{"verdict": verdict, **fields} for _ in range(int(count))]
        rows += [{} for _ in range(int(total) - len(rows))]
        start = 1000 * (list(CLAUSES).index(name) + 1)
        cases += [
            case(start + place, name, **(row if fail else {})) for place, row in enumerate(rows)
        ]
        clauses.append(clause(name, "fail" if fail else "pass", cases=len(rows)))
    return report_of(clauses, cases)


@pytest.mark.parametrize("mutant", SEEN)
def test_the_first_clause_is_one_in_which_the_mutant_must_die(mutant: str) -> None:
    expected, new = (report(SEEN[mutant], fail) for fail in (False, True))
    gated = gate(baseline(expected), new, today=date(2026, 11, 28))
    assert gated.clauses[0].id in MUTANTS[mutant].dies_in
    _, failures = page([new]).split("<h2>Failures</h2>")
    found = re.search("[A-Z]+-[0-9]+", failures)
    assert found is not None
    assert found[0] == gated.clauses[0].id


@pytest.mark.parametrize(
    ("name", "ratio", "expected"),
    [
        ("FWD-9", 10.0, True),  # a number is wrong, but FWD-9 is about dtypes and formats
        ("FWD-9", "inf", True),
        ("FWD-9", None, False),
        ("FWD-9", 0.5, False),
        ("NUM-2", None, True),  # a dtype is wrong, but NUM-2 is about numbers
        ("NUM-2", 10.0, False),
        ("FWD-1", None, False),
        ("FWD-1", 10.0, False),
    ],
)
def test_what_explains_a_failure(name: str, ratio: Any, expected: bool) -> None:
    assert explained(case(1, name, "fail", ratio=ratio)) is expected
    assert not explained(case(1, name, "hang", ratio=ratio))


def test_a_wrong_output_comes_first_if_more_than_a_third_of_its_cases_fail() -> None:
    gradient = importance("GRAD-1", 38, 39, True, 2)
    assert importance("FWD-3", 2, 5, True, 1) < gradient
    assert importance("FWD-3", 1, 5, True, 1) > gradient
    assert importance("FWD-3", 5, 5, False, 1) > gradient
