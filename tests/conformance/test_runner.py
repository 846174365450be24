"""Which pool runs a case, and what the answers of target and oracle mean together."""

from __future__ import annotations

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


class Answers:
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


class NeverRuns:
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
