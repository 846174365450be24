"""A training step of the layer: statistics of the group, and the gradients that go with them.

A step costs two collectives: one all_gather of each rank's statistics in the forward, one
all_reduce of two sums per channel in the backward. A rank that fails before the all_gather still
joins it, with the mark FAIL, so that every rank raises and none waits (ERR-9).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import protocol
from syncbn.contract import FLOATING, check_input_dtype, check_shape
from syncbn.torch import layout
from syncbn.torch.backends import Backend, may_sync_host, statistics_dtype
from syncbn.torch.groups import Communicator

DTYPES = tuple(getattr(torch, name) for name in FLOATING)


class Statistics(NamedTuple):
    """Mean, biased variance and 1 / sqrt(var + eps), (C,) each, of n values (a scalar tensor)."""

    mean: Tensor
    var: Tensor
    invstd: Tensor
    n: Tensor


def batch_statistics(
    x: Tensor,
    num_features: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    communicator: Communicator,
    backend: Backend,
) -> Statistics:
    """Statistics of x over all ranks, by one all_gather.

    Raises:
        TypeError, ValueError: x breaks a rule of `check_input`.
        RuntimeError: some ranks have nothing to differentiate, others have and would wait.
        PeerError: another rank raised one of these, or anything else.
    """
    mark = protocol.BACKWARD if _differentiates(x, weight, bias) else protocol.NOTHING
    error: Exception | None = None
    with torch.no_grad():
        try:
            check_input(x, num_features, weight)
            message = _message(x, backend, mark)
        except Exception as caught:
            error = caught
            nothing = torch.zeros(2, num_features, device=device_of_step(x, weight))
            message = _pack(nothing, 0, protocol.FAIL)
        table = communicator.all_gather(message)
        if may_sync_host(table.device):
            _check_together(table, error, communicator)
        elif error:
            raise error
        means, variances = table[:, :-3].view(-1, 2, num_features).unbind(1)
        return Statistics(*backend.combine(means, variances, _counts(table), eps))


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    n: Tensor | None,
    communicator: Communicator,
    backend: Backend,
) -> Tensor:
    """(x - mean) * invstd * weight + bias, differentiable once in x, weight and bias.

    mean and invstd are functions of the n values that the ranks hold, or constants if n is None.
    """
    y: Tensor = _Normalize.apply(x, weight, bias, mean, invstd, n, communicator, backend)
    return y


def check_input(x: Any, num_features: int, weight: Tensor | None) -> None:
    """Raise TypeError or ValueError unless x can be normalized.

    x is a tensor of shape (N, C, +) with C = num_features, on the device of the parameters and
    of their dtype, or of float16 or bfloat16 beside float32 parameters.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(x).__name__}")
    check_shape(x.shape, num_features)
    check_input_dtype(dtype_name(x.dtype), None if weight is None else dtype_name(weight.dtype))
    if weight is None:
        return
    if x.device != weight.device:
        raise ValueError(
            f"input must be on the device of the parameters, {weight.device}, got {x.device}"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def device_of_step(x: Any, weight: Tensor | None) -> torch.device:
    """The device of the step, also when x is not a tensor."""
    if weight is not None:
        return weight.device
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        n: Tensor | None,
        communicator: Communicator,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, invstd, n)
        ctx.communicator, ctx.backend = communicator, backend
        if not x.numel():
            return torch.empty_like(x)
        return _restore(backend.normalize(_rows(x, like=x), mean, invstd, weight, bias), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "SyncBatchNorm cannot be differentiated twice on the statistics of a batch: call "
                "backward without create_graph=True"
            )
        x, weight, bias, mean, invstd, n = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        backend: Backend = ctx.backend
        x_rows, dy_rows = _rows(x, like=x), _rows(dy, like=x)
        zero = torch.zeros_like(mean)
        sums = (zero, zero)
        if x.numel() and (n is not None or wants_weight or wants_bias):
            sums = backend.reduce_grad(dy_rows, x_rows, mean)
        grad_weight = (sums[1] * invstd).to(weight.dtype) if wants_weight else None
        grad_bias = sums[0].to(bias.dtype) if wants_bias else None
        if n is not None:
            # Also if this rank wants no dx: the others wait for its sums. A copy of them is reduced
            # in place, for grad_bias may be the very tensor sums[0].
            sums = ctx.communicator.all_reduce(torch.stack(sums).to(mean.dtype)).unbind(0)
        if not wants_x:
            dx = None
        elif not x.numel():
            dx = torch.empty_like(x)
        elif n is None:
            dx = _restore(backend.normalize(dy_rows, zero, invstd, weight, None), x)
        else:
            dx = _restore(backend.input_grad(dy_rows, x_rows, mean, invstd, weight, *sums, n), x)
        return dx, grad_weight, grad_bias, None, None, None, None, None


def _message(x: Tensor, backend: Backend, mark: int) -> Tensor:
    """The message of this rank: mean, var, the count in two words, the mark."""
    count = x.numel() // x.shape[1]
    if not count:
        return _pack(torch.zeros(2, x.shape[1], device=x.device), 0, mark)
    return _pack(torch.stack(backend.stats(_rows(x, like=x))), count, mark)


def _pack(mean_var: Tensor, count: int, mark: int) -> Tensor:
    """One vector of 2C + 3 words, of a dtype that does not depend on this rank's input."""
    # Filled, not copied from the host, which would wait for the device.
    words = [
        torch.full((1,), word, dtype=statistics_dtype(mean_var.device), device=mean_var.device)
        for word in (*divmod(count, protocol.COUNT_WORD), mark)
    ]
    dtype = statistics_dtype(mean_var.device)
    return torch.cat([mean_var.to(dtype).flatten(), *words])


def _counts(table: Tensor) -> Tensor:
    return table[:, -3] * protocol.COUNT_WORD + table[:, -2]


def _differentiates(x: Any, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether this rank's backward will reach the layer."""
    tensors = (tensor for tensor in (x, weight, bias) if isinstance(tensor, Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check_together(table: Tensor, error: Exception | None, communicator: Communicator) -> None:
    """Raise on every rank if the table of all ranks' messages shows that the step must fail."""
    found = protocol.verdict(table[:, -1].tolist(), communicator.ranks)
    if found.failed:
        texts = _exchange_errors(error, table.device, communicator)
        raise error or protocol.peer_error(found.failed, [texts[rank] for rank in found.failed])
    if found.idle:
        raise RuntimeError(protocol.nothing_to_differentiate(found.idle))


def _exchange_errors(
    error: Exception | None, device: torch.device, communicator: Communicator
) -> dict[int, str]:
    """Every rank's error text, by a second all_gather that only failing steps pay."""
    message = torch.tensor(list(protocol.encode_error(error)), dtype=torch.uint8, device=device)
    rows = communicator.all_gather(message).tolist()
    texts = [protocol.decode_error(bytes(row)) for row in rows]
    return dict(zip(communicator.ranks, texts, strict=True))


def _rows(t: Tensor, like: Tensor) -> Tensor:
    """t in the memory order of `like`."""
    return layout.to_rows(t, layout.is_channels_last(like))


def _restore(rows: Tensor, like: Tensor) -> Tensor:
    """A result in the shape and memory order of `like`."""
    # Not as a view, which the user could not change in place (ReLU(inplace=True)).
    return layout.from_rows(rows, like.shape, layout.is_channels_last(like)).data
