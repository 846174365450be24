"""Second derivatives are right: against complex steps, high precision and PyTorch's autograd.

The complex steps and the high precision differentiate the first gradients once more, with the
formulas of the first backward pass alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch

from syncbn.reference import Bounded, Cotangents, SecondGradients, SyncBatchNorm, formulas

Array: TypeAlias = npt.NDArray[np.float64]
Shape: TypeAlias = tuple[int, ...]

C = 3
EPS = 1e-5
# Uneven, of different spatial sizes, one empty, one with a single value per channel.
SHAPES: list[Shape] = [(2, C, 3, 2), (0, C, 5), (1, C), (4, C, 1), (1, C, 2, 1, 3)]
TRAINING, EVAL, UNTRACKED = MODES = ("training", "eval", "untracked eval")


@dataclass(frozen=True)
class Step:
    """The input of both backward passes, as matrices (C, n_r) and vectors (C,) of each rank."""

    x: list[Array]
    dy: list[Array]
    a: list[Array]
    p: list[Array]
    q: list[Array]
    weight: Array
    running: tuple[Array, Array]

    @staticmethod
    def random(seed: int) -> Step:
        rng = np.random.default_rng(seed)
        counts = [int(np.prod(shape)) // C for shape in SHAPES]
        x, dy, a = ([rng.standard_normal((C, n)) + 0.7 for n in counts] for _ in range(3))
        p, q = ([rng.standard_normal(C) for _ in counts] for _ in range(2))
        weight = np.array([-1.3, 0.4, 2.1]) * (rng.random(C) + 0.5)
        return Step(x, dy, a, p, q, weight, (rng.standard_normal(C), rng.random(C) + 0.5))


def shard(matrix: Array, shape: Shape) -> Array:
    n, channels, *spatial = shape
    return np.moveaxis(matrix.reshape(channels, n, *spatial), 0, 1)


def second_gradients(step: Step, mode: str) -> list[SecondGradients]:
    norm = SyncBatchNorm(
        C,
        EPS,
        dtype="float64",
        weight=step.weight,
        running_mean=step.running[0],
        running_var=step.running[1],
        track_running_stats=mode != UNTRACKED,
    )

    def shards(values: list[Array]) -> list[Array]:
        return [shard(matrix, shape) for matrix, shape in zip(values, SHAPES, strict=True)]

    norm.forward(shards(step.x), training=mode == TRAINING, dtype="float64")
    cotangents = [
        Cotangents(*of_rank) for of_rank in zip(shards(step.a), step.p, step.q, strict=True)
    ]
    return norm.double_backward(shards(step.dy), cotangents)


def loss(step: Step, mode: str, x: list[Any], dy: list[Any], weight: Any) -> Any:
    """L, by the formulas of the first backward pass."""
    total: Any = 0
    ranks = range(len(x))
    for group in [ranks] if mode == TRAINING else [[rank] for rank in ranks]:
        whole, grads = (np.concatenate([v[rank] for rank in group], axis=1) for v in (x, dy))
        if not whole.size:
            continue
        mean, var = step.running if mode == EVAL else formulas.stats(whole)
        sums = formulas.reduce_grad(grads, whole, mean)
        for rank in group:
            if mode == EVAL:
                dx = formulas.input_grad_in_eval(dy[rank], var, EPS, weight)
            else:
                dx = formulas.input_grad(
                    dy[rank], x[rank], mean, var, EPS, weight, *sums, whole.shape[1]
                )
            grad_bias, sum_dy_xmu = formulas.reduce_grad(dy[rank], x[rank], mean)
            grad_weight = sum_dy_xmu / np.sqrt(var + EPS)
            total += (step.a[rank] * dx).sum()
            total += (step.p[rank] * grad_weight + step.q[rank] * grad_bias).sum()
    return total


def derivative(function: Callable[[Any], Any], at: Array) -> Array:
    """By complex steps: Squire and Trapp, SIAM Review 40 (1998), f'(x) = Im f(x + ih) / h."""
    step = 1e-30
    found = np.zeros_like(at)
    for entry in np.ndindex(at.shape):
        moved = at.astype(complex)
        moved[entry] += step * 1j
        found[entry] = function(moved).imag / step
    return found


