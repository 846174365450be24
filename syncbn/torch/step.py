"""A training step of the layer: statistics of the group, and the gradients that go with them.

A step costs two collectives: one all_gather of each rank's statistics in the forward, one
all_reduce of two sums per channel in the backward. A second derivative costs one more all_reduce.

Whatever can fail on one rank does so before its collective, memory for the result included. The
rank then joins the collective with a mark, so that every rank raises and none waits (ERR-9). On an
accelerator the others see the mark only with SYNCBN_DEBUG=1, because the host waits to read it.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from syncbn import protocol
from syncbn.backends import TORCH
from syncbn.contract import FLOATING, check_count, check_input_dtype, check_shape
from syncbn.protocol import COUNT_HIGH, COUNT_LOW, HEADER_WORDS, MARK
from syncbn.torch import backends, layout
from syncbn.torch.backends import Running, may_sync_host, statistics_dtype
from syncbn.torch.groups import ALONE_KEY, Communicator
from syncbn.torch.messages import WORDS, constant, first_words

DTYPES = tuple(getattr(torch, name) for name in FLOATING)

# On CPU the first message has room for so many channels, so that its length does not depend on the
# layer. Gloo takes as long for 100 words as for 4,000.
INLINE_CHANNELS = 2048

_BACKENDS = tuple(TORCH)


def statistics(
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_features: int,
    eps: float,
    momentum: float | None,
    dtype: str | None,
    differentiates: bool,
    problem: str,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """mean and 1 / sqrt(var + eps), (C,) each, of the n values (a scalar) of the group.

    By one all_gather. The running statistics move, unless the whole group is empty.

    Args:
        x: (N, C, +).
        weight: for its dtype and device.
        running_mean, running_var, num_batches_tracked: changed in place, or None.
        momentum, dtype: of the layer. The ranks must agree in them, in eps and in C.
        differentiates: whether a backward of this rank will reach the step.
        problem: what is wrong with the call: type and text of an error, or "".
        group, backend: see `Communicator.of_key` and `backends.load`.

    Raises:
        TypeError, ValueError: there is a problem, x breaks a rule of `check_input`, the layers of
            the ranks differ, or the group has one value per channel.
        RuntimeError: some ranks have nothing to differentiate, others have and would wait.
        PeerError: another rank raised any error.
    """
    communicator = Communicator.of_key(group)
    device = device_of_step(x, weight)
    sent = dtype_of_statistics(x, weight, dtype)
    ranks = len(communicator.ranks)
    error: Exception | None = None
    count = 0
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, num_batches_tracked, momentum)
    with torch.no_grad():
        try:
            raise_problem(problem)
            check_input(x, num_features, weight)
            if differentiates:
                _check_may_be_saved(x, weight)
            if running:
                _check_may_move(running)
            chosen = backends.chosen_for(backend, x)
            operations = backends.module_of(chosen)
            count = x.numel() // num_features
            settings = protocol.Settings(
                num_features,
                eps,
                momentum if running else None,
                dtype,
                weight is not None,
                running is not None,
                chosen.name,
            )
            mark = protocol.BACKWARD if differentiates else protocol.NOTHING
            words = protocol.header(mark, count, settings, _BACKENDS)
            header = constant(first_words(words, count, ranks), sent, device)
            if count:
                rows = layout.to_rows(x, layout.is_channels_last(x))
                message = operations.pack_stats(rows, header).to(header.dtype)
                torch.empty_like(rows)  # memory for y, which the allocator keeps
            else:
                message = torch.cat([header, header.new_zeros(2 * num_features)])
        except Exception as caught:
            error = caught
            words = [protocol.FAIL] + [0.0] * (HEADER_WORDS - 1)
            header = constant(first_words(words, 0, ranks), sent, device)
            message = torch.cat([header, header.new_zeros(2 * num_features)])
        if ranks > 1:
            table, counts = _gather(message, error, communicator)
        elif error:
            raise error
        else:
            if group != ALONE_KEY:
                check_count(count)
            table, counts = message.unsqueeze(0), [count]
        results = operations.combine_ranks(table, counts, count > 1, eps, running)
        mean, invstd, n = (result.to(sent) for result in results)
        return mean, invstd, n


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    n: Tensor,
    group: str,
    backend: str,
) -> Tensor:
    """y = (x - mean) * invstd * weight + bias. The group and n are for the backward."""
    if not x.numel():
        return layout.empty_like(x)
    operations = backends.load(backend, x)
    with torch.no_grad():
        rows = layout.to_rows(x, layout.is_channels_last(x))
        return layout.restored(operations.normalize(rows, mean, invstd, weight, bias), x)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    n: Tensor,
    wants_x: bool,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty if not wanted), weight and bias, by one all_reduce.

    A rank joins the all_reduce also if it has no data or its dx is not wanted, because the others
    wait for its sums.

    Raises:
        PeerError: another rank raised any error.
    """
    communicator = Communicator.of_key(group)
    error: Exception | None = None
    with torch.no_grad():
        parameter_dtype = mean.dtype if weight is None else weight.dtype
        message = grad_weight = grad_bias = None
        try:
            if x.numel():
                operations = backends.load(backend, x)
                channels_last = layout.is_channels_last(x)
                rows, dy_rows = layout.to_rows(x, channels_last), layout.to_rows(dy, channels_last)
                message, grad_weight, grad_bias = operations.pack_grad(
                    dy_rows, rows, mean, invstd, parameter_dtype
                )
                torch.empty_like(rows)  # memory for dx, which the allocator keeps
        except Exception as caught:
            error = caught
        if message is None or grad_weight is None or grad_bias is None or error:
            message = mean.new_zeros(2 * mean.numel() + 1)
            grad_weight = torch.zeros_like(mean, dtype=parameter_dtype)
            grad_bias = torch.zeros_like(grad_weight)
        sums = sum_over_ranks(message.to(mean.dtype), error, communicator)
        if not wants_x:
            dx = x.new_empty(0)
        elif not x.numel():
            dx = layout.empty_like(x)
        else:
            sum_dy, sum_dy_xmu = sums.view(2, -1).unbind(0)
            dx = operations.input_grad(dy_rows, rows, mean, invstd, weight, sum_dy, sum_dy_xmu, n)
            dx = layout.restored(dx, x)
        return dx, grad_weight, grad_bias


