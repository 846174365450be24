"""The report as a document: what makes it valid, and how it is read and written."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

from syncbn.reports.files import ReportError, read, write
from syncbn.reports.schema import Schema, parse, shorten

Report: TypeAlias = dict[str, Any]

SCHEMA: dict[str, Any] = json.loads(
    Path(__file__).with_name("schema").joinpath("report-1.json").read_bytes()
)


THRESHOLD = 3  # the largest ratio of a case that passes: syncbn.reference.ratio.THRESHOLD
_SCHEMA = Schema(SCHEMA)
_LARGEST = 1_000_000_000  # bytes of a file; 100,000 cases take 90 MB


def validate(report: Report) -> None:
    """Check that a report obeys the schema and does not contradict itself.

    Apart from the schema: a case names a clause of the report and is there once, it passes only
    within the threshold, a clause passes only if its cases do, the counts are those of the clauses
    and cases, the verdict is "pass" only if every required clause passes and there is one, and
    "error" only if a case is.

    Raises:
        ReportError: with the place, the value and the rule, as in
            "clauses[3].verdict: 'passed' is not one of ['pass', 'fail', ...]".
    """
    if not isinstance(report, dict) or report.get("schema") != SCHEMA["title"]:
        name = report.get("schema") if isinstance(report, dict) else report
        raise ReportError(f"schema: must be {SCHEMA['title']!r}, got {shorten(repr(name))}")
    if violation := _SCHEMA.violation(report):
        raise ReportError(violation)
    _check_consistency(report)


def save(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report as UTF-8 JSON; its directory must exist.

    The file appears whole or not at all. If writing is interrupted, an older report stays as it
    was, and no other file is left.

    Raises:
        ReportError: the report is not valid, or the system refuses, as in
            "cannot write report to report.json: No space left on device".
    """
    validate(report)
    write(path, json.dumps(report, indent=1, allow_nan=False) + "\n", "report")


def load(path: str | os.PathLike[str]) -> Report:
    """Read a report and check it.

    Raises:
        ReportError: the file does not exist, cannot be read, is too large, is not JSON, or is not a
            valid report of this version.
    """
    try:
        report = parse(read(path, _LARGEST, "report"))
    except ReportError:
        raise
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    try:
        validate(report)
    except ReportError as error:
        raise ReportError(f"{path} is not a valid report: {error}") from error
    return report


def _check_consistency(report: Report) -> None:
    clauses, cases, summary = report["clauses"], report["cases"], report["summary"]
    known = {clause["id"] for clause in clauses}
    for index, case in enumerate(cases):
        if case["clause"] not in known:
            raise ReportError(
                f"cases[{index}].clause: must be a clause of the report, got {case['clause']!r}"
            )
    _check_cases(clauses, cases)
    required = [clause for clause in clauses if clause["required"]]
    for name, rows in (("required", required), ("cases", cases)):
        counted = Counter(row["verdict"] for row in rows)
        for verdict, count in summary[name].items():
            if count != counted[verdict]:
                raise ReportError(
                    f"summary.{name}.{verdict}: must be the count {counted[verdict]}, got {count}"
                )
    ran = {case["id"] for case in cases if case["verdict"] != "not-run"}
    for id in report["must_pass"]["missing"]:
        if id in ran:
            raise ReportError(f"must_pass.missing: must not name a case that ran, got {id!r}")
    if (summary["verdict"] == "error") != (summary["cases"]["error"] > 0):
        raise ReportError(
            "summary.verdict: must be 'error' if a case has the verdict 'error', and only then, "
            f"got {summary['verdict']!r}"
        )
    passes = 0 < summary["required"]["pass"] == len(required)
    passes = passes and not report["must_pass"]["missing"]
    if summary["verdict"] == "pass" and not passes:
        raise ReportError(
            "summary.verdict: must be 'fail' unless every required clause passes and no case is "
            "missing, got 'pass'"
        )


def _check_cases(clauses: list[Any], cases: list[Any]) -> None:
    """The rows of clauses and cases do not contradict each other."""
    ran = Counter(case["id"] for case in cases)
    by_clause: dict[str, Counter[str]] = {clause["id"]: Counter() for clause in clauses}
    for index, case in enumerate(cases):
        if ran[case["id"]] > 1:
            raise ReportError(f"cases[{index}].id: must be there once, got {case['id']!r} again")
        ratio = float(case["ratio"] or 0.0)
        if case["verdict"] == "pass" and ratio > THRESHOLD:
            raise ReportError(
                f"cases[{index}].verdict: must not be 'pass' with a ratio of {ratio:g}, above "
                f"{THRESHOLD}"
            )
        by_clause[case["clause"]][case["verdict"]] += 1
    for index, clause in enumerate(clauses):
        counts = by_clause[clause["id"]]
        if clause["cases"] != counts.total():
            raise ReportError(
                f"clauses[{index}].cases: must be the count {counts.total()}, got {clause['cases']}"
            )
        bad = [name for name in ("fail", "hang", "crash", "error") if counts[name]]
        if clause["verdict"] == "pass" and (bad or not counts["pass"]):
            found = bad[0] if bad else "none that passed"
            raise ReportError(
                f"clauses[{index}].verdict: must not be 'pass', its cases have {found}"
            )