def assert_alike(got: Bounded, expected: Array) -> None:
    assert got.value.shape == got.bound.shape == expected.shape
    tolerance = 1e-13 * max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(got.value, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_they_are_the_derivatives_of_the_first_gradients(mode: str, seed: int) -> None:
    step = Step.random(seed)
    found = second_gradients(step, mode)
    of_weight = derivative(lambda w: loss(step, mode, step.x, step.dy, w), step.weight)
    for rank, gradients in enumerate(found):

        def of_x(x: Any, rank: int = rank) -> Any:
            moved = [*step.x[:rank], x, *step.x[rank + 1 :]]
            return loss(step, mode, moved, step.dy, step.weight)

        def of_dy(dy: Any, rank: int = rank) -> Any:
            moved = [*step.dy[:rank], dy, *step.dy[rank + 1 :]]
            return loss(step, mode, step.x, moved, step.weight)

        assert_alike(gradients.input, shard(derivative(of_x, step.x[rank]), SHAPES[rank]))
        assert_alike(gradients.grad_output, shard(derivative(of_dy, step.dy[rank]), SHAPES[rank]))
        assert_alike(gradients.weight, of_weight)


@pytest.mark.parametrize("mode", MODES)
def test_they_are_those_of_pytorch(mode: str) -> None:
    """PyTorch's own batch normalization in float64, of all shards of a group together."""
    step = Step.random(3)
    x, dy = (
        [torch.tensor(matrix.T, requires_grad=True) for matrix in values]
        for values in (step.x, step.dy)
    )
    ranks = range(len(x))
    weights = [torch.tensor(step.weight, requires_grad=True) for _ in ranks]
    biases = [torch.zeros(C, dtype=torch.float64, requires_grad=True) for _ in ranks]
    total = torch.zeros((), dtype=torch.float64)
    for group in (
        [list(ranks)] if mode != UNTRACKED else [[rank] for rank in ranks if x[rank].numel()]
    ):
        whole = torch.cat([x[rank] for rank in group])
        if len(whole) == 1:  # for which PyTorch has no training step
            normalized = (whole - whole) / EPS**0.5
        elif mode == EVAL:
            mean, var = (torch.tensor(values) for values in step.running)
            normalized = torch.nn.functional.batch_norm(whole, mean, var, eps=EPS)
        else:
            normalized = torch.nn.functional.batch_norm(whole, None, None, training=True, eps=EPS)
        parts = normalized.split([len(x[rank]) for rank in group])
        ys = [z * weights[r] + biases[r] for r, z in zip(group, parts, strict=True)]
        inputs = [t for r in group for t in (x[r], weights[r], biases[r])]
        first = torch.autograd.grad(ys, inputs, [dy[r] for r in group], create_graph=True)
        for rank, (dx, dw, db) in zip(group, zip(*[iter(first)] * 3, strict=True), strict=True):
            total = total + (torch.tensor(step.a[rank].T) * dx).sum()
            total = (
                total + (torch.tensor(step.p[rank]) * dw + torch.tensor(step.q[rank]) * db).sum()
            )
    seconds = torch.autograd.grad(total, [*x, *dy, *weights], materialize_grads=True)
    of_weight = torch.stack(seconds[2 * len(x) :]).sum(0).numpy()
    for rank, gradients in enumerate(second_gradients(step, mode)):
        for got, of_torch in (
            (gradients.input, seconds[rank]),
            (gradients.grad_output, seconds[len(x) + rank]),
        ):
            expected = shard(np.ascontiguousarray(of_torch.numpy().T), SHAPES[rank])
            np.testing.assert_allclose(got.value, expected, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(gradients.weight.value, of_weight, rtol=1e-11)


# Exact values

EXACT_CASES = {
    "two values": [-1.0, 0.5],
    "mean 0": [-0.7, 0.2, 1.9, -1.3, 0.4, 0.8, -1.1],
    "constant": [0.1] * 5,
    "mean/std 1e5": [1e5 + d for d in (-0.7, 0.2, 1.9, -1.3, 0.4, 0.8, -1.1)],
    "variance far below eps": [3.0 + d * 1e-6 for d in (-0.7, 0.2, 1.9, -1.3)],
    "scale 1e18": [d * 1e18 for d in (-0.7, 0.2, 1.9, -1.3)],
    "scale 1e-18": [d * 1e-18 for d in (-0.7, 0.2, 1.9, -1.3)],
}
Numbers: TypeAlias = "list[Any]"  # of mpmath


def exact_loss(x: Numbers, dy: Numbers, weight: Any, a: Numbers, p: Any, q: Any) -> Any:
    """L of one channel on one rank."""
    n = len(x)
    mean = sum(x) / n
    d = [value - mean for value in x]
    scale = 1 / mpmath.sqrt(sum(value * value for value in d) / n + mpmath.mpf(EPS))
    sum_dy = sum(dy)
    sum_dy_xmu = sum(g * value for g, value in zip(dy, d, strict=True))
    slope = scale * scale * sum_dy_xmu / n
    dx = [weight * scale * (g - sum_dy / n - v * slope) for g, v in zip(dy, d, strict=True)]
    products = sum(one * other for one, other in zip(a, dx, strict=True))
    return products + p * scale * sum_dy_xmu + q * sum_dy


@pytest.mark.parametrize("name", EXACT_CASES)
@pytest.mark.parametrize("weight", [0.6, -1.7])
def test_values_are_those_of_exact_arithmetic(name: str, weight: float) -> None:
    """Central differences in 200 digits; the error is at most half the bound in float64."""
    x = np.array(EXACT_CASES[name])
    dy, a = np.random.default_rng(0).standard_normal((2, x.size))
    p, q = 0.8, -0.3
    norm = SyncBatchNorm(1, EPS, dtype="float64", weight=np.array([weight]))
    norm.forward([x.reshape(1, 1, -1)], dtype="float64")
    cotangents = Cotangents(a.reshape(1, 1, -1), np.array([p]), np.array([q]))
    (found,) = norm.double_backward([dy.reshape(1, 1, -1)], [cotangents])
    with mpmath.workdps(200):
        arguments = [mpmath.mpf(value) for value in [*x.tolist(), *dy.tolist(), weight]]

        def at(moved: Numbers) -> Any:
            xs, dys = moved[: x.size], moved[x.size : 2 * x.size]
            return exact_loss(xs, dys, moved[-1], [mpmath.mpf(v) for v in a.tolist()], p, q)

        def partial(index: int) -> Any:
            step = mpmath.mpf(10) ** -80
            ends = []
            for sign in (1, -1):
                moved = list(arguments)
                moved[index] += sign * step
                ends.append(at(moved))
            return (ends[0] - ends[1]) / (2 * step)

        got = [*zip(found.input.value.ravel(), found.input.bound.ravel(), strict=True)]
        got += zip(found.grad_output.value.ravel(), found.grad_output.bound.ravel(), strict=True)
        got += zip(found.weight.value, found.weight.bound, strict=True)
        for index, (value, bound) in enumerate(got):
            exact = partial(index)
            assert abs(mpmath.mpf(float(value)) - exact) <= float(bound) / 2, index
