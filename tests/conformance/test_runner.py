"""Which pool runs a case, and what the answers of target and oracle mean together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from syncbn.conformance import runner
from syncbn.conformance.case import Case, Step
from syncbn.conformance.data import shard
from syncbn.conformance.expected import expect
from syncbn.conformance.pool import Outcome, RankPool
from syncbn.conformance.wire import Message

CASE = Case("FWD-1", "one rank", 1, {"num_features": 3}, (Step(((4, 3),), backward=False),), ("y",))


class Pool:
    """A pool that answers at once."""

    hangs = 0

    def begin(self, case: Case) -> Callable[[], Outcome]:
        return lambda: self.run(case)

    def run(self, case: Case) -> Outcome:
        raise NotImplementedError


class Answers(Pool):
    """A pool whose only rank answers with y = the expected y + `error`, or with facts alone."""

    def __init__(self, error: float = 0.0, **facts: Any) -> None:
        self.message = Message({"steps": [{}]} | facts, {})
        if not facts:
            first = expect(CASE)[0][0]
            assert first is not None
            y = first.values["y"]
            assert y is not None
            self.message.arrays["0/y"] = y.value + np.full(shard(CASE, 0, 0).shape, error)

    def run(self, case: Case) -> Outcome:
        return Outcome([self.message])


class Hangs(Pool):
    """A pool whose rank never answers."""

    def run(self, case: Case) -> Outcome:
        self.hangs += 1
        return Outcome([None], hung=[0], details="d")


class NeverRuns(Pool):
    def run(self, case: Case) -> Outcome:
        raise AssertionError("the oracle must not run")


def run_case(target: Any, oracle: Any) -> runner.Result:
    return runner.run_case(cast(RankPool, target), CASE, cast(RankPool, oracle))


@pytest.mark.parametrize(
    ("target", "oracle", "finding"),
    [
        (Answers(), Answers(), "agree"),
        (Answers(0.1), Answers(), "target departs"),
        (Answers(), Answers(0.1), "oracle departs"),
        (Answers(0.1), Answers(0.1), "reference departs"),
        (Answers(0.1), Answers(-0.1), "both depart"),
        (Answers(), Answers(unsupported="no kernel"), "no answer"),
        (Answers(), Answers(failed="RuntimeError: broken"), "no answer"),
    ],
)
def test_findings(target: Answers, oracle: Answers, finding: str) -> None:
    comparison = run_case(target, oracle).comparison
    assert comparison is not None
    assert comparison.finding == finding
    assert finding in runner.FINDINGS


def test_no_oracle_runs_what_the_target_does_not_support() -> None:
    result = run_case(Answers(unsupported="no float64"), NeverRuns())
    assert (result.verdict.verdict, result.verdict.message) == ("unsupported", "no float64")
    assert result.comparison is None


def test_a_run_gives_up_after_some_hangs() -> None:
    seen: list[runner.Result] = []
    pool = Hangs()
    found = runner.run(cast(RankPool, pool), [CASE] * 5, seen.append, max_hangs=2)
    assert [result.verdict.verdict for result in found] == ["hang"] * 2 + ["not-run"] * 3
    assert found == seen
    assert found[-1].verdict.message == "not run after 2 hangs (see --max-hangs)"
    assert pool.hangs == 2


def test_a_run_gives_up_an_oracle_after_some_hangs() -> None:
    oracle = Hangs()
    found = runner.run(
        cast(RankPool, Answers()), [CASE] * 3, lambda _: None, cast(RankPool, oracle), max_hangs=2
    )
    assert [result.verdict.verdict for result in found] == ["pass"] * 3
    assert [result.comparison is None for result in found] == [False, False, True]


def test_a_case_is_judged_while_the_next_one_runs() -> None:
    log: list[str] = []

    class Target(Answers):
        def begin(self, case: Case) -> Callable[[], Outcome]:
            log.append("begin")
            return super().begin(case)

        def run(self, case: Case) -> Outcome:
            log.append("answer")
            return super().run(case)

    class Oracle(Answers):
        def run(self, case: Case) -> Outcome:
            log.append("oracle")
            return super().run(case)

    runner.run(
        cast(RankPool, Target()),
        [CASE] * 2,
        lambda _: log.append("result"),
        cast(RankPool, Oracle()),
    )
    first, last = ["oracle", "result"], ["oracle", "result"]
    assert log == ["begin", "answer", "begin", *first, "answer", *last]


def test_no_case_begins_after_a_result_ends_the_run() -> None:
    class Enough(Exception):
        pass

    def stop(_: runner.Result) -> None:
        raise Enough

    pool = Hangs()
    with pytest.raises(Enough):
        runner.run(cast(RankPool, pool), [CASE] * 5, stop)
    assert pool.hangs == 1
