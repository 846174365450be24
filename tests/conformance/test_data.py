"""The data of a case follow its document, and a fault shows in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from syncbn.conformance import data
from syncbn.conformance.case import Case, Data, Step

EVEN = Step(((500, 3, 4),) * 2)


def case(step: Step = EVEN, **fields: Any) -> Case:
    steps, layer = (step, step), {"num_features": step.shapes[0][1]}
    return Case("FWD-1", "data", len(step.shapes), layer, steps, **fields)


def both(make: Any, step: Step = EVEN) -> list[data.Array]:
    """The arrays of rank 0 and rank 1."""
    return [make(case(step), 0, rank) for rank in (0, 1)]


def standardized(values: data.Array) -> data.Array:
    return (values - values.mean()) / values.std()


def cotangent(case: Case, index: int, rank: int) -> data.Array:
    return data.cotangents(case, index, rank)["grad_input"]


@pytest.mark.parametrize("make", [data.shard, data.grad_output, cotangent])
def test_ranks_steps_and_seeds_draw_for_themselves(make: Any) -> None:
    one = case()
    first = standardized(make(one, 0, 0))
    np.testing.assert_array_equal(standardized(make(case(), 0, 0)), first)
    for other in (make(one, 0, 1), make(one, 1, 0), make(replace(one, seed=1), 0, 0)):
        correlation = (standardized(other) * first).mean()
        assert abs(correlation) < 0.1


def test_ranks_differ_in_mean_and_spread() -> None:
    """Or the statistics of one rank, or their plain mean, would pass for those of the group."""
    first, last = both(data.shard)
    assert last.mean() - first.mean() > 0.5
    assert last.std() / first.std() > 1.2


def test_channels_differ() -> None:
    first, second, _ = data.shard(case(), 0, 0).swapaxes(0, 1)
    assert not np.isin(first, second).any()


def test_grad_outputs_have_a_mean_and_a_spread_of_their_own() -> None:
    """Without it, sums over ranks and the terms of the gradient would look alike."""
    first, last = both(data.grad_output)
    assert last.mean() - first.mean() > 0.05
    assert first.std() / last.std() > 1.1
    assert first.std() > 1.2


def test_ratio_and_scale() -> None:
    first, last = both(data.shard, replace(EVEN, x=Data(ratio=100.0, scale=1e6)))
    plain_first, plain_last = both(data.shard)
    for values, plain in ((first, plain_first), (last, plain_last)):
        np.testing.assert_allclose(values, (plain + 100) * 1e6, rtol=1e-6)


def test_constant() -> None:
    for values in both(data.shard, replace(EVEN, x=Data(ratio=3.0, scale=2.0, constant=True))):
        assert np.all(values == 6.0)


def test_flat_channels_are_constant_on_each_rank_but_not_over_ranks() -> None:
    first, last = both(data.shard, replace(EVEN, x=Data(flat=(1,))))
    assert [np.unique(values[:, 1]).size for values in (first, last)] == [1, 1]
    assert first[0, 1, 0] != last[0, 1, 0]
    assert np.unique(first[:, 0]).size > 1


def test_a_shared_batch_does_not_depend_on_the_cut() -> None:
    def whole(*rows: int) -> data.Array:
        step = Step(tuple((n, 3, 4) for n in rows), x=Data(shared=True))
        return np.concatenate([data.shard(case(step), 0, rank) for rank in range(len(rows))])

    np.testing.assert_array_equal(whole(5, 3), whole(1, 0, 7))


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_poison_is_in_its_place_and_nowhere_else(poison: str) -> None:
    first, last = both(data.shard, replace(EVEN, x=Data(poison=(((1, 2, 0, 3), poison),))))
    assert np.isfinite(first).all()
    assert np.argwhere(~np.isfinite(last)).tolist() == [[2, 0, 3]]
    np.testing.assert_equal(last[2, 0, 3], float(poison))


def test_paired_steps_are_orthogonal() -> None:
    step = replace(EVEN, paired=True)
    for x, dy in zip(both(data.shard, step), both(data.grad_output, step), strict=True):
        assert (dy * x).sum() == pytest.approx(0, abs=1e-9)
        assert np.abs(dy * x).sum() > 100


def test_gradients_that_sum_to_zero() -> None:
    for dy in both(data.grad_output, replace(EVEN, dtype="float64", dy_zero_sum=True)):
        np.testing.assert_allclose(dy.mean(axis=(0, 2)), 0, atol=1e-12)


@pytest.mark.parametrize("make", [data.shard, data.grad_output])
def test_expanded_tensors_repeat_their_first_row(make: Any) -> None:
    for values in both(make, replace(EVEN, layout="expanded", dy_layout="expanded")):
        np.testing.assert_array_equal(values, np.broadcast_to(values[:1], values.shape))


@pytest.mark.parametrize("make", [data.shard, data.grad_output])
def test_tensors_are_representable_in_their_dtype(make: Any) -> None:
    for dtype in ("float16", "float32"):
        for values in both(make, replace(EVEN, dtype=dtype)):
            np.testing.assert_array_equal(values, values.astype(dtype))
    for values in both(make, replace(EVEN, dtype="bfloat16")):
        bits = values.astype(np.float32).view(np.uint32)
        assert not np.any(bits & 0xFFFF)


def test_the_state_is_not_the_initial_one() -> None:
    """Or a layer without weight or bias, or one that ignores its checkpoint, would pass."""
    state = data.initial_state(case())
    assert {0.5 < abs(w) < 1.5 for w in state["weight"]} == {True}
    assert {np.sign(w) for w in state["weight"]} == {-1, 1}
    for name in ("bias", "running_mean"):
        assert state[name].std() > 0.5
    assert state["running_var"].min() > 0
    assert state["running_var"].std() > 0.2


def test_a_negative_running_var_is_in_channel_0_alone() -> None:
    state = data.initial_state(case(state="negative"))
    assert [bool(v < 0) for v in state["running_var"]] == [True, False, False]
