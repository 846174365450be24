"""A baseline: the verdicts of a run that a gate expects of the next one, one line for each case."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeAlias

from syncbn.reports.document import Report
from syncbn.reports.files import ReportError, read
from syncbn.reports.schema import Schema, parse, shorten
from syncbn.reports.text import one_line

Baseline: TypeAlias = dict[str, Any]

BASELINE_SCHEMA: dict[str, Any] = json.loads(
    Path(__file__).with_name("schema").joinpath("baseline-1.json").read_bytes()
)
_SCHEMA = Schema(BASELINE_SCHEMA)
_LARGEST = 200_000_000  # bytes
_DIGITS = 3  # of a ratio; the gate compares factors


def baseline(report: Report) -> Baseline:
    """The baseline of a run.

    Raises:
        ReportError: the run was of a part of its profile, or has no verdict.
    """
    if selection := report.get("selection"):
        raise ReportError(f"selection: must be of the whole profile, got {selection}")
    verdict = report["summary"]["verdict"]
    if verdict in ("error", "incomplete"):
        raise ReportError(f"summary.verdict: must be a verdict on the target, got {verdict!r}")
    return {
        "schema": BASELINE_SCHEMA["title"],
        "of": subject(report),
        "suite": report["suite"]["version"],
        "environment": versions(report),
        "seconds": round(seconds(report), 1),
        "clauses": {
            clause["id"]: [clause["verdict"], clause["title"]] for clause in report["clauses"]
        },
        "cases": {
            case["id"]: [case["clause"], case["verdict"], _rounded(case["ratio"]), title(case)]
            for case in report["cases"]
        },
    }


def subject(report: Report) -> dict[str, Any]:
    """What a report is of: a baseline fits only reports of the same."""
    target = report["target"]
    return {
        "target": target["name"],
        "backend": target["backend"],
        "device": target["device"],
        "mode": target["mode"],
        "rung": target["rung"],
        "collectives": target.get("collectives"),
        "layer_args": target.get("layer_args") or {},
        "ranks": report["ranks"],
        "profile": report["profile"],
        "level": report["level"],
    }


def versions(report: Report) -> dict[str, str]:
    """The environment of a run without what differs between two machines of a kind."""
    items = sorted(report["environment"].items())
    return {name: value for name, value in items if name not in ("platform", "cores")}


def seconds(report: Report) -> float:
    """The time of all cases, without the oracle."""
    return sum(float(case["seconds"]) for case in report["cases"])


def title(case: Any) -> str:
    return one_line(str(case["spec"].get("title", "")))


def text(document: Baseline) -> str:
    """The text of a baseline: a line for each clause and case, so that a diff can be read."""
    parts = []
    for name, value in document.items():
        if name in ("clauses", "cases", "environment"):
            lines = [f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items()]
            parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load_baseline(path: str | os.PathLike[str]) -> Baseline:
    """Read a baseline and check it.

    Raises:
        ReportError: the file cannot be read, is too large, is not JSON, or is no valid baseline.
    """
    try:
        document = parse(read(path, _LARGEST, "baseline"))
    except ReportError:
        raise
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    name = document.get("schema") if isinstance(document, dict) else None
    if name != BASELINE_SCHEMA["title"]:
        violation: str | None = (
            f"schema: must be {BASELINE_SCHEMA['title']!r}, got {shorten(repr(name))}"
        )
    else:
        violation = _SCHEMA.violation(document) or _contradiction(document)
    if violation:
        raise ReportError(f"{path} is not a valid baseline: {violation}")
    found: Baseline = document
    return found


def _contradiction(document: Baseline) -> str | None:
    for id, (clause, *_) in document["cases"].items():
        if clause not in document["clauses"]:
            return f"cases.{id}: must be of a clause of the baseline, got {clause!r}"
    return None


def _rounded(ratio: float | str | None) -> float | str | None:
    return float(f"{ratio:.{_DIGITS}g}") if isinstance(ratio, (int, float)) else ratio
