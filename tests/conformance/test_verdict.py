"""The judge itself: each thing that it looks at can fail."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from syncbn.conformance import data, must_pass, verdict
from syncbn.conformance.case import Case, ExpectedError, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.expected import expect
from syncbn.conformance.pool import Outcome
from syncbn.conformance.verdict import judge
from syncbn.conformance.wire import Message
from syncbn.reference import Bounded
from syncbn.reference.ratio import THRESHOLD, ratio

CHECKS = (
    *("y", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var"),
    *("num_batches_tracked", "parameters", "state_names", "initial_values", "signature"),
    *("format", "grad_format", "input_unmodified", "ranks_agree", "repeatable"),
    *("collectives", "communicators"),
)
STEP = Step(((3, 3, 4), (2, 3, 4)))
CASE = Case("FWD-1", "all checks", 2, {"num_features": 3}, (STEP,), CHECKS)
NAMES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def judged(case: Case, outcome: Outcome) -> verdict.Verdict:
    return judge(case, outcome, lambda: expect(case))


def right_answers() -> list[Message]:
    """What a layer that agrees with the reference to the last bit would answer."""
    result = []
    for rank, (expected,) in enumerate(expect(CASE)):
        assert expected is not None
        arrays = {f"0/{n}": b.value.copy() for n, b in expected.values.items() if b is not None}
        arrays["0/num_batches_tracked"] = np.array(expected.num_batches_tracked)
        arrays |= {f"initial/{n}": np.full(3, float(n in ("weight", "running_var"))) for n in NAMES}
        arrays["initial/num_batches_tracked"] = np.array(0)
        form: dict[str, Any] = {"shape": list(STEP.shapes[rank]), "dtype": "float32"}
        form |= {"class": "torch.Tensor", "contiguous": True, "channels_last": False}
        content: dict[str, Any] = {
            "signature": dict(verdict._DOCUMENTED),
            "parameters": {n: {"shape": [3], "dtype": "float32"} for n in NAMES},
            "state_names": list(NAMES),
            "unlike": [],
            "steps": [
                {
                    "format": {"x": form, "y": dict(form), "grad_input": False},
                    "modified": [],
                    "collectives": [1, 1],
                    "communicators": 1,
                }
            ],
        }
        result.append(Message(content, arrays))
    return result


def verdict_after(damage: Any) -> verdict.Verdict:
    """The verdict when `damage` has changed the right answers."""
    answers = copy.deepcopy(right_answers())
    damage(answers)
    return judged(CASE, Outcome(list(answers)))


def test_right_answers_pass() -> None:
    found = verdict_after(lambda answers: None)
    assert found == verdict.Verdict("pass", 0.0)


@pytest.mark.parametrize(
    "name", ["y", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_number_just_out_of_bound_fails(name: str, rank: int) -> None:
    (expected,) = expect(CASE)[rank]
    assert expected is not None
    bounded = expected.values[name]
    assert bounded is not None
    at = np.unravel_index(bounded.value.size - 1, bounded.value.shape)

    def off_by(factor: float) -> verdict.Verdict:
        def damage(answers: list[Message]) -> None:
            for answer in answers if "running" in name else answers[rank : rank + 1]:
                answer.arrays[f"0/{name}"][at] += factor * bounded.bound[at]

        return verdict_after(damage)

    assert off_by(0.99 * THRESHOLD).verdict == "pass"
    found = off_by(1.01 * THRESHOLD)
    assert found.verdict == "fail"
    assert found.ratio == pytest.approx(1.01 * THRESHOLD, rel=1e-3)
    assert f"{name}[{', '.join(map(str, at))}]" in str(found.message)


def forget(name: str) -> Any:
    return lambda answers: answers[1].arrays.pop(name)


def put(value: Any, *path: Any) -> Any:
    """Set a fact of rank 1's answer."""

    def damage(answers: list[Message]) -> None:
        place: Any = answers[1].content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return damage


def poison(value: float) -> Any:
    def damage(answers: list[Message]) -> None:
        answers[1].arrays["0/y"][0, 0, 0] = value

    return damage


def reshape(answers: list[Message]) -> None:
    answers[1].arrays["0/y"] = answers[1].arrays["0/y"][:, :, :2]


def last_bit(answers: list[Message]) -> None:
    means = answers[1].arrays["0/running_mean"]
    means[0] = np.nextafter(means[0], np.inf)


