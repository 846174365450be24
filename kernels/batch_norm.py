"""The five operations in Triton: stats, combine, normalize, reduce_grad, input_grad.

One source for Ascend (triton-ascend), CUDA (triton) and Triton's interpreter. The function of the
same name in `syncbn.reference.formulas` is the plain version of each kernel, and
`syncbn.reference.bounds` derives how far a kernel may be from it.

The kernels between them work on a few numbers per channel: `pack_stats` and `pack_grad` make the
message that a rank sends, and `combine` takes the messages of all ranks.

Every other kernel reads x as a contiguous (R, C, S) tensor, in tiles of BLOCK_R rows by
BLOCK values. There are two layouts of a tile:

- planes (S > 1, from contiguous input): a tile is (rows, places) of one channel;
- columns (S = 1, from channels-last input and (N, C)): a tile is (rows, channels).

The work is divided into items. An item is one part of one channel (planes) or of one block of
channels (columns); a part is a run of `per_part` tiles, and there are `parts` of them. A program
takes every `num_programs`-th item, so the size of the grid depends on the machine and not on the
input. A reduction writes one number per part and channel, and the parts are merged afterwards: no
atomics.

A sum adds _RUN tiles place by place, then the values of that tile in steps of _RUN, then those
totals. So there are few additions in a row, as the bounds require, even where a compiler adds one
by one. Every sum is in float32. Places beyond the data are loaded as a neutral value (`other=`), so
they never count.

`normalize` and `input_grad` take items and tiles in the opposite order of `stats` and
`reduce_grad`, so that they begin with what was read last, which may still be in the cache.

Two rules come from Ascend. Tiles are 2-D and strided, because // and % on a tensor of indices
become scalar loads; on scalars they are free. Addresses are int64, and masks are compared in int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

_RUN = tl.constexpr(16)

# Do not recompile for another R: the last batch of an epoch has fewer rows. Do specialize on C and
# S: their divisibility decides how many values a GPU loads at a time.
_SIZES = ["R", "per_part", "parts"]


@triton.jit
def _extent(R, C, S, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """The number of blocks of channels, and the number of tiles in each."""
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
def _values(t, R, S, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """The number of values per channel in tile t, in float32."""
    if COLUMNS:
        values = tl.minimum(R - t * BLOCK_R, BLOCK_R)
    else:
        across = tl.cdiv(S, BLOCK)
        rows = tl.minimum(R - (t // across) * BLOCK_R, BLOCK_R)
        values = rows * tl.minimum(S - (t % across) * BLOCK, BLOCK)
    return values.to(tl.float32)


@triton.jit
def _channels(block, C, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Index and mask of the channels of a block: rows (BLOCK,) for columns, scalars for planes."""
    if COLUMNS:
        index = block * BLOCK + tl.arange(0, BLOCK)
        mask = index < C
    else:
        index = block
        mask = True
    return index, mask


@triton.jit
def _of_channels(ptr, index, mask, COLUMNS: tl.constexpr):
    """One float32 value per channel, in a shape that broadcasts to a tile."""
    if COLUMNS:
        value = tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)[None, :]
    else:
        value = tl.load(ptr + index).to(tl.float32)
    return value


