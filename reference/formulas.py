"""The formulas of batch normalization, as plainly as they can be written.

Five operations make a training step; kernels, backends and bounds use the same five names:

    stats(x)                                   -> mean, var      of one rank
    combine(means, variances, counts)          -> mean, var, n   of the group
    normalize(x, mean, var, ...)               -> y
    reduce_grad(dy, x, mean)                   -> sum_dy, sum_dy_xmu
    input_grad(dy, x, mean, var, ..., n)       -> dx

Data are matrices of shape (C, n): row c holds n values of channel c, of one rank or of several
side by side. Statistics and parameters have shape (C,). The formulas are those of Ioffe and
Szegedy, arXiv 1502.03167, section 3, with the biased variance. They use analytic operations only,
so complex input gives complex-step derivatives; the tests prove the gradients in this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]


def column(v: Array) -> Array:
    """(C,) as (C, 1), which broadcasts to the columns of a (C, n) matrix."""
    return v[:, np.newaxis]


def stats(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance (C,) of x (C, n), n >= 1.

    The variance comes from squared deviations. NumPy sums a contiguous row pairwise.
    """
    n = x.shape[1]
    mean = x.sum(axis=1) / n
    var = np.square(x - column(mean)).sum(axis=1) / n
    return mean, var


def combine(
    means: Sequence[Array], variances: Sequence[Array], counts: Sequence[int]
) -> tuple[Array, Array, int]:
    """Mean and biased variance (C,) of all values, and their number n >= 1 per channel.

    mean = sum w_p mean_p and var = sum w_p (var_p + (mean_p - mean)^2) over the parts p, where
    w_p = count_p / n: Chan, Golub and LeVeque, The American Statistician 37 (1983). A part with a
    count of 0 is ignored, whatever its statistics.
    """
    n = sum(counts)
    parts = [
        (mean, var, count / n)
        for mean, var, count in zip(means, variances, counts, strict=True)
        if count
    ]
    mean = np.sum([weight * of_part for of_part, _, weight in parts], axis=0)
    var = np.sum(
        [weight * (of_part + np.square(at - mean)) for at, of_part, weight in parts], axis=0
    )
    return mean, var, n


def normalize(x: Array, mean: Array, var: Array, eps: float, weight: Array, bias: Array) -> Array:
    """y = (x - mean) / sqrt(var + eps) * weight + bias."""
    return (x - column(mean)) / column(np.sqrt(var + eps)) * column(weight) + column(bias)


def reduce_grad(dy: Array, x: Array, mean: Array) -> tuple[Array, Array]:
    """sum dy and sum dy (x - mean), (C,): added over the ranks, all that dx needs of the group."""
    return dy.sum(axis=1), (dy * (x - column(mean))).sum(axis=1)


def input_grad(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    eps: float,
    weight: Array,
    sum_dy: Array,
    sum_dy_xmu: Array,
    n: int,
) -> Array:
    """dx = weight s (dy - sum_dy / n - (x - mean) s^2 sum_dy_xmu / n), s = 1 / sqrt(var + eps).

    The second term comes from the mean and the third from the variance, which depend on every
    value of the group. sum_dy and sum_dy_xmu are sums over the group, of n values per channel.
    """
    s = 1 / np.sqrt(var + eps)
    through_mean = column(sum_dy / n)
    through_var = (x - column(mean)) * column(s**2 * sum_dy_xmu / n)
    return column(weight * s) * (dy - through_mean - through_var)


def input_grad_in_eval(dy: Array, var: Array, eps: float, weight: Array) -> Array:
    """dx = weight dy / sqrt(var + eps): in eval, mean and var do not depend on x."""
    return column(weight / np.sqrt(var + eps)) * dy


def unbiased(var: Array, n: int) -> Array:
    """The variance that running_var takes: var n / (n - 1) (Bessel)."""
    return var * n / (n - 1)


def running(old: Array, batch: Array, momentum: float) -> Array:
    """(1 - momentum) old + momentum batch."""
    return (1 - momentum) * old + momentum * batch
