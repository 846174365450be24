"""The layer as a function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not marked so

from syncbn.contract import check_count
from syncbn.torch import backends
from syncbn.torch.backends import may_sync_host
from syncbn.torch.evaluation import evaluate
from syncbn.torch.groups import ALONE, Communicator, ProcessGroupLike
from syncbn.torch.step import (
    Statistics,
    batch_statistics,
    check_input,
    device_of_step,
    normalize,
)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroupLike = None,
    *,
    num_features: int | None = None,
    num_batches_tracked: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, statistics over a process group.

    In training, mean and var are those of the inputs of all ranks of the group together; running
    statistics, if given, move towards them, with the unbiased variance. In eval they are the
    running statistics, or those of this rank's input if none are given; eval never communicates.

    Args:
        input: (N, C, +), float16, bfloat16, float32 or float64; N and + may differ between ranks,
            and N may be 0.
        running_mean, running_var: (C,), updated in place in training.
        weight, bias: (C,), of the dtype of the input, or float32 beside float16 and bfloat16.
        training: whether to use the statistics of the batch.
        momentum: weight of this batch in the running statistics, in [0, 1]; None for their
            cumulative average, which needs num_batches_tracked.
        eps: added to the variance.
        process_group: None for all ranks (this process alone, if torch.distributed is not
            initialized), a ProcessGroup, the name of a group or a list of rank ids.
        num_features: C, for the check of the input; by default that of the parameters, or without
            any that of the input, and then ranks must not differ in it.
        num_batches_tracked: int64 scalar, counts the batches that moved the running statistics.
        backend: "auto", or the name of a backend; see `syncbn.torch.backends`.

    Returns:
        A tensor of the shape, dtype and memory format of the input, differentiable once. The
        gradients of weight and bias are those of this rank alone.

    Raises:
        TypeError, ValueError: the input breaks one of the rules above, or a group that trains
            holds only one value per channel.
        RuntimeError: in training, some ranks have nothing to differentiate and others have.
        PeerError: another rank of the group raised one of these.
    """
    vectors = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    if not training and running_mean is not None and running_var is not None:
        if not is_tracing():  # a size is a tensor then, not a number to compare
            check_input(input, _check_vectors(input, vectors, num_features), weight)
        return evaluate(input, running_mean, running_var, weight, bias, eps)
    num_features = _check_vectors(input, vectors, num_features)
    ops = backends.load(backend, device_of_step(input, weight))
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("momentum=None (cumulative average) needs num_batches_tracked")
    if training:
        communicator = Communicator.of(process_group)
        stats = batch_statistics(input, num_features, weight, bias, eps, communicator, ops)
        if may_sync_host(stats.n.device):
            check_count(int(stats.n))
        if running_mean is not None and running_var is not None:
            _update_running(running_mean, running_var, num_batches_tracked, momentum, stats)
        return normalize(input, weight, bias, stats.mean, stats.invstd, stats.n, communicator, ops)
    stats = batch_statistics(input, num_features, weight, bias, eps, ALONE, ops)
    return normalize(input, weight, bias, stats.mean, stats.invstd, stats.n, ALONE, ops)


def _channels(input: Tensor, vectors: dict[str, Tensor | None]) -> int:
    """C as the parameters have it, or else the input."""
    for vector in vectors.values():
        if vector is not None:
            return vector.numel()
    shaped = isinstance(input, Tensor) and input.dim() > 1
    check_input(input, input.shape[1] if shaped else 0, None)
    return input.shape[1]


def _check_vectors(
    input: Tensor, vectors: dict[str, Tensor | None], num_features: int | None
) -> int:
    """Check what is per channel, and return C."""
    if num_features is None:
        num_features = _channels(input, vectors)
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (num_features,):
            raise ValueError(f"{name} must have shape ({num_features},), got {tuple(vector.shape)}")
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        missing = "running_mean" if vectors["running_mean"] is None else "running_var"
        raise ValueError(f"running_mean and running_var must be given together, got no {missing}")
    return num_features


@torch.no_grad()
def _update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    stats: Statistics,
) -> None:
    """Move the running statistics, unless the whole group was empty; the host need not know n."""
    n = stats.n
    if num_batches_tracked is not None:
        num_batches_tracked.add_(n > 0)
    taken: float | Tensor
    if momentum is not None:
        taken = float(momentum)  # on the host: in float32, 1 - 0.999 has four digits left
    else:
        assert num_batches_tracked is not None
        taken = 1 / num_batches_tracked.clamp(min=1).to(n.dtype)
    unbiased = stats.var * (n / (n - 1).clamp(min=1))
    for buffer, batch in ((running_mean, stats.mean), (running_var, unbiased)):
        moved = (1 - taken) * buffer.to(n.dtype) + taken * batch
        buffer.copy_(torch.where(n > 0, moved, buffer.to(n.dtype)))
