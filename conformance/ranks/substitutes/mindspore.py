"""CPU substitutes for what MindSpore's SyncBatchNorm calls and only Ascend has.

MindSpore's SyncBatchNorm and SyncBatchNormInner, construct and bprop, stay as they are. Only the
kernels of the five operations, the two collectives and mint.full that they call have no CPU kernel
in MindSpore 2.10, and are replaced (`install`). The substitutes do what the documentation of the
kernels says, including its losses of digits and its limits on dtypes, because MindSpore's algorithm
is what is judged. Where the documentation leaves something open, they are careful: the inputs and
results of a kernel are float32, but sums and everything else per channel are computed in float64
and rounded once. So no verdict depends on the order in which a CPU adds.

Sources: the aclnn documentation of CANN's ops-nn (norm/*/docs) and ops-math, and MindSpore's shape
and type inference (mindspore/ops/infer/ops_func_impl/batch_norm_*.cc).
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, communication, mint, ops
from mindspore.mint import distributed as dist
from mindspore.mint.nn.layer import _functions

_HALF_OR_SINGLE = (ms.float16, ms.float32)
_ANY = (ms.float16, ms.float32, ms.bfloat16)


def install() -> None:
    """Replace what has no CPU kernel, in this process. Call it before a layer is imported."""
    mint.full = ops.full
    mint.batch_norm_stats = batch_norm_stats
    mint.batch_norm_gather_stats_with_counts = batch_norm_gather_stats_with_counts
    mint.batch_norm_elemt = batch_norm_elemt
    _functions.batch_norm_reduce_grad = batch_norm_reduce_grad
    _functions.batch_norm_elemt_grad = batch_norm_elemt_grad
    _functions.all_gather_into_tensor = all_gather_into_tensor
    _functions.all_reduce = all_reduce


def batch_norm_stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean and invstd = 1 / sqrt(var + eps) of this rank, (C,) float32, var in two passes.

    aclnnBatchNormStats: float16 and float32 only; for an empty input mean 0 and invstd NaN.
    """
    _check("BatchNormStats", "input", input, _HALF_OR_SINGLE)
    channels = input.shape[1]
    if input.size == 0:
        return _filled(channels, 0.0), _filled(channels, float("nan"))
    x = _float64(input)
    count = input.size // channels
    mean = _sum(x) / count
    centred = x - _per_channel(mean, x)
    var = _sum(centred * centred) / count
    return _float32(mean), _float32(1 / ops.sqrt(var + eps))


