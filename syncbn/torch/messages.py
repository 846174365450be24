"""What ranks send each other and make of it, in ATen's operations: few, on small vectors.

The functions stand for those of the same name in `syncbn.torch.backends.Backend`, for a backend
without kernels of its own for them. On an accelerator each operation is a launch, which costs the
host more than these vectors cost the device. Vectors that do not change are sent there once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from syncbn.protocol import HEADER_WORDS
from syncbn.torch.backends import Running

# A message begins with the header and two words more: the rank's share of n and of n - 1, so that
# their sums over the ranks are n and n - 1. The count in the header is exact; these are rounded.
WORDS = HEADER_WORDS + 2

# Below it, r + f (b - r), as `lerp_` forms it, is within the bound of (1 - f) r + f b.
_LERP = 0.5


@functools.lru_cache(maxsize=1024)
def constant(words: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector that is sent to the device once, not in every step. It must not be changed."""
    with torch.inference_mode(False):
        return torch.tensor(words, dtype=dtype).to(device)


@functools.lru_cache(maxsize=1024)
def filled(value: float, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same, of equal values.

    It is made on the host: memory of a CUDA graph that is being captured must not be kept, and a
    copy makes the capture fail if no step has run before.
    """
    with torch.inference_mode(False):
        return torch.full((length,), value, dtype=dtype).to(device)


def first_words(header: Sequence[float], count: int, ranks: int) -> tuple[float, ...]:
    """The first WORDS words of the message of a rank, one of so many."""
    return *header, count, count - 1 / ranks


def pack_stats(header: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The message [header, mean, var]."""
    return torch.cat([header, mean.to(header.dtype), var.to(header.dtype)])


def combine_ranks(
    table: Tensor, counts: Sequence[int] | None, filled: bool, eps: float, running: Running | None
) -> tuple[Tensor, Tensor, Tensor]:
    channels = (table.shape[1] - WORDS) // 2
    _, means, variances = table.split([WORDS, channels, channels], 1)
    n, weights = _weights(table, counts, filled)
    mean = (weights[0] * means).sum(0)
    away = means - mean
    squares = torch.addcmul(variances, away, away)
    # Every rank adds its share of eps to the biased variance, which saves an operation.
    share = constant((eps / len(table), 0.0), table.dtype, table.device).view(2, 1, 1)
    var_eps, unbiased = torch.addcmul(share, weights, squares).sum(1).unbind(0)
    if running is not None:
        move(running, mean, unbiased, None if filled else n > 0)
    return mean, var_eps.rsqrt(), n


def pack_grad(
    sum_dy: Tensor, sum_dy_xmu: Tensor, invstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The message [sum_dy, sum_dy_xmu, 0], and the gradients of weight and bias."""
    vectors = [sum_dy.to(invstd.dtype), sum_dy_xmu.to(invstd.dtype)]
    message = torch.cat([*vectors, filled(0.0, 1, invstd.dtype, invstd.device)])
    return message, (vectors[1] * invstd).to(dtype), sum_dy.to(dtype)


def _weights(table: Tensor, counts: Sequence[int] | None, filled: bool) -> tuple[Tensor, Tensor]:
    """n, the sum of the counts, and (2, ranks, 1): each count over n and over n - 1."""
    if counts is not None:
        n = sum(counts)
        words = [count / max(total, 1) for total in (n, n - 1) for count in counts]
        weights = constant(tuple(words), table.dtype, table.device)
        return table.new_full((), n), weights.view(2, -1, 1)
    shares = table[:, HEADER_WORDS:WORDS]
    totals = shares.sum(0)
    divisors = totals if filled else totals.clamp(min=1)
    return totals[0], (shares[:, :1] / divisors).t().unsqueeze(2)


@torch.no_grad()
def move(running: Running, mean: Tensor, unbiased: Tensor, if_filled: Tensor | None = None) -> None:
    """Move the running statistics; if `if_filled` is given, only where it holds.

    The ranks of a group must get equal bits, so that both ways do the same operations.
    """
    taken: float | Tensor
    if running.steps is not None:
        running.steps.add_(1 if if_filled is None else if_filled)
    if running.momentum is None:
        assert running.steps is not None
        taken = running.steps.clamp(min=1).to(mean.dtype).reciprocal()
    else:
        taken = running.momentum
    buffers, batches = [running.mean, running.var], [mean, unbiased]
    if if_filled is None and isinstance(taken, float) and _may_lerp(buffers[0], mean, taken):
        torch._foreach_lerp_(buffers, batches, taken)
        return
    for buffer, batch in zip(buffers, batches, strict=True):
        if if_filled is None:
            _move_one(buffer, batch, taken)
        else:
            moved = buffer.clone()
            _move_one(moved, batch, taken)
            buffer.copy_(torch.where(if_filled, moved, buffer))


def _move_one(buffer: Tensor, batch: Tensor, taken: float | Tensor) -> None:
    """buffer = (1 - taken) buffer + taken batch, rounded once to the dtype of the buffer.

    1 - taken is formed on the host where it can be: in float32, 1 - 0.999 has four digits left.
    """
    if _may_lerp(buffer, batch, taken):
        buffer.lerp_(batch, taken)
    elif buffer.dtype == torch.float32 and isinstance(taken, float):
        buffer.mul_(1 - taken).add_(batch, alpha=taken)
    else:
        buffer.copy_((1 - taken) * buffer.to(batch.dtype) + taken * batch)


def _may_lerp(buffer: Tensor, batch: Tensor, taken: float | Tensor) -> bool:
    return buffer.dtype == batch.dtype and not (isinstance(taken, float) and taken >= _LERP)
