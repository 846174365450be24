"""The operations on CPU, in three loops that Numba compiles: one pass over the data in each.

A value is converted where it is used: to float64, which costs no time, because a loop waits for
memory; halves to float32, except in sums. So this is at least as exact as ATen's kernels.

The loops are compiled in the first step of each dtype. That takes some seconds; Numba keeps the
result on disk, next to this file or in NUMBA_CACHE_DIR.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from syncbn.torch import messages
from syncbn.torch.backends import composed

combine = composed.combine
combine_ranks = composed.combine_ranks

_PART = 2**16  # values for which a thread is worth its start

# NumPy has no bfloat16, and Numba computes with no half on CPU. So the loops get their bits.
_BITS = {torch.float16: torch.uint16, torch.bfloat16: torch.int16}
_INT = ir.IntType(32)


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    # The variance of n values is at least 1 / n of the square of the distance from any of them to
    # the mean. So a difference of squares loses at most log10(n) of the 16 digits of float64, which
    # float64 data cannot spare: for these the distances are from the mean, in a second pass.
    count = x.shape[0] * x.shape[2]
    shift = _vector(x[0, :, 0])
    with np.errstate(all="ignore"):  # NaN, inf and what overflows go their way
        for _ in range(2 if x.dtype == torch.float64 else 1):
            shift = np.where(np.isfinite(shift), shift, 0)  # so that the mean with inf is inf
            away, squares = _sums(x, x, shift, shift) / count
            shift = shift + away
        var = np.maximum(squares - away * away, 0)
    return torch.from_numpy(shift), torch.from_numpy(var)


def pack_stats(x: Tensor, header: Tensor) -> Tensor:
    _compile(x.dtype)
    return messages.pack_stats(header, *stats(x))


def pack_grad(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _compile(x.dtype)
    return messages.pack_grad(*reduce_grad(dy, x, mean), invstd, dtype)


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    y = torch.empty_like(x)
    scale = invstd if weight is None else invstd * weight
    shift = torch.zeros_like(mean) if bias is None else bias
    _in_parts(_normalize, [x, y], [_vector(v, _arithmetic(x)) for v in (mean, scale, shift)])
    return y


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    sum_dy, sum_dy_xmu = torch.from_numpy(_sums(dy, x, np.zeros(len(mean)), _vector(mean)))
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
    dx = torch.empty_like(dy)
    scale = invstd if weight is None else invstd * weight
    slope = invstd.square() * sum_dy_xmu / n
    vectors = [_vector(v, _arithmetic(x)) for v in (mean, sum_dy / n, slope, scale)]
    _in_parts(_input_grad, [dy, x, dx], vectors)
    return dx


def _arithmetic(x: Tensor) -> torch.dtype:
    """The dtype in which elements of x are computed, apart from sums."""
    return torch.float32 if x.dtype in _BITS else torch.float64


def _sums(a: Tensor, b: Tensor, from_a: Any, from_b: Any) -> Any:
    """The sums of a - from_a, and of its products with b - from_b: (2, C)."""
    return sum(_in_parts(_add_up, [a, b], [from_a, from_b]))


def _vector(values: Tensor, dtype: torch.dtype = torch.float64) -> Any:
    return _numpy(values.to(dtype).contiguous())  # strided vectors would be another type for Numba


def _in_parts(loop: Callable[..., Any], tensors: list[Tensor], vectors: list[Any]) -> list[Any]:
    """What the loop returns for each part of the rows of the tensors, one for each thread.

    The loops run without Python's lock. Threads of Numba's own do not survive a fork.
    """
    arrays = [_array(tensor) for tensor in tensors]
    rows = len(arrays[0])
    parts = max(1, min(torch.get_num_threads(), rows, arrays[0].size // _PART))
    if parts == 1:
        return [loop(*arrays, *vectors)]
    cuts = [slice(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]
    threads = _threads(torch.get_num_threads(), os.getpid())
    return list(threads.map(lambda cut: loop(*(a[cut] for a in arrays), *vectors), cuts))


def _array(x: Tensor) -> Any:
    """x (R, C, S); as (R, C) if S is 1, so that the loop over channels is the inner one."""
    x = x.view(_BITS.get(x.dtype, x.dtype))
    return _numpy(x.squeeze(2) if x.shape[2] == 1 else x)


def _numpy(x: Tensor) -> Any:
    if x.device.type != "cpu":
        raise RuntimeError(
            f"backend 'numba' runs on cpu, got a tensor on {x.device}: choose backend='auto'"
        )
    return x.detach().numpy()


@functools.lru_cache(maxsize=1)
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "syncbn")


# Loops


@intrinsic
def _load(typing: Any, element: Any) -> Any:
    """What an element of an array of `_array` stands for: float64, or float32 for all others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if element == types.uint16:
            value = builder.bitcast(value, ir.HalfType())
        elif element == types.int16:  # the upper half of a float32
            bits = builder.shl(builder.zext(value, _INT), _INT(16))
            value = builder.bitcast(bits, ir.FloatType())
        return builder.fpext(value, ir.FloatType()) if element == types.uint16 else value

    return (element if element == types.float64 else types.float32)(element), generate


