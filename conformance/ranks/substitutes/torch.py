"""CPU substitutes for the five ATen operations that torch_npu hands to CANN's aclnn.

PyTorch has no CPU kernels for them. Once `install` has registered these, code that calls the
operations runs on CPU. They do what the documentation of the kernels says, or their host code where
it is silent: their losses of digits, and their limits on dtypes and shapes, with the same kind of
error. Where both leave something open, they are careful: the inputs and results of a kernel, and
products value by value, are float32, but sums and everything else per channel are computed in
float64 and rounded once. So no verdict depends on the order in which a CPU adds.

They stand for Atlas A2 and A3, where batch_norm_stats takes no bfloat16.

Sources: documentation and host code of aclnnBatchNormStats (CANN's ops-math) and of
aclnnBatchNormElemt, -ReduceBackward, -ElemtBackward and -GatherStatsWithCounts (ops-nn, norm/);
the dtypes of results are those of torch_npu's op-plugin.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.library import Library

_HALF_OR_SINGLE = (torch.float16, torch.float32)
_ANY = (*_HALF_OR_SINGLE, torch.bfloat16)
_COUNTERS = (torch.int32, *_HALF_OR_SINGLE)


KERNELS = (
    "batch_norm_stats",
    "batch_norm_gather_stats_with_counts",
    "batch_norm_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_backward_elemt",
)


@functools.cache
def install() -> Library:
    """Register the five operations for CPU tensors in this process."""
    library = Library("aten", "IMPL")
    for name in KERNELS:
        library.impl(name, globals()[name], "CPU")
    return library


def batch_norm_stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean and invstd = 1 / sqrt(var + eps) of this rank, (C,) float32, var in two passes.

    aclnnBatchNormStats: float16 and float32 only; for an empty input mean 0 and invstd NaN.
    """
    name = "aclnnBatchNormStats"
    _check_input(name, input)
    _check_dtypes(name, _HALF_OR_SINGLE, input=input)
    if not input.numel():
        mean = torch.zeros(input.shape[1])
        return mean, torch.full_like(mean, torch.nan)
    mean = _mean(input.double())
    var = _mean((input.double() - _per_channel(mean, input)).square())
    return mean.float(), (var + eps).rsqrt().float()


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
    variance. Nothing may be empty; counts are of a float type. The documentation guarantees nothing
    for counts that are not positive integers and for invstd <= 0; they are refused here.
    """
    name = "aclnnBatchNormGatherStatsWithCounts"
    _check_input(name, input)
    tensors = {"input": input, "mean": mean, "invstd": invstd, "counts": counts}
    _check_dtypes(name, _ANY, **tensors, runningMean=running_mean, runningVar=running_var)
    channels = input.shape[1]
    _check_shapes(name, (channels,), runningMean=running_mean, runningVar=running_var)
    _check_shapes(name, (counts.numel(), channels), mean=mean, invstd=invstd)
    _check_shapes(name, (counts.numel(),), counts=counts)
    for what, tensor in tensors.items():
        if not tensor.numel():
            raise _invalid(name, f"{what} should not be an empty tensor")
    weights = counts.double()
    if not ((weights > 0) & (weights == weights.round())).all():
        raise _invalid(name, f"counts should be positive integers, got {counts.tolist()}")
    if not (invstd > 0).all():
        raise _invalid(name, "invstd should be greater than 0")
    n = weights.sum()
    weights = weights.unsqueeze(1)
    mean_of_all = (mean.double() * weights).sum(0) / n
    away = mean.double() - mean_of_all
    squares = ((_variance(invstd, eps) + away.square()) * weights).sum(0)
    for running, batch in ((running_mean, mean_of_all), (running_var, squares / (n - 1))):
        if running is not None:
            running.copy_((1 - momentum) * running.double() + momentum * batch)
    result = _result_dtype(input, mean)
    return mean_of_all.to(result), (squares / n + eps).rsqrt().to(result)


def batch_norm_elemt(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, where var = 1 / invstd^2 - eps.

    aclnnBatchNormElemt: one dtype for all tensors (its host code accepts others, which is not
    documented). It rebuilds the variance, because it calls the kernel of inference.
    """
    name = "aclnnBatchNormElemt"
    _check_input(name, input)
    vectors = {"weight": weight, "bias": bias, "mean": mean, "invstd": invstd}
    _check_dtypes(name, _ANY, input=input)
    _check_dtypes(name, (input.dtype,), **vectors)
    _check_shapes(name, (input.shape[1],), **vectors)
    x = input.float()
    scale = (_variance(invstd, eps) + eps).rsqrt().float()
    y = (x - _per_channel(mean.float(), x)) * _per_channel(scale, x)
    if weight is not None:
        y = y * _per_channel(weight.float(), x)
    if bias is not None:
        y = y + _per_channel(bias.float(), x)
    return y.to(input.dtype)