def wrong_start(answers: list[Message]) -> None:
    answers[1].arrays["initial/weight"][2] = 0.5


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (forget("0/grad_weight"), "grad_weight is missing"),
        (forget("0/running_var"), "running_var is missing"),
        (forget("initial/weight"), "no weight"),
        (forget("0/num_batches_tracked"), "num_batches_tracked is None"),
        (reshape, "shape"),
        (poison(np.nan), "nan"),
        (poison(np.inf), "inf"),
        (last_bit, "running_mean differs between rank 0 and rank 1"),
        (wrong_start, "weight starts as"),
        (put("2e-05", "signature", "eps"), "default of eps is 2e-05"),
        (put({}, "signature"), "no argument num_features"),
        (put([2], "parameters", "bias", "shape"), "shape of bias"),
        (put("float64", "parameters", "bias", "dtype"), "dtype of bias"),
        (put(NAMES[1:], "state_names"), "state_dict names"),
        (put(["input"], "steps", 0, "modified"), "input was modified"),
        (put(["grad_output"], "steps", 0, "modified"), "grad_output was modified"),
        (put(["0/y"], "unlike"), "second run gives another 0/y"),
        (put("float64", "steps", 0, "format", "y", "dtype"), "dtype of y"),
        (put([3, 2, 4], "steps", 0, "format", "y", "shape"), "shape of y"),
        (put("own.Tensor", "steps", 0, "format", "y", "class"), "class of y is own.Tensor"),
        (put(False, "steps", 0, "format", "y", "contiguous"), "x is contiguous, y is not"),
        (put([2, 1], "steps", 0, "collectives"), "collectives"),
        (put({"types": ["KeyError"], "message": "k"}, "error"), "constructor raised KeyError: k"),
        (put({"types": ["KeyError"], "message": "k"}, "steps", 0, "error"), "raised KeyError: k"),
    ],
)
def test_every_departure_fails(damage: Any, text: str) -> None:
    found = verdict_after(damage)
    assert found.verdict == "fail"
    assert text in str(found.message)


def test_a_gradient_in_another_format_fails() -> None:
    answers = right_answers()
    for answer in answers:
        form = answer.content["steps"][0]["format"]
        form["x"]["channels_last"] = form["y"]["channels_last"] = True
    found = judged(CASE, Outcome(list(answers)))
    assert found.message == "rank 0, step 0: grad_input is channels_last is False, expected True"


def test_communicators_must_not_become_more() -> None:
    answers = right_answers()
    answers[1].content["steps"].append({**answers[1].content["steps"][0], "communicators": 2})
    case = replace(CASE, steps=(STEP, STEP))
    found = judge(case, Outcome(list(answers)), lambda: [[], []])
    assert found.message == "rank 1: communicators after each step are [1, 2]"


def test_undefined_numbers_fail_where_no_value_is_expected() -> None:
    case = replace(CASE, checks=("defined",))
    answers = right_answers()
    answers[1].arrays["0/grad_input"][0, 0, 0] = np.inf
    assert judged(case, Outcome(list(answers))).verdict == "pass"
    answers[1].arrays["0/grad_input"][0, 0, 0] = np.nan
    found = judged(case, Outcome(list(answers)))
    assert found.message == "rank 1, step 0: grad_input has NaN"


def test_errors_are_no_wrong_answers() -> None:
    assert verdict_after(lambda answers: answers[0].arrays.pop("0/y")).raised is False
    error = {"types": ["ValueError"], "message": "planted"}
    assert verdict_after(lambda answers: answers[0].content.update(error=error)).raised is True


def test_a_frozen_gradient_that_is_there_fails() -> None:
    frozen = replace(CASE, steps=(replace(STEP, frozen_input=(1,)),))
    found = judged(frozen, Outcome(list(right_answers())))
    assert found.verdict == "fail"
    assert "grad_input is present, expected none" in str(found.message)


def test_a_rank_that_fails_by_itself_is_an_error_even_if_its_peers_hang() -> None:
    answers: list[Message | None] = [None, Message({"failed": "ValueError: v"}, {})]
    found = judged(CASE, Outcome(answers, hung=[0], details="d"))
    assert (found.verdict, found.message) == ("error", "rank 1: ValueError: v")
    assert judged(CASE, Outcome([None, None], error="e")).verdict == "error"


def test_crash_and_hang_come_before_every_answer() -> None:
    answers: list[Message | None] = [None, right_answers()[1]]
    assert judged(CASE, Outcome(answers, crashed=[0], details="d")).verdict == "crash"
    assert judged(CASE, Outcome(answers, hung=[0], details="d")).verdict == "hang"
    assert judged(CASE, Outcome(answers, crashed=[0], hung=[0])).verdict == "crash"


RAISED = {"types": ["ValueError", "Exception"], "message": "rank 0 had 2 channels"}
OTHER = {"types": ["RuntimeError", "Exception"], "message": "connection closed"}


@pytest.mark.parametrize(
    ("raised", "verdict_", "text"),
    [
        ([RAISED, RAISED], "pass", ""),
        ([None, RAISED], "fail", "rank 0, step 0: raised nothing, expected ValueError"),
        ([OTHER, RAISED], "fail", "raised RuntimeError: connection closed, expected ValueError"),
        ([RAISED, None], "fail", "rank 1, step 0: raised nothing, expected an error"),
        ([RAISED, OTHER], "fail", "does not name rank 0"),
    ],
)
def test_an_error_of_one_rank_must_reach_all(
    raised: list[dict[str, Any] | None], verdict_: str, text: str
) -> None:
    step = replace(STEP, error=ExpectedError("ValueError", (0,)))
    case = Case("ERR-9", "one fails", 2, {"num_features": 3}, (step,))
    answers = [Message({"steps": [{"error": r} if r else {}]}, {}) for r in raised]
    found = judged(case, Outcome(list(answers)))
    assert found.verdict == verdict_
    assert text in str(found.message or "")


