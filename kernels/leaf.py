"""The five leaf operations in Triton: four that go over the data, and the merge of statistics.

One source for Ascend (triton-ascend), CUDA (triton) and Triton's interpreter. Every kernel reads x
as a contiguous (R, C, S) tensor in tiles of BLOCK_R rows and BLOCK values side by side, and has two
ways to lay them:

- planes (S > 1, from contiguous input): a tile is (rows, places) of one channel;
- columns (S = 1, from channels-last input and (N, C)): a tile is (rows, channels).

The work is cut into items: `parts` runs of `per_part` tiles, of each channel or block of channels.
A program takes every `num_programs`-th item, so the grid has the size of the machine, whatever the
input. Per channel there is one number of each part, merged afterwards: no atomics.

A sum adds up _RUN tiles place by place, then the tile in steps of _RUN, then those totals, so that
few additions are in a row, as reference/bounds.py asks, also where a compiler adds one by one.
Everything is added up in float32. What lies beyond the data is never counted: it is loaded as the
neutral value (`other=`).

How Ascend wants it: tiles are 2-D strided, for an index taken apart by // and % on a tensor becomes
scalar loads; on scalars they are free. Addresses are int64, masks are compared in int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

_RUN = tl.constexpr(16)

# A new number of rows, as of the last batch of an epoch, shall not compile anew. C and S shall:
# what they are multiples of is how wide a GPU loads.
_SIZES = ["R", "per_part", "parts"]


@triton.jit
def _extent(R, C, S, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks of channels there are, and tiles in each."""
    if COLUMNS:
        blocks = tl.cdiv(C, BLOCK)
        tiles = tl.cdiv(R, BLOCK_R)
    else:
        blocks = C
        tiles = tl.cdiv(R, BLOCK_R) * tl.cdiv(S, BLOCK)
    return blocks, tiles


@triton.jit
def _tile(t, block, R, C, S, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of tile t of a block of channels."""
    if COLUMNS:
        first_row = t * BLOCK_R
        first = block * BLOCK
        base = tl.cast(first_row, tl.int64) * C + first
        stride = tl.cast(C, tl.int64)
        end = C
    else:
        across = tl.cdiv(S, BLOCK)
        first_row = (t // across) * BLOCK_R
        first = (t % across) * BLOCK
        base = (tl.cast(first_row, tl.int64) * C + block) * S + first
        stride = tl.cast(C, tl.int64) * S
        end = S
    rows = tl.arange(0, BLOCK_R)
    places = tl.arange(0, BLOCK)
    offsets = base + rows[:, None] * stride + places[None, :]
    mask = (first_row + rows < R)[:, None] & (first + places < end)[None, :]
    return offsets, mask


@triton.jit
def _values_before(t, R, S, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """How many values of a channel lie in the tiles before tile t."""
    if COLUMNS:
        values = tl.minimum(t * BLOCK_R, R).to(tl.int64)
    else:
        across = tl.cdiv(S, BLOCK)
        first_row = tl.minimum((t // across) * BLOCK_R, R)
        rows = tl.minimum(R - first_row, BLOCK_R)
        left = tl.minimum((t % across) * BLOCK, S)
        values = tl.cast(first_row, tl.int64) * S + tl.cast(rows, tl.int64) * left
    return values


@triton.jit
def _channels(block, C, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Index and mask of the channels of a block: a row of numbers, or a number."""
    if COLUMNS:
        index = block * BLOCK + tl.arange(0, BLOCK)
        mask = index < C
    else:
        index = block
        mask = True
    return index, mask


@triton.jit
def _of_channels(ptr, index, mask, COLUMNS: tl.constexpr):
    """A value of each channel, in float32, to be broadcast to a tile."""
    if COLUMNS:
        value = tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)[None, :]
    else:
        value = tl.load(ptr + index).to(tl.float32)
    return value


