"""Build the report of a run, as reports/schema/ describes it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import syncbn
from syncbn.conformance import must_pass, verdict
from syncbn.conformance.cases import why_none
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.pool import RankPool
from syncbn.conformance.runner import Comparison, Result
from syncbn.conformance.selection import EVERYTHING, Selection
from syncbn.conformance.targets import Target

Row: TypeAlias = dict[str, Any]

_ROOT = Path(__file__).resolve().parent.parent


def build(
    pool: RankPool,
    rows: Sequence[Row],
    *,
    profile: str,
    level: str,
    seconds: float,
    oracle: RankPool | str,
    run: dict[str, Any],
    selection: Selection = EVERYTHING,
    stopped: bool = False,
    restarts_before: Sequence[Row] = (),
) -> dict[str, Any]:
    """The report of a run.

    Args:
        pool: the ranks of the target.
        rows: the result of each case, in the order of the run; see `row`.
        profile: one of syncbn.conformance.cases.PROFILES.
        level: which clauses count for the verdict, "decided" (all) or "documented".
        seconds: the duration of the run.
        oracle: the ranks of the oracle, or why there was none.
        run: the id, the date and the command line of the run.
        selection: the part of the profile that was to run.
        stopped: whether something stopped the run before all its cases had run.
        restarts_before: those of the run before it was resumed; see `restarts`.
    """
    facts = {
        "schema": "syncbn-report/1",
        "run": run,
        "suite": suite(),
        "target": target_document(pool.target),
        "oracle": _oracle(oracle),
        "environment": _environment()
        | (oracle.versions if isinstance(oracle, RankPool) else {})
        | pool.versions,
        "ranks": pool.ranks,
        "launcher": pool.launcher,
        "profile": profile,
        "level": level,
        "seconds": round(seconds, 3),
        "restarts": [*restarts_before, *restarts(pool)],
    }
    return conclude(facts, rows, selection, stopped)


def conclude(
    facts: dict[str, Any],
    rows: Sequence[Row],
    selection: Selection = EVERYTHING,
    stopped: bool = False,
) -> dict[str, Any]:
    """A report: the facts of a run, its results, and what follows from both.

    Args:
        facts: the fields that do not follow from results.
        rows, selection, stopped: see `build`.
    """
    ranks, profile, level = facts["ranks"], facts["profile"], facts["level"]
    part = selection != EVERYTHING
    clauses = [_clause(name, rows, ranks, level, part) for name in CLAUSES]
    counting = [clause["verdict"] for clause in clauses if clause["required"]]
    ran = {one["id"] for one in rows if one["verdict"] != "not-run"}
    listed = set(must_pass.listed(ranks, profile))
    if part:
        listed &= {case.id for case in selection.of(ranks, profile)}
    missing = sorted(listed - ran)
    verdicts = [one["verdict"] for one in rows]
    return facts | {
        "selection": selection.document,
        "must_pass": {"listed": len(listed), "missing": missing},
        "summary": {
            "verdict": _summary(verdicts, counting, missing, stopped),
            "required": _counts(counting),
            "cases": _counts(verdicts),
        },
        "clauses": clauses,
        "cases": [*rows],
    }


def restarts(pool: RankPool) -> list[Row]:
    """The restarts of the ranks as a report has them."""
    return [
        {"case": restart.case, "reason": restart.reason, "seconds": round(restart.seconds, 3)}
        for restart in pool.restarts
    ]


def row(result: Result) -> Row:
    """The result of a case as a report has it."""
    return {
        "id": result.case.id,
        "clause": result.case.clause,
        "spec": result.case.document,
        "verdict": result.verdict.verdict,
        "ratio": _number(result.verdict.ratio),
        "message": result.verdict.message,
        "seconds": round(result.seconds, 4),
        "oracle": _comparison(result.comparison),
        "changed": list(result.changed),
    }


def _summary(
    cases: Sequence[str], required: Sequence[str], missing: Sequence[str], stopped: bool
) -> str:
    """The verdict on a run; there is none on the target if the suite failed in one case."""
    if "error" in cases:
        return "error"
    if stopped:
        return "incomplete"
    # Where no clause could be judged, nothing was shown.
    passed = bool(required) and all(judged == "pass" for judged in required) and not missing
    return "pass" if passed else "fail"


def target_document(target: Target) -> dict[str, Any]:
    """A target as a report has it."""
    return {
        "name": target.name,
        "framework": target.framework,
        "module": target.module,
        "class": target.cls,
        "backend": target.backend,
        "device": target.device,
        "mode": target.mode,
        "rung": target.rung,
        "collectives": target.collectives,
        "share_device": target.share_device,
        "layer_args": target.layer_args,
        "setup": target.setup,
        "framework_file": target.framework_file,
    }


def _oracle(oracle: RankPool | str) -> dict[str, Any]:
    if isinstance(oracle, str):
        return {"target": None, "left_out": oracle}
    return {"target": target_document(oracle.target), "left_out": None}


def _comparison(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    return {
        "finding": comparison.finding,
        "verdict": comparison.verdict.verdict,
        "ratio": _number(comparison.verdict.ratio),
        "apart": _number(comparison.apart),
        "message": comparison.verdict.message,
    }


def _clause(name: str, rows: Sequence[Row], ranks: int, level: str, part: bool) -> dict[str, Any]:
    """The row of a clause. It is required only if the target supports at least one of its cases.

    part: whether only a part of the profile was to run.
    """
    clause = CLAUSES[name]
    none = "not selected" if part and clause.not_run is None else why_none(name, ranks)
    mine = [one for one in rows if one["clause"] == name]
    verdicts = [one["verdict"] for one in mine]
    judged = [one for one in verdicts if one not in ("unsupported", "not-run")]
    worst = verdict.worst_of(judged or verdicts)
    with_ratio = [one for one in mine if one["ratio"] is not None]
    largest = max(with_ratio, key=lambda one: float(one["ratio"]), default=None)
    return {
        "id": name,
        "title": clause.title,
        "origin": clause.origin,
        "required": verdict.required(name, level) and bool(judged),
        "verdict": worst,
        "cases": len(mine),
        "unsupported": len(mine) - len(judged),
        "worst_ratio": None if largest is None else largest["ratio"],
        "worst_case": None if largest is None else largest["id"],
        "reason": _reason(mine, worst) if mine else none,
    }


def _reason(rows: Sequence[Row], worst: str) -> str | None:
    """The first message of the worst verdict; if that is a pass, why some cases were left out."""
    wanted = "unsupported" if worst == "pass" else worst
    return next((one["message"] for one in rows if one["verdict"] == wanted), None)


def _counts(verdicts: Sequence[str]) -> dict[str, int]:
    return {name: list(verdicts).count(name) for name in verdict.VERDICTS}


def _number(ratio: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "inf" if ratio is not None and np.isinf(ratio) else ratio


def _environment() -> dict[str, str]:
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def suite() -> dict[str, Any]:
    """The version of the suite and its commit."""
    return {"version": syncbn.__version__, **_commit()}


def _commit() -> dict[str, Any]:
    """The commit of this checkout and whether it was changed; None outside git.

    An installed suite may lie below the repository of a project that uses it. Its commit is not
    the suite's, and does not have this file.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", "conformance/report.py") is None:
        return {"commit": None, "dirty": None}
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}
