r"""How far a careful implementation may be from the reference, element by element.

The implementation that is judged accumulates in a type of unit roundoff u (float32 for inputs of
float16, bfloat16 and float32; float64 for float64). It rounds each result to the dtype it
returns, of unit roundoff u_o. These rules derive the bounds:

(a) fl(a op b) = (a op b)(1 + d), abs(d) <= u. Higham, Accuracy and Stability of Numerical
    Algorithms (2002), (2.4). Everything below is to first order in u.
(b) A sum of n terms costs h u sum|terms|. Pairwise summation has h = log2 n (Higham, (4.6)). A
    group of R ranks adds log2 R for the sum over ranks. A further 4 is for forming a term, its
    weight n_r / n, the division and the store: h = log2 n + log2 R + 4. Blocks of b values that
    are added one by one have a worst case of b instead, but rounding errors that are not aligned
    grow as sqrt(b) (Higham and Mary, SIAM J. Sci. Comput. 41, 2019); the threshold of the verdict
    leaves room for them. One running sum over a large n is meant to fail.
(c) Parts are merged by the formula of Chan, Golub and LeVeque (The American Statistician 37,
    1983), which ranks cannot avoid: v = sum w (v_p + (m_p - m)^2). If the means of the parts are
    in error by e_p and that of the whole by e, then v is in error by 2 sum w (m_p - m) e_p +
    sum w ((e_p - e)^2 + e_p^2), because sum w (m_p - m) = 0. As sum w e_p^2 <= de^2 with
    de = u (h + 1) sqrt(v + m^2), the inequality of Cauchy and Schwarz bounds this by
    2 sqrt(v) de + 5 de^2: the condition number sqrt(1 + m^2 / v) of their paper. A two-pass
    variance of a single part has the last term only, e_p^2.
(d) y and dx may be formed as written or folded into x a + c. The folded form rounds x a and m a
    instead of x - m: hence abs(x) + abs(m) where the formula has abs(x - m).

With m, v, s = 1 / sqrt(v + eps), d = x - m, g = weight, b = bias, S = sum dy, X = sum dy d,
k = s^2 X / n, and A = mean|x|:

    m    dm = u (h A + |m|)                                                         (b), store
    v    dv = u h v + 2 sqrt(v) de + 5 de^2                                            (b), (c)
    s    ds = max(sqrt((v + eps) / (max(v - dv, 0) + eps)) - 1,
                  1 - sqrt((v + eps) / (v + dv + eps))) + 3u    relative; add, root, reciprocal;
                                                                a mean of squares is not negative
    y    |g| s (1 + ds) (dm + u (|x| + 2|m|)) + |g d| s (ds + 2u) + u (|y| + |b|)           (d)
    S    dS = u h sum|dy|                                                                   (b)
    X    dX = u (h + 2) sum|dy| (|d| + dm) + |S| dm           (b); X of m + dm is X - S dm
    gw   s (1 + ds) dX + |s X| (ds + u)                                 grad_weight = s X
    k    dk = (1 + ds)^2 s^2 dX / n + |k| ((1 + ds)^2 - 1 + 4u)
    dx   |g| s (1 + ds) (dS / n + |d| dk + (|k| + dk) dm + 4u (|dy| + |S| / n + |k| (|x| + |m|)))
             + |dx| (ds + 3u)                                                               (d)
         |dx| (ds + 2u) in eval, where dx = g s dy
    r    (1 - f) dr + f db + 2u (|(1 - f) r| + |f b|)        running statistic, f = momentum
         where b is m with db = dm, or v n / (n - 1) with db = dv n / (n - 1) + 2u b

Where v is far below its own error, ds is not small: hence 1 + ds, which a first-order bound would
leave out. With eps = 0 the bound may be infinite: then the reference defines no result.

Each value is then rounded to its dtype: u_o |value| + half the smallest subnormal.

The reference works in float64 and obeys the same analysis with u = 2^-53. Adding 2^-53 to u
accounts for its own error: nothing for float32, a factor of 2 for float64.

The bound depends on the data: mean/std, the cancellation in y near zero and the cancellation in S
and X all enter. Intermediate overflow and underflow do not. Between scales 1e-18 and 1e18 the
result has neither, and an implementation can avoid them: a sum of squares overflows where the
variance does not, and g s^3 X / n, the coefficient of x in a folded dx, underflows where dx does
not. A ring that adds up many ranks one after the other does not enter either: log2 R is the depth
of a tree.

One function for each operation gives its bound (of_stats, of_combine, of_normalize,
of_reduce_grad, of_input_grad); the others are for what lies between them. syncbn.reference.second
derives the bounds of second derivatives by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from syncbn.reference.formulas import Array, column

_UNIT_ROUNDOFF = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}
_SMALLEST_SUBNORMAL = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
    "float32": 2.0**-149,
    "float64": 2.0**-1074,
}


class Bounded(NamedTuple):
    """A value, and how far from it a careful implementation may be; two arrays of one shape."""

    value: Array
    bound: Array


@dataclass(frozen=True)
class Precision:
    """The arithmetic of the implementation that is judged."""

    input_dtype: str  # name of the dtype of its input

    @property
    def u(self) -> float:
        """Unit roundoff of the accumulating type, plus the reference's own."""
        accumulating = "float64" if self.input_dtype == "float64" else "float32"
        return _UNIT_ROUNDOFF[accumulating] + _UNIT_ROUNDOFF["float64"]


@dataclass(frozen=True)
class Statistics:
    """The statistics that data are normalized with."""

    mean: Bounded  # (C,)
    var: Bounded  # (C,), biased
    n: int  # values per channel that they were taken from; 0 for running statistics


class Scale(NamedTuple):
    """s = 1 / sqrt(v + eps), (C,)."""

    value: Array
    relative: Array  # ds, its relative error