def double_backward(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    ddbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    n: Tensor,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of dy, x and weight, given those of the results of `backward`; by one all_reduce.

    With c = x - mean, s = invstd, g = ddx, E over all n values of the group, and sums over those of
    this rank, `backward` is

        dx = w s (dy - E[dy] - c s^2 E[dy c]),  dweight = s sum dy c,  dbias = sum dy.

    The derivative of a sum over ranks is a sum over ranks; those of c and s with respect to x are
    dc_i / dx_j = [i = j] - 1 / n and ds / dx_j = -s^3 c_j / n. All arithmetic is in the dtype of
    the statistics.

    Raises:
        PeerError: another rank raised any error.
    """
    communicator = Communicator.of_key(group)
    error: Exception | None = None
    with torch.no_grad():
        message = mean.new_zeros(7 * mean.numel() + 1)
        try:
            channels_last = layout.is_channels_last(x)
            zeros = torch.zeros_like(mean)
            w = zeros + 1 if weight is None else weight.to(mean.dtype)
            u, v = (zeros if t is None else t.to(mean.dtype) for t in (ddweight, ddbias))
            c, d, g = (
                layout.to_rows(torch.zeros_like(x) if t is None else t, channels_last).to(
                    mean.dtype
                )
                for t in (x, dy, ddx)
            )
            c = c - mean.view(1, -1, 1)
            sum_d, sum_dc, sum_g, sum_gc, sum_gd = (
                t.sum((0, 2)) for t in (d, d * c, g, g * c, g * d)
            )
            sums = [sum_d, sum_dc, w * sum_g, w * sum_gc, w * sum_gd, u * sum_d, u * sum_dc]
            message = torch.cat([*sums, zeros[:1]])
        except Exception as caught:
            error = caught
        means = (sum_over_ranks(message, error, communicator) / n.clamp(min=1)).view(7, -1)
        e_d, e_dc, e_g, e_gc, e_gd, e_ud, e_udc = means.view(7, 1, -1, 1)
        grad_weight = invstd * (sum_gd - means[0] * sum_g - invstd.square() * means[1] * sum_gc)
        s, w, u, v = (t.view(1, -1, 1) for t in (invstd, w, u, v))
        g = w * g
        grad_dy = s * (g - e_g - c * s.square() * e_gc + u * c) + v
        through_s = c * (e_gd - e_d * e_g - 3 * s.square() * e_dc * e_gc)
        through_c = e_gc * (d - e_d) + e_dc * (g - e_g)
        grad_x = s * (u * d - e_ud - c * s.square() * e_udc) - s.pow(3) * (through_s + through_c)
        return (
            layout.restored(grad_dy.to(dy.dtype), x),
            layout.restored(grad_x.to(x.dtype), x),
            grad_weight.to(mean.dtype if weight is None else weight.dtype),
        )


def check_input(x: Tensor, num_features: int, weight: Tensor | None) -> None:
    """Raise TypeError or ValueError unless x can be normalized.

    x must be of shape (N, C, +) with C = num_features, on the device of the parameters and of their
    dtype, or of float16 or bfloat16 with float32 parameters.
    """
    if x.is_nested or x.layout not in (torch.strided, torch._mkldnn):  # type: ignore[attr-defined]
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"input must be a dense tensor, got a {kind} one")
    check_shape(x.shape, num_features)
    check_input_dtype(dtype_name(x.dtype), None if weight is None else dtype_name(weight.dtype))
    if weight is not None and x.device != weight.device:
        raise ValueError(
            f"input must be on the device of the parameters, {weight.device}, got {x.device}"
        )


def _check_may_be_saved(x: Tensor, weight: Tensor | None) -> None:
    """Refuse what autograd refuses only after the step, when the others rely on this rank."""
    for name, tensor in (("input", x), ("weight", weight)):
        if tensor is not None and tensor.is_inference():
            raise RuntimeError(
                f"{name} must not be an inference tensor where gradients are wanted: make it "
                "outside torch.inference_mode(), or clone it there"
            )


def _check_may_move(running: Running) -> None:
    """Refuse buffers that cannot be changed in place, which else only this rank would notice."""
    steps = running.steps
    if steps is not None and (steps.shape != () or steps.dtype != torch.int64):
        shown = f"{dtype_name(steps.dtype)} of shape {tuple(steps.shape)}"
        raise TypeError(f"num_batches_tracked must be an int64 scalar, got {shown}")
    for name, buffer in (("mean", running.mean), ("var", running.var)):
        if 0 in buffer.stride() and buffer.numel() > 1:
            raise ValueError(f"running_{name} must have memory of its own, got an expanded tensor")
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"running_{name} must not be an inference tensor: build or load the layer outside "
                "torch.inference_mode()"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def device_of_step(x: Tensor, weight: Tensor | None) -> torch.device:
    """Where the ranks exchange statistics, also if x is on a wrong device."""
    return x.device if weight is None else weight.device


def dtype_of_statistics(x: Tensor, weight: Tensor | None, dtype: str | None) -> torch.dtype:
    """The dtype of what `statistics` returns. dtype: of the layer, by name."""
    data = x.dtype if dtype is None else getattr(torch, dtype)
    return statistics_dtype(device_of_step(x, weight), data)


def raise_problem(problem: str) -> None:
    """Raise the error that `problem` describes, as "TypeError: text" or "ValueError: text"."""
    kind, _, text = problem.partition(": ")
    if kind:
        raise (TypeError if kind == "TypeError" else ValueError)(text)


def _gather(
    message: Tensor, error: Exception | None, communicator: Communicator
) -> tuple[Tensor, list[int] | None]:
    """The messages of all ranks, none of which has failed, and their counts if they were read."""
    if not may_sync_host(message.device):
        table = communicator.all_gather(message)
        if error:
            raise error
        return table, None
    length, used = WORDS + 2 * INLINE_CHANNELS, message.numel()
    rest = message[length:]
    table = communicator.all_gather(message[:length] if used > length else message.resize_(length))
    headers = table[:, :HEADER_WORDS].tolist()
    counts = _check_together(headers, error, message.device, communicator)
    if used > length:  # on all ranks, because they agree in num_features
        return torch.cat([table, communicator.all_gather(rest)], 1), counts
    return table[:, :used], counts


def sum_over_ranks(message: Tensor, error: Exception | None, communicator: Communicator) -> Tensor:
    """The sums of all ranks, none of which has failed.

    Args:
        message: this rank's sums and a 0, the place of its mark; changed in place.
    """
    if len(communicator.ranks) == 1:
        if error:
            raise error
        return message[:-1]
    if error:
        message[-1] = 1
    communicator.all_reduce(message)
    if not may_sync_host(message.device):
        if error:
            raise error
    elif message[-1].item():
        _raise_together(error, message.device, communicator)
    return message[:-1]


def _check_together(
    headers: list[list[float]],
    error: Exception | None,
    device: torch.device,
    communicator: Communicator,
) -> list[int]:
    """The counts of all ranks. Raises on every rank if their headers show that the step fails."""
    found = protocol.verdict([row[MARK] for row in headers], communicator.ranks)
    if found.failed:
        _raise_together(error, device, communicator)
    if differs := protocol.disagreement(headers, communicator.ranks, _BACKENDS):
        raise ValueError(differs)
    if found.idle:
        raise RuntimeError(protocol.nothing_to_differentiate(found.idle))
    counts = [int(row[COUNT_HIGH] * protocol.COUNT_WORD + row[COUNT_LOW]) for row in headers]
    check_count(sum(counts))
    return counts


def _raise_together(
    error: Exception | None, device: torch.device, communicator: Communicator
) -> NoReturn:
    """Raise this rank's error, or one that names the ranks that failed.

    A second all_gather, which only failing steps pay, sends the text of every rank's error.
    """
    message = torch.tensor(list(protocol.encode_error(error)), dtype=torch.uint8, device=device)
    rows = communicator.all_gather(message).tolist()
    if error:
        raise error
    texts = [protocol.decode_error(bytes(row)) for row in rows]
    failed = [(rank, text) for rank, text in zip(communicator.ranks, texts, strict=True) if text]
    raise protocol.peer_error(*zip(*failed, strict=True))
