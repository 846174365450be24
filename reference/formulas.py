"""The formulas of batch normalization, on one matrix x of shape (C, n).

Row c of the matrix holds every value of channel c over all shards of the group, so the formulas
know nothing of ranks, batches and spatial sizes. They are those of Ioffe and Szegedy,
arXiv 1502.03167, section 3, with the biased variance. They use no operation that is not analytic:
complex input gives complex-step derivatives, which is how the tests prove the gradients.
Statistics and parameters have shape (C,).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]


def column(v: Array) -> Array:
    """(C,) as (C, 1), to meet the columns of a (C, n) matrix."""
    return v[:, np.newaxis]


def moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each row; NumPy sums a contiguous row pairwise."""
    n = x.shape[1]
    mean = x.sum(axis=1) / n
    var = np.square(x - column(mean)).sum(axis=1) / n
    return mean, var


def normalize(x: Array, mean: Array, var: Array, eps: float, weight: Array, bias: Array) -> Array:
    """y = (x - mean) / sqrt(var + eps) * weight + bias."""
    return (x - column(mean)) / column(np.sqrt(var + eps)) * column(weight) + column(bias)


def sums(dy: Array, x: Array, mean: Array) -> tuple[Array, Array]:
    """sum dy and sum dy (x - mean): all that the gradients need to know of a group."""
    return dy.sum(axis=1), (dy * (x - column(mean))).sum(axis=1)


def input_gradient(
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

    The second and third term come from mean and var, which depend on every value of the group.
    """
    s = 1 / np.sqrt(var + eps)
    through_mean = column(sum_dy / n)
    through_var = (x - column(mean)) * column(s**2 * sum_dy_xmu / n)
    return column(weight * s) * (dy - through_mean - through_var)


def constant_statistics_gradient(dy: Array, var: Array, eps: float, weight: Array) -> Array:
    """dx = weight s dy, where mean and var do not depend on x (eval)."""
    return column(weight / np.sqrt(var + eps)) * dy


def unbiased(var: Array, n: int) -> Array:
    """The variance that running_var takes: var n / (n - 1) (Bessel)."""
    return var * n / (n - 1)


def running(old: Array, batch: Array, momentum: float) -> Array:
    """(1 - momentum) old + momentum batch."""
    return (1 - momentum) * old + momentum * batch
