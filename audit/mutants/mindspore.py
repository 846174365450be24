"""Mutants as MindSpore cells on CPU, for PyNative mode; torch.py is the same for PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.api import _pynative_executor
from mindspore.communication import get_rank

from audit.mutants import algorithm
from audit.mutants.layer import Alone, Array, Communicator, Plain, Saved
from audit.mutants.wrapper import Wrapper, mutant_layer
from syncbn.contract import FLOATING, check_dtype
from syncbn.mindspore import groups

_DTYPES = tuple(getattr(ms, name) for name in FLOATING)


def __getattr__(name: str) -> type[SyncBatchNorm]:
    """The layer of the mutant of that name."""
    return mutant_layer(name, SyncBatchNorm)


class SyncBatchNorm(Wrapper, nn.Cell):
    """The documented layer.

    mutant: the name of the mutant to build; None for the default of the class.
    """

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
        check_dtype(dtype, _DTYPES)
        dtype = dtype or ms.float32
        self.plain = algorithm(mutant or self.default)(
            num_features, eps, momentum, affine, track_running_stats, _name(dtype)
        )
        self.communicator = _communicator(process_group)

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
        self.plain.context = "" if _pynative_executor.enable_grad() else "no_grad"
        return _Function(self, differentiates)(*tensors)

    @staticmethod
    def to_array(tensor: Tensor) -> Array:
        half = tensor.dtype in (ms.float16, ms.bfloat16)
        array: Array = (tensor.astype(ms.float32) if half else tensor).asnumpy()
        return array

    @staticmethod
    def assign(tensor: Parameter, values: Array) -> None:
        tensor.set_data(Tensor(values, tensor.dtype))


class _Function(nn.Cell):
    """One call of the layer, and its gradient."""

    def __init__(self, layer: SyncBatchNorm, differentiates: bool) -> None:
        super().__init__()
        self.step = (layer, differentiates)  # in a tuple, or the layer would become a child

    def construct(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        layer, differentiates = self.step
        y, self.saved = layer.run_forward(
            layer.to_array(x), _name(x.dtype), layer.communicator, differentiates
        )
        return _tensor(y, x, layer.plain)

    def bprop(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, dout: Tensor
    ) -> tuple[Tensor | None, ...]:
        layer, _ = self.step
        # MindSpore differentiates no cell again that was given a None.
        given = Tensor(0.0, ms.float32) if weight is None else weight
        dx, *gradients = _Gradients(layer, self.saved)(dout, x, given)
        return (
            dx,
            *(
                None if parameter is None else gradient
                for gradient, parameter in zip(gradients, (weight, bias), strict=True)
            ),
        )


class _Gradients(nn.Cell):
    """The gradients of one call, which can be differentiated once more."""

    def __init__(self, layer: SyncBatchNorm, saved: Saved) -> None:
        super().__init__()
        self.step = (layer, saved)

    def construct(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        layer, saved = self.step
        # A MindSpore cell cannot see whether x needs a gradient.
        dx, *gradients = layer.plain.backward(saved, layer.to_array(dy), wants_input=True)
        return (
            None if dx is None else _tensor(dx, x, layer.plain),
            # Without parameters there are none, but every result needs a shape.
            *(Tensor(0.0 if g is None else g, weight.dtype) for g in gradients),
        )

    def bprop(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        out: tuple[Tensor | None, ...],
        dout: tuple[Tensor, ...],
    ) -> tuple[Tensor | None, ...]:
        layer, saved = self.step
        arrays = [layer.to_array(tensor) for tensor in (dy, *dout)]
        of_dy, of_x, of_weight = layer.plain.double_backward(saved, *arrays)
        return (
            _tensor(of_dy, x, layer.plain),
            _tensor(of_x, x, layer.plain),
            Tensor(of_weight if weight.ndim else 0.0, weight.dtype),
        )


@dataclass(frozen=True)
class _GroupCommunicator:
    """The communicator of a process group of several ranks."""

    group: groups.Group

    @property
    def rank(self) -> int:
        return get_rank()

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.group.ranks

    @property
    def world(self) -> Communicator:
        return _communicator(None)

    def all_gather(self, message: Array) -> Array:
        table: Array = groups.Communicator(self.group).all_gather(Tensor(message)).asnumpy()
        return table

    def all_reduce(self, values: Array) -> Array:
        return self.all_gather(values).sum(axis=0)  # MindSpore reduces no float64 on CPU


def _communicator(process_group: str | None) -> Communicator:
    group = groups.resolve(process_group)
    return _GroupCommunicator(group) if len(group.ranks) > 1 else Alone()


def _name(dtype: Any) -> str:
    return str(dtype).lower()


def _tensor(values: Array, x: Tensor, plain: Plain) -> Tensor:
    """The values in the dtype of x, unless the mutant does not keep it."""
    return Tensor(values, x.dtype if plain.keeps_dtype else ms.float32)