@triton.jit
def _sum(tile, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a tile over all but channels, _RUN at a time: a compiler may add one by one."""
    if COLUMNS:
        some = tl.sum(tl.reshape(tile, (BLOCK_R // _RUN, _RUN, BLOCK)), axis=1)
        total = tl.sum(some, axis=0)[None, :]
    else:
        some = tl.sum(tl.reshape(tile, (BLOCK_R * BLOCK // _RUN, _RUN)), axis=1)
        some = tl.sum(tl.reshape(some, (BLOCK_R * BLOCK // _RUN // _RUN, _RUN)), axis=1)
        total = tl.sum(some, axis=0)
    return total


@triton.jit
def _zero(COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """What `_sum` gives of nothing."""
    return tl.zeros((1, BLOCK), dtype=tl.float32) if COLUMNS else 0.0


@triton.jit
def _store(ptr, index, mask, value, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `_sum` gave."""
    if COLUMNS:
        tl.store(ptr + index, tl.reshape(value, (BLOCK,)), mask=mask)
    else:
        tl.store(ptr + index, value)


@triton.jit
def _deviations(x_ptr, offsets, mask, mean, COLUMNS: tl.constexpr):
    """x - mean in float32, 0 beyond the data."""
    if COLUMNS:  # triton-ascend cannot lower an `other` that is a row of means
        d = _masked_deviations(x_ptr, offsets, mask, mean)
    elif x_ptr.dtype.element_ty == tl.float32:
        d = tl.load(x_ptr + offsets, mask=mask, other=mean) - mean
    else:  # whose `other` would be the mean rounded to half
        d = _masked_deviations(x_ptr, offsets, mask, mean)
    return d


@triton.jit
def _masked_deviations(x_ptr, offsets, mask, mean):
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x - mean, 0.0)


@triton.jit
def _corrected(mean, shift):
    """mean + shift, the mean of x - mean, which is no number for an infinite mean, which stays."""
    return tl.where(tl.abs(shift) < float("inf"), mean + shift, mean)


