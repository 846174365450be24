"""The expected results follow the case: its groups, its steps, its frozen tensors.

The numbers are those of the formulas in plain NumPy, over the shards of the ranks that the case
puts together; that the reference evaluates the formulas well is proven in test_reference.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from syncbn.conformance import data
from syncbn.conformance.case import Case, ExpectedError, Step
from syncbn.conformance.expected import Expected, expect

Array = npt.NDArray[np.float64]

RANKS = 4
STEP = Step(((3, 3, 4), (2, 3, 4), (4, 3, 4), (1, 3, 4)), dtype="float64")
GROUPS = ((0, 2), (1, 3))
GRADIENTS = ("grad_input", "grad_weight", "grad_bias")


def case(*steps: Step, layer: Any = None, **fields: Any) -> Case:
    arguments = {"num_features": 3, "dtype": "float64", **(layer or {})}
    return Case("FWD-1", "expected", RANKS, arguments, steps or (STEP,), **fields)


def at(one: Case, rank: int, index: int = 0) -> Expected:
    found = expect(one)[rank][index]
    assert found is not None
    return found


def value(one: Case, name: str, rank: int, index: int = 0) -> Array:
    bounded = at(one, rank, index).values[name]
    assert bounded is not None
    return bounded.value


def moments(one: Case, index: int, ranks: tuple[int, ...]) -> tuple[Array, Array, int]:
    """Mean, biased variance and count of the values of some ranks."""
    shards = [np.moveaxis(data.shard(one, index, r), 1, 0).reshape(3, -1) for r in ranks]
    values = np.concatenate(shards, axis=1)
    return values.mean(axis=1), values.var(axis=1), values.shape[1]


def moved(one: Case, ranks: tuple[int, ...], steps: list[int], momentum: float = 0.1) -> list[Any]:
    """The running statistics after these steps, which these ranks took together."""
    state = data.initial_state(one)
    mean, var = state["running_mean"], state["running_var"]
    for index in steps:
        batch_mean, batch_var, n = moments(one, index, ranks)
        mean = (1 - momentum) * mean + momentum * batch_mean
        var = (1 - momentum) * var + momentum * batch_var * n / (n - 1)
    return [mean, var]


def assert_running(one: Case, rank: int, index: int, expected: list[Any]) -> None:
    got = [value(one, name, rank, index) for name in ("running_mean", "running_var")]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "groups", [None, (tuple(range(RANKS)),), GROUPS, ((0,), (1,), (2,), (3,)), ((0, 1, 2), (3,))]
)
def test_statistics_are_those_of_the_group(groups: Any) -> None:
    one = case(groups=groups)
    state = data.initial_state(one)
    for ranks in groups or (tuple(range(RANKS)),):
        mean, var, _ = moments(one, 0, ranks)
        for rank in ranks:
            y = (np.moveaxis(data.shard(one, 0, rank), 1, -1) - mean) / np.sqrt(var + 1e-5)
            y = np.moveaxis(y * state["weight"] + state["bias"], -1, 1)
            np.testing.assert_allclose(value(one, "y", rank), y, rtol=1e-9)
            assert_running(one, rank, 0, moved(one, ranks, [0]))


def test_gradients_are_those_of_the_group() -> None:
    """y does not depend on a constant added to x on all ranks of a group: dx sums to 0 there."""
    one = case(groups=GROUPS)
    for ranks in GROUPS:
        dx = [value(one, "grad_input", rank).sum(axis=(0, 2)) for rank in ranks]
        np.testing.assert_allclose(sum(dx), 0, atol=1e-12)
        assert np.abs(dx).min() > 1e-3


def test_a_rank_in_no_group_gets_nothing() -> None:
    assert expect(case(groups=((0, 2, 3),)))[1] == [None]


def test_a_rank_that_is_absent_gets_nothing() -> None:
    alone = replace(STEP, mode="eval", present=(2,))
    assert [steps[0] is None for steps in expect(case(alone))] == [True, True, False, True]


def test_steps_go_on_from_one_another() -> None:
    one = case(STEP, STEP)
    all_ranks = tuple(range(RANKS))
    assert_running(one, 1, 0, moved(one, all_ranks, [0]))
    assert_running(one, 1, 1, moved(one, all_ranks, [0, 1]))
    assert [at(one, 1, index).num_batches_tracked for index in (0, 1)] == [1, 2]


def test_groups_may_change_between_steps() -> None:
    one = case(STEP, replace(STEP, reload=True, groups=GROUPS))
    other = replace(one, groups=(tuple(range(RANKS)),))
    for each in (one, other):
        mean, var = moved(each, tuple(range(RANKS)), [0])
        for ranks in GROUPS:
            batch_mean, batch_var, n = moments(each, 1, ranks)
            expected = [
                0.9 * mean + 0.1 * batch_mean,
                0.9 * var + 0.1 * batch_var * n / (n - 1),
            ]
            for rank in ranks:
                assert_running(each, rank, 1, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum(momentum: float) -> None:
    one = case(layer={"momentum": momentum})
    assert_running(one, 0, 0, moved(one, tuple(range(RANKS)), [0], momentum))


@pytest.mark.parametrize(
    ("step", "times"),
    [(STEP, 1), (replace(STEP, recompute=True), 2), (replace(STEP, repeat=3), 3)],
)
def test_every_forward_moves_the_statistics(step: Step, times: int) -> None:
    one = case(step)
    assert_running(one, 0, 0, moved(one, tuple(range(RANKS)), [0] * times))
    assert at(one, 0).num_batches_tracked == times
    for name in ("y", *GRADIENTS):
        np.testing.assert_array_equal(value(one, name, 0), value(case(), name, 0))


def test_eval_uses_the_running_statistics_and_leaves_them() -> None:
    one = case(replace(STEP, mode="eval"))
    state = data.initial_state(one)
    x = np.moveaxis(data.shard(one, 0, 1), 1, -1)
    y = (x - state["running_mean"]) / np.sqrt(state["running_var"] + 1e-5)
    y = np.moveaxis(y * state["weight"] + state["bias"], -1, 1)
    np.testing.assert_allclose(value(one, "y", 1), y, rtol=1e-9)
    assert_running(one, 1, 0, moved(one, (), []))
    assert at(one, 1).num_batches_tracked == 0


def test_a_layer_in_its_initial_state() -> None:
    one = case(replace(STEP, mode="eval"), state="initial")
    x = data.shard(one, 0, 1)
    np.testing.assert_allclose(value(one, "y", 1), x / np.sqrt(1 + 1e-5), rtol=1e-12)


def test_parameter_gradients_are_local_and_data_parallelism_averages_them() -> None:
    alone, wrapped = case(), case(ddp=True)
    for name in ("grad_weight", "grad_bias"):
        own = [value(alone, name, rank) for rank in range(RANKS)]
        for rank in range(RANKS):
            np.testing.assert_allclose(value(wrapped, name, rank), np.mean(own, 0), rtol=1e-12)
    dy = data.grad_output(alone, 0, 1)
    np.testing.assert_allclose(value(alone, "grad_bias", 1), dy.sum(axis=(0, 2)), rtol=1e-9)
    np.testing.assert_array_equal(value(wrapped, "grad_input", 1), value(alone, "grad_input", 1))


def test_what_is_frozen_or_missing_must_not_be_there() -> None:
    def missing(one: Case, rank: int) -> list[str]:
        return [name for name, bounded in at(one, rank).values.items() if bounded is None]

    frozen = case(replace(STEP, frozen_input=(1,), frozen_parameters=(2,)))
    assert [missing(frozen, rank) for rank in range(RANKS)] == [
        [],
        ["grad_input"],
        ["grad_weight", "grad_bias"],
        [],
    ]
    assert missing(case(layer={"affine": False}), 0) == ["grad_weight", "grad_bias"]
    assert missing(case(layer={"track_running_stats": False}), 0) == ["running_mean", "running_var"]


def test_of_a_failing_step_only_the_state_is_expected() -> None:
    bad = replace(STEP, error=ExpectedError("Exception", (0,)))
    one = case(bad, STEP, groups=GROUPS)
    for rank in GROUPS[0]:
        assert set(at(one, rank).values) == {"running_mean", "running_var"}
        assert_running(one, rank, 0, moved(one, (), []))
        assert_running(one, rank, 1, moved(one, GROUPS[0], [1]))
    for rank in GROUPS[1]:
        assert {"y", *GRADIENTS} < set(at(one, rank).values)


def test_an_error_in_the_backward_comes_after_the_statistics_have_moved() -> None:
    bad = replace(STEP, error=ExpectedError("Exception", (0,), in_backward=True), lost=(0,))
    one = case(bad, STEP, groups=GROUPS)
    for rank in GROUPS[0]:
        assert set(at(one, rank).values) == {"running_mean", "running_var"}
        assert_running(one, rank, 0, moved(one, GROUPS[0], [0]))
        assert_running(one, rank, 1, moved(one, GROUPS[0], [0, 1]))
        assert at(one, rank, 1).num_batches_tracked == 2


def test_attributes_are_set_before_their_step_and_stay() -> None:
    one = case(STEP, replace(STEP, attributes={"eps": 0.5, "momentum": 1.0}), STEP)
    built = case(layer={"eps": 0.5})
    np.testing.assert_array_equal(value(one, "y", 0), value(case(), "y", 0))
    for index in (1, 2):
        mean, var, n = moments(one, index, tuple(range(RANKS)))
        assert_running(one, 0, index, [mean, var * n / (n - 1)])
        x = np.moveaxis(data.shard(one, index, 0), 1, -1)
        state = data.initial_state(built)
        y = (x - mean) / np.sqrt(var + 0.5) * state["weight"] + state["bias"]
        np.testing.assert_allclose(value(one, "y", 0, index), np.moveaxis(y, -1, 1), rtol=1e-9)


def test_statistics_that_are_no_longer_tracked_stay_and_serve_in_eval() -> None:
    off = replace(STEP, attributes={"track_running_stats": False})
    evaluate, on = replace(STEP, mode="eval"), {"track_running_stats": True}
    one = case(STEP, off, evaluate, replace(STEP, attributes=on))
    all_ranks = tuple(range(RANKS))
    for index in (1, 2):
        assert_running(one, 0, index, moved(one, all_ranks, [0]))
        assert at(one, 0, index).num_batches_tracked == 1
    assert_running(one, 0, 3, moved(one, all_ranks, [0, 3]))
    state, (mean, var) = data.initial_state(one), moved(one, all_ranks, [0])
    x = np.moveaxis(data.shard(one, 2, 0), 1, -1)
    y = (x - mean) / np.sqrt(var + 1e-5) * state["weight"] + state["bias"]
    np.testing.assert_allclose(value(one, "y", 0, 2), np.moveaxis(y, -1, 1), rtol=1e-9)


def test_each_rank_has_its_own_layer_where_they_differ() -> None:
    bad = replace(STEP, error=ExpectedError("Exception", (1,)))
    one = case(bad, layers=((1, {"num_features": 5}), (2, {"track_running_stats": False})))
    assert_running(one, 0, 0, moved(one, (), []))
    assert_running(one, 1, 0, moved(one.of_rank(1), (), []))
    assert value(one, "running_mean", 1).shape == (5,)
    assert at(one, 2).values == {"running_mean": None, "running_var": None}
    assert at(one, 2).num_batches_tracked is None
