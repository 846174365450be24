"""Second derivatives in the suite (GRAD-5): the ranks, the expectations and the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from syncbn.conformance import data, runner, targets
from syncbn.conformance.case import SECOND, Case, Step
from syncbn.conformance.cases.gradients import second_derivatives
from syncbn.conformance.checks import SECOND_GRADIENTS
from syncbn.conformance.document import CaseError, load
from syncbn.conformance.expected import expect
from syncbn.conformance.pool import Outcome, RankPool
from syncbn.conformance.verdict import judge
from syncbn.conformance.wire import Message

RANKS = 2
CASES = [Case("GRAD-5", ranks=RANKS, **draft) for draft in second_derivatives(RANKS)]
PLANTED = "torch:tests/conformance/planted.py"

STEP = Step(((3, 3, 4), (2, 3, 4)), second=SECOND)
CASE = Case("GRAD-5", "second", RANKS, {"num_features": 3}, (STEP,), SECOND_GRADIENTS)
WEIGHT = "0/grad_grad_weight"


@pytest.fixture(scope="module")
def composed() -> Iterator[RankPool]:
    with RankPool(targets.parse(f"{PLANTED}:Composed"), RANKS) as pool:
        yield pool


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_layer_whose_backwards_pytorch_derives_passes(composed: RankPool, case: Case) -> None:
    found = runner.run_case(composed, case).verdict
    assert found.verdict == "pass", found.message


def test_a_layer_that_forgets_to_sum_again_fails_only_there() -> None:
    step = replace(STEP, second=())
    first = Case("GRAD-1", "first", RANKS, {"num_features": 3}, (step,), ("grad_input",))
    with RankPool(targets.parse(f"{PLANTED}:ForgetsToSumAgain"), RANKS) as pool:
        assert runner.run_case(pool, first).verdict.verdict == "pass"
        found = runner.run_case(pool, CASE).verdict
    assert found.verdict == "fail"
    assert "grad_grad_output" in str(found.message)


def answers() -> list[Message]:
    """What ranks answer that agree with the reference, of whom rank 0 has all of the weight's."""
    result = []
    for rank, (expected,) in enumerate(expect(CASE)):
        assert expected is not None
        arrays = {f"0/{n}": b.value.copy() for n, b in expected.values.items() if b is not None}
        arrays[WEIGHT] *= rank == 0
        result.append(Message({"steps": [{}]}, arrays))
    return result


def verdict_of(messages: list[Message]) -> str:
    return judge(CASE, Outcome(list(messages)), lambda: expect(CASE)).verdict


def test_only_the_sum_of_the_ranks_counts_for_the_weight() -> None:
    assert verdict_of(answers()) == "pass"
    moved = answers()
    moved[0].arrays[WEIGHT] -= 5.0
    moved[1].arrays[WEIGHT] += 5.0
    assert verdict_of(moved) == "pass"
    moved[1].arrays[WEIGHT] += 1e-3
    assert verdict_of(moved) == "fail"


@pytest.mark.parametrize("name", SECOND_GRADIENTS)
@pytest.mark.parametrize("rank", range(RANKS))
def test_every_array_is_needed(name: str, rank: int) -> None:
    lacking = answers()
    del lacking[rank].arrays[f"0/{name}"]
    assert verdict_of(lacking) == "fail"


def values(case: Case, rank: int) -> dict[str, Any]:
    expected = expect(case)[rank][0]
    assert expected is not None
    return {
        name: None if bounded is None else bounded.value
        for name, bounded in expected.values.items()
        if name in SECOND_GRADIENTS
    }


def test_what_is_frozen_has_no_second_derivative_and_no_cotangent() -> None:
    """Without that of dx, the function is linear in dy and does not depend on the weight."""
    without = replace(CASE, steps=(replace(STEP, frozen_input=(0, 1)),))
    assert values(without, 0)["grad_grad_input"] is None
    np.testing.assert_array_equal(values(without, 0)["grad_grad_weight"], np.zeros(3))
    without = replace(CASE, steps=(replace(STEP, frozen_parameters=(0, 1)),))
    assert values(without, 0)["grad_grad_weight"] is None
    affine = replace(CASE, layer={"num_features": 3, "affine": False})
    assert values(affine, 0)["grad_grad_weight"] is None
    assert set(values(replace(CASE, steps=(replace(STEP, second=("input",)),)), 0)) == {
        "grad_grad_input"
    }


def test_cotangents_are_representable_in_the_dtypes_of_their_gradients() -> None:
    halves = replace(CASE, steps=(replace(STEP, dtype="float16"),))
    given = data.cotangents(halves, 0, 1)
    assert [given[name].shape for name in given] == [(2, 3, 4), (3,), (3,)]
    for name, dtype in (("grad_input", "float16"), ("grad_weight", "float32")):
        np.testing.assert_array_equal(given[name], data.round_to(given[name], dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second": ["bias"]}, "second must be among input, grad_output, weight, got bias"),
        ({"backward": False}, "must stand with one backward"),
        ({"repeat": 2}, "must stand with one backward"),
        ({"recompute": True}, "must stand with one backward"),
        ({"beside": True}, "must stand with one backward"),
        ({"autocast": "bfloat16"}, "must stand with one backward"),
        ({"lost": [0]}, "must stand with one backward"),
    ],
)
def test_a_step_that_cannot_be_differentiated_again_is_no_case(
    changes: dict[str, object], message: str
) -> None:
    document = CASE.document
    document["steps"][0] |= changes
    with pytest.raises(CaseError, match=message):
        load(document)