@triton.jit(do_not_specialize=_SIZES)
def stats(
    x_ptr, mean_ptr, var_ptr, count_ptr, R, C, S, per_part, parts,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance (parts, C) of each part, and how many values it has (parts,).

    In two passes, of which the second also corrects the mean: what is left of a rounding error that
    all values share, as in a constant channel, is the mean of x - mean. A variance is added up as
    variance, in 64ths: its sum of squares may overflow where it does not.
    """
    blocks, tiles = _extent(R, C, S, COLUMNS, BLOCK_R, BLOCK)
    for item in range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        block = item % blocks
        part = item // blocks
        begin = part * per_part
        end = tl.minimum(begin + per_part, tiles)
        count = (
            _values_before(end, R, S, COLUMNS, BLOCK_R, BLOCK)
            - _values_before(begin, R, S, COLUMNS, BLOCK_R, BLOCK)
        ).to(tl.float32)
        mean = _zero(COLUMNS, BLOCK)
        for run in range(begin, end, _RUN):
            sums = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float32)
            for t in range(run, tl.minimum(run + _RUN, end)):
                offsets, mask = _tile(t, block, R, C, S, COLUMNS, BLOCK_R, BLOCK)
                sums += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            mean += _sum(sums, COLUMNS, BLOCK_R, BLOCK) / count
        shift = _zero(COLUMNS, BLOCK)
        var = _zero(COLUMNS, BLOCK)
        for run in range(begin, end, _RUN):
            sums = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float32)
            squares = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float32)
            for t in range(run, tl.minimum(run + _RUN, end)):
                offsets, mask = _tile(t, block, R, C, S, COLUMNS, BLOCK_R, BLOCK)
                d = _deviations(x_ptr, offsets, mask, mean, COLUMNS)
                sums += d
                squares += (d * 0.125) * (d * 0.125)
            shift += _sum(sums, COLUMNS, BLOCK_R, BLOCK) / count
            var += _sum(squares * (64.0 / count), COLUMNS, BLOCK_R, BLOCK)
        mean = _corrected(mean, shift)
        var = tl.where(var < float("inf"), var - shift * shift, var)  # infinity stays what it is
        var = tl.where(var < 0, 0.0, var)  # not maximum, which would drop a NaN
        index, channel_mask = _channels(block, C, COLUMNS, BLOCK)
        _store(mean_ptr + part * C, index, channel_mask, mean, COLUMNS, BLOCK)
        _store(var_ptr + part * C, index, channel_mask, var, COLUMNS, BLOCK)
        tl.store(count_ptr + part, count)


@triton.jit(do_not_specialize=["P"])
def combine(
    means_ptr, vars_ptr, counts_ptr, mean_ptr, var_ptr, invstd_ptr, n_ptr, P, C, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the statistics (P, C) of P parts of counts (P,); a count of 0 is ignored.

    Chan, Golub and LeVeque, The American Statistician 37 (1983), for P parts. The mean is corrected
    by what is left of it, so that parts which agree have exactly their mean. _RUN parts are taken
    at a time, beside each other.
    """
    parts = tl.arange(0, _RUN)
    counted = tl.zeros((_RUN,), dtype=tl.float32)
    for p in range(0, P, _RUN):
        counted += tl.load(counts_ptr + p + parts, mask=p + parts < P, other=0.0)
    n = tl.sum(counted, axis=0)
    tl.store(n_ptr, n)
    for first in range(tl.program_id(0) * BLOCK, C, tl.num_programs(0) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < C
        means = tl.zeros((_RUN, BLOCK), dtype=tl.float32)
        for p in range(0, P, _RUN):
            weight, full = _weights(counts_ptr, p + parts, P, n)
            of_part = _of_parts(means_ptr, p + parts, index, P, C)
            means += tl.where(full, of_part * weight, 0.0)
        mean = tl.sum(means, axis=0)
        shifts = tl.zeros((_RUN, BLOCK), dtype=tl.float32)
        for p in range(0, P, _RUN):
            weight, full = _weights(counts_ptr, p + parts, P, n)
            away = _of_parts(means_ptr, p + parts, index, P, C) - mean[None, :]
            shifts += tl.where(full, away * weight, 0.0)
        mean = _corrected(mean, tl.sum(shifts, axis=0))
        variances = tl.zeros((_RUN, BLOCK), dtype=tl.float32)
        for p in range(0, P, _RUN):
            weight, full = _weights(counts_ptr, p + parts, P, n)
            away = _of_parts(means_ptr, p + parts, index, P, C) - mean[None, :]
            of_part = _of_parts(vars_ptr, p + parts, index, P, C)
            variances += tl.where(full, (of_part + away * away) * weight, 0.0)
        var = tl.sum(variances, axis=0)
        tl.store(mean_ptr + index, mean, mask=mask)
        tl.store(var_ptr + index, var, mask=mask)
        tl.store(invstd_ptr + index, 1.0 / tl.sqrt(var + eps), mask=mask)


@triton.jit
def _weights(counts_ptr, parts, P, n):
    """count / n of these parts, as a column, and which of them have values."""
    counts = tl.load(counts_ptr + parts, mask=parts < P, other=0.0)
    return (counts / tl.maximum(n, 1.0))[:, None], (counts > 0)[:, None]


@triton.jit
def _of_parts(ptr, parts, index, P, C):
    """(parts, channels) of a (P, C) tensor."""
    offsets = tl.cast(parts, tl.int64)[:, None] * C + index[None, :]
    return tl.load(ptr + offsets, mask=(parts < P)[:, None] & (index < C)[None, :], other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def normalize(
    x_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, y_ptr, R, C, S, per_part, parts,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * invstd * weight + bias."""
    blocks, tiles = _extent(R, C, S, COLUMNS, BLOCK_R, BLOCK)
    for item in range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        block = item % blocks
        begin = (item // blocks) * per_part
        index, channel_mask = _channels(block, C, COLUMNS, BLOCK)
        mean = _of_channels(mean_ptr, index, channel_mask, COLUMNS)
        scale = _of_channels(invstd_ptr, index, channel_mask, COLUMNS)
        scale *= _of_channels(weight_ptr, index, channel_mask, COLUMNS)
        bias = _of_channels(bias_ptr, index, channel_mask, COLUMNS)
        for t in range(begin, tl.minimum(begin + per_part, tiles)):
            offsets, mask = _tile(t, block, R, C, S, COLUMNS, BLOCK_R, BLOCK)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            y = (x - mean) * scale + bias
            tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def reduce_grad(
    dy_ptr, x_ptr, mean_ptr, sum_dy_ptr, sum_dy_xmu_ptr, R, C, S, per_part, parts,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum dy and sum dy * (x - mean), (parts, C), of each part; dy is 0 beyond the data."""
    blocks, tiles = _extent(R, C, S, COLUMNS, BLOCK_R, BLOCK)
    for item in range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        block = item % blocks
        part = item // blocks
        begin = part * per_part
        end = tl.minimum(begin + per_part, tiles)
        index, channel_mask = _channels(block, C, COLUMNS, BLOCK)
        mean = _of_channels(mean_ptr, index, channel_mask, COLUMNS)
        sum_dy = _zero(COLUMNS, BLOCK)
        sum_dy_xmu = _zero(COLUMNS, BLOCK)
        for run in range(begin, end, _RUN):
            of_dy = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float32)
            of_dy_xmu = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float32)
            for t in range(run, tl.minimum(run + _RUN, end)):
                offsets, mask = _tile(t, block, R, C, S, COLUMNS, BLOCK_R, BLOCK)
                dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                of_dy += dy
                of_dy_xmu += dy * (x - mean)
            sum_dy += _sum(of_dy, COLUMNS, BLOCK_R, BLOCK)
            sum_dy_xmu += _sum(of_dy_xmu, COLUMNS, BLOCK_R, BLOCK)
        _store(sum_dy_ptr + part * C, index, channel_mask, sum_dy, COLUMNS, BLOCK)
        _store(sum_dy_xmu_ptr + part * C, index, channel_mask, sum_dy_xmu, COLUMNS, BLOCK)


@triton.jit(do_not_specialize=_SIZES)
def input_grad(
    dy_ptr, x_ptr, mean_ptr, invstd_ptr, weight_ptr, sum_dy_ptr, sum_dy_xmu_ptr, n_ptr, dx_ptr,
    R, C, S, per_part, parts,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = weight invstd (dy - sum_dy / n - (x - mean) invstd^2 sum_dy_xmu / n)."""
    blocks, tiles = _extent(R, C, S, COLUMNS, BLOCK_R, BLOCK)
    n = tl.load(n_ptr)
    for item in range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        block = item % blocks
        begin = (item // blocks) * per_part
        index, channel_mask = _channels(block, C, COLUMNS, BLOCK)
        mean = _of_channels(mean_ptr, index, channel_mask, COLUMNS)
        invstd = _of_channels(invstd_ptr, index, channel_mask, COLUMNS)
        scale = invstd * _of_channels(weight_ptr, index, channel_mask, COLUMNS)
        mean_dy = _of_channels(sum_dy_ptr, index, channel_mask, COLUMNS) / n
        # In this order, for invstd^2 may underflow where the product does not.
        slope = invstd * (_of_channels(sum_dy_xmu_ptr, index, channel_mask, COLUMNS) / n) * invstd
        for t in range(begin, tl.minimum(begin + per_part, tiles)):
            offsets, mask = _tile(t, block, R, C, S, COLUMNS, BLOCK_R, BLOCK)
            dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dx = (dy - mean_dy - (x - mean) * slope) * scale
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
