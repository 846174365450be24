"""The smallest layer that is right on the page of mindspore.mint.nn.SyncBatchNorm, and no more.

    syncbn-conformance run --target torch:examples/vendor_layer.py:SyncBatchNorm --level documented

passes without a failure. What the page leaves open fails or is unsupported here: empty shards,
errors that reach all ranks, the unbiased variance, a batch counter, dtypes other than float32, and
more. The table without `--level documented` names these clauses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncBatchNorm(nn.Module):
    """Batch normalization over the batches of all ranks of a process group, in float32."""

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_features, int):
            raise TypeError(f"num_features must be an int, got {num_features!r}")
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if not isinstance(eps, float):
            raise TypeError(f"eps must be a float, got {eps!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        if dtype not in (None, torch.float32):
            raise TypeError(f"dtype must be torch.float32, got {dtype}")
        self.eps, self.momentum, self.group = eps, momentum, process_group
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        mean, var = torch.zeros(num_features), torch.ones(num_features)
        self.register_buffer("running_mean", mean if track_running_stats else None)
        self.register_buffer("running_var", var if track_running_stats else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError(f"x must be a tensor of torch.float32, got {x.dtype}")
        normalized: Tensor
        if self.training or self.running_mean is None or self.running_var is None:
            normalized, mean, var = _Normalize.apply(x, self.eps, self.group)
            if self.running_mean is not None and self.running_var is not None:
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        else:
            scale = (self.running_var + self.eps).rsqrt()
            normalized = (x - _per_channel(self.running_mean, x)) * _per_channel(scale, x)
        if self.weight is None or self.bias is None:
            return normalized
        return normalized * _per_channel(self.weight, x) + _per_channel(self.bias, x)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps), with the mean and the variance of all ranks of the group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        axes = [0, *range(2, x.dim())]
        count = x.new_full((1,), x.numel() // x.shape[1])
        own_mean = x.mean(axes)
        own_squares = (x - _per_channel(own_mean, x)).square().sum(axes)
        counts, means, squares = _gather(torch.cat([count, own_mean, own_squares]), x, group)
        mean = (counts * means).sum(0) / counts.sum()
        var = (squares + counts * (means - mean).square()).sum(0) / counts.sum()
        scale = (var + eps).rsqrt()
        normalized = (x - _per_channel(mean, x)) * _per_channel(scale, x)
        ctx.save_for_backward(normalized, scale, counts.sum())
        ctx.group = group
        ctx.mark_non_differentiable(mean, var)
        return normalized, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor, None, None]:
        normalized, scale, count = ctx.saved_tensors
        axes = [0, *range(2, dy.dim())]
        sums = torch.cat([count[None], dy.sum(axes), (dy * normalized).sum(axes)])
        _, of_dy, of_product = _gather(sums, dy, ctx.group)
        mean_dy, mean_product = of_dy.sum(0) / count, of_product.sum(0) / count
        centred = dy - _per_channel(mean_dy, dy) - normalized * _per_channel(mean_product, dy)
        return (centred * _per_channel(scale, dy)).contiguous(), None, None


def _gather(own: Tensor, x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """From every rank: one number, and two rows with a value for each channel."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    table, channels = torch.stack(parts), x.shape[1]
    return table[:, :1], table[:, 1 : 1 + channels], table[:, 1 + channels :]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))
