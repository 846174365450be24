"""The memory order of (N, C, *S): contiguous or channels-last."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of one place are neighbours, as in channels_last and slices of it."""
    if x.is_contiguous() or x.stride(1) != 1:
        return False
    others = [x.stride(d) for d in range(x.dim()) if d != 1 and x.shape[d] > 1]
    return min(others, default=0) >= x.shape[1]


def to_rows(t: Tensor, channels_last: bool) -> Tensor:
    """t (N, C, *S) as contiguous (R, C, S): a view if t has that order and no gaps, or a copy.

    (N, C, prod S), or (N prod S, C, 1) for channels-last.
    """
    batch, channels, *spatial = t.shape
    if channels_last:
        values, shape = t.movedim(1, -1), (batch * math.prod(spatial), channels, 1)
    else:
        values, shape = t, (batch, channels, math.prod(spatial))
    # Flat in between, so that dimensions of size 1 have the usual strides. If those of x and dy
    # differ, ATen takes kernels that add up bfloat16 in bfloat16, or that give a wrong dx.
    return values.contiguous().view(-1).view(shape)


def from_rows(rows: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """The inverse of `to_rows`, as a view."""
    if channels_last:
        batch, channels, *spatial = shape
        return rows.view(batch, *spatial, channels).movedim(-1, 1)
    return rows.view(tuple(shape))


def restored(rows: Tensor, like: Tensor) -> Tensor:
    """rows (R, C, S) in the shape and memory order of `like`.

    Not as a view, which the user could not change in place (ReLU(inplace=True)).
    """
    return from_rows(rows, like.shape, is_channels_last(like)).data


def empty_like(x: Tensor) -> Tensor:
    """A tensor with the shape, dtype and strides of a result that `restored` returns."""
    batch, channels, *spatial = x.shape
    if is_channels_last(x):
        return x.new_empty(batch, *spatial, channels).movedim(-1, 1)
    return x.new_empty(x.shape)
