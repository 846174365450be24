"""The layer, a drop-in for mindspore.mint.nn.SyncBatchNorm that keeps what its page promises."""

from __future__ import annotations

from typing import Any, TypeVar

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore._c_expression import MixedPrecisionType
from mindspore.communication import GlobalComm
from mindspore.rewrite.common import namespace

from syncbn import protocol
from syncbn.contract import SINGLE_VALUE, check_arguments, check_dtype
from syncbn.mindspore import backends
from syncbn.mindspore.backends import statistics_dtype
from syncbn.mindspore.graph import (
    compiling,
    may_sync_host,
    note_compiled,
    note_exported,
    was_compiled,
    was_exported,
)
from syncbn.mindspore.groups import ALONE, Group, communication_began, resolve
from syncbn.mindspore.layout import LeadingOnes, is_empty, per_channel
from syncbn.mindspore.normalize import Normalize, NormalizeByConstants
from syncbn.mindspore.settings import Numbers, Settings, Values
from syncbn.mindspore.step import (
    DTYPES,
    BatchStatistics,
    dtype_name,
    fixed_words,
    problem_of,
    raise_problem,
)

_CellT = TypeVar("_CellT", bound=nn.Cell)


@ms.jit_class
class _StepCells:
    """The cells of a step, by the statistics that they use.

    This holder is no cell: tools for mixed precision rewrite the child cells of a layer.
    """

    def __init__(self, num_features: int, group: Group, backend: backends.Backend) -> None:
        self.group_statistics = BatchStatistics(num_features, group, backend)
        self.own_statistics = BatchStatistics(num_features, ALONE, backend)
        self.normalize_by_group = Normalize(backend, group)
        self.normalize_by_own = Normalize(backend, ALONE)
        self.normalize_by_running = NormalizeByConstants()
        self.leading_ones = LeadingOnes()


