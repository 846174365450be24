"""Run cases on a target and say what came of it: verdict by verdict, then as one report."""

from __future__ import annotations

import functools
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
from syncbn.conformance import must_pass, verdict
from syncbn.conformance.case import Case
from syncbn.conformance.cases import why_none
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.expected import expect
from syncbn.conformance.pool import RankPool, went_wrong
from syncbn.conformance.targets import Target
from syncbn.conformance.verdict import Verdict

_RANK_IDS = "the target takes a ProcessGroup, whose rank ids are torch's to check"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Beside:
    """What an oracle, another layer, made of a case, and how far the target is from it.

    apart is the largest difference of the two in multiples of the reference's bound. finding is
    one of FINDINGS.
    """

    verdict: Verdict
    apart: float | None
    finding: str


# Which of three departs from the others: the target, the oracle or the reference.
FINDINGS = {
    "agree": "all three agree",
    "target departs": "the target departs from the reference, the oracle does not",
    "oracle departs": "the oracle departs from the reference, the target does not",
    "both depart": "target and oracle depart from the reference and from each other",
    "reference departs": "target and oracle agree with each other, but not with the reference",
    "no answer": "the oracle raised, hung or crashed, or does not support the case",
    "not asked": "an error is expected in a step, which the oracle may answer by hanging",
}
_NOT_ASKED = Beside(Verdict("not-run", None, FINDINGS["not asked"]), None, "not asked")


@dataclass(frozen=True)
class Result:
    """A case and what came of it."""

    case: Case
    verdict: Verdict
    seconds: float
    beside: Beside | None = None


def run_case(pool: RankPool, case: Case, oracle: RankPool | None = None) -> Result:
    """Ask one case of the target, and of the oracle if there is one; raises for neither."""
    start = time.monotonic()
    target = pool.target
    if "process_group" in case.layer and target.framework == "torch" and not target.rank_ids:
        return Result(case, Verdict("unsupported", None, _RANK_IDS), 0.0)
    expected = functools.cache(lambda: expect(case))
    outcome = pool.run(case)
    found = verdict.judge(case, outcome, expected)
    seconds = time.monotonic() - start
    if oracle is None:
        return Result(case, found, seconds)
    if any(step.error for step in case.steps):
        return Result(case, found, seconds, _NOT_ASKED)
    answer = oracle.run(case)
    judged = verdict.judge(case, answer, expected)
    apart = None if case.error else verdict.apart(case, outcome, answer, expected())
    raised = case.error is None and any(map(went_wrong, answer.answers))
    finding = "no answer" if raised else _finding(found, judged, apart)
    return Result(case, found, seconds, Beside(judged, apart, finding))


def _finding(target: Verdict, oracle: Verdict, apart: float | None) -> str:
    if oracle.verdict not in ("pass", "fail"):
        return "no answer"
    if oracle.verdict == "pass":
        return "agree" if target.verdict == "pass" else "target departs"
    if target.verdict == "pass":
        return "oracle departs"
    together = apart is not None and apart <= verdict.THRESHOLD
    return "reference departs" if together else "both depart"


def run(
    pool: RankPool,
    cases: Sequence[Case],
    progress: Callable[[Result], None],
    oracle: RankPool | None = None,
) -> list[Result]:
    """Ask all cases in their order, and call `progress` after each."""
    results = []
    for case in cases:
        results.append(run_case(pool, case, oracle))
        progress(results[-1])
    return results


def report(
    pool: RankPool,
    results: Sequence[Result],
    profile: str,
    level: str,
    seconds: float,
    oracle: RankPool | str,
) -> dict[str, Any]:
    """The report of a run, as reports/schema/ describes it; oracle may be why there was none."""
    clauses = [_clause(name, results, pool.ranks, level) for name in CLAUSES]
    counting = [clause["verdict"] for clause in clauses if clause["required"]]
    ran = [result.case.id for result in results]
    missing = must_pass.missing(pool.ranks, profile, ran)
    passed = all(found == "pass" for found in counting) and not missing
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
                "oracle": _beside(result.beside),
            }
            for result in results
        ],
    }


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
    }


def _oracle(oracle: RankPool | str) -> dict[str, Any]:
    if isinstance(oracle, str):
        return {"target": None, "left_out": oracle}
    return {"target": _target(oracle.target), "left_out": None}


def _beside(beside: Beside | None) -> dict[str, Any] | None:
    if beside is None:
        return None
    return {
        "finding": beside.finding,
        "verdict": beside.verdict.verdict,
        "ratio": _number(beside.verdict.ratio),
        "apart": _number(beside.apart),
        "message": beside.verdict.message,
    }


def _clause(name: str, results: Sequence[Result], ranks: int, level: str) -> dict[str, Any]:
    """The row of a clause, which is required only if it could be asked, at least in part."""
    known = CLAUSES[name]
    mine = [result for result in results if result.case.clause == name]
    verdicts = [result.verdict.verdict for result in mine]
    asked = [found for found in verdicts if found not in ("unsupported", "not-run")]
    found = verdict.worst_of(asked or verdicts)
    with_ratio = [result for result in mine if result.verdict.ratio is not None]
    worst = max(with_ratio, key=lambda result: result.verdict.ratio or 0.0, default=None)
    return {
        "id": name,
        "title": known.title,
        "origin": known.origin,
        "required": verdict.required(name, level) and bool(asked),
        "verdict": found,
        "cases": len(mine),
        "unsupported": len(mine) - len(asked),
        "worst_ratio": None if worst is None else _number(worst.verdict.ratio),
        "worst_case": None if worst is None else worst.case.id,
        "reason": _reason(mine, found) if mine else why_none(name, ranks),
    }


def _reason(results: Sequence[Result], found: str) -> str | None:
    """The first message of the worst verdict; for a pass, why some cases were not asked."""
    wanted = "unsupported" if found == "pass" else found
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
