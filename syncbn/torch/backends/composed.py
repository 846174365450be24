"""The five operations, composed of ATen's operations, on any device.

On CPU they are ATen's native batch-norm kernels. Used as they are, those lose accuracy: on
channels-last input they add up float32 values one after the other, so that 1e5 values of mean/std
1e4 leave no digit of the variance. Here the kernels get columns of at most `_BLOCK` values, and
the results of all columns are merged in float64. Other values are converted to float64 and added
up in it: those of few rows, and those whose squares overflow float32 (if the host may look).

The native kernels of other devices have other limits and leave out other results. There each
operation is its formula, in the dtype of the statistics. That is right on every device, but slow,
because it copies x into that dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from syncbn.torch import messages
from syncbn.torch.backends import may_sync_host, statistics_dtype
from syncbn.torch.messages import filled

_BLOCK = 64  # longest column that is added up in float32: an error of 64 u at the very worst
_CACHED = 2**18  # values that stay in the cache between two passes: 1 MiB of float32
_LARGE = 512  # values of an image, from which its sums are the kernel's
_FEW = 8  # with fewer rows, columns are too short to pay for their merge
_SMALL = 2**15  # values up to which float64 costs less than the operations of the merge


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    if not _has_native_kernels(x):
        return _formula_stats(x)
    x = _as_rows(x)
    # The kernel adds up squares, which may overflow float32 where their mean does not.
    small = x.numel() <= _SMALL and x.dtype != torch.float64  # float64 has no wider dtype
    if x.shape[0] < _FEW or small:
        return _kernel_stats(x.to(statistics_dtype(x.device)))
    mean, var = _stats_of_columns(x)
    if may_sync_host(x.device) and not var.isfinite().all():
        return _stats_of_columns(x.to(statistics_dtype(x.device)))
    return mean, var


def _stats_of_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    parts = []
    for block in _blocks(x):
        means, variances = (_spread(v, block) for v in _kernel_stats(_as_columns(block)))
        mean = means.mean((0, 2))
        between = (means - mean.view(1, -1, 1)).square().mean((0, 2))
        count = torch.full_like(mean[0], block[:, :, 0].numel())
        parts.append((mean, variances.mean((0, 2)) + between, count))
    means, variances, counts = (torch.stack(values) for values in zip(*parts, strict=True))
    mean, var, _, _ = combine(means, variances, counts, eps=0.0)
    return mean, var


def combine(
    means: Tensor, variances: Tensor, counts: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = counts.sum()
    weights = (counts / n.clamp(min=1)).unsqueeze(1)
    mean = (weights * means).sum(0)
    var = (weights * (variances + (means - mean).square())).sum(0)
    return mean, var, (var + eps).rsqrt(), n


combine_ranks = messages.combine_ranks


def pack_stats(x: Tensor, header: Tensor) -> Tensor:
    return messages.pack_stats(header, *stats(x))


def pack_grad(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return messages.pack_grad(*reduce_grad(dy, x, mean), invstd, dtype)


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    scale = invstd if weight is None else invstd * weight
    if not _has_native_kernels(x):
        y = _centered(x, mean) * _per_channel(scale)
        return (y if bias is None else y + _per_channel(bias)).to(x.dtype)
    zeros = filled(0.0, mean.numel(), mean.dtype, mean.device)
    return _affine(x, scale, torch.addcmul(zeros if bias is None else bias, mean, scale, value=-1))


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    if not _has_native_kernels(x):
        dy = dy.to(mean.dtype)
        return dy.sum((0, 2)), (dy * _centered(x, mean)).sum((0, 2))
    if x.numel() <= _SMALL and x.dtype != torch.float64:
        dtype = statistics_dtype(x.device)
        return _kernel_sums(dy.to(dtype), x.to(dtype), mean.to(dtype))
    mean = mean.to(_accumulating(x))
    dy, x = _as_rows(dy), _as_rows(x)
    if x.shape[2] >= _LARGE:
        # Contiguous images the CPU kernel adds up in float64, large ones faster than in columns.
        sum_dy, sum_dy_xmu = _kernel_sums(dy, x, mean)
        return sum_dy.to(statistics_dtype(x.device)), sum_dy_xmu.to(statistics_dtype(x.device))
    totals = []
    for dy_block, block in zip(_blocks(dy), _blocks(x), strict=True):
        columns = block.shape[1:]  # (merged, C, S)
        means = mean.view(1, -1, 1).expand(columns).contiguous().view(-1)
        sums = _kernel_sums(_as_columns(dy_block), _as_columns(block), means)
        dtype = statistics_dtype(x.device)
        totals.append([v.view(columns).sum((0, 2), dtype=dtype) for v in sums])
    sum_dy, sum_dy_xmu = (functools.reduce(torch.add, parts) for parts in zip(*totals, strict=True))
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
    scale = invstd if weight is None else invstd * weight
    slope = invstd.square() * sum_dy_xmu / n
    if not _has_native_kernels(x):
        dx = dy.to(mean.dtype) - _per_channel(sum_dy / n)
        dx -= _centered(x, mean) * _per_channel(slope)
        return (dx * _per_channel(scale)).to(dy.dtype)
    # The scale comes last: scale * slope, as a coefficient of x, underflows where x is large.
    dtype = _accumulating(x)
    shift = torch.addcdiv(mean * slope, sum_dy, n, value=-1)
    slope, shift, scale = (_per_channel(v.to(dtype)) for v in (slope, shift, scale))
    dx = torch.empty_like(dy)
    rows = max(1, _CACHED // x[0].numel())
    for part, x_part, dy_part in zip(dx.split(rows), x.split(rows), dy.split(rows), strict=True):
        # In the cache, and in float32 also for halves, which are rounded once.
        terms = part if part.dtype == dtype else torch.empty_like(part, dtype=dtype)
        torch.addcmul(dy_part.to(dtype), x_part.to(dtype), slope, value=-1, out=terms)
        part.copy_(terms.add_(shift).mul_(scale))
    return dx


def _has_native_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _formula_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, the latter of the differences from the former."""
    x = x.to(statistics_dtype(x.device))
    mean = x.mean((0, 2))
    error = _centered(x, mean).mean((0, 2))  # what rounding left in the mean
    mean = mean + error.where(error.isfinite(), 0)
    return mean, _centered(x, mean).square().mean((0, 2))


