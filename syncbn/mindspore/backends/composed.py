"""The five leaf operations, composed of operators that MindSpore has on every device."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from syncbn.mindspore.backends import inverse_std, wide

_BLOCK = 64  # values that are added up one after the other


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    values, count = x.astype(wide()), x.shape[0] * x.shape[2]
    mean = _sum(values, x.dtype) / count
    centred = values - mean.reshape(1, -1, 1)
    return mean, _sum(ops.square(centred), x.dtype) / count


def combine(
    means: Tensor, variances: Tensor, counts: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = counts.sum()
    weights = (counts / ops.maximum(n, 1.0)).reshape(-1, 1)
    mean = (weights * means).sum(0)
    var = (weights * (variances + ops.square(means - mean))).sum(0)
    return mean, var, inverse_std(var, eps), n


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    y = (x.astype(wide()) - mean.reshape(1, -1, 1)) * _scale(invstd, weight)
    if bias is not None:
        y = y + bias.reshape(1, -1, 1)
    return y.astype(x.dtype)


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    dy = dy.astype(wide())
    centred = x.astype(wide()) - mean.reshape(1, -1, 1)
    return _sum(dy, x.dtype), _sum(dy * centred, x.dtype)


def input_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    n: Tensor,
) -> Tensor:
    slope = ops.square(invstd) * sum_dy_xmu / n
    centred = x.astype(wide()) - mean.reshape(1, -1, 1)
    dx = dy.astype(wide()) - (sum_dy / n).reshape(1, -1, 1) - centred * slope.reshape(1, -1, 1)
    return (dx * _scale(invstd, weight)).astype(dy.dtype)


def _sum(values: Tensor, dtype: Any) -> Tensor:
    """Of each channel of (R, C, S), whose values were computed from such of `dtype`.

    MindSpore adds one value after the other: no harm unless they were float64 from the start.
    """
    if dtype != ms.float64:
        return values.sum((0, 2))
    rows = values.swapaxes(0, 1).reshape(values.shape[1], -1)
    for _ in range(4):  # of 2^24 values, one is left
        rows = ops.pad(rows, (0, -rows.shape[1] % _BLOCK))
        rows = rows.reshape(rows.shape[0], -1, _BLOCK).sum(2)
    return rows.sum(1)


def _scale(invstd: Tensor, weight: Tensor | None) -> Tensor:
    scale = invstd if weight is None else invstd * weight
    return scale.reshape(1, -1, 1)
