"""The operations of `composed` on CPU, with two of them in loops that torch.compile generates.

ATen's operations need six passes for dx of halves, because they convert one operand at a time. The
generated loop reads dy and x once and writes dx once, with no memory in between. The statistics of
contiguous data take one pass in place of two.

A loop is compiled in the first step of each dtype and layout. That takes some seconds and a C++
compiler; PyTorch keeps the result on disk, in TORCHINDUCTOR_CACHE_DIR.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncbn.torch import messages
from syncbn.torch.backends import composed

combine = composed.combine
normalize = composed.normalize
reduce_grad = composed.reduce_grad
combine_ranks = composed.combine_ranks

# Dynamo compiles once more for every dtype, for x of (R, C) or (R, C, S), for each dimension of
# size 1, and if dy is x. This is more than all of them.
_VARIANTS = 256


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    # Of columns, ATen's kernels add up as fast. float64 has no wider dtype to add up in.
    if x.shape[2] == 1 or x.dtype == torch.float64:
        return composed.stats(x)
    # The variance of n values is at least 1 / n of the square of the distance from any of them to
    # the mean. So a difference of squares loses at most log10(n) of the 16 digits of float64.
    shift = x[0, :, 0].to(torch.float64)
    shift = shift.where(shift.isfinite(), 0)  # so that the mean of values with inf is inf
    away, squares = _compiled(_sums)(x, shift.view(1, -1, 1)) / (x.shape[0] * x.shape[2])
    return shift + away, (squares - away.square()).clamp(min=0)


def pack_stats(x: Tensor, header: Tensor) -> Tensor:
    return messages.pack_stats(header, *stats(x))


def pack_grad(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    # The other ranks wait in the collective, so what cannot be compiled must fail before it.
    _compile_input_grad(x.dtype)
    return composed.pack_grad(dy, x, mean, invstd, dtype)


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
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    vectors = [v.to(dtype) for v in (mean, sum_dy / n, slope, scale)]
    loop = _compiled(_input_grad)
    if x.shape[2] == 1:  # the loop over channels is the inner one only without a third dimension
        return loop(dy.squeeze(2), x.squeeze(2), *vectors).unsqueeze(2)
    return loop(dy, x, *(v.view(-1, 1) for v in vectors))


def _sums(x: Tensor, shift: Tensor) -> Tensor:
    """The sums of x - shift and of its squares, (2, C)."""
    away = x.to(shift.dtype) - shift
    return torch.stack([away.sum((0, 2)), away.square().sum((0, 2))])


def _input_grad(
    dy: Tensor, x: Tensor, mean: Tensor, mean_dy: Tensor, slope: Tensor, scale: Tensor
) -> Tensor:
    # The scale comes last: scale * slope, as a coefficient of x, underflows where x is large.
    return ((dy.to(mean.dtype) - mean_dy - (x.to(mean.dtype) - mean) * slope) * scale).to(dy.dtype)


@functools.cache
def _compile_input_grad(dtype: torch.dtype) -> None:
    dy, x = torch.ones(2, 3, 4, 5, dtype=dtype)
    mean, invstd, weight, sum_dy, sum_dy_xmu, n = torch.ones(6, 4, dtype=torch.float64)
    input_grad(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, n[0])


@functools.cache
def _compiled(loop: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loop, whose errors of the compiler say what to do."""
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        raise RuntimeError(
            f"backend 'inductor' needs PyTorch 2.13, got {torch.__version__}: install it, or "
            f"choose backend='composed'"
        )
    options: dict[str, Any] = {"recompile_limit": _VARIANTS}  # PyTorch does not declare its type
    compiled = torch.compile(loop, fullgraph=True, dynamic=True, **options)

    def call(x: Tensor, *arguments: Any) -> Tensor:
        if x.device.type != "cpu":
            raise RuntimeError(
                f"backend 'inductor' runs on cpu, got a tensor on {x.device}: choose backend='auto'"
            )
        try:
            return compiled(x, *arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise RuntimeError(
                f"backend 'inductor' could not compile a loop. It needs a C++ compiler, such as "
                f"g++; CXX names another one. {error}"
            ) from error

    return call