def rounding(size: Array, dtype: str) -> Array:
    """How far rounding to `dtype` moves a value of this size."""
    return _UNIT_ROUNDOFF[dtype] * size + _SMALLEST_SUBNORMAL[dtype] / 2


def rounded(result: Bounded, dtype: str) -> Bounded:
    """The result after rounding to `dtype`."""
    return Bounded(result.value, result.bound + rounding(np.abs(result.value), dtype))


def of_average(results: Sequence[Bounded], dtype: str) -> Bounded:
    """The mean of one result per rank, added over the ranks in `dtype`: rule (b) with n = 1."""
    value = np.mean([result.value for result in results], axis=0)
    size = np.mean([np.abs(result.value) for result in results], axis=0)
    bound = np.mean([result.bound for result in results], axis=0)
    return Bounded(value, bound + _UNIT_ROUNDOFF[dtype] * depth(1, len(results)) * size)


def depth(n: int, ranks: int) -> float:
    """h of rule (b), for n values per channel in the whole group."""
    return math.log2(max(n, 1)) + math.log2(ranks) + 4


def of_stats(x: Array, mean: Array, var: Array, u: float) -> Statistics:
    """dm and dv of one rank, whose values are the matrix x (C, n)."""
    return of_combine(x, mean, var, 1, u)


def of_combine(x: Array, mean: Array, var: Array, ranks: int, u: float) -> Statistics:
    """dm and dv of a group, whose values are the matrix x (C, n)."""
    n = x.shape[1]
    h = depth(n, ranks)
    dm = u * (h * np.abs(x).mean(axis=1) + np.abs(mean))
    dm_parts = u * (h + 1) * np.sqrt(var + mean**2)
    dv = u * h * var + 2 * np.sqrt(var) * dm_parts + 5 * dm_parts**2
    return Statistics(Bounded(mean, dm), Bounded(var, dv), n)


def of_scale(var: Bounded, eps: float, u: float) -> Scale:
    """ds."""
    v, dv = var
    lowest = np.where(v >= 0, np.maximum(v - dv, 0), v - dv)
    with np.errstate(divide="ignore", invalid="ignore"):
        rise = np.sqrt((v + eps) / (lowest + eps)) - 1
        fall = 1 - np.sqrt((v + eps) / (v + dv + eps))
        return Scale(1 / np.sqrt(v + eps), np.maximum(rise, fall) + 3 * u)


def of_normalize(
    y: Array, x: Array, stats: Statistics, scale: Scale, weight: Array, bias: Array, u: float
) -> Array:
    """The bound of y before it is rounded to its dtype."""
    mean, dm = stats.mean
    gain = np.abs(weight) * scale.value
    off = column(dm) + u * (np.abs(x) + 2 * column(np.abs(mean)))
    shift = column(gain * (1 + scale.relative)) * off
    stretch = column(gain * (scale.relative + 2 * u)) * np.abs(x - column(mean))
    return shift + stretch + u * (np.abs(y) + column(np.abs(bias)))


def of_reduce_grad(
    dy: Array, x: Array, mean: Bounded, sum_dy: Array, ranks: int, u: float
) -> tuple[Array, Array]:
    """dS and dX, (C,), for the sums over the matrices dy and x (C, n) of `ranks` ranks."""
    h = depth(dy.shape[1], ranks)
    d = x - column(mean.value)
    d_sum_dy = u * h * np.abs(dy).sum(axis=1)
    terms = (np.abs(dy) * (np.abs(d) + column(mean.bound))).sum(axis=1)
    d_sum_dy_xmu = u * (h + 2) * terms + np.abs(sum_dy) * mean.bound
    return d_sum_dy, d_sum_dy_xmu


def of_grad_weight(sum_dy_xmu: Bounded, scale: Scale, u: float) -> Array:
    """The bound of grad_weight = s X before it is rounded to its dtype."""
    value, bound = sum_dy_xmu
    largest = scale.value * (1 + scale.relative)
    return largest * bound + np.abs(scale.value * value) * (scale.relative + u)


def of_input_grad(
    dx: Array,
    dy: Array,
    x: Array,
    stats: Statistics,
    scale: Scale,
    weight: Array,
    sum_dy: Bounded,
    sum_dy_xmu: Bounded,
    u: float,
) -> Array:
    """The bound of dx before it is rounded to its dtype; both sums are over the group."""
    mean, dm = stats.mean
    n = stats.n
    growth = 1 + scale.relative
    k = np.abs(scale.value**2 * sum_dy_xmu.value / n)
    dk = growth**2 * scale.value**2 * sum_dy_xmu.bound / n + k * (growth**2 - 1 + 4 * u)
    sizes = column(np.abs(sum_dy.value) / n) + column(k) * (np.abs(x) + column(np.abs(mean)))
    rounding = 4 * u * (np.abs(dy) + sizes)
    inner = column(sum_dy.bound / n + (k + dk) * dm) + column(dk) * np.abs(x - column(mean))
    gain = np.abs(weight) * scale.value * growth
    return column(gain) * (inner + rounding) + column(scale.relative + 3 * u) * np.abs(dx)


def of_input_grad_in_eval(dx: Array, scale: Scale, u: float) -> Array:
    """The bound of dx = g s dy, whose statistics are constants, before it is rounded."""
    return column(scale.relative + 2 * u) * np.abs(dx)


def of_running(old: Bounded, batch: Bounded, momentum: float, u: float) -> Array:
    """The bound of a running statistic before it is rounded to its dtype."""
    kept, taken = (1 - momentum), momentum
    rounding = 2 * u * (np.abs(kept * old.value) + np.abs(taken * batch.value))
    return kept * old.bound + taken * batch.bound + rounding
