"""The five operations, composed of operators that MindSpore has on every device."""

from __future__ import annotations

from mindspore import Tensor, ops

from syncbn.mindspore.backends import inverse_std, statistics_dtype
from syncbn.mindspore.layout import channel_sums, per_channel


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    values, count = x.astype(statistics_dtype()), x.shape[0] * x.shape[2]
    mean = channel_sums(values, x.dtype) / count
    centred = values - per_channel(mean)
    return mean, channel_sums(ops.square(centred), x.dtype) / count


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
    scale = invstd if weight is None else invstd * weight
    y = (x.astype(statistics_dtype()) - per_channel(mean)) * per_channel(scale)
    if bias is not None:
        y = y + per_channel(bias)
    return y.astype(x.dtype)


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    dy = dy.astype(statistics_dtype())
    centred = x.astype(statistics_dtype()) - per_channel(mean)
    return channel_sums(dy, x.dtype), channel_sums(dy * centred, x.dtype)


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
    scale = invstd if weight is None else invstd * weight
    slope = ops.square(invstd) * sum_dy_xmu / n
    centred = x.astype(statistics_dtype()) - per_channel(mean)
    dx = dy.astype(statistics_dtype()) - per_channel(sum_dy / n) - centred * per_channel(slope)
    return (dx * per_channel(scale)).astype(dy.dtype)