@triton.jit
def _sum(tile, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a tile over everything except channels, in steps of _RUN values."""
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
    """A zero of the shape that `_sum` returns."""
    return tl.zeros((1, BLOCK), dtype=tl.float32) if COLUMNS else 0.0


@triton.jit
def _store(ptr, index, mask, value, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a result of `_sum`."""
    if COLUMNS:
        tl.store(ptr + index, tl.reshape(value, (BLOCK,)), mask=mask)
    else:
        tl.store(ptr + index, value)


@triton.jit
def _corrected(mean, shift):
    """mean + shift, where shift is the mean of x - mean.

    If the mean is infinite, the shift is NaN and the mean is kept.
    """
    return tl.where(tl.abs(shift) < float("inf"), mean + shift, mean)


@triton.jit
def _stats_of_tile(
    x, mask, count, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr
):
    """Mean and biased variance of the values of a tile; x is 0 beyond the data.

    The second pass also corrects the mean by the mean of x - mean: the rounding error that all
    values share, as in a constant channel. The squares are divided by count before they are added,
    in 64ths, because a sum of squares may overflow where the variance does not.
    """
    mean = _sum(x, COLUMNS, BLOCK_R, BLOCK) / count
    d = tl.where(mask, x - mean, 0.0)
    shift = _sum(d, COLUMNS, BLOCK_R, BLOCK) / count
    d *= 0.125
    var = _sum(d * d * (64.0 / count), COLUMNS, BLOCK_R, BLOCK)
    var = tl.where(var < float("inf"), var - shift * shift, var)  # keep infinity
    var = tl.where(var < 0, 0.0, var)  # `maximum` would drop a NaN
    return _corrected(mean, shift), var


@triton.jit
def _merged(count, mean, var, more_count, more_mean, more_var):
    """Count, mean and variance of two sets of values together.

    Chan, Golub and LeVeque, The American Statistician 37 (1983). A set with a count of 0 is
    ignored, whatever its statistics. Sets with equal means keep that mean exactly. The variances
    are weighted, not their difference, so that infinity stays.
    """
    # A GPU divides approximately: a / a may be 1 - 2^-24. So an empty first set is replaced by the
    # second, and no weight is 1 minus another, which might be negative.
    total = count + more_count
    kept = count / tl.maximum(total, 1.0)
    weight = more_count / tl.maximum(total, 1.0)
    more_mean = tl.where(more_count > 0, more_mean, 0.0)
    more_var = tl.where(more_count > 0, more_var, 0.0)
    mean = tl.where(count > 0, mean, more_mean)
    away = tl.where(count > 0, more_mean - mean, 0.0)
    merged = tl.where(
        tl.abs(away) < float("inf"),
        mean + away * weight,
        mean * kept + more_mean * weight,
    )
    between = (away * weight) * (away * kept)
    return total, merged, var * kept + more_var * weight + between


@triton.jit(do_not_specialize=_SIZES)
def stats(
    x_ptr, mean_ptr, var_ptr, count_ptr, R, C, S, per_part, parts,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean = sum x / count and var = sum (x - mean)^2 / count of each part.

    Plain version: `syncbn.reference.formulas.stats`.

    x is read once: a tile stays on the chip for the two passes over it, and its statistics are
    merged with those of the tiles before it (`_merged`), _RUN tiles at a time and then those runs.

    Args:
        x_ptr: (R, C, S), float32, float16 or bfloat16.
        mean_ptr, var_ptr: results (parts, C), float32.
        count_ptr: result (parts,), float32, the number of values per channel of each part.
        per_part, parts: see the module.
    """
    blocks, tiles = _extent(R, C, S, COLUMNS, BLOCK_R, BLOCK)
    for item in range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        block = item % blocks
        part = item // blocks
        begin = part * per_part
        end = tl.minimum(begin + per_part, tiles)
        count = 0.0
        mean = _zero(COLUMNS, BLOCK)
        var = _zero(COLUMNS, BLOCK)
        for run in range(begin, end, _RUN):
            run_count = 0.0
            run_mean = _zero(COLUMNS, BLOCK)
            run_var = _zero(COLUMNS, BLOCK)
            for t in range(run, tl.minimum(run + _RUN, end)):
                offsets, mask = _tile(t, block, R, C, S, COLUMNS, BLOCK_R, BLOCK)
                x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                values = _values(t, R, S, COLUMNS, BLOCK_R, BLOCK)
                tile_mean, tile_var = _stats_of_tile(x, mask, values, COLUMNS, BLOCK_R, BLOCK)
                run_count, run_mean, run_var = _merged(
                    run_count, run_mean, run_var, values, tile_mean, tile_var
                )
            count, mean, var = _merged(count, mean, var, run_count, run_mean, run_var)
        index, channel_mask = _channels(block, C, COLUMNS, BLOCK)
        _store(mean_ptr + part * C, index, channel_mask, mean, COLUMNS, BLOCK)
        _store(var_ptr + part * C, index, channel_mask, var, COLUMNS, BLOCK)
        tl.store(count_ptr + part, count)


@triton.jit(do_not_specialize=["P"])
def pack_stats(
    means_ptr, vars_ptr, counts_ptr, header_ptr, message_ptr, P, C, header_words,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The message of a rank: its header, and mean and variance of its P parts together.

    Args:
        means_ptr, vars_ptr: (P, C), float32, results of `stats`.
        counts_ptr: (P,), float32.
        header_ptr: (header_words,), float32, at most _RUN words.
        message_ptr: result (header_words + 2 C,), float32: header, means, variances.
    """
    words = tl.arange(0, _RUN)
    header = tl.load(header_ptr + words, mask=words < header_words, other=0.0)
    tl.store(message_ptr + words, header, mask=words < header_words)
    for first in range(tl.program_id(0) * BLOCK, C, tl.num_programs(0) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        count = tl.zeros((_RUN, 1), dtype=tl.float32)
        mean = tl.zeros((_RUN, BLOCK), dtype=tl.float32)
        var = tl.zeros((_RUN, BLOCK), dtype=tl.float32)
        for p in range(0, P, _RUN):
            part = p + words
            more = tl.load(counts_ptr + part, mask=part < P, other=0.0)[:, None]
            count, mean, var = _merged(
                count, mean, var,
                more, _rows(means_ptr, part, C, index, P, C), _rows(vars_ptr, part, C, index, P, C),
            )  # fmt: skip
        _, mean, var = _merged_rows(count, mean, var)
        message = message_ptr + header_words
        tl.store(message + index, mean, mask=index < C)
        tl.store(message + C + index, var, mask=index < C)


@triton.jit(do_not_specialize=["P"])
def combine(
    table_ptr, mean_ptr, var_ptr, invstd_ptr, n_ptr, running_mean_ptr, running_var_ptr, steps_ptr,
    P, C, header_words, count_word, eps, momentum, kept,
    RUNNING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean = sum w mean_p, var = sum w (var_p + (mean_p - mean)^2), invstd = 1 / sqrt(var + eps).

    Plain version: `syncbn.reference.formulas.combine`. The formula is that of Chan, Golub and
    LeVeque, The American Statistician 37 (1983), for P ranks of weight w = count_p / n. A rank with
    a count of 0 is ignored, whatever its statistics.

    The running statistics move by the same launch, with the unbiased variance, unless n is 0:
    running = kept * running + momentum * batch.

    Args:
        table_ptr: (P, header_words + 2 C), float32, the messages of the ranks (`pack_stats`).
        mean_ptr, var_ptr, invstd_ptr: results (C,), float32.
        n_ptr: result (), float32, the sum of the counts.
        running_mean_ptr, running_var_ptr: (C,), of any dtype, changed in place.
        steps_ptr: (), int64, the number of steps that moved the running statistics.
        count_word: place in the header of a rank's count: in two words, the first in units of 2^20.
        momentum, kept: weights of the batch and of the running statistics, whose sum is 1.
        RUNNING: "none": there are no running statistics; "moving": `steps` is counted up;
            "average": they are the average of all steps, and `steps` counts this one already.
    """
    ranks = tl.arange(0, _RUN)
    width = header_words + 2 * C
    for first in range(tl.program_id(0) * BLOCK, C, tl.num_programs(0) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        count = tl.zeros((_RUN, 1), dtype=tl.float32)
        mean = tl.zeros((_RUN, BLOCK), dtype=tl.float32)
        var = tl.zeros((_RUN, BLOCK), dtype=tl.float32)
        for p in range(0, P, _RUN):
            rank = p + ranks
            counts = table_ptr + tl.cast(rank, tl.int64) * width + count_word
            more = tl.load(counts, mask=rank < P, other=0.0) * 1048576.0
            more += tl.load(counts + 1, mask=rank < P, other=0.0)
            means = table_ptr + header_words
            count, mean, var = _merged(
                count, mean, var,
                more[:, None],
                _rows(means, rank, width, index, P, C),
                _rows(means + C, rank, width, index, P, C),
            )  # fmt: skip
        n, mean, var = _merged_rows(count, mean, var)
        mask = index < C
        tl.store(mean_ptr + index, mean, mask=mask)
        tl.store(var_ptr + index, var, mask=mask)
        tl.store(invstd_ptr + index, 1.0 / tl.sqrt(var + eps), mask=mask)
        tl.store(n_ptr, n)
        if RUNNING != "none":
            if RUNNING == "average":
                steps = tl.load(steps_ptr).to(tl.float32)
                taken = 1.0 / tl.maximum(steps, 1.0)
                left = (steps - 1.0) * taken
            else:
                taken = momentum
                left = kept
                if first == 0:  # one program only
                    tl.store(steps_ptr, tl.load(steps_ptr) + (n > 0).to(tl.int64))
            unbiased = var * (n / tl.maximum(n - 1.0, 1.0))
            _move(running_mean_ptr, index, mask, mean, taken, left, n)
            _move(running_var_ptr, index, mask, unbiased, taken, left, n)


@triton.jit
def _rows(ptr, row, stride, index, P, C):
    """A tile (rows, channels) of a table whose rows begin `stride` values apart."""
    offsets = tl.cast(row, tl.int64)[:, None] * stride + index[None, :]
    return tl.load(ptr + offsets, mask=(row < P)[:, None] & (index < C)[None, :], other=0.0)


@triton.jit
def _merged_rows(count, mean, var):
    """n, mean and variance of all rows of a tile together.

    A second pass adds the mean residual to the mean, so that identical rows give exactly that mean.
    """
    n = tl.sum(tl.reshape(count, (_RUN,)), axis=0)
    weight = count / tl.maximum(n, 1.0)
    total = tl.sum(mean * weight, axis=0)
    shift = tl.sum(tl.where(count > 0, mean - total[None, :], 0.0) * weight, axis=0)
    total = _corrected(total, shift)
    away = tl.where(count > 0, mean - total[None, :], 0.0)
    return n, total, tl.sum((var + away * away) * weight, axis=0)


@triton.jit
def _move(ptr, index, mask, batch, taken, left, n):
    """Move a running statistic towards that of the batch, if there is one."""
    old = tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)
    new = tl.where(n > 0, left * old + taken * batch, old)
    tl.store(ptr + index, new.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def normalize(
    x_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, y_ptr, R, C, S, per_part, parts,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) * invstd * weight + bias.

    Plain version: `syncbn.reference.formulas.normalize`.

    Args:
        x_ptr: (R, C, S), float32, float16 or bfloat16.
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr: (C,), float32.
        y_ptr: result, of the shape and dtype of x.
        per_part, parts: see the module.
    """
    blocks, tiles = _extent(R, C, S, COLUMNS, BLOCK_R, BLOCK)
    items = blocks * parts
    for turn in range(tl.program_id(0), items, tl.num_programs(0)):
        item = items - 1 - turn  # backwards, see the module
        block = item % blocks
        begin = (item // blocks) * per_part
        end = tl.minimum(begin + per_part, tiles)
        index, channel_mask = _channels(block, C, COLUMNS, BLOCK)
        mean = _of_channels(mean_ptr, index, channel_mask, COLUMNS)
        scale = _of_channels(invstd_ptr, index, channel_mask, COLUMNS)
        scale *= _of_channels(weight_ptr, index, channel_mask, COLUMNS)
        bias = _of_channels(bias_ptr, index, channel_mask, COLUMNS)
        for step in range(begin, end):
            offsets, mask = _tile(begin + end - 1 - step, block, R, C, S, COLUMNS, BLOCK_R, BLOCK)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            y = (x - mean) * scale + bias
            tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def reduce_grad(
    dy_ptr, x_ptr, mean_ptr, sum_dy_ptr, sum_dy_xmu_ptr, R, C, S, per_part, parts,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_dy = sum dy and sum_dy_xmu = sum dy * (x - mean) of each part.

    Plain version: `syncbn.reference.formulas.reduce_grad`. dy is 0 beyond the data, so x needs no
    neutral value there.

    Args:
        dy_ptr, x_ptr: (R, C, S), float32, float16 or bfloat16.
        mean_ptr: (C,), float32.
        sum_dy_ptr, sum_dy_xmu_ptr: results (parts, C), float32.
        per_part, parts: see the module.
    """
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


@triton.jit(do_not_specialize=["P"])
def pack_grad(
    sums_ptr, invstd_ptr, message_ptr, grad_weight_ptr, grad_bias_ptr, P, C, BLOCK: tl.constexpr
):
    """What a rank sends in the backward, and its gradients of weight and bias.

    Args:
        sums_ptr: (2, P, C), float32, both results of `reduce_grad`.
        invstd_ptr: (C,), float32.
        message_ptr: result (2 C + 1,), float32: sum_dy, sum_dy_xmu, and 0, the mark of a rank that
            did not fail.
        grad_weight_ptr, grad_bias_ptr: results (C,), of one dtype: invstd sum_dy_xmu and sum_dy.
    """
    parts = tl.arange(0, _RUN)
    for first in range(tl.program_id(0) * BLOCK, C, tl.num_programs(0) * BLOCK):
        index = first + tl.arange(0, BLOCK)
        sum_dy = tl.zeros((_RUN, BLOCK), dtype=tl.float32)
        sum_dy_xmu = tl.zeros((_RUN, BLOCK), dtype=tl.float32)
        for p in range(0, P, _RUN):
            sum_dy += _rows(sums_ptr, p + parts, C, index, P, C)
            sum_dy_xmu += _rows(sums_ptr + P * C, p + parts, C, index, P, C)
        total = tl.sum(sum_dy, axis=0)
        total_xmu = tl.sum(sum_dy_xmu, axis=0)
        mask = index < C
        tl.store(message_ptr + index, total, mask=mask)
        tl.store(message_ptr + C + index, total_xmu, mask=mask)
        tl.store(message_ptr + 2 * C, 0.0)
        dtype = grad_weight_ptr.dtype.element_ty
        grad_weight = tl.load(invstd_ptr + index, mask=mask, other=0.0) * total_xmu
        tl.store(grad_weight_ptr + index, grad_weight.to(dtype), mask=mask)
        tl.store(grad_bias_ptr + index, total.to(dtype), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def input_grad(
    dy_ptr, x_ptr, mean_ptr, invstd_ptr, weight_ptr, sum_dy_ptr, sum_dy_xmu_ptr, n_ptr, dx_ptr,
    R, C, S, per_part, parts,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = weight invstd (dy - sum_dy / n - (x - mean) invstd^2 sum_dy_xmu / n).

    Plain version: `syncbn.reference.formulas.input_grad`.

    Args:
        dy_ptr, x_ptr: (R, C, S), float32, float16 or bfloat16.
        mean_ptr, invstd_ptr, weight_ptr, sum_dy_ptr, sum_dy_xmu_ptr: (C,), float32; both sums are
            over the group.
        n_ptr: (), float32, the number of values per channel in the group.
        dx_ptr: result, of the shape and dtype of dy.
        per_part, parts: see the module.
    """
    blocks, tiles = _extent(R, C, S, COLUMNS, BLOCK_R, BLOCK)
    n = tl.load(n_ptr)
    items = blocks * parts
    for turn in range(tl.program_id(0), items, tl.num_programs(0)):
        item = items - 1 - turn  # backwards, see the module
        block = item % blocks
        begin = (item // blocks) * per_part
        end = tl.minimum(begin + per_part, tiles)
        index, channel_mask = _channels(block, C, COLUMNS, BLOCK)
        mean = _of_channels(mean_ptr, index, channel_mask, COLUMNS)
        invstd = _of_channels(invstd_ptr, index, channel_mask, COLUMNS)
        scale = invstd * _of_channels(weight_ptr, index, channel_mask, COLUMNS)
        mean_dy = _of_channels(sum_dy_ptr, index, channel_mask, COLUMNS) / n
        # In this order: invstd^2 may underflow where the product does not.
        slope = invstd * (_of_channels(sum_dy_xmu_ptr, index, channel_mask, COLUMNS) / n) * invstd
        for step in range(begin, end):
            offsets, mask = _tile(begin + end - 1 - step, block, R, C, S, COLUMNS, BLOCK_R, BLOCK)
            dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dx = (dy - mean_dy - (x - mean) * slope) * scale
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
