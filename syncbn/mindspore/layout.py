"""How inputs are counted, laid out for a backend and summed, and memory for results."""

from __future__ import annotations

import math
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint, nn, ops
from mindspore.graph.api import _pynative_executor

_BLOCK = 64  # values that are added one after the other


@ops.constexpr
def count_of(shape: tuple[int, ...]) -> int:
    """How many values each channel of an input of shape (N, C, *S) has.

    Raises:
        ValueError: in a graph with a dimension that its compiler does not know.
    """
    if None in shape:
        raise ValueError(
            "SyncBatchNorm needs the statistics of its input, whose shape must be known when a "
            f"graph is compiled, got {shape}: call it without dynamic shapes, or in PyNative mode"
        )
    return shape[0] * math.prod(shape[2:])


@ops.constexpr
def is_empty(shape: tuple[int | None, ...]) -> bool:
    """Whether an input of that shape has no value; None is a dimension that a graph finds later."""
    return 0 in shape


@ops.constexpr
def axes_of_sums(dimensions: int) -> tuple[int, ...]:
    """All axes except that of the channels."""
    return (0, *range(2, dimensions))


def canonical(x: Tensor) -> Tensor:
    """(N, C, *S) as (N, C, prod S), if it is not empty."""
    return x.reshape(x.shape[0], x.shape[1], -1)


def per_channel(vector: Tensor, dimensions: int = 3) -> Tensor:
    """(C,) as (1, C, 1, ...) of so many dimensions, to go with (R, C, S) or an input."""
    return vector.reshape(1, -1, *(1,) * (dimensions - 2))


class LeadingOnes(nn.Cell):
    """`per_channel` of a parameter, with a gradient that is not a view; see `is_recorded`."""

    def construct(self, vector: Tensor, dimensions: int) -> Tensor:
        return vector.reshape(1, -1, *(1,) * (dimensions - 2))

    def bprop(self, vector: Tensor, dimensions: int, out: Tensor, dout: Tensor) -> Any:
        return dout.reshape(-1) * 1, None


@ops.constexpr
def is_recorded() -> bool:
    """Whether PyNative records what is computed now, so that it can be differentiated.

    A bprop that is recorded must not return a view, such as the result of `reshape`: MindSpore
    2.10.0 then computes a wrong second derivative.
    """
    return bool(_pynative_executor.requires_grad())


def reserve(like: Tensor) -> None:
    """In PyNative: take memory for a result and give it back to the allocator, which keeps it.

    So a rank that has no memory for it finds out before a collective, and the others hear of it.
    """
    mint.empty(like.shape, dtype=like.dtype)


def channel_sums(values: Tensor, dtype: Any) -> Tensor:
    """The sum over each channel of (R, C, S); `dtype` is that of the input they come from.

    MindSpore adds one value after the other. In the dtype of statistics that costs no digits of an
    input that is narrower; float64 values are added in blocks.
    """
    if dtype != ms.float64:
        return values.sum((0, 2))
    rows = values.swapaxes(0, 1).reshape(values.shape[1], -1)
    for _ in range(4):  # of 2^24 values, one is left
        rows = ops.pad(rows, (0, -rows.shape[1] % _BLOCK))
        rows = rows.reshape(rows.shape[0], -1, _BLOCK).sum(2)
    return rows.sum(1)
