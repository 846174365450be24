"""Run cases on a target and say what came of it: verdict by verdict, then as one report."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import syncbn
from conformance import verdict
from conformance.case import Case
from conformance.cases import why_none
from conformance.clauses import CLAUSES
from conformance.pool import RankPool
from conformance.verdict import Verdict

_RANK_IDS = "the target takes a ProcessGroup, whose rank ids are torch's to check"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Result:
    """A case and what came of it."""

    case: Case
    verdict: Verdict
    seconds: float


def run_case(pool: RankPool, case: Case) -> Result:
    """Ask one case; never raises for what the target does."""
    start = time.monotonic()
    if "process_group" in case.layer and not pool.target.rank_ids:
        return Result(case, Verdict("unsupported", None, _RANK_IDS), 0.0)
    found = verdict.judge(case, pool.run(case))
    return Result(case, found, time.monotonic() - start)


def run(pool: RankPool, cases: Sequence[Case], progress: Callable[[Result], None]) -> list[Result]:
    """Ask all cases in their order, and call `progress` after each."""
    results = []
    for case in cases:
        results.append(run_case(pool, case))
        progress(results[-1])
    return results


def report(
    pool: RankPool, results: Sequence[Result], profile: str, level: str, seconds: float
) -> dict[str, Any]:
    """The report of a run, as reports/schema/ describes it."""
    clauses = [_clause(name, results, pool.ranks, level) for name in CLAUSES]
    counting = [clause["verdict"] for clause in clauses if clause["required"]]
    passed = all(found == "pass" for found in counting)
    target = pool.target
    return {
        "schema": "syncbn-report/1",
        "suite": {"version": syncbn.__version__, **_commit()},
        "target": {
            "name": target.name,
            "framework": target.framework,
            "module": target.module,
            "class": target.cls,
            "backend": target.backend,
            "device": target.device,
            "rung": target.rung,
        },
        "environment": _environment() | pool.versions,
        "ranks": pool.ranks,
        "launcher": pool.launcher,
        "profile": profile,
        "level": level,
        "seconds": round(seconds, 3),
        "summary": {
            "verdict": "pass" if passed else "fail",
            "required": _counts(counting),
            "cases": _counts([result.verdict.verdict for result in results]),
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
            }
            for result in results
        ],
    }


def _clause(name: str, results: Sequence[Result], ranks: int, level: str) -> dict[str, Any]:
    """The row of a clause, which is required only if it could be asked."""
    known = CLAUSES[name]
    mine = [result for result in results if result.case.clause == name]
    found = verdict.worst_of([result.verdict.verdict for result in mine])
    with_ratio = [result for result in mine if result.verdict.ratio is not None]
    worst = max(with_ratio, key=lambda result: result.verdict.ratio or 0.0, default=None)
    reasons = [result.verdict.message for result in mine if result.verdict.verdict == found]
    reason = next(filter(None, reasons), None) if mine else why_none(name, ranks)
    return {
        "id": name,
        "title": known.title,
        "origin": known.origin,
        "required": verdict.required(name, level) and found not in ("unsupported", "not-run"),
        "verdict": found,
        "cases": len(mine),
        "worst_ratio": None if worst is None else _number(worst.verdict.ratio),
        "worst_case": None if worst is None else worst.case.id,
        "reason": reason,
    }


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
    """The commit of this checkout and whether it was changed; None outside git."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(_ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}
