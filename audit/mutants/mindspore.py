"""Mutants as MindSpore cells on CPU, for PyNative mode: see torch.py, which this is the twin of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.api import _pynative_executor
from mindspore.communication import get_rank

from audit.mutants import CONTROL, MUTANTS, algorithm
from audit.mutants.layer import Alone, Array, Plain, Ranks, State
from syncbn.contract import check_dtype
from syncbn.mindspore.groups import Communicator, Group, resolve

_FLOATING = (ms.float16, ms.bfloat16, ms.float32, ms.float64)


def __getattr__(name: str) -> type[SyncBatchNorm]:
    """The layer of a mutant, by the mutant's name."""
    if name not in MUTANTS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return type(name, (SyncBatchNorm,), {"default": name})


class SyncBatchNorm(nn.Cell):
    """The documented layer. mutant: the name of the one that it is to be."""

    default = CONTROL

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: str | None = None,
        dtype: Any = None,
        *,
        mutant: str | None = None,
    ) -> None:
        super().__init__()
        check_dtype(dtype, _FLOATING)
        dtype = dtype or ms.float32
        self.plain = algorithm(mutant or self.default)(
            num_features, eps, momentum, affine, track_running_stats, _name(dtype)
        )
        self.ranks = _ranks(process_group)

        def vector(name: str, value: float) -> Parameter:
            values = Tensor(np.full(int(num_features), value), dtype)
            return Parameter(values, name=name, requires_grad=name in ("weight", "bias"))

        self.weight = vector("weight", 1.0) if affine else None
        self.bias = vector("bias", 0.0) if affine else None
        tracked = track_running_stats
        self.running_mean = vector("running_mean", 0.0) if tracked else None
        self.running_var = vector("running_var", 1.0) if tracked else None
        self.num_batches_tracked = None
        if tracked:
            self.num_batches_tracked = Parameter(
                Tensor(0, ms.int64), name="num_batches_tracked", requires_grad=False
            )

    def construct(self, x: Tensor) -> Tensor:
        tensors = (x, self.weight, self.bias)
        wanted = any(tensor is not None and tensor._requires_grad for tensor in tensors)
        differentiates = wanted and _pynative_executor.requires_grad()
        return _Function(self, differentiates)(*tensors)

    def state(self) -> State:
        """A copy of parameters and statistics, which `track` puts back."""
        vectors = (self.weight, self.bias, self.running_mean, self.running_var)
        arrays = [None if v is None else _array(v).copy() for v in vectors]
        tracked = self.num_batches_tracked
        count = 0 if tracked is None else int(tracked.asnumpy())
        return State(count, *arrays)

    def track(self, state: State) -> None:
        for parameter, values in (
            (self.running_mean, state.running_mean),
            (self.running_var, state.running_var),
            (self.num_batches_tracked, np.array(state.num_batches_tracked)),
        ):
            if parameter is not None:
                parameter.set_data(Tensor(values, parameter.dtype))


class _Function(nn.Cell):
    """One call of the layer, and its gradient."""

    def __init__(self, layer: SyncBatchNorm, differentiates: bool) -> None:
        super().__init__()
        self.step = (layer, differentiates)  # in a tuple, or the layer would be a child

    def construct(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        layer, differentiates = self.step
        state = layer.state()
        try:
            y, self.saved = layer.plain.forward(
                _array(x), _name(x.dtype), state, layer.ranks, layer.training, differentiates
            )
        finally:  # a mutant may count what fails
            layer.track(state)
        return _tensor(y, x, layer.plain)

    def bprop(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, dout: Tensor
    ) -> tuple[Tensor | None, ...]:
        plain: Plain = self.step[0].plain
        # MindSpore does not tell whether x wants a gradient.
        dx, *gradients = plain.backward(self.saved, _array(dout), wants_input=True)
        return (
            None if dx is None else _tensor(dx, x, plain),
            *(
                None if parameter is None else Tensor(gradient, parameter.dtype)
                for gradient, parameter in zip(gradients, (weight, bias), strict=True)
            ),
        )


@dataclass(frozen=True)
class _Group:
    """A process group of several ranks; see audit.mutants.layer.Ranks."""

    group: Group

    @property
    def rank(self) -> int:
        return get_rank()

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.group.ranks

    @property
    def world(self) -> Ranks:
        return _ranks(None)

    def all_gather(self, message: Array) -> Array:
        table: Array = Communicator(self.group).all_gather(Tensor(message)).asnumpy()
        return table

    def all_reduce(self, values: Array) -> Array:
        return self.all_gather(values).sum(axis=0)  # MindSpore reduces no float64 on CPU


def _ranks(process_group: str | None) -> Ranks:
    group = resolve(process_group)
    return _Group(group) if len(group.ranks) > 1 else Alone()


def _name(dtype: Any) -> str:
    return str(dtype).lower()


def _array(tensor: Tensor) -> Array:
    """The same memory if NumPy has the dtype and sums it well; halves as float32."""
    half = tensor.dtype in (ms.float16, ms.bfloat16)
    array: Array = (tensor.astype(ms.float32) if half else tensor).asnumpy()
    return array


def _tensor(values: Array, x: Tensor, plain: Plain) -> Tensor:
    """Values in the dtype of x."""
    return Tensor(values, x.dtype if plain.keeps_dtype else ms.float32)
