"""What certified means: which runs, which reports, and which gaps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from syncbn import reports
from syncbn.conformance import ConformanceError
from syncbn.conformance.cases import catalogue
from syncbn.conformance.certification.plan import CERTIFIED, shortfalls, why_not_certified
from tests.conformance.certification.packages import PLAN


@pytest.fixture
def report(passed: Path) -> Any:
    return copy.deepcopy(reports.load(passed / "runs/2/report.json"))


def test_the_runs_of_a_device() -> None:
    assert CERTIFIED.profile == "certify"
    assert CERTIFIED.runs("cpu", None) == CERTIFIED.runs("npu", None) == (1, 2, 4, 8)
    assert CERTIFIED.runs("npu", 8) == (1, 2, 4, 8)
    assert CERTIFIED.runs("npu", 7) == (1, 2, 4)
    assert CERTIFIED.runs("cuda", 2) == (1, 2)
    with pytest.raises(ConformanceError, match="at least 2 for a certificate, got 1"):
        CERTIFIED.runs("npu", 1)
    with pytest.raises(ConformanceError, match="must not be given for cpu, got 4"):
        CERTIFIED.runs("cpu", 4)


def test_a_run_that_counts(report: Any) -> None:
    assert shortfalls(report, PLAN, "decided") == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"profile": "smoke"}, "profile is smoke, not certify"),
        ({"ranks": 3}, "the run has 3 ranks, not 1 or 2"),
        ({"level": "documented"}, "level is documented, not decided"),
        ({"selection": {"clauses": [], "cases": [], "shard": "1/2"}}, "only a part of the cases"),
        ({"summary": {"verdict": "fail"}}, "the verdict of the run is fail"),
        ({"summary": {"verdict": "incomplete"}}, "the verdict of the run is incomplete"),
    ],
)
def test_a_run_that_does_not_count(report: Any, change: Any, reason: str) -> None:
    assert reason in shortfalls(report | change, PLAN, "decided")[0]
    last = why_not_certified(report | change)
    assert last.startswith("not certified: one run")
    assert "needs runs on 1, 2, 4, 8 ranks" in last


def unsupported(clause: str, reason: str, **wanted: Any) -> Any:
    """A report in which the first case of a clause that has some fields is unsupported."""
    for case in catalogue(4, "certify"):
        fields = {"dtypes": "float64" in case.dtypes, "group": "process_group" in case.layer}
        if case.clause == clause and all(fields[name] == value for name, value in wanted.items()):
            row = {"id": case.id, "clause": clause, "spec": case.document}
            return row | {"verdict": "unsupported", "message": reason}
    raise AssertionError("no such case")


FLOAT64 = "Ascend and its kernels have no float64"
RANK_IDS = "the target takes a ProcessGroup, and torch checks the rank ids of that"


@pytest.mark.parametrize(
    ("row", "allowed"),
    [
        (unsupported("NUM-1", FLOAT64, dtypes=True), True),
        (unsupported("FWD-1", FLOAT64, dtypes=False), False),  # the case has no float64
        (unsupported("ERR-5", RANK_IDS, group=True), True),
        (unsupported("FWD-1", RANK_IDS, group=False), False),
        (unsupported("FWD-1", "the layer does not feel like it"), False),
        (unsupported("FWD-1", f"{FLOAT64}, or so"), False),
    ],
)
def test_what_may_be_unsupported(report: Any, row: Any, allowed: bool) -> None:
    report["cases"].append(row)
    found = shortfalls(report, PLAN, "decided")
    assert (found == []) is allowed
    assert allowed or "for a reason that is not on the list" in found[0]


def test_a_clause_of_the_page_must_be_judged(report: Any) -> None:
    for clause in report["clauses"]:
        if clause["id"] in ("FWD-1", "ERR-5", "STAT-3"):
            clause |= {"cases": 1, "unsupported": 1, "verdict": "unsupported", "required": False}
    assert shortfalls(report, PLAN, "decided") == ["FWD-1 is unsupported"]