@intrinsic
def _round(typing: Any, value: Any, element: Any) -> Any:
    """A float64 or float32 as an element of the kind of another one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rounded = arguments[0]
        if element == types.float64:
            return rounded
        if value == types.float64:
            rounded = builder.fptrunc(rounded, ir.FloatType())
        if element == types.uint16:
            half = builder.fptrunc(rounded, ir.HalfType())
            return builder.bitcast(half, ir.IntType(16))
        if element == types.int16:
            return _bfloat16_bits(builder, rounded)
        return rounded

    return element(value, element), generate


def _bfloat16_bits(builder: Any, value: Any) -> Any:
    """The nearest bfloat16 of a float32, the even one of two; NaN has its highest digit set."""
    bits = builder.bitcast(value, _INT)
    upper = builder.lshr(bits, _INT(16))
    half = builder.add(_INT(0x7FFF), builder.and_(upper, _INT(1)))
    nearest = builder.lshr(builder.add(bits, half), _INT(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, builder.or_(upper, _INT(0x40)), nearest)
    return builder.trunc(chosen, ir.IntType(16))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as Numba compiles it: sums may be formed in another order."""
    try:
        return numba.njit(function, nogil=True, cache=True, fastmath={"reassoc", "contract"})
    except RuntimeError as error:  # no folder can be written
        raise RuntimeError(
            "backend 'numba' keeps compiled loops on disk: set NUMBA_CACHE_DIR to a folder that "
            "can be written"
        ) from error


@_compiled
def _add_up(a: Any, b: Any, from_a: Any, from_b: Any) -> Any:
    """The sums of a - from_a, and of its products with b - from_b: (2, C)."""
    sums = np.zeros((2, a.shape[1]))
    totals, products = sums[0], sums[1]
    for r in range(a.shape[0]):
        for c in range(a.shape[1]):
            if a.ndim == 2:
                away = _load(a[r, c]) - from_a[c]
                totals[c] += away
                products[c] += away * (_load(b[r, c]) - from_b[c])
            else:
                total = product = 0.0
                for s in range(a.shape[2]):
                    away = _load(a[r, c, s]) - from_a[c]
                    total += away
                    product += away * (_load(b[r, c, s]) - from_b[c])
                totals[c] += total
                products[c] += product
    return sums


@_compiled
def _normalize(x: Any, y: Any, mean: Any, scale: Any, shift: Any) -> None:
    """y = (x - mean) * scale + shift."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            if x.ndim == 2:
                away = _load(x[r, c]) - mean[c]
                y[r, c] = _round(away * scale[c] + shift[c], x[r, c])
            else:
                for s in range(x.shape[2]):
                    away = _load(x[r, c, s]) - mean[c]
                    y[r, c, s] = _round(away * scale[c] + shift[c], x[r, c, s])


@_compiled
def _input_grad(dy: Any, x: Any, dx: Any, mean: Any, mean_dy: Any, slope: Any, scale: Any) -> None:
    """dx = (dy - mean_dy - (x - mean) * slope) * scale."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            if x.ndim == 2:
                away = _load(dy[r, c]) - mean_dy[c] - (_load(x[r, c]) - mean[c]) * slope[c]
                dx[r, c] = _round(away * scale[c], x[r, c])
            else:
                for s in range(x.shape[2]):
                    away = (
                        _load(dy[r, c, s]) - mean_dy[c] - (_load(x[r, c, s]) - mean[c]) * slope[c]
                    )
                    dx[r, c, s] = _round(away * scale[c], x[r, c, s])


@functools.cache
def _compile(dtype: torch.dtype) -> None:
    """Run all loops: the other ranks wait in a collective, so what cannot be compiled fails before.

    float64 numbers of channels-last data and of other data are different types for Numba.
    """
    for size in (1, 2):
        x = torch.ones(1, 1, size, dtype=dtype)
        mean = torch.ones(1, dtype=torch.float64)
        reduce_grad(x, x, mean)
        normalize(x, mean, mean, None, None)
        input_grad(x, x, mean, mean, None, mean, mean, mean[0])
