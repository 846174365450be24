"""Random tensors: the controller and every rank generate the same ones, without any framework.

An array is a function of (seed, name, rank): Philox is a counter-based generator, and its key is
the hash of the three. Values are float64, but the dtype of the tensor can represent them. So the
ranks and the reference compute with the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from syncbn.conformance.case import Case

Array: TypeAlias = npt.NDArray[np.float64]


def shard(case: Case, index: int, rank: int) -> Array:
    """The input of one rank in one step."""
    while case.steps[index].again:
        index -= 1
    step = case.steps[index]
    spec = step.x
    shape = step.shapes[rank]
    if spec.shared:
        values = _cut_of_whole(case, index, rank)
    else:
        values = _generator(case.seed, f"x{index}", rank).standard_normal(shape)
        # Ranks differ in mean and spread, so that local statistics differ from those of the group.
        values = values * (1 + 0.3 * rank) + 0.7 * rank
    if spec.constant:
        values = np.zeros(shape)
    for channel in spec.flat:
        values[:, channel] = 0.7 * rank
    values = (values + spec.ratio) * spec.scale
    if step.paired:
        values = np.concatenate([values[: shape[0] // 2]] * 2)
    if step.layout_of(rank) == "expanded":
        values = np.broadcast_to(values[:1], shape)
    values = round_to(values, step.dtype_of(rank))
    for at, poison in spec.poison:
        if at[0] == rank:
            values[tuple(at[1:])] = float(poison)
    return values


def grad_output(case: Case, index: int, rank: int) -> Array:
    """The gradient of the loss in y, of one rank in one step."""
    step = case.steps[index]
    shape = step.shapes[rank]
    values = _generator(case.seed, f"dy{index}", rank).standard_normal(shape)
    values = values * 1.5 / (1 + 0.2 * rank) + 0.1 * rank
    if step.dy_zero_sum and values.size:
        axes = (0, *range(2, values.ndim))
        values -= values.mean(axis=axes, keepdims=True)
    if step.paired:
        half = values[: shape[0] // 2]
        values = np.concatenate([half, -half])
    if step.dy_layout_of(rank) == "expanded":
        values = np.broadcast_to(values[:1], shape)
    return round_to(values, step.dtype_of(rank))


def cotangents(case: Case, index: int, rank: int) -> dict[str, Array]:
    """What the second backward of one rank in one step starts from, by the gradient's name."""
    step = case.steps[index]
    draw = _generator(case.seed, f"cotangents{index}", rank)
    of_input = draw.standard_normal(step.shapes[rank]) + 0.3 * rank
    weight, bias = draw.standard_normal((2, case.num_features))
    return {
        "grad_input": round_to(of_input, step.dtype_of(rank)),
        "grad_weight": round_to(weight, case.parameter_dtype),
        "grad_bias": round_to(bias, case.parameter_dtype),
    }


def initial_state(case: Case) -> dict[str, Array]:
    """The parameters and running statistics that every rank starts with."""
    features, dtype = case.num_features, case.parameter_dtype
    draw = _generator(case.seed, "state", 0)
    weight = draw.uniform(0.5, 1.5, features) * np.where(np.arange(features) % 2, -1, 1)
    bias = draw.standard_normal(features)
    mean = draw.standard_normal(features)
    var = 10 ** draw.uniform(-2, 2, features)
    if case.state == "negative":
        var[0] = -var[0]
    state: dict[str, Array] = {}
    if case.affine:
        state |= {"weight": round_to(weight, dtype), "bias": round_to(bias, dtype)}
    if case.track_running_stats:
        state |= {"running_mean": round_to(mean, dtype), "running_var": round_to(var, dtype)}
    return state


def round_to(values: Any, dtype: str) -> Array:
    """The values of `dtype` nearest to the given ones (ties to even), as float64."""
    if dtype == "bfloat16":
        bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return nearest.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.asarray(values).astype(dtype).astype(np.float64)


def _cut_of_whole(case: Case, index: int, rank: int) -> Array:
    """This rank's rows of a batch that does not depend on how it is cut."""
    shapes = case.steps[index].shapes
    rows = [shape[0] for shape in shapes]
    whole = _generator(case.seed, f"x{index}", -1).standard_normal((sum(rows), *shapes[0][1:]))
    start = sum(rows[:rank])
    return whole[start : start + rows[rank]]


def _generator(seed: int, name: str, rank: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{rank}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
