"""The layer, a drop-in for mindspore.mint.nn.SyncBatchNorm that keeps what its page promises."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore._c_expression import MixedPrecisionType

from syncbn.contract import SINGLE_VALUE, check_arguments, check_dtype
from syncbn.mindspore import backends
from syncbn.mindspore.backends import inverse_std, number, wide
from syncbn.mindspore.function import (
    FLOATING,
    BatchStatistics,
    Normalize,
    problem_of,
    raise_problem,
)
from syncbn.mindspore.graph import host_may_look
from syncbn.mindspore.groups import ALONE, resolve


class SyncBatchNorm(nn.Cell):
    """Batch normalization whose statistics are those of all ranks of a process group.

    `y = (x - mean) / sqrt(var + eps) * weight + bias` per channel. In training, mean and biased
    var are taken over the inputs of the whole group, which may differ in N and in spatial size
    and may be empty, and the gradients are those of this group-wide formula. Running statistics
    take the unbiased variance and are bitwise equal on all ranks. A step costs one all_gather and
    one all_reduce; eval does not communicate. An error that one rank meets is raised on all.

    The arguments and their defaults are those of mindspore.mint.nn.SyncBatchNorm, and so are the
    names of the parameters. As every nn.Cell, a new one is in eval mode: call `set_train()`.
    Without mindspore.communication, or in a group of one rank, it is a BatchNorm.

    With mixed precision (`to_float`, amp levels O2, O3 and auto) it takes what input it is given
    and keeps its own precision; amp level O1 rewrites sources and cannot rewrite this one.

    It runs in PyNative mode, and under ms.jit or in graph mode for shapes that the compiler knows.
    In a graph, as on Ascend, an error is raised on all ranks only with SYNCBN_DEBUG=1; the rank at
    fault raises always. In the backward of parallel branches a graph keeps the collectives of all
    ranks in step only if all have the same graph (they do not if one of them has no data, or
    freezes its input, or with SYNCBN_DEBUG=1): on CPU the gradients are then NaN, not wrong.
    With SYNCBN_DEBUG=1, give a graph contiguous inputs: MindSpore 2.10.0 ignores the strides of one
    that no operation has used before the point where the graph may raise.
    On CPU, a graph that runs one float64 layer twice, updates its parameters, too, or may raise,
    may round to float32: MindSpore copies by an operator without float64 there (TensorMove).

    Args:
        num_features: C of the input (N, C, +).
        eps: added to the variance, a float.
        momentum: weight of the newest batch in the running statistics, in [0, 1]; None for their
            cumulative average.
        affine: whether weight (ones) and bias (zeros), of shape (C,), are learned.
        track_running_stats: whether to keep running_mean (zeros), running_var (ones) and
            num_batches_tracked (0) for eval. Without them, eval normalizes each rank's input with
            its own statistics.
        process_group: the ranks to synchronize with: None for all, the name of a group made by
            `create_group` or by MindSpore, or a list of rank ids (every member builds the layer).
        dtype: of parameters and running statistics; None is mindspore.float32.
        backend: "auto" or the name of a backend (`syncbn.mindspore.backends`).

    Inputs:
        x: (N, C, +) with at least 2 dimensions, of the dtype of the parameters, or float16 or
            bfloat16 beside float32.

    Outputs:
        y, of the shape and dtype of x.

    Raises:
        TypeError: an argument is not of its type; see `syncbn.contract.check_arguments`.
        ValueError: num_features < 1, momentum outside [0, 1], eps negative, a rank id outside
            [0, world size), no such group, an unknown backend; when called, an input of the wrong
            shape, a group that trains on one value per channel or does not contain this rank.
        RuntimeError, PeerError: when called, see `syncbn.mindspore.function.BatchStatistics`.
    """

    # Whose statistics normalize: indices of the inner cells.
    _GROUP, _OWN, _RUNNING = 0, 1, 2

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
    ) -> None:
        check_arguments(num_features, eps, momentum, affine, track_running_stats)
        check_dtype(dtype, FLOATING)
        leaf_operations = backends.load(backend)
        super().__init__()
        # Set, or in PyNative a cell around it lends it its own; see add_flags_recursive.
        self.mixed_precision_type = MixedPrecisionType.NOTSET
        num_features, eps = int(num_features), float(eps)
        self.num_features = num_features
        self.eps = eps
        self.momentum = None if momentum is None else float(momentum)
        self._eps = number(eps)
        if self.momentum is not None:
            # Both from the host: in float32, 1 - 0.999 has four digits left.
            self._kept, self._taken = number(1 - self.momentum), number(self.momentum)
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.process_group = process_group
        self.backend = backend
        self._add_parameters(ms.float32 if dtype is None else dtype)
        group = resolve(process_group)
        self._is_member = group.place is not None
        trains_with = group if self._is_member else ALONE
        # In tuples they are no children of this cell, to which a tool for mixed precision would go.
        self._statistics = tuple(
            BatchStatistics(num_features, eps, ranks, leaf_operations)
            for ranks in (trains_with, ALONE)
        )
        self._normalize = tuple(
            Normalize(leaf_operations, ranks) for ranks in (trains_with, ALONE, None)
        )

    def construct(self, x: Tensor) -> Tensor:
        if self.training:
            return self._train(x)
        if self.track_running_stats:
            return self._evaluate(x)
        problem = problem_of(x, self.num_features, self.weight)
        raise_problem(problem)
        mean, _, invstd, n = self._statistics[self._OWN](x, self.weight, self.bias, problem)
        return self._normalize[self._OWN](x, self.weight, self.bias, mean, invstd, n)

    def add_flags_recursive(self, **flags: Any) -> Any:
        """Take a flag of nn.Cell, but none of mixed precision (`to_float`, amp).

        The input may be float16; statistics and parameters keep the precision that they have.
        """
        kept = {name: flag for name, flag in flags.items() if name not in ("fp16", "fp32", "bf16")}
        super().add_flags_recursive(**kept)
        return self

    def _train(self, x: Tensor) -> Tensor:
        if not self._is_member:
            raise ValueError(
                "process_group must contain the rank that trains, got a group without it"
            )
        problem = problem_of(x, self.num_features, self.weight)
        # Read once, before a parameter is written: a graph would read again for the backward, and
        # copy what it reads around the write; on CPU a copy of float64 is rounded to float32.
        weight = None if self.weight is None else self.weight.value()
        bias = None if self.bias is None else self.bias.value()
        mean, var, invstd, n = self._statistics[self._GROUP](x, weight, bias, problem)
        if problem is not None:
            return ops.depend(x, mean)  # never: it was raised. But a graph is compiled to its end.
        if host_may_look():  # noqa: SIM102  # one of them is for the compiler
            if n == 1:
                raise ValueError(SINGLE_VALUE)
        if self.track_running_stats:
            self._update_running(mean, var, n)
        return self._normalize[self._GROUP](x, weight, bias, mean, invstd, n)

    def _evaluate(self, x: Tensor) -> Tensor:
        raise_problem(problem_of(x, self.num_features, self.weight))
        # A copy, for a training step may move the parameter before the backward of this one.
        mean = self.running_mean.astype(wide()).copy()
        var = self.running_var.astype(wide())
        invstd = inverse_std(var, self._eps)
        return self._normalize[self._RUNNING](x, self.weight, self.bias, mean, invstd, mean)

    def _update_running(self, mean: Tensor, var: Tensor, n: Tensor) -> None:
        """Move the running statistics, unless the whole group was empty."""
        count = self.num_batches_tracked + (n > 0).astype(ms.int64)
        ops.assign(self.num_batches_tracked, count)
        if self.momentum is None:
            taken = 1 / ops.maximum(count, 1).astype(wide())
            kept = 1 - taken
        else:
            kept, taken = self._kept, self._taken
        unbiased = var * (n / ops.maximum(n - 1, 1.0))
        self._move(self.running_mean, kept, mean * taken, n)
        self._move(self.running_var, kept, unbiased * taken, n)

    def _move(self, buffer: Parameter, kept: Tensor, taken: Tensor, n: Tensor) -> None:
        old = buffer.astype(wide())
        moved = ops.where(n > 0, kept * old + taken, old)
        ops.assign(buffer, moved.astype(buffer.dtype))

    def _add_parameters(self, dtype: Any) -> None:
        def vector(name: str, value: float, learned: bool) -> Parameter:
            values = Tensor(np.full(self.num_features, value), dtype)
            return Parameter(values, name=name, requires_grad=learned)

        tracked = self.track_running_stats
        self.weight = vector("weight", 1.0, True) if self.affine else None
        self.bias = vector("bias", 0.0, True) if self.affine else None
        self.running_mean: Any = vector("running_mean", 0.0, False) if tracked else None
        self.running_var: Any = vector("running_var", 1.0, False) if tracked else None
        self.num_batches_tracked = None
        if tracked:
            zero = Tensor(0, ms.int64)
            self.num_batches_tracked = Parameter(
                zero, name="num_batches_tracked", requires_grad=False
            )

    def extend_repr(self) -> str:
        backend = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}{backend}"
        )
