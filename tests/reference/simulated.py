"""Simulated layers in NumPy, every rounding included, and the data that they are judged on.

A simulated layer is a set of operations (`Layer`) and the training step around them (`step`). Each
operation works in the type of its operands: float32 unless the input is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from syncbn.conformance.data import round_to
from syncbn.reference import Bounded, SyncBatchNorm
from syncbn.reference.ratio import ratio

Array: TypeAlias = npt.NDArray[Any]  # (C, n) values, or (C,) statistics
Sum: TypeAlias = Callable[[Array], Array]

EPS = 1e-5
BLOCK = 128  # values that a sound layer may add up one after the other


def column(v: Array) -> Array:
    return v[:, np.newaxis]


# Sums of each row of a matrix


def pairwise(terms: Array) -> Array:
    return np.ascontiguousarray(terms).sum(axis=1)


def one_by_one(terms: Array) -> Array:
    return np.add.accumulate(terms, axis=-1)[..., -1]


def in_blocks(terms: Array) -> Array:
    padded = np.pad(terms, ((0, 0), (0, -terms.shape[1] % BLOCK)))
    return pairwise(one_by_one(padded.reshape(len(terms), -1, BLOCK)))


def in_float16(terms: Array) -> Array:
    return one_by_one(terms.astype(np.float16)).astype(terms.dtype)


# Mean and biased variance of one rank


def two_pass(x: Array, total: Sum) -> tuple[Array, Array]:
    n = x.shape[1]
    mean = total(x) / n
    d = x - column(mean)
    # Divided before it is summed: a sum of squares overflows float32 at scale 1e18.
    return mean, total(d * (d / n))


def welford(x: Array, total: Sum) -> tuple[Array, Array]:
    """Chains of at most BLOCK values, which Chan's formula merges."""
    chains = -(-x.shape[1] // BLOCK)
    mean, squares = np.zeros((2, len(x), chains), x.dtype)
    counts = np.zeros(chains, x.dtype)
    for start in range(0, x.shape[1], chains):
        values = x[:, start : start + chains]
        live = slice(values.shape[1])
        counts[live] += 1
        d = values - mean[:, live]
        mean[:, live] += d / counts[live]
        squares[:, live] += d * (values - mean[:, live])
    return chan(mean.T, (squares / counts).T, counts)


def one_pass(x: Array, total: Sum) -> tuple[Array, Array]:
    n = x.shape[1]
    mean = total(x) / n
    return mean, np.maximum(total(x * x) / n - mean * mean, 0)


def through_invstd(x: Array, total: Sum) -> tuple[Array, Array]:
    mean, var = two_pass(x, total)
    invstd = 1 / np.sqrt(var + EPS)
    return mean, (1 / invstd) ** 2 - EPS


# The merge of parts (P, C), counts (P,)


def chan(means: Array, variances: Array, counts: Array) -> tuple[Array, Array]:
    weights = counts / counts.sum()
    mean = pairwise(means.T * weights)
    var = pairwise((variances + (means - mean) ** 2).T * weights)
    return mean, var


def equal_weights(means: Array, variances: Array, counts: Array) -> tuple[Array, Array]:
    return chan(means, variances, np.ones_like(counts))


# What running_var takes


def of_the_group(var: Array, counts: Array) -> Array:
    n = counts.sum()
    return var * (n / (n - 1))


def of_the_rank(var: Array, counts: Array) -> Array:
    return of_the_group(var, counts[:1])


def biased(var: Array, counts: Array) -> Array:
    return var


# y


def normalized(x: Array, mean: Array, invstd: Array, weight: Array, bias: Array) -> Array:
    return (x - column(mean)) * column(invstd) * column(weight) + column(bias)


def folded_y(x: Array, mean: Array, invstd: Array, weight: Array, bias: Array) -> Array:
    a = invstd * weight
    return x * column(a) + column(bias - mean * a)


# sum dy and sum dy (x - mean) of one rank


def centred(dy: Array, x: Array, mean: Array, total: Sum) -> tuple[Array, Array]:
    return total(dy), total(dy * (x - column(mean)))


def raw_moments(dy: Array, x: Array, mean: Array, total: Sum) -> tuple[Array, Array]:
    sum_dy = total(dy)
    return sum_dy, total(dy * x) - mean * sum_dy


# dx


def differentiated(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array,
    mean_dy: Array,
    mean_dy_xmu: Array,
) -> Array:
    through_var = (x - column(mean)) * column(invstd * invstd * mean_dy_xmu)
    return (dy - column(mean_dy) - through_var) * column(invstd * weight)


def folded_dx(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array,
    mean_dy: Array,
    mean_dy_xmu: Array,
) -> Array:
    a, k = invstd * weight, invstd * invstd * mean_dy_xmu
    return column(a) * dy + column(-a * k) * x + column(a * (mean * k - mean_dy))


# Layers


@dataclass(frozen=True)
class Layer:
    """Operations of a layer; the defaults are the formulas as written, with pairwise sums."""

    total: Sum = pairwise
    stats: Callable[[Array, Sum], tuple[Array, Array]] = two_pass
    combine: Callable[[Array, Array, Array], tuple[Array, Array]] = chan
    unbiased: Callable[[Array, Array], Array] = of_the_group
    normalize: Callable[..., Array] = normalized
    reduce_grad: Callable[[Array, Array, Array, Sum], tuple[Array, Array]] = centred
    input_grad: Callable[..., Array] = differentiated


SOUND = {
    "as written": Layer(),
    "Welford": Layer(stats=welford),
    "folded": Layer(normalize=folded_y, input_grad=folded_dx),
}
IN_BLOCKS = {
    "sums in blocks": Layer(in_blocks),
    "folded, sums in blocks": Layer(in_blocks, normalize=folded_y, input_grad=folded_dx),
}


@dataclass(frozen=True)
class Batch:
    """A step's input: (C, n_r) of every rank, representable in dtype; (C,) the layer's state."""

    x: list[Array]
    dy: list[Array]
    weight: Array
    bias: Array
    running_mean: Array
    running_var: Array
    dtype: str = "float32"
    momentum: float = 1.0


Results: TypeAlias = dict[str, list[Any]]


def step(layer: Layer, batch: Batch) -> Results:
    """What the simulated ranks get, by quantity; every rank has the same running statistics."""
    weight, bias, momentum = batch.weight, batch.bias, batch.momentum
    counts = np.array([x.shape[1] for x in batch.x], weight.dtype)
    means, variances = zip(*(layer.stats(x, layer.total) for x in batch.x), strict=True)
    mean, var = layer.combine(np.array(means), np.array(variances), counts)
    invstd = 1 / np.sqrt(var + EPS)
    shards = list(zip(batch.dy, batch.x, strict=True))
    sums = [layer.reduce_grad(dy, x, mean, layer.total) for dy, x in shards]
    mean_dy, mean_dy_xmu = (sum(parts) / counts.sum() for parts in zip(*sums, strict=True))
    ys = [layer.normalize(x, mean, invstd, weight, bias) for x in batch.x]
    dxs = [layer.input_grad(dy, x, mean, invstd, weight, mean_dy, mean_dy_xmu) for dy, x in shards]
    var_taken = layer.unbiased(var, counts)
    return {
        "y": [round_to(y, batch.dtype) for y in ys],
        "dx": [round_to(dx, batch.dtype) for dx in dxs],
        "grad_weight": [sum_dy_xmu * invstd for _, sum_dy_xmu in sums],
        "grad_bias": [sum_dy for sum_dy, _ in sums],
        "running_mean": [(1 - momentum) * batch.running_mean + momentum * mean],
        "running_var": [(1 - momentum) * batch.running_var + momentum * var_taken],
    }


def reference_of(batch: Batch) -> SyncBatchNorm:
    return SyncBatchNorm(
        len(batch.weight),
        EPS,
        batch.momentum,
        dtype=str(batch.weight.dtype),
        weight=batch.weight,
        bias=batch.bias,
        running_mean=batch.running_mean,
        running_var=batch.running_var,
    )


def transposed(result: Bounded) -> Bounded:
    return Bounded(result.value.T, result.bound.T)


def shards(rows: list[Array]) -> list[Array]:
    """(C, n_r) of every rank as the reference takes them: float64, (n_r, C)."""
    return [row.T.astype(np.float64) for row in rows]


def expected(batch: Batch) -> Results:
    norm = reference_of(batch)
    ys = norm.forward(shards(batch.x), dtype=batch.dtype)
    gradients = norm.backward(shards(batch.dy))
    return {
        "y": [transposed(y) for y in ys],
        "dx": [transposed(gradient.input) for gradient in gradients],
        "grad_weight": [gradient.weight for gradient in gradients],
        "grad_bias": [gradient.bias for gradient in gradients],
        "running_mean": [norm.running_mean],
        "running_var": [norm.running_var],
    }


def ratios(layer: Layer, batch: Batch, wanted: Results) -> dict[str, Array]:
    """The largest |got - expected| / bound of each channel (C,), by quantity."""
    with np.errstate(all="ignore"):  # what overflows fails by its ratio
        got = step(layer, batch)
    return {
        name: np.max(
            [
                ratio(part, bounded).reshape(len(batch.weight), -1).max(axis=1)
                for part, bounded in zip(got[name], wanted[name], strict=True)
            ],
            axis=0,
        )
        for name in wanted
    }


# Data

UNEVEN = (0.25, 0.5)  # where the batch is cut into ranks
ALONE = ()
EIGHT = tuple(i / 8 for i in range(1, 8))


def batch_of(
    x: Array, dy: Array, cuts: tuple[float, ...] = UNEVEN, dtype: str = "float32", **rest: Any
) -> Batch:
    """x and dy (C, n), rounded to dtype and cut into ranks."""
    held = "float64" if dtype == "float64" else "float32"
    rng = np.random.default_rng(1)
    weight, bias, running_mean = rng.standard_normal((3, len(x))).astype(held)
    running_var = rng.random(len(x)).astype(held)

    def ranks(values: Array) -> list[Array]:
        at = [int(cut * values.shape[1]) for cut in cuts]
        return np.split(round_to(values, dtype).astype(held), at, axis=1)

    return Batch(ranks(x), ranks(dy), weight, bias, running_mean, running_var, dtype, **rest)


def normal(n: int, mean: float, scale: float = 1.0, channels: int = 8, **rest: Any) -> Batch:
    """The mean is in units of the standard deviation `scale`."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, channels, n))
    return batch_of((x + mean) * scale, dy, **rest)


def orthogonal_gradients(n: int, mean: float) -> Batch:
    """Every x occurs twice, with dy and with -dy: sum dy and sum dy (x - mean) are exactly 0."""
    rng = np.random.default_rng(10)
    x, dy = rng.standard_normal((2, 8, n // 2))
    order = rng.permutation(n)
    x, dy = np.concatenate([x, x], 1) + mean, np.concatenate([dy, -dy], 1)
    return batch_of(x[:, order], dy[:, order], ALONE)


def parallel_gradients(n: int, mean: float) -> Batch:
    """dy is x - mean plus a little noise, so most of dx cancels."""
    rng = np.random.default_rng(11)
    x, rest = rng.standard_normal((2, 8, n))
    return batch_of(x + mean, x + 1e-3 * rest)


def alternation(n: int) -> Array:
    return np.where(np.arange(n) % 2, -1.0, 1.0)


def constant(n: int, channels: int = 16, **rest: Any) -> Batch:
    """x and dy are constant in each channel, so the roundings of a sum are aligned."""
    x, dy = 1 + np.random.default_rng(2).random((2, channels, 1))
    return batch_of(np.repeat(x, n, axis=1), np.repeat(dy, n, axis=1), **rest)


def clusters(n: int, gap: float) -> Batch:
    """Two values per channel, `gap` apart: the first half has one, the second half the other."""
    rng = np.random.default_rng(3)
    x = 1 + rng.random((16, 1)) + np.where(np.arange(n) < n / 2, 0, gap)
    return batch_of(x, rng.standard_normal((16, n)))


def alternating(n: int, size: float) -> Batch:
    """x and dy of magnitude `size`, with a sign that turns at every value, plus unit noise."""
    rng = np.random.default_rng(4)
    x, dy = rng.standard_normal((2, 16, n)) + size * alternation(n)
    return batch_of(x, dy)


def above_a_power_of_two(n: int, ulps: int) -> Batch:
    """1 and at most `ulps` units in the last place of float32."""
    rng = np.random.default_rng(5)
    x = 1 + rng.integers(0, ulps, (16, n)) * 2.0**-23
    return batch_of(x, rng.standard_normal((16, n)))


def outlier(n: int, size: float) -> Batch:
    """The first value swamps the others, which differ only in sign, in every sum."""
    rng = np.random.default_rng(6)
    x, dy = rng.choice([-1.0, 1.0], (2, 16, n)) * rng.uniform(0.9, 1, (2, 16, 1))
    x[:, 0] = dy[:, 0] = size
    return batch_of(x, dy)


def scales_of_ranks(n: int) -> Batch:
    """Eight ranks; mean and standard deviation grow tenfold from rank to rank."""
    rng = np.random.default_rng(7)
    scale = np.repeat(10.0 ** np.arange(-4, 4), n // 8)
    return batch_of((rng.standard_normal((16, n)) + 1) * scale, rng.standard_normal((16, n)), EIGHT)


COUNTS = (8, 1000, 60_000)
