"""The report of a run passes if, and only if, every clause that counts passed in all its cases."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from syncbn.conformance import report, targets
from syncbn.conformance.cases import catalogue
from syncbn.conformance.pool import RankPool
from syncbn.conformance.runner import Result
from syncbn.conformance.verdict import Verdict

RANKS = 2
CASES = catalogue(RANKS, "smoke")
RUN = {"id": "0" * 16, "started": "2026-11-27T21:00:00+00:00", "command": []}
DOCUMENTED, DECIDED = "FWD-1", "FWD-3"


def report_of(verdicts: dict[str, str], level: str = "decided") -> dict[str, Any]:
    """The report of a run in which every case passed, except one of each clause named."""
    results = [Result(c, Verdict(verdicts.get(c.clause, "pass"), 0.5, "m"), 0.1) for c in CASES]
    results += [Result(c, Verdict("pass", 0.25), 0.1) for c in CASES]
    pool = RankPool(targets.parse("syncbn.torch"), RANKS)
    rows = [report.row(result) for result in results]
    return report.build(
        pool, rows, profile="smoke", level=level, seconds=1.0, oracle="--oracle none", run=RUN
    )


def clause(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (one for one in document["clauses"] if one["id"] == name)
    row: dict[str, Any] = found
    return row


def test_a_run_in_which_all_cases_pass_passes() -> None:
    document = report_of({})
    assert document["summary"]["verdict"] == "pass"
    assert document["summary"]["cases"]["pass"] == 2 * len(CASES)
    assert clause(document, DOCUMENTED)["required"]
    assert clause(document, DOCUMENTED)["worst_ratio"] == 0.5


@pytest.mark.parametrize("bad", ["fail", "hang", "crash"])
@pytest.mark.parametrize("name", [DOCUMENTED, DECIDED])
def test_one_bad_case_fails_the_run(name: str, bad: str) -> None:
    document = report_of({name: bad})
    assert document["summary"]["verdict"] == "fail"
    assert clause(document, name)["verdict"] == bad
    assert clause(document, name)["reason"] == "m"
    assert document["summary"]["cases"][bad] == 1


def test_a_run_with_an_error_has_no_verdict() -> None:
    document = report_of({DOCUMENTED: "fail", DECIDED: "error"}, "documented")
    assert document["summary"]["verdict"] == "error"
    assert document["summary"]["cases"]["error"] == 1


def test_a_run_that_gave_up_does_not_pass() -> None:
    """The cases that did not run are missing, whatever clauses count."""
    assert report_of({DECIDED: "not-run"}, "documented")["summary"]["verdict"] == "pass"
    results = [Result(c, Verdict("not-run" if c.clause == DECIDED else "pass"), 0.1) for c in CASES]
    pool = RankPool(targets.parse("syncbn.torch"), RANKS)
    document = report.build(
        pool,
        [report.row(result) for result in results],
        profile="smoke",
        level="documented",
        seconds=1.0,
        oracle="--oracle none",
        run=RUN,
    )
    assert document["must_pass"]["missing"] == [c.id for c in CASES if c.clause == DECIDED]
    assert document["summary"]["verdict"] == "fail"


def test_only_documented_clauses_count_if_that_is_the_level() -> None:
    for name, verdict in ((DECIDED, "pass"), (DOCUMENTED, "fail")):
        assert report_of({name: "fail"}, "documented")["summary"]["verdict"] == verdict


def test_unsupported_cases_are_shown() -> None:
    row = clause(report_of({"FWD-1": "unsupported"}), "FWD-1")
    assert (row["verdict"], row["unsupported"], row["cases"]) == ("pass", 1, 2)


def test_a_run_in_which_no_clause_was_judged_does_not_pass() -> None:
    rows = [row | {"verdict": "unsupported"} for row in report_of({})["cases"]]
    pool = RankPool(targets.parse("syncbn.torch"), RANKS)
    found = report.build(
        pool, rows, profile="smoke", level="decided", seconds=1.0, oracle="none", run=RUN
    )
    assert found["summary"]["verdict"] == "fail"


def test_the_suite_asks_git_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed would leave the lock in the repository of the user."""
    file = tmp_path / "conformance" / "report.py"
    file.parent.mkdir()
    file.write_text("")
    for command in ("init -q", "add .", "-c user.name=T -c user.email=t@example.org commit -qm 1"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    os.utime(file, (1e9, 1e9))  # git would write the new time into its index
    before = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    assert report.suite()["dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == before