@pytest.mark.parametrize(
    ("types", "verdict_"),
    [(["TypeError"], "pass"), (["ValueError"], "fail"), (None, "fail")],
)
def test_a_constructor_must_raise_the_named_error(types: list[str] | None, verdict_: str) -> None:
    case = Case("ERR-1", "refused", 1, {"num_features": 2.5}, error="TypeError")
    content: dict[str, Any] = {"steps": []}
    content |= {"error": {"types": types, "message": "m"}} if types else {}
    assert judged(case, Outcome([Message(content, {})])).verdict == verdict_


def test_ratio_of_special_values() -> None:
    value = np.array([1.0, 1.0, 1.0, np.nan, np.nan, np.inf, np.inf, np.inf, 2.0, 2.0, 1.0])
    bound = np.array([0.5, 0.5, 0.5, 0.50, 0.500, 0.500, 0.500, 0.500, 0.0, 0.0, np.inf])
    got = np.array([1.25, np.nan, np.inf, np.nan, 3.0, np.inf, -np.inf, 1.0, 2.0, 2.1, 5.0])
    expected = [0.5, np.inf, np.inf, 0.0, np.inf, 0.0, np.inf, np.inf, 0.0, np.inf, np.inf]
    assert ratio(got, Bounded(value, bound)).tolist() == expected


def test_no_bound_of_the_suite_is_vacuous() -> None:
    """A finite reference value with an infinite bound would let anything pass."""
    for case in catalogue(3):
        if case.error is not None or not case.steps or case.deadline > 100:
            continue
        for rank, steps in enumerate(expect(case)):
            for index, expected in enumerate(steps):
                for name, bounded in (expected.values if expected else {}).items():
                    if bounded is not None and name in case.checks:
                        finite = np.isfinite(bounded.value)
                        assert np.all(np.isfinite(bounded.bound[finite])), (case.title, rank, index)


def test_data_differ_between_ranks_steps_and_seeds_and_repeat() -> None:
    case = Case("FWD-1", "data", 2, {"num_features": 3}, (STEP, STEP))
    again = Case("FWD-1", "data", 2, {"num_features": 3}, (STEP, STEP))
    other = replace(case, seed=1)
    first = data.shard(case, 0, 0)
    np.testing.assert_array_equal(first, data.shard(again, 0, 0))
    for different in (data.shard(case, 1, 0), data.shard(other, 0, 0), data.shard(case, 0, 1)):
        assert not np.isin(first, different).any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_data_are_representable_in_their_dtype(dtype: str) -> None:
    import torch

    values = data.round_to(np.random.default_rng(0).standard_normal(10_000) * 1e3, dtype)
    kept = torch.tensor(values).to(getattr(torch, dtype)).to(torch.float64).numpy()
    np.testing.assert_array_equal(kept, values)


def test_bfloat16_rounds_to_nearest_even() -> None:
    import torch

    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    ties = (values.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)
    for given in (values, ties):
        expected = torch.tensor(given).to(torch.bfloat16).to(torch.float64).numpy()
        np.testing.assert_array_equal(data.round_to(given, "bfloat16"), expected)


@pytest.mark.parametrize("bad", ["crash", "hang", "fail", "unsupported", "not-run"])
def test_a_clause_has_the_verdict_of_its_worst_case(bad: str) -> None:
    assert verdict.worst_of(["pass", bad, "pass"]) == bad
    assert verdict.worst_of(["pass", "pass"]) == "pass"
    assert verdict.worst_of([]) == "not-run"


def test_which_clauses_count_for_the_exit_status() -> None:
    def counting(level: str) -> set[str]:
        return {name for name in CLAUSES if verdict.required(name, level)}

    with_cases = {name for name, clause in CLAUSES.items() if clause.not_run is None}
    assert counting("decided") == with_cases
    assert counting("documented") == {name for name in with_cases if CLAUSES[name].documented}
    assert counting("documented") < counting("decided")


@pytest.mark.parametrize("ranks", must_pass.RANKS)
def test_every_case_can_be_judged(ranks: int) -> None:
    """No result of a right layer overflows, but where that is the question."""
    numeric = (case for case in catalogue(ranks) if not case.error and "defined" not in case.checks)
    assert [case.title for case in numeric if not verdict.judgeable(case, expect(case))] == []


@pytest.mark.parametrize(("state", "judgeable"), [("random", True), ("negative", False)])
def test_a_negative_variance_of_no_data_cannot_be_judged(state: str, judgeable: bool) -> None:
    step = Step(((0, 3), (2, 3)), mode="eval")
    case = Case("EVAL-3", "no data", 2, {"num_features": 3}, (step,), ("grad_weight",), state=state)
    assert verdict.judgeable(case, expect(case)) == judgeable
