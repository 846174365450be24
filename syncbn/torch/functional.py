"""The layer as a function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not marked so

from syncbn.contract import FLOATING, check_settings
from syncbn.torch.evaluation import evaluate
from syncbn.torch.groups import ALONE_KEY, ProcessGroupLike, key_of
from syncbn.torch.operators import normalize, statistics
from syncbn.torch.step import DTYPES, check_input, dtype_name, raise_problem

_NO_COUNTER = "ValueError: momentum=None (cumulative average) needs num_batches_tracked"

_TRACED = (
    "SyncBatchNorm in training cannot be traced by torch.jit: call eval() first, or use "
    "torch.export, which takes a training step"
)

# By the names of classes, whose modules are not imported for this question.
_REFUSED_IN_TRAINING = {
    "DTensor": "TypeError: input must be a plain tensor in training, got DTensor: give the layer "
    "the part of this rank, input.to_local(). It normalizes with the statistics of all ranks",
    "NestedTensor": "TypeError: input must be a dense tensor, got a nested one",
}


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
        input: (N, C, +), float16, bfloat16, float32 or float64. N and + may differ between ranks,
            and N may be 0.
        running_mean, running_var: (C,), updated in place in training.
        weight, bias: (C,), of the dtype of the input, or float32 with float16 and bfloat16.
        training: whether to use the statistics of the batch.
        momentum: weight of this batch in the running statistics, in [0, 1]; None for their
            cumulative average, which needs num_batches_tracked.
        eps: added to the variance.
        process_group: None for all ranks (this process alone, if torch.distributed is not
            initialized), a ProcessGroup, the name of a group or a list of rank ids.
        num_features: C, for the check of the input; by default that of the vectors, or without any
            that of the input.
        num_batches_tracked: int64 scalar, counts the batches that moved the running statistics.
        backend: "auto", or the name of a backend; see `syncbn.torch.backends`.

    Returns:
        A tensor of the shape, dtype and memory format of the input, differentiable twice. The
        gradients of weight and bias are those of this rank alone.

    Raises:
        TypeError, ValueError: the input breaks one of the rules above, the ranks' layers differ, or
            a group that trains holds only one value per channel.
        RuntimeError: in training, some ranks have nothing to differentiate and others have.
        PeerError: in training, another rank of the group raised an error.
    """
    vectors = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    given = [vector for vector in vectors.values() if vector is not None]
    if num_features is None:
        num_features = given[0].numel() if given else _channels(input)
    tracked = running_mean is not None and running_var is not None
    if not training and (tracked or is_tracing() or torch.compiler.is_exporting()):
        if not is_tracing():  # a size is a tensor then, not a number to compare
            raise_problem(_problem(input, vectors, num_features) or _problem_of(eps, momentum))
            check_input(input, num_features, weight)
        return evaluate(input, running_mean, running_var, weight, bias, eps)
    if is_tracing():
        raise RuntimeError(_TRACED)
    problem = _problem(input, vectors, num_features)
    if wrong := _problem_of(eps, momentum):
        problem, eps, momentum = problem or wrong, 0.0, None
    refused = _REFUSED_IN_TRAINING.get(type(input).__name__, "")
    problem = problem or refused
    tracks = running_mean is not None
    if tracks and momentum is None and num_batches_tracked is None:
        problem = problem or _NO_COUNTER
    if refused or not isinstance(input, Tensor):
        input = torch.empty(0, device=given[0].device if given else None)
    group = key_of(process_group) if training else ALONE_KEY
    mean, invstd, n = statistics(
        input,
        weight,
        running_mean,
        running_var,
        num_batches_tracked if tracks else None,
        num_features,
        float(eps),
        None if momentum is None else float(momentum),
        dtype_name(given[0].dtype) if given else None,
        _differentiates(input, weight, bias),
        problem,
        group,
        backend,
    )
    return normalize(input, weight, bias, mean, invstd, n, group, backend)


def _channels(input: Any) -> int:
    """C as the input has it; 0 if it has none, which `check_input` refuses."""
    return input.shape[1] if isinstance(input, Tensor) and input.dim() > 1 else 0


def _differentiates(*tensors: Tensor | None) -> bool:
    """Whether this rank's backward will reach the layer."""
    wanted = [tensor.requires_grad for tensor in tensors if tensor is not None]
    return torch.is_grad_enabled() and any(wanted)


def _problem(input: Any, vectors: Mapping[str, Tensor | None], num_features: int) -> str:
    """Type and text of the error of a call with these tensors, or "".

    It is not raised here, because in training the other ranks must hear of it. The shape of the
    input is checked when the step runs.
    """
    if not isinstance(input, Tensor):
        return f"TypeError: input must be a torch.Tensor, got {type(input).__name__}"
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        missing = "running_mean" if vectors["running_mean"] is None else "running_var"
        return f"ValueError: running_mean and running_var must be given together, got no {missing}"
    first: tuple[str, Tensor] | None = None
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (num_features,):
            shape = tuple(vector.shape)
            return f"ValueError: {name} must have shape ({num_features},), got {shape}"
        if vector.dtype not in DTYPES:
            return f"TypeError: {name} must be of one of {', '.join(FLOATING)}, got {vector.dtype}"
        first = first or (name, vector)
        if vector.device != first[1].device:
            return (
                f"ValueError: {name} must be on the device of {first[0]}, {first[1].device}, got "
                f"{vector.device}"
            )
    return ""


def _problem_of(eps: Any, momentum: Any) -> str:
    """The same of the settings, which may have been set after the construction of a layer."""
    try:
        check_settings(eps, momentum)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
