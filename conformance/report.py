"""Build the report of a run, as reports/schema/ describes it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import syncbn
from syncbn.conformance import must_pass, verdict
from syncbn.conformance.cases import why_none
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.pool import RankPool
from syncbn.conformance.runner import Comparison, Result
from syncbn.conformance.targets import Target

_ROOT = Path(__file__).resolve().parent.parent


def build(
    pool: RankPool,
    results: Sequence[Result],
    *,
    profile: str,
    level: str,
    seconds: float,
    oracle: RankPool | str,
) -> dict[str, Any]:
    """The report of a run.

    Args:
        pool: the ranks of the target.
        results: one of each case, in the order of the run.
        profile: one of syncbn.conformance.cases.PROFILES.
        level: which clauses count for the verdict, "decided" (all) or "documented".
        seconds: the duration of the run.
        oracle: the ranks of the oracle, or why there was none.
    """
    clauses = [_clause(name, results, pool.ranks, level) for name in CLAUSES]
    counting = [clause["verdict"] for clause in clauses if clause["required"]]
    ran = [result.case.id for result in results if result.verdict.verdict != "not-run"]
    missing = must_pass.missing(pool.ranks, profile, ran)
    verdicts = [result.verdict.verdict for result in results]
    return {
        "schema": "syncbn-report/1",
        "suite": {"version": syncbn.__version__, **_commit()},
        "target": _target(pool.target),
        "oracle": _oracle(oracle),
        "environment": _environment()
        | (oracle.versions if isinstance(oracle, RankPool) else {})
        | pool.versions,
        "ranks": pool.ranks,
        "launcher": pool.launcher,
        "profile": profile,
        "level": level,
        "seconds": round(seconds, 3),
        "must_pass": {"listed": len(must_pass.listed(pool.ranks, profile)), "missing": missing},
        "restarts": [
            {"case": restart.case, "reason": restart.reason, "seconds": round(restart.seconds, 3)}
            for restart in pool.restarts
        ],
        "summary": {
            "verdict": _summary(verdicts, counting, missing),
            "required": _counts(counting),
            "cases": _counts(verdicts),
        },
        "clauses": clauses,
        "cases": [
            {
                "id": result.case.id,
                "clause": result.case.clause,
                "spec": result.case.document,
                "verdict": result.verdict.verdict,
                "ratio": _number(result.verdict.ratio),
                "message": result.verdict.message,
                "seconds": round(result.seconds, 4),
                "oracle": _comparison(result.comparison),
            }
            for result in results
        ],
    }


def _summary(cases: Sequence[str], required: Sequence[str], missing: Sequence[str]) -> str:
    """The verdict on a run; there is none on the target if the suite failed in one case."""
    if "error" in cases:
        return "error"
    passed = all(judged == "pass" for judged in required) and not missing
    return "pass" if passed else "fail"


def _target(target: Target) -> dict[str, Any]:
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
    }


def _oracle(oracle: RankPool | str) -> dict[str, Any]:
    if isinstance(oracle, str):
        return {"target": None, "left_out": oracle}
    return {"target": _target(oracle.target), "left_out": None}


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


def _clause(name: str, results: Sequence[Result], ranks: int, level: str) -> dict[str, Any]:
    """The row of a clause. It is required only if the target supports at least one of its cases."""
    clause = CLAUSES[name]
    mine = [result for result in results if result.case.clause == name]
    verdicts = [result.verdict.verdict for result in mine]
    judged = [one for one in verdicts if one not in ("unsupported", "not-run")]
    worst = verdict.worst_of(judged or verdicts)
    with_ratio = [result for result in mine if result.verdict.ratio is not None]
    largest = max(with_ratio, key=lambda result: result.verdict.ratio or 0.0, default=None)
    return {
        "id": name,
        "title": clause.title,
        "origin": clause.origin,
        "required": verdict.required(name, level) and bool(judged),
        "verdict": worst,
        "cases": len(mine),
        "unsupported": len(mine) - len(judged),
        "worst_ratio": None if largest is None else _number(largest.verdict.ratio),
        "worst_case": None if largest is None else largest.case.id,
        "reason": _reason(mine, worst) if mine else why_none(name, ranks),
    }


def _reason(results: Sequence[Result], worst: str) -> str | None:
    """The first message of the worst verdict; if that is a pass, why some cases were left out."""
    wanted = "unsupported" if worst == "pass" else worst
    messages = [r.verdict.message for r in results if r.verdict.verdict == wanted]
    return next(filter(None, messages), None)


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


def _commit() -> dict[str, Any]:
    """The commit of this checkout and whether it was changed; None outside git.

    An installed suite may lie below the repository of a project that uses it. Its commit is not
    the suite's, and does not have this file.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(_ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", "conformance/report.py") is None:
        return {"commit": None, "dirty": None}
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}