def _centered(x: Tensor, mean: Tensor) -> Tensor:
    return x.to(mean.dtype) - _per_channel(mean)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1)


def _accumulating(x: Tensor) -> torch.dtype:
    """What the kernels accumulate in and return statistics as."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _as_rows(x: Tensor) -> Tensor:
    """float64 (R, C, S) as (R S, C, 1): nothing wider can add up a whole image of it."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], 1) if x.dtype == torch.float64 else x


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """x (R, C, S) cut into views (rows, merged, C, S) that have at most `_BLOCK` rows.

    A view takes `merged` neighbouring rows of x as one row, so that the kernel walks memory in
    order; the rows that are left over are cut in turn.
    """
    while x.shape[0]:
        merged = -(-x.shape[0] // _BLOCK)
        rows = x.shape[0] // merged
        yield x[: rows * merged].unflatten(0, (rows, merged))
        x = x[rows * merged :]


def _as_columns(block: Tensor) -> Tensor:
    """A view as a channels-last image (1, columns, rows, 1): each column is a channel of it."""
    return block.reshape(1, block.shape[0], 1, -1).permute(0, 3, 1, 2)


def _spread(columns: Tensor, block: Tensor) -> Tensor:
    """One number per column, as (merged, C, S), in the type that columns are merged in."""
    return columns.to(statistics_dtype(block.device)).view(block.shape[1:])


def _kernel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel (dimension 1)."""
    if x.dtype == _accumulating(x):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, var
    # For halves the kernel returns float32 only with float32 running statistics.
    unused = torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
    mean, var = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    return mean, var


def _kernel_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """sum dy and sum dy (x - mean) of each channel: the kernel's parameter gradients at std 1."""
    ones = filled(1.0, mean.numel(), mean.dtype, mean.device)
    _, sum_dy_xmu, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, mean, ones, True, 0.0, [False, True, True]
    )
    return sum_dy, sum_dy_xmu


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, per channel, in one pass: inference with mean 0, variance 1, eps 0."""
    scale, shift = scale.to(_accumulating(x)), shift.to(_accumulating(x))
    zeros, ones = (filled(v, scale.numel(), scale.dtype, scale.device) for v in (0.0, 1.0))
    y, _, _ = torch.native_batch_norm(x, scale, shift, zeros, ones, False, 0.0, 0.0)
    return y