def batch_norm_gather_stats_with_counts(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """mean and invstd of all ranks from theirs (ranks, C) and counts (ranks,); moves the running.

    aclnnBatchNormGatherStatsWithCounts: var = 1 / invstd^2 - eps, mean first, unbiased running
    variance. It requires positive counts and invstd > 0: the NaN of an empty rank goes through the
    formula.
    """
    weights = _float64(counts).reshape(-1, 1)
    n = weights.sum()
    mean_of_all = _sum(_float64(mean) * weights) / n
    away = _float64(mean) - mean_of_all
    squares = _sum((_variance(invstd, eps) + away * away) * weights)
    if running_mean is not None:
        _move(running_mean, mean_of_all, momentum)
    if running_var is not None:
        _move(running_var, squares / (n - 1), momentum)
    return _float32(mean_of_all), _float32(1 / ops.sqrt(squares / n + eps))


def batch_norm_elemt(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, where var = 1 / invstd^2 - eps.

    aclnnBatchNormElemt rebuilds the variance so and calls the kernel of inference.
    """
    _check("BatchNormElemt", "input", input, _ANY)
    x = _float32(input)
    scale = _float32(1 / ops.sqrt(_variance(invstd, eps) + eps))
    y = (x - _per_channel(mean, x)) * _per_channel(scale, x)
    if weight is not None:
        y = y * _per_channel(_float32(weight), x)
    if bias is not None:
        y = y + _per_channel(_float32(bias), x)
    return y.astype(input.dtype)


def batch_norm_reduce_grad(
    dout: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_dy and sum_dy_xmu, (C,) of the input's dtype; grad_weight and grad_bias of the weight's.

    aclnnBatchNormReduceBackward: sum_dy_xmu = sum(dy x) - sum(dy) mean of float32 sums; dout of
    the input's dtype. MindSpore infers the dtypes, by which float16 sums are float16. That an
    empty input gives zeros is documented for one chip only; here it does.
    """
    _check("BatchNormReduceGrad", "input", input, _ANY)
    _check("BatchNormReduceGrad", "dout", dout, (input.dtype,))
    if input.size == 0:
        sum_dy = sum_dy_xmu = _filled(input.shape[1], 0.0)
    else:
        x, dy = _float64(input), _float64(dout)
        sum_dy = _float32(_sum(dy))
        sum_dy_xmu = _float32(_sum(dy * x)) - sum_dy * mean
    of_weight = input.dtype if weight is None else weight.dtype
    grad_weight, grad_bias = sum_dy_xmu * invstd, sum_dy
    return (
        sum_dy.astype(input.dtype),
        sum_dy_xmu.astype(input.dtype),
        grad_weight.astype(of_weight),
        grad_bias.astype(of_weight),
    )


def batch_norm_elemt_grad(
    dout: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    """((dy - sum_dy / n) - (x - mean) invstd^2 sum_dy_xmu / n) invstd weight, n = sum(count).

    aclnnBatchNormElemtBackward: the result has the input's dtype.
    """
    _check("BatchNormElemtGrad", "input", input, _ANY)
    x, dy = _float32(input), _float32(dout)
    n = _float64(count).sum()
    mean_dy = _float32(_float64(sum_dy) / n)
    slope = _float32(_float64(invstd) * _float64(invstd) * _float64(sum_dy_xmu) / n)
    scale = invstd if weight is None else invstd * _float32(weight)
    dx = (
        (dy - _per_channel(mean_dy, x)) - (x - _per_channel(mean, x)) * _per_channel(slope, x)
    ) * _per_channel(scale, x)
    return dx.astype(input.dtype)


def all_gather_into_tensor(tensor: Tensor, group: str) -> tuple[Tensor, None]:
    """The tensors of all ranks of a group, one after the other along the first axis."""
    gathered = [ops.zeros_like(tensor) for _ in range(communication.get_group_size(group))]
    dist.all_gather(gathered, tensor, group)
    return ops.cat(gathered), None


def all_reduce(tensor: Tensor, group: str) -> tuple[Tensor, None]:
    """The sum of the tensors of all ranks of a group."""
    return ops.AllReduce(group=group)(tensor), None


def _check(kernel: str, name: str, tensor: Tensor, dtypes: tuple[Any, ...]) -> None:
    if tensor.dtype not in dtypes:
        known = ", ".join(map(str, dtypes))
        raise TypeError(f"For {kernel}, {name} must be of dtype {known}, got {tensor.dtype}")


def _filled(channels: int, value: float) -> Tensor:
    return ops.full((channels,), value, dtype=ms.float32)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.astype(ms.float32)


def _float64(tensor: Tensor) -> Tensor:
    return tensor.astype(ms.float64)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...)."""
    return values.reshape((1, -1) + (1,) * (like.ndim - 2))


def _sum(values: Tensor) -> Tensor:
    """The sum (C,) over all axes of (N, C, +) except C; float64, and not empty."""
    return values.sum((0, *range(2, values.ndim)))


def _variance(invstd: Tensor, eps: float) -> Tensor:
    """The variance as the kernels compute it that receive only invstd; float64."""
    return 1 / ops.square(_float64(invstd)) - eps


def _move(running: Tensor, batch: Tensor, momentum: float) -> None:
    moved = (1 - momentum) * _float64(running) + momentum * batch
    ops.assign(running, moved.astype(running.dtype))