def batch_norm_backward_reduce(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor | None, ...]:
    """sum_dy, sum_dy_xmu, grad_weight, grad_bias, (C,) each; None for what is not wanted.

    aclnnBatchNormReduceBackward: sum_dy_xmu = sum(dy x) - sum(dy) mean, of float32 products;
    grad_out of the input's dtype. Float16 results if input and mean are, or else float32. An empty
    input leaves the results unwritten, which NaN stands for.
    """
    name = "aclnnBatchNormReduceBackward"
    _check_input(name, input)
    vectors = {"mean": mean, "invstd": invstd}
    _check_dtypes(name, _ANY, input=input, weight=weight, **vectors)
    _check_dtypes(name, (input.dtype,), gradOut=grad_out)
    _check_shapes(name, input.shape, gradOut=grad_out)
    _check_shapes(name, (input.shape[1],), weight=weight, **vectors)
    sum_dy = sum_dy_xmu = torch.full((input.shape[1],), torch.nan)
    if input.numel():
        sum_dy = _sum(grad_out.double()).float()
        products = grad_out.float() * input.float()
        sum_dy_xmu = _sum(products.double()).float() - sum_dy * mean.float()
    results = (sum_dy, sum_dy_xmu, sum_dy_xmu * invstd.float(), sum_dy.clone())
    wanted = (input_g, input_g, weight_g, bias_g)
    dtype = _result_dtype(input, mean)
    return tuple(r.to(dtype) if w else None for r, w in zip(results, wanted, strict=True))


def batch_norm_backward_elemt(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    """((dy - sum_dy / n) - (x - mean) invstd^2 sum_dy_xmu / n) invstd weight, n = sum(count).

    aclnnBatchNormElemtBackward: each tensor has its own dtype, the count int32 or a float type. It
    computes in float32 unless everything is float16. The result has the input's dtype.
    """
    name = "aclnnBatchNormElemtBackward"
    _check_input(name, input)
    vectors = {
        "mean": mean,
        "invstd": invstd,
        "weight": weight,
        "sumDy": sum_dy,
        "sumDyXmu": sum_dy_xmu,
    }
    _check_dtypes(name, _ANY, gradOut=grad_out, input=input, **vectors)
    _check_dtypes(name, _COUNTERS, counter=count)
    _check_shapes(name, input.shape, gradOut=grad_out)
    _check_shapes(name, (input.shape[1],), **vectors)
    x, dy, n = input.float(), grad_out.float(), count.double().sum()
    mean_dy = (sum_dy.double() / n).float()
    slope = (invstd.double().square() * sum_dy_xmu.double() / n).float()
    scale = invstd.float() if weight is None else invstd.float() * weight.float()
    away = (x - _per_channel(mean.float(), x)) * _per_channel(slope, x)
    dx = ((dy - _per_channel(mean_dy, x)) - away) * _per_channel(scale, x)
    return dx.to(input.dtype)


def _check_input(kernel: str, x: Tensor) -> None:
    if not 2 <= x.dim() <= 8:
        raise _invalid(kernel, f"input should have 2 to 8 dimensions, got {x.dim()}")
    if not x.shape[1]:
        raise _invalid(kernel, "the channel size of input should not be zero")


def _check_dtypes(kernel: str, dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in dtypes:
            known = ", ".join(map(str, dtypes))
            raise _invalid(kernel, f"{name} should be of dtype {known}, got {tensor.dtype}")


def _check_shapes(kernel: str, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            given = tuple(tensor.shape)
            raise _invalid(kernel, f"{name} should be of shape {tuple(shape)}, got {given}")


def _invalid(kernel: str, rule: str) -> RuntimeError:
    return RuntimeError(f"call {kernel} failed, error code is 161002 (invalid parameter): {rule}")


def _result_dtype(input: Tensor, mean: Tensor) -> torch.dtype:
    half = input.dtype == mean.dtype == torch.float16
    return torch.float16 if half else torch.float32


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...)."""
    return values.view(1, -1, *(1,) * (like.dim() - 2))


def _sum(values: Tensor) -> Tensor:
    """The sum (C,) over all dimensions of (N, C, +) except C."""
    return values.sum((0, *range(2, values.dim())))


def _mean(values: Tensor) -> Tensor:
    return _sum(values) / (values.numel() // values.shape[1])


def _variance(invstd: Tensor, eps: float) -> Tensor:
    """The variance as the kernels compute it that receive only invstd; float64."""
    return 1 / invstd.double().square() - eps
