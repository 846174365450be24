"""The five operations by the kernels that PyTorch's own SyncBatchNorm uses.

On CUDA they are PyTorch's; on NPUs torch_npu maps them to CANN's aclnn. What would cost digits or
raise is kept from the user:

- batch_norm_stats gives a variance as invstd = 1 / sqrt(var + eps), in which a variance far below
  eps drowns. On NPUs eps is 0 here and var is (1 / invstd)^2: inverted first, for the square of
  invstd overflows where var does not, and a constant channel has invstd = inf, hence var = 0. On
  CUDA that would not do: with eps = 0 the kernel says 0 both for a constant channel and for an
  infinite variance. There batch_norm_update_stats is called, the same kernel without the root.
- aclnn refuses bfloat16 in batch_norm_stats: it gets float32.
- batch_norm_gather_stats_with_counts takes variances as invstd, wants counts above 0 of one float
  type, which is not exact beyond 2^24, and no statistics that are 0. It is not used: `combine`
  merges a few numbers per channel and rank, and has no such limits.
- aclnn's batch_norm_elemt rebuilds var = 1 / invstd^2 - eps: eps is 0. It is documented for input,
  parameters and statistics of one dtype: all are float32 there, also with halves.
- aclnn's batch_norm_backward_reduce is sum(dy x) - mean sum(dy), where a large mean drowns the
  result: there it gets x - mean, in float32, and a mean of 0. CUDA's kernel subtracts the mean
  from each value. It gets x as it is, except images of halves, which are copied to float32:
  for them it rounds its partial sums to the half type (PyTorch 2.11, on an H100: 100 times the
  bound of 20 values, and -inf where the sum of dy exceeds 65504).
- batch_norm_backward_elemt takes int32 counts on CUDA, which end at 2^31: there it gets means for
  its sums, and a count of 1. aclnn's takes a count of float32.

What remains: the kernels add up squares, and sums of squares beyond 3.4e38 are inf in float32, as
1000 values of a deviation of 1e18 have.

Sources: Normalization.cu and Normalization.cuh of PyTorch; op-plugin of torch_npu; documentation
and host code of aclnnBatchNormStats, -Elemt, -ReduceBackward, -ElemtBackward and
-GatherStatsWithCounts in CANN's ops-nn and ops-math.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from syncbn.torch import messages
from syncbn.torch.backends.composed import combine
from syncbn.torch.messages import combine_ranks, filled

__all__ = [
    "DEVICES",
    "combine",
    "combine_ranks",
    "input_grad",
    "normalize",
    "pack_grad",
    "pack_stats",
    "reduce_grad",
    "stats",
]

DEVICES = ("cuda", "npu")


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    if x.is_cuda:
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, var
    mean, invstd = torch.batch_norm_stats(x.float() if x.dtype == torch.bfloat16 else x, 0.0)
    return mean, invstd.reciprocal().square()


def pack_stats(x: Tensor, header: Tensor) -> Tensor:
    return messages.pack_stats(header, *stats(x))


def pack_grad(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return messages.pack_grad(*reduce_grad(dy, x, mean), invstd, dtype)


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    _check(x)
    dtype = _accumulating(x)
    values = x if x.is_cuda else x.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    y = torch.batch_norm_elemt(values, weight, bias, mean.to(dtype), invstd.to(dtype), 0.0)
    return y.to(x.dtype)


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    mean = mean.to(_accumulating(x))
    ones = filled(1.0, mean.numel(), mean.dtype, mean.device)
    if not x.is_cuda:
        x, dy = x - mean.view(1, -1, 1), dy.float()  # in float32 for halves, by one launch
        mean = filled(0.0, mean.numel(), mean.dtype, mean.device)
    elif x.shape[2] > 1:
        x, dy = (t.to(mean.dtype) for t in (x, dy))
    sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
        dy, x, mean, ones, None, True, False, False
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
    _check(x)
    dtype = _accumulating(x)
    count = n.to(dtype).view(1)
    if x.is_cuda:
        sum_dy, sum_dy_xmu = torch._foreach_div([sum_dy, sum_dy_xmu], n)
        count = filled(1, 1, torch.int32, x.device)
    return torch.batch_norm_backward_elemt(
        dy,
        x,
        mean.to(dtype),
        invstd.to(dtype),
        None if weight is None else weight.to(dtype),
        sum_dy.to(dtype),
        sum_dy_xmu.to(dtype),
        count,
    )


def _accumulating(x: Tensor) -> torch.dtype:
    """What the kernels accumulate in and want statistics as."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(x: Tensor) -> None:
    """Raise unless the device has the kernels, and they the dtype."""
    _check_device(x.device.type)
    if x.dtype == torch.float64 and not x.is_cuda:
        raise TypeError(
            f"backend 'aten' has float64 on cuda only, got float64 on {x.device.type}: choose "
            "another dtype, or backend='composed'"
        )


@functools.cache
def _check_device(kind: str) -> None:
    """Raise RuntimeError unless there are kernels for that type of device."""
    key = torch._C._dispatch_key_for_device(kind)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::batch_norm_stats", key):
        raise RuntimeError(
            f"backend 'aten' has kernels for {' and '.join(DEVICES)} (by torch_npu), got a tensor "
            f"on {kind}: move the layer and its input there, or choose backend='composed'"
        )
