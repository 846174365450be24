"""The reference is right.

It is compared with complex-step derivatives, exact arithmetic, and itself on other cuts of a batch.
Where a value is compared with a tolerance, the tolerance is the reference's own claim: half of
the float64 bound of each value is what it allows itself (syncbn.reference.bounds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.reference import Bounded, Gradients, SyncBatchNorm, formulas

Array: TypeAlias = npt.NDArray[np.float64]
Shape: TypeAlias = tuple[int, ...]

C = 3
EPS = 1e-5
# Uneven, of different spatial sizes, one empty, one with a single value per channel.
SHAPES: list[Shape] = [(2, C, 3, 2), (0, C, 5), (1, C), (4, C, 1), (1, C, 2, 1, 3)]


def layer(channels: int = C, **arguments: Any) -> SyncBatchNorm:
    return SyncBatchNorm(channels, EPS, dtype="float64", **arguments)


def random_shards(rng: np.random.Generator, shapes: Sequence[Shape]) -> list[Array]:
    return [rng.standard_normal(shape) + 0.7 for shape in shapes]


def matrix(shards: Sequence[Array]) -> Array:
    """(C, n): every value of each channel."""
    rows = [np.moveaxis(shard, 1, 0).reshape(shard.shape[1], -1) for shard in shards]
    return np.concatenate(rows, axis=1)


def assert_close(actual: Bounded, expected: Any) -> None:
    """The error is at most half of the bound."""
    error = np.abs(actual.value - expected)
    np.testing.assert_array_less(error, actual.bound / 2 + np.finfo(float).tiny)


# Gradients

MODES = ["training", "eval with running statistics", "eval with its own statistics"]


@dataclass(frozen=True)
class Loss:
    """sum(y grad_output) of each shard, by the forward formula alone."""

    mode: str
    running: tuple[Array, Array]
    grad_outputs: list[Array]

    def __call__(self, shards: list[Array], weight: Array, bias: Array) -> list[Any]:
        losses = []
        for shard, dy in zip(shards, self.grad_outputs, strict=True):
            mean, var = self._statistics(shard, shards)
            y = formulas.normalize(matrix([shard]), mean, var, EPS, weight, bias)
            losses.append((y * matrix([dy])).sum())
        return losses

    def _statistics(self, shard: Array, shards: list[Array]) -> tuple[Array, Array]:
        if self.mode == "eval with running statistics" or not shard.size:
            return self.running
        return formulas.stats(matrix(shards if self.mode == "training" else [shard]))


def assert_gradient(actual: Bounded, function: Callable[[Any], Any], at: Array) -> None:
    """Compare with the complex-step derivative, which loses no digits by cancellation.

    Squire and Trapp, SIAM Review 40 (1998): f'(x) = Im f(x + ih) / h.
    """
    step = 1e-30
    expected = np.zeros_like(at)
    for entry in np.ndindex(at.shape):
        moved = at.astype(complex)
        moved[entry] += step * 1j
        expected[entry] = function(moved).imag / step
    assert actual.value.shape == at.shape
    tolerance = 1e-13 * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(actual.value, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_the_derivatives_of_the_forward_formula(mode: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards, grad_outputs = random_shards(rng, SHAPES), random_shards(rng, SHAPES)
    weight, bias = np.array([-1.3, 0.4, 2.1]) * rng.random(C), rng.standard_normal(C)
    running = rng.standard_normal(C), rng.random(C) + 0.5
    loss = Loss(mode, running, grad_outputs)
    norm = layer(
        weight=weight,
        bias=bias,
        running_mean=running[0],
        running_var=running[1],
        track_running_stats=mode != "eval with its own statistics",
    )

    ys = norm.forward(shards, training=mode == "training", dtype="float64")
    gradients = norm.backward(grad_outputs)

    losses = [(y.value * dy).sum() for y, dy in zip(ys, grad_outputs, strict=True)]
    np.testing.assert_allclose(losses, loss(shards, weight, bias), rtol=1e-12, atol=1e-12)
    for rank, gradient in enumerate(gradients):

        def of_x(x: Any, rank: int = rank) -> Any:
            return sum(loss([*shards[:rank], x, *shards[rank + 1 :]], weight, bias))

        def of_weight(w: Any, rank: int = rank) -> Any:
            return loss(shards, w, bias)[rank]

        def of_bias(b: Any, rank: int = rank) -> Any:
            return loss(shards, weight, b)[rank]

        assert_gradient(gradient.input, of_x, shards[rank])
        assert_gradient(gradient.weight, of_weight, weight)
        assert_gradient(gradient.bias, of_bias, bias)


# Values


@dataclass(frozen=True)
class Exact:
    """One channel of a training step in rational arithmetic.

    Only 1 / sqrt is rounded, to 50 digits.
    """

    x: list[Fraction]
    dy: list[Fraction]
    weight: Fraction
    bias: Fraction

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def mean(self) -> Fraction:
        return sum(self.x, Fraction(0)) / self.n

    @property
    def deviations(self) -> list[Fraction]:
        mean = self.mean
        return [x - mean for x in self.x]

    @property
    def var(self) -> Fraction:
        return sum((d * d for d in self.deviations), Fraction(0)) / self.n

    @property
    def running_var(self) -> Fraction:
        return self.var * self.n / (self.n - 1)

    @property
    def scale(self) -> Fraction:
        with mpmath.workdps(50):
            square = self.var + Fraction(EPS)
            root = mpmath.sqrt(mpmath.mpf(square.numerator) / square.denominator)
            return Fraction(mpmath.nstr(1 / root, 50))

    @property
    def y(self) -> list[Fraction]:
        gain = self.scale * self.weight
        return [d * gain + self.bias for d in self.deviations]

    @property
    def grad_bias(self) -> Fraction:
        return sum(self.dy, Fraction(0))

    @property
    def grad_weight(self) -> Fraction:
        return self.scale * self._sum_dy_xmu

    @property
    def dx(self) -> list[Fraction]:
        gain, n = self.scale * self.weight, self.n
        slope = self._sum_dy_xmu / (self.var + Fraction(EPS)) / n
        return [
            gain * (dy - self.grad_bias / n - d * slope)
            for dy, d in zip(self.dy, self.deviations, strict=True)
        ]

    @property
    def _sum_dy_xmu(self) -> Fraction:
        pairs = zip(self.dy, self.deviations, strict=True)
        return sum((dy * d for dy, d in pairs), Fraction(0))


def assert_exact(actual: Bounded, exact: Sequence[Fraction]) -> None:
    """As assert_close, without rounding the expected values or the differences."""
    values, bounds = actual.value.ravel().tolist(), actual.bound.ravel().tolist()
    for value, bound, expected in zip(values, bounds, exact, strict=True):
        assert abs(Fraction(value) - expected) <= Fraction(bound) / 2


EXACT_CASES = {
    "two values": [-1.0, 0.5],
    "mean 0": [-0.7, 0.2, 1.9, -1.3, 0.4, 0.8, -1.1],
    "constant": [0.1] * 5,
    "mean/std 1e5": [1e5 + d for d in (-0.7, 0.2, 1.9, -1.3, 0.4, 0.8, -1.1)],
    "variance far below eps": [3.0 + d * 1e-6 for d in (-0.7, 0.2, 1.9, -1.3)],
    "scale 1e18": [d * 1e18 for d in (-0.7, 0.2, 1.9, -1.3)],
    "scale 1e-18": [d * 1e-18 for d in (-0.7, 0.2, 1.9, -1.3)],
}


@pytest.mark.parametrize("name", EXACT_CASES)
@pytest.mark.parametrize("weight", [0.6, -1.7])
def test_values_are_those_of_exact_arithmetic(name: str, weight: float) -> None:
    x = np.array(EXACT_CASES[name])
    dy, bias = np.random.default_rng(0).standard_normal(x.size), 0.3
    norm = layer(1, momentum=1.0, weight=np.array([weight]), bias=np.array([bias]))
    exact = Exact(
        [Fraction(value) for value in x.tolist()],
        [Fraction(value) for value in dy.tolist()],
        Fraction(weight),
        Fraction(bias),
    )

    (y,) = norm.forward([x.reshape(1, 1, -1)], dtype="float64")
    (gradients,) = norm.backward([dy.reshape(1, 1, -1)])

    assert_exact(y, exact.y)
    assert_exact(norm.running_mean, [exact.mean])
    assert_exact(norm.running_var, [exact.running_var])
    assert_exact(gradients.input, exact.dx)
    assert_exact(gradients.weight, [exact.grad_weight])
    assert_exact(gradients.bias, [exact.grad_bias])


# Partition invariance


def test_combine_merges_parts_and_ignores_empty_ones() -> None:
    rng = np.random.default_rng(4)
    parts = [rng.standard_normal((C, n)) * n + n for n in (1, 7, 30)]
    whole = np.concatenate(parts, axis=1)
    means, variances = zip(*map(formulas.stats, parts), strict=True)
    undefined = np.full(C, np.nan)
    mean, var, n = formulas.combine([*means, undefined], [*variances, undefined], [1, 7, 30, 0])
    np.testing.assert_allclose(mean, whole.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(var, whole.var(axis=1), rtol=1e-14)
    assert n == 38


@dataclass(frozen=True)
class Step:
    """A training step: values per channel in the order of the batch, sums over the ranks."""

    y: Bounded
    dx: Bounded
    grad_weight: Bounded
    grad_bias: Bounded
    running_mean: Bounded
    running_var: Bounded


def step(x: list[Array], dy: list[Array]) -> Step:
    norm = layer(weight=np.array([-1.3, 0.4, 2.1]), bias=np.array([0.5, -0.2, 0.0]))
    ys = norm.forward(x, dtype="float64")
    gradients: list[Gradients] = norm.backward(dy)
    return Step(
        joined(ys),
        joined([g.input for g in gradients]),
        added([g.weight for g in gradients]),
        added([g.bias for g in gradients]),
        norm.running_mean,
        norm.running_var,
    )


def joined(parts: list[Bounded]) -> Bounded:
    return Bounded(matrix([p.value for p in parts]), matrix([p.bound for p in parts]))


def added(parts: list[Bounded]) -> Bounded:
    return Bounded(
        np.sum([p.value for p in parts], axis=0), np.sum([p.bound for p in parts], axis=0)
    )


def assert_alike(one: Bounded, other: Bounded) -> None:
    assert_close(Bounded(one.value, one.bound + other.bound), other.value)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data())
def test_any_cut_of_a_batch_gives_the_same_step(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 24), "values per channel")
    order = np.array(data.draw(st.permutations(range(n)), "order"))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6), "cuts"))
    seed = data.draw(st.integers(0, 1000), "seed")
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((C, n)) + 3, rng.standard_normal((C, n))

    def shards(values: Array) -> list[Array]:
        parts = np.split(values[:, order], cuts, axis=1)
        # (N, C) and (1, C, S) by turns: what is batch on one rank is space on the next.
        return [part.T if rank % 2 else part[np.newaxis] for rank, part in enumerate(parts)]

    whole, cut = step([x[np.newaxis]], [dy[np.newaxis]]), step(shards(x), shards(dy))

    def reordered(values: Bounded) -> Bounded:
        return Bounded(values.value[:, order], values.bound[:, order])

    assert_alike(reordered(whole.y), cut.y)
    assert_alike(reordered(whole.dx), cut.dx)
    assert_alike(whole.grad_weight, cut.grad_weight)
    assert_alike(whole.grad_bias, cut.grad_bias)
    assert_alike(whole.running_mean, cut.running_mean)
    assert_alike(whole.running_var, cut.running_var)


def test_results_have_the_shapes_of_their_shards() -> None:
    rng = np.random.default_rng(0)
    norm = layer()
    ys = norm.forward(random_shards(rng, SHAPES), dtype="float64")
    gradients = norm.backward(random_shards(rng, SHAPES))
    assert [y.value.shape for y in ys] == [y.bound.shape for y in ys] == SHAPES
    assert [g.input.value.shape for g in gradients] == SHAPES
    empty = gradients[1]
    np.testing.assert_array_equal([empty.weight.value, empty.bias.value], np.zeros((2, C)))


# Running statistics

STEPS: list[list[Shape]] = [
    [(2, C, 3), (1, C)],
    [(0, C), (1, C, 2, 2), (3, C, 5)],
    [(7, C)],
    [(1, C), (1, C)],
]


def batches() -> list[list[Array]]:
    rng = np.random.default_rng(3)
    return [random_shards(rng, shapes) for shapes in STEPS]


def batch_statistics() -> list[tuple[Array, Array]]:
    return [
        (matrix(shards).mean(axis=1), matrix(shards).var(axis=1, ddof=1)) for shards in batches()
    ]


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_move_by_the_momentum(momentum: float) -> None:
    mean, var = np.array([1.0, -2.0, 0.5]), np.array([0.5, 1.0, 4.0])
    norm = layer(momentum=momentum, running_mean=mean, running_var=var)
    for tracked, (shards, (batch_mean, batch_var)) in enumerate(
        zip(batches(), batch_statistics(), strict=True), 1
    ):
        norm.forward(shards, dtype="float64")
        mean = (1 - momentum) * mean + momentum * batch_mean
        var = (1 - momentum) * var + momentum * batch_var
        assert_close(norm.running_mean, mean)
        assert_close(norm.running_var, var)
        assert norm.num_batches_tracked == tracked


def test_momentum_none_is_the_plain_mean_over_steps() -> None:
    norm = layer(momentum=None)
    for tracked, shards in enumerate(batches(), 1):
        norm.forward(shards, dtype="float64")
        means, variances = zip(*batch_statistics()[:tracked], strict=True)
        assert_close(norm.running_mean, np.mean(means, axis=0))
        assert_close(norm.running_var, np.mean(variances, axis=0))
        assert norm.num_batches_tracked == tracked


def test_momentum_none_continues_from_num_batches_tracked() -> None:
    shards, (mean, _) = batches()[0], batch_statistics()[0]
    norm = layer(momentum=None, running_mean=np.ones(C), num_batches_tracked=3)
    norm.forward(shards, dtype="float64")
    assert_close(norm.running_mean, (3 + mean) / 4)
    assert norm.num_batches_tracked == 4


def assert_untouched(
    shards: list[Array], training: bool, momentum: float | None, tracks: bool = True
) -> None:
    norm = layer(momentum=momentum, track_running_stats=tracks, num_batches_tracked=2)
    before = norm.running_mean, norm.running_var
    norm.forward(shards, training, dtype="float64")
    norm.backward(shards)
    after = norm.running_mean, norm.running_var
    np.testing.assert_array_equal(after, before)
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_what_leaves_the_running_statistics_alone(momentum: float | None) -> None:
    assert_untouched(batches()[0], training=False, momentum=momentum)
    assert_untouched(batches()[0], training=True, momentum=momentum, tracks=False)
    empty = [np.zeros((0, C, 4)), np.zeros((0, C))]
    assert_untouched(empty, training=True, momentum=momentum)


@pytest.mark.parametrize("tracks", [True, False])
def test_one_value_per_channel_is_an_error_in_training_only(tracks: bool) -> None:
    norm = layer(track_running_stats=tracks)
    shards = [np.zeros((0, C, 2)), np.ones((1, C, 1))]
    with pytest.raises(ValueError, match="1 value per channel"):
        norm.forward(shards, dtype="float64")
    assert norm.num_batches_tracked == 0
    norm.forward(shards, training=False, dtype="float64")


def test_without_affine_there_is_no_weight_and_no_bias() -> None:
    shards = batches()[0]
    ones, zeros = np.ones(C), np.zeros(C)
    plain = layer(affine=False, weight=ones * 3, bias=ones * 4)
    affine = layer(weight=ones, bias=zeros)
    ys, expected = (norm.forward(shards, dtype="float64") for norm in (plain, affine))
    for y, other in zip(ys, expected, strict=True):
        np.testing.assert_array_equal(y.value, other.value)
