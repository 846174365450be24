"""Run cases on a target, and on an oracle if there is one."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from syncbn.conformance import verdict
from syncbn.conformance.case import Case
from syncbn.conformance.expected import Expectations, expect
from syncbn.conformance.pool import Outcome, RankPool, went_wrong
from syncbn.conformance.verdict import Verdict
from syncbn.reference.ratio import THRESHOLD

MAX_HANGS = 50  # each costs seconds

# Which of three departs from the others: the target, the oracle or the reference.
FINDINGS = {
    "agree": "all three agree",
    "target departs": "the target departs from the reference, the oracle does not",
    "oracle departs": "the oracle departs from the reference, the target does not",
    "both depart": "target and oracle depart from the reference and from each other",
    "reference departs": "target and oracle agree with each other, but not with the reference",
    "no answer": "the oracle raised, hung or crashed, or does not support the case",
    "not asked": "a step must raise an error, and there the oracle might hang",
}


@dataclass(frozen=True)
class Comparison:
    """How the oracle, another layer, did in the case of a result.

    verdict: the verdict on the oracle.
    apart: the largest difference between target and oracle, in multiples of the reference's bound.
    finding: one of FINDINGS.
    """

    verdict: Verdict
    apart: float | None
    finding: str


@dataclass(frozen=True)
class Result:
    """The verdict on a target in one case.

    seconds: the time the target and its judgement took.
    comparison: None without an oracle, and where the target does not support the case.
    changed: what the target changed in the processes of the ranks, one text for each rank.
    """

    case: Case
    verdict: Verdict
    seconds: float
    comparison: Comparison | None = None
    changed: tuple[str, ...] = ()


# Gets a case, the answers of the target, and a function that returns the expected results.
Recorder: TypeAlias = Callable[[Case, Outcome, Callable[[], Expectations]], None]

_NOT_ASKED = Comparison(Verdict("not-run", None, FINDINGS["not asked"]), None, "not asked")


def run(
    pool: RankPool,
    cases: Sequence[Case],
    progress: Callable[[Result], None],
    oracle: RankPool | None = None,
    max_hangs: int = MAX_HANGS,
    record: Recorder | None = None,
) -> list[Result]:
    """Run all cases in their order, and call `progress` after each and `record` before that.

    After `max_hangs` hangs of the target no more case runs, and after as many of the oracle the
    oracle gets no more.
    """
    results = []
    for case in cases:
        if pool.hangs >= max_hangs:
            results.append(not_run(case, max_hangs))
        else:
            asked = oracle if oracle is None or oracle.hangs < max_hangs else None
            results.append(run_case(pool, case, asked, record))
        progress(results[-1])
    return results


def not_run(case: Case, max_hangs: int = MAX_HANGS) -> Result:
    """The result of a case that did not run because others hung."""
    reason = f"not run after {max_hangs} hangs (see --max-hangs)"
    return Result(case, Verdict("not-run", None, reason), 0.0)


def run_case(
    pool: RankPool,
    case: Case,
    oracle: RankPool | None = None,
    record: Recorder | None = None,
) -> Result:
    """Run one case on the target, and on the oracle if there is one. Neither can make it raise."""
    start = time.monotonic()
    expected = functools.cache(lambda: expect(case))
    outcome = pool.run(case)
    changed = tuple(outcome.changed)
    judged = judge(case, outcome, expected)
    if record is not None:
        record(case, outcome, expected)
    seconds = time.monotonic() - start
    if oracle is None or judged.verdict in ("unsupported", "error"):
        return Result(case, judged, seconds, None, changed)
    if any(step.error for step in case.steps):
        return Result(case, judged, seconds, _NOT_ASKED, changed)
    answer = oracle.run(case)
    of_oracle = judge(case, answer, expected)
    apart = None if case.error else verdict.apart(case, outcome, answer, expected())
    raised = case.error is None and any(map(went_wrong, answer.answers))
    finding = "no answer" if raised else _finding(judged, of_oracle, apart)
    return Result(case, judged, seconds, Comparison(of_oracle, apart, finding), changed)


def judge(case: Case, outcome: Outcome, expected: Callable[[], Expectations]) -> Verdict:
    """The verdict on a case; "error" if the suite cannot judge it."""
    try:
        return verdict.judge(case, outcome, expected)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}:{frame.lineno} in {frame.name}"
        text = f"the suite failed to judge: {type(error).__name__}: {error} ({place})"
        return Verdict("error", None, text)


def _finding(target: Verdict, oracle: Verdict, apart: float | None) -> str:
    if oracle.verdict not in ("pass", "fail"):
        return "no answer"
    if oracle.verdict == "pass":
        return "agree" if target.verdict == "pass" else "target departs"
    if target.verdict == "pass":
        return "oracle departs"
    together = apart is not None and apart <= THRESHOLD
    return "reference departs" if together else "both depart"
