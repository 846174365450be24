"""Run cases on a target, and on an oracle if there is one."""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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

    seconds: how long the run waited for the target and its judgement. While a case is judged the
        next one runs, so that time counts for one of them only.
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

    While the ranks of the target run a case, the case before it is judged, and runs on the oracle.

    After `max_hangs` hangs of the target no more case runs, and after as many of the oracle the
    oracle gets no more.
    """
    results = []
    for result in _results(pool, cases, oracle, max_hangs, record):
        results.append(result)
        progress(result)
    return results


def _results(
    pool: RankPool,
    cases: Sequence[Case],
    oracle: RankPool | None,
    max_hangs: int,
    record: Recorder | None,
) -> Iterator[Result]:
    def result(of: _Run) -> Result:
        asked = oracle if oracle is None or oracle.hangs < max_hangs else None
        return of.result(asked, record)

    last: _Run | None = None
    for index, case in enumerate(cases):
        if pool.hangs >= max_hangs:
            rest = cases[index:]
            break
        next_one = _Run(pool, case)
        if last is not None:
            yield result(last)
        next_one.wait()
        last = next_one
    else:
        rest = []
    if last is not None:
        yield result(last)
    yield from (not_run(case, max_hangs) for case in rest)


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
    one = _Run(pool, case)
    one.wait()
    return one.result(oracle, record)


class _Run:
    """A case that the ranks of a target run from now on."""

    def __init__(self, pool: RankPool, case: Case) -> None:
        self._case = case
        self._expected = functools.cache(lambda: expect(case))
        self._seconds = 0.0
        with self._timed():
            self._answers = pool.begin(case)

    def wait(self) -> None:
        """Wait for the answers, and compute meanwhile what is expected."""
        with self._timed():
            # `judge` meets an exception again, and tells it.
            with contextlib.suppress(Exception):
                if self._case.error is None:
                    self._expected()
            self._outcome = self._answers()

    def result(self, oracle: RankPool | None, record: Recorder | None) -> Result:
        case, outcome, expected = self._case, self._outcome, self._expected
        with self._timed():
            judged = judge(case, outcome, expected)
            if record is not None:
                record(case, outcome, expected)
        result = Result(case, judged, self._seconds, None, tuple(outcome.changed))
        if oracle is None or judged.verdict in ("unsupported", "error"):
            return result
        if any(step.error for step in case.steps):
            return replace(result, comparison=_NOT_ASKED)
        answer = oracle.run(case)
        of_oracle = judge(case, answer, expected)
        apart = None if case.error else verdict.apart(case, outcome, answer, expected())
        raised = case.error is None and any(map(went_wrong, answer.answers))
        finding = "no answer" if raised else _finding(judged, of_oracle, apart)
        return replace(result, comparison=Comparison(of_oracle, apart, finding))

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds += time.monotonic() - start


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
