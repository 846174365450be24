"""The five operations by the kernels that MindSpore's own SyncBatchNorm uses on Ascend.

Four of their properties would cost digits or raise, so they are called differently:
- They return a variance as 1 / sqrt(var + eps) and take it back as 1 / invstd^2 - eps, which loses
  a variance far below eps. Here their eps is always 0.
- Their sums are sum(dy x) - mean sum(dy), which loses the result if the mean is large. Here they
  get x - mean, and a mean of 0.
- With float16 those sums are float16, which overflows at 65504. Here they get float32.
- The statistics refuse bfloat16. Here they get float32.

Sources: the documentation of aclnnBatchNormStats, aclnnBatchNormElemt,
aclnnBatchNormReduceBackward and aclnnBatchNormElemtBackward of CANN's ops-nn, and MindSpore's
inference of the results' types.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, mint, ops
from mindspore.mint.nn.layer import _functions

from syncbn.mindspore.backends.composed import combine

__all__ = ["combine", "input_grad", "normalize", "reduce_grad", "stats"]


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype == ms.bfloat16:
        x = x.astype(ms.float32)
    mean, invstd = mint.batch_norm_stats(x, 0.0)
    return mean, ops.square(1 / invstd)  # a constant channel has invstd = inf, hence var = 0


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    mean, invstd, weight, bias = _float32(mean), _float32(invstd), _float32(weight), _float32(bias)
    return mint.batch_norm_elemt(x, weight, bias, mean, invstd, 0.0)


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    mean = _float32(mean)
    centred = _float32(x) - mean.reshape(1, -1, 1)
    zeros, ones = ops.zeros_like(mean), ops.ones_like(mean)
    # The shapes of the results are those of the weight, which therefore must be given.
    sum_dy, sum_dy_xmu, _, _ = _functions.batch_norm_reduce_grad(
        _float32(dy), centred, zeros, ones, ones, True, True, True
    )
    return sum_dy, sum_dy_xmu


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
    mean, invstd, weight = _float32(mean), _float32(invstd), _float32(weight)
    sum_dy, sum_dy_xmu, n = _float32(sum_dy), _float32(sum_dy_xmu), _float32(n).reshape(1)
    return _functions.batch_norm_elemt_grad(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, n)


def _float32(t: Any) -> Any:
    return None if t is None else t.astype(ms.float32)