class SyncBatchNorm(nn.Cell):
    """Batch normalization whose statistics are those of all ranks of a process group.

    `y = (x - mean) / sqrt(var + eps) * weight + bias` per channel. In training, mean and biased
    var are taken over the inputs of the whole group, which may differ in N and in spatial size
    and may be empty, and the gradients are those of this group-wide formula. Running statistics
    take the unbiased variance and are bitwise equal on all ranks. A step costs one all_gather and
    one all_reduce. Eval does not communicate. All ranks raise an error that one rank meets, and an
    error if their layers differ.

    The arguments and their defaults are those of mindspore.mint.nn.SyncBatchNorm, and so are the
    names of the parameters. As every nn.Cell, a new one is in eval mode: call `set_train()`.
    Without mindspore.communication, or in a group of one rank, it is a BatchNorm.

    `eps`, `momentum`, `track_running_stats`, `process_group` and `backend` may be set at any time
    and hold from the next step on. The last two cannot be set once the layer has been compiled into
    a graph, nor can eps once it has been exported, nor momentum and track_running_stats once it has
    been exported in training: that raises RuntimeError.

    In training it has a second derivative in PyNative mode, and none in a graph. In eval it has
    every derivative. A derivative that it does not have raises RuntimeError.

    With mixed precision (`to_float`, every amp level) it takes what input it is given and keeps its
    own precision. In eval it can be exported to ONNX and MindIR, in training to MindIR on one rank.

    With recomputation (`recompute`) it moves its statistics as MindSpore's own BatchNorm does: in
    PyNative twice, because the forward runs twice; in a graph once, because MindSpore then
    recomputes single operations.

    It runs in PyNative mode, and under ms.jit or in graph mode. There the compiler must know the
    shapes, except in eval with running statistics.
    In a graph, and on Ascend, all ranks raise an error only with SYNCBN_DEBUG=1, and only then are
    their layers compared. The rank at fault always raises. A graph cannot compare layers with more
    than 512 channels on one rank and other channels on another.
    In the backward of parallel branches a graph keeps the collectives of all ranks in step only if
    all ranks have the same graph. They do not if one of them has no data, or freezes its input, or
    with SYNCBN_DEBUG=1. On CPU the gradients are then NaN, and never another number.
    With SYNCBN_DEBUG=1, give a graph contiguous inputs. MindSpore 2.10.0 ignores the strides of an
    input that no operation has used before the point where the graph may raise.
    On CPU, a graph may round float64 to float32 if it runs one layer twice, also updates its
    parameters, or may raise: MindSpore copies by an operator without float64 (TensorMove).

    Args:
        num_features: C of the input (N, C, +).
        eps: added to the variance, a float.
        momentum: weight of the newest batch in the running statistics, in [0, 1]; None for their
            cumulative average.
        affine: whether there are a learned weight (ones) and bias (zeros) of shape (C,).
        track_running_stats: whether to keep running_mean (zeros), running_var (ones) and
            num_batches_tracked (0) for eval. Without them, eval normalizes the input of each rank
            with its own statistics.
        process_group: the ranks to synchronize with: None for all, the name of a group made by
            `create_group` or by MindSpore, or a list of rank ids (every member builds the layer).
        dtype: of parameters and running statistics; None is mindspore.float32.
        backend: "auto" or the name of a backend (`syncbn.mindspore.backends`).

    Inputs:
        x: (N, C, +) with at least 2 dimensions, of the dtype of the parameters, or float16 or
            bfloat16 with float32.

    Outputs:
        y, of the shape and dtype of x.

    Raises:
        TypeError: an argument is not of its type; see `syncbn.contract.check_arguments`.
        ValueError: num_features < 1, momentum outside [0, 1], eps negative, a rank id outside
            [0, world size), no such group, an unknown backend; when called, an input of the wrong
            shape, a group that trains on one value per channel or does not contain this rank.
        RuntimeError, PeerError: when called, see `syncbn.mindspore.step.BatchStatistics`.

    Example:
        >>> import mindspore
        >>> from syncbn.mindspore import SyncBatchNorm
        >>> layer = SyncBatchNorm(2).set_train()
        >>> layer(mindspore.Tensor([[1.0, 4.0], [3.0, 8.0]])).asnumpy().round(3)
        array([[-1., -1.],
               [ 1.,  1.]], dtype=float32)
        >>> layer.running_mean.asnumpy()
        array([0.2, 0.6], dtype=float32)
    """

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
        check_dtype(dtype, DTYPES)
        super().__init__()
        # Set explicitly: otherwise PyNative inherits the enclosing cell's value.
        self.mixed_precision_type = MixedPrecisionType.NOTSET
        self._num_features = int(num_features)
        self.affine = affine
        momentum = None if momentum is None else float(momentum)
        self._settings = Settings(Values(float(eps), momentum, track_running_stats))
        self._add_parameters(ms.float32 if dtype is None else dtype)
        self._build_cells(process_group, backend)

    def construct(self, x: Tensor) -> Tensor:
        if self.training:
            return self._train(x)
        if self.running_mean is not None:
            return self._evaluate(x)
        if compiling():
            note_compiled(self._settings.layer)
        problem = problem_of(x, self.num_features, self.weight)
        raise_problem(problem)
        mean, _, invstd, n = self._step.own_statistics(
            x, self.weight, self.bias, self._numbers().eps, problem, None
        )
        return self._step.normalize_by_own(x, self.weight, self.bias, mean, invstd, n)

    @property
    def num_features(self) -> int:
        """C. Set it after the parameters have been replaced by shorter or longer ones.

        Raises:
            RuntimeError: a graph has been compiled with this layer. It keeps its channels.
        """
        return self._num_features

    @num_features.setter
    def num_features(self, num_features: int) -> None:
        self._refuse_if_compiled("num_features")
        values = self._settings.values
        check_arguments(num_features, *values[:2], self.affine, values.track_running_stats)
        self._num_features = int(num_features)
        self._build_cells(self._process_group, self._backend)

    @property
    def eps(self) -> float:
        """What is added to the variance. A new value holds from the next step on.

        Raises:
            RuntimeError: the layer has been exported.
        """
        return self._settings.values.eps

    @eps.setter
    def eps(self, eps: float) -> None:
        self._refuse_if_exported("eps", training=False)
        self._set(eps=eps)

    @property
    def momentum(self) -> float | None:
        """Weight of the newest batch, or None. A new value holds from the next step on.

        Raises:
            RuntimeError: the layer has been exported in training.
        """
        return self._settings.values.momentum

    @momentum.setter
    def momentum(self, momentum: float | None) -> None:
        self._set(momentum=momentum)

    @property
    def track_running_stats(self) -> bool:
        """Whether training moves the running statistics. A new value holds from the next step on.

        Eval uses running statistics that exist, whether or not training still moves them.

        Raises:
            RuntimeError: the layer has been exported in training.
        """
        return self._settings.values.track_running_stats

    @track_running_stats.setter
    def track_running_stats(self, track_running_stats: bool) -> None:
        if track_running_stats is True and self.running_mean is None:
            raise ValueError(
                "track_running_stats cannot be set to True: the layer was built without running "
                "statistics. Build a new layer with track_running_stats=True"
            )
        self._set(track_running_stats=track_running_stats)

    @property
    def process_group(self) -> Any:
        """The process group as it was given. A new one holds from the next step on.

        Raises:
            RuntimeError: a graph has been compiled with this layer. It keeps its group.
        """
        return self._process_group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        self._refuse_if_compiled("process_group")
        self._build_cells(process_group, self._backend)

    @property
    def backend(self) -> str:
        """The name of the backend as it was given. A new one holds from the next step on.

        Raises:
            RuntimeError: a graph has been compiled with this layer. It keeps its backend.
        """
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self._refuse_if_compiled("backend")
        self._build_cells(self._process_group, backend)

    def _refuse_if_compiled(self, name: str) -> None:
        if was_compiled(self._settings.layer):
            raise RuntimeError(
                f"{name} cannot be set: the layer has been compiled into a graph, which keeps the "
                f"{name} that it was compiled with. Build a new layer with the new {name} and load "
                "the parameters of this one"
            )

    def _refuse_if_exported(self, name: str, training: bool) -> None:
        if was_exported(self._settings.layer, training):
            raise RuntimeError(
                f"{name} cannot be set: the layer has been exported, and MindSpore would export "
                f"the same graph again. Build a new layer with the new {name} and load the "
                "parameters of this one"
            )

    def _set(self, **changed: Any) -> None:
        for name in changed:
            self._refuse_if_exported(name, training=True)
        values = self._settings.values._replace(**changed)
        check_arguments(self.num_features, *values[:2], self.affine, values.track_running_stats)
        momentum = None if values.momentum is None else float(values.momentum)
        self._settings.set(values._replace(eps=float(values.eps), momentum=momentum))

    def _build_cells(self, process_group: Any, backend: str) -> None:
        operations, group = backends.load(backend), resolve(process_group)
        self._process_group, self._backend = process_group, backend
        self._backend_name = backends.info(backend).name
        self._found_communication = bool(GlobalComm.INITED)
        self._is_member = group.place is not None
        trains_with = group if self._is_member else ALONE
        self._step = _StepCells(self.num_features, trains_with, operations)

    def add_flags_recursive(self, **flags: Any) -> Any:
        """Take a flag of nn.Cell, except those of mixed precision (`to_float`, amp).

        The input may be float16. Statistics and parameters keep their precision.
        """
        kept = {name: flag for name, flag in flags.items() if name not in ("fp16", "fp32", "bf16")}
        super().add_flags_recursive(**kept)
        return self

    def _train(self, x: Tensor) -> Tensor:
        if not self._is_member:
            raise ValueError(
                "process_group must contain the rank that trains, got a group without it"
            )
        if communication_began(self._process_group is None, self._found_communication):
            if compiling():
                raise RuntimeError(
                    "SyncBatchNorm was built before mindspore.communication.init was called. Set "
                    "its group again before it is compiled: layer.process_group = None"
                )
            self._build_cells(None, self._backend)
        if compiling():
            note_compiled(self._settings.layer)
        problem = problem_of(x, self.num_features, self.weight)
        # Read once, before a parameter is written. Otherwise a graph reads again for the backward
        # and copies what it reads around the write. On CPU that copy rounds float64 to float32.
        weight = None if self.weight is None else self.weight.value()
        bias = None if self.bias is None else self.bias.value()
        agreed = None
        if not compiling():
            agreed = self._agreed_settings()
        elif may_sync_host():
            agreed = self._agreed_words()
        mean, var, invstd, n = self._step.group_statistics(
            x, weight, bias, self._numbers().eps, problem, agreed
        )
        if problem is not None:
            return ops.depend(x, mean)  # unreachable; the graph compiler needs a return value
        if may_sync_host():  # noqa: SIM102  # the compiler evaluates the outer condition only
            if n == 1:
                raise ValueError(SINGLE_VALUE)
        if self.running_mean is not None:
            self._update_running(mean, var, n)
        return self._step.normalize_by_group(x, weight, bias, mean, invstd, n)

    def _numbers(self) -> Numbers:
        """The settings as a step takes them; in a graph that is exported, as constants."""
        if compiling():  # noqa: SIM102  # the compiler evaluates the outer condition only
            if note_exported(self._settings.layer, self.compile_phase, self.training):
                return self._settings.constant
        return self._settings.live

    def _agreed_settings(self) -> protocol.Settings:
        """What the layers of all ranks must have in common."""
        values = self._settings.values
        tracks = values.track_running_stats and self.running_mean is not None
        first = next(iter(self.get_parameters()), None)
        return protocol.Settings(
            self.num_features,
            values.eps,
            values.momentum if tracks else None,
            None if first is None else dtype_name(first.dtype),
            self.weight is not None,
            tracks,
            self._backend_name,
        )

    def _agreed_words(self) -> Tensor:
        """The same in a graph, as words of the header; momentum None is -1."""
        numbers = self._numbers()
        vector = self.running_mean if self.weight is None else self.weight
        dtype = None if vector is None else vector.dtype
        affine = self.weight is not None
        words = fixed_words(self.num_features, dtype, affine, self._backend_name)
        momentum = numbers.tracks * (numbers.taken - numbers.cumulative + 1) - 1
        live = ops.stack([numbers.eps, momentum, numbers.tracks])
        fixed = Tensor(words, statistics_dtype())
        # In the order of protocol.Settings.
        return ops.cat([fixed[:1], live[:2], fixed[3:5], live[2:], fixed[6:]])

    def _evaluate(self, x: Tensor) -> Tensor:
        raise_problem(problem_of(x, self.num_features, self.weight))
        if is_empty(x.shape):
            return ops.zeros(x.shape, x.dtype)
        # A copy: a training step may move the parameter before the backward of this one.
        mean = per_channel(self.running_mean.copy(), x.ndim)
        # No reciprocal: MindSpore cannot export one to ONNX.
        var = self.running_var.astype(statistics_dtype())
        std = per_channel(ops.sqrt(var + self._numbers().eps), x.ndim)
        weight = (
            ops.ones_like(std)
            if self.weight is None
            else self._step.leading_ones(self.weight, x.ndim)
        )
        bias = None if self.bias is None else self._step.leading_ones(self.bias, x.ndim)
        dtype = ms.float64 if x.dtype == ms.float64 else ms.float32
        y = self._step.normalize_by_running(x.astype(dtype), mean, weight / std, bias)
        return y.astype(x.dtype)

    def _update_running(self, mean: Tensor, var: Tensor, n: Tensor) -> None:
        """Move the running statistics, unless the whole group was empty or they are not tracked."""
        numbers = self._numbers()
        moves = n * numbers.tracks > 0
        count = self.num_batches_tracked + moves.astype(ms.int64)
        ops.assign(self.num_batches_tracked, count)
        share = numbers.cumulative / ops.maximum(count, 1).astype(statistics_dtype())
        kept, taken = numbers.kept - share, numbers.taken + share
        unbiased = var * (n / ops.maximum(n - 1, 1.0))
        self._move(self.running_mean, kept, mean * taken, moves)
        self._move(self.running_var, kept, unbiased * taken, moves)

    def _move(self, buffer: Parameter, kept: Tensor, taken: Tensor, moves: Tensor) -> None:
        old = buffer.astype(statistics_dtype())
        moved = ops.where(moves, kept * old + taken, old)
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

    @classmethod
    def convert_sync_batchnorm(cls, network: _CellT, process_group: Any = None) -> _CellT:
        """See `syncbn.mindspore.convert.convert_sync_batchnorm`."""
        from syncbn.mindspore import convert  # which imports this module

        return convert.convert_sync_batchnorm(network, process_group)

    @classmethod
    def revert_sync_batchnorm(
        cls, network: _CellT, batch_norm: type[nn.Cell] | None = None
    ) -> _CellT:
        """See `syncbn.mindspore.convert.revert_sync_batchnorm`."""
        from syncbn.mindspore import convert

        return convert.revert_sync_batchnorm(network, batch_norm)

    def extend_repr(self) -> str:
        backend = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}{backend}"
        )


# Level O1 of mindspore.amp rewrites the source of every cell that is not on this list. The source
# of this layer does not run where the rewritten one is put.
namespace._subtree_black_list.append(SyncBatchNorm)
