"""The five leaf operations, composed of operators that MindSpore has on every device."""

from __future__ import annotations

from mindspore import Tensor, ops

from syncbn.mindspore.backends import inverse_std, wide


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.astype(wide())
    mean = x.mean((0, 2))
    return mean, ops.square(x - mean.reshape(1, -1, 1)).mean((0, 2))


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
    return dy.sum((0, 2)), (dy * centred).sum((0, 2))


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


def _scale(invstd: Tensor, weight: Tensor | None) -> Tensor:
    scale = invstd if weight is None else invstd * weight
    return scale.reshape(1, -1, 1)
