"""Mutants as PyTorch layers on CPU: `torch:audit.mutants.torch:EqualWeightMean` is a target.

`SyncBatchNorm` is the right layer, the control. Its argument `mutant` builds a mutant instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from audit.mutants import algorithm
from audit.mutants.layer import Alone, Array, Communicator, Saved
from audit.mutants.wrapper import Wrapper, mutant_layer
from syncbn.contract import FLOATING, check_dtype

_DTYPES = tuple(getattr(torch, name) for name in FLOATING)


def __getattr__(name: str) -> type[SyncBatchNorm]:
    """The layer of the mutant of that name."""
    return mutant_layer(name, SyncBatchNorm)


class SyncBatchNorm(Wrapper, nn.Module):
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
        process_group: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mutant: str | None = None,
    ) -> None:
        super().__init__()
        check_dtype(dtype, _DTYPES)
        dtype = dtype or torch.float32
        self.built_with = dtype
        self.plain = algorithm(mutant or self.default)(
            num_features, eps, momentum, affine, track_running_stats, _name(dtype)
        )
        self.process_group = process_group

        def vector(value: float) -> Tensor:
            return torch.full((int(num_features),), value, dtype=dtype)

        self.weight = nn.Parameter(vector(1.0)) if affine else None
        self.bias = nn.Parameter(vector(0.0)) if affine else None
        tracked = track_running_stats
        self.register_buffer("running_mean", vector(0.0) if tracked else None)
        self.register_buffer("running_var", vector(1.0) if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)

    def forward(self, input: Tensor) -> Tensor:
        tensors = (input, self.weight, self.bias)
        wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
        differentiates = torch.is_grad_enabled() and wanted
        self.plain.context = _context()
        own = [tensor.dtype for tensor in (self.weight, self.running_mean) if tensor is not None]
        self.plain.was_cast = any(dtype != self.built_with for dtype in own)
        if self.plain.was_cast:
            self.plain.parameter_dtype = _name(own[0])
        y: Tensor = _Function.apply(*tensors, self, differentiates)
        return y

    @staticmethod
    def to_array(tensor: Tensor) -> Array:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        array: Array = (tensor.detach().float() if half else tensor.detach()).numpy()
        return array

    @staticmethod
    def assign(tensor: Tensor, values: Array) -> None:
        tensor.copy_(torch.from_numpy(values))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        layer: SyncBatchNorm,
        differentiates: bool,
    ) -> Tensor:
        y, saved = layer.run_forward(
            layer.to_array(x), _name(x.dtype), _communicator(layer.process_group), differentiates
        )
        # x is saved as a tensor: when backward reads it, checkpointing runs the forward again.
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.saved = layer, saved
        return _tensor(y, x, layer.plain.keeps_dtype, layer.plain.keeps_format)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer, wants = ctx.layer, ctx.needs_input_grad
        try:
            x, weight = ctx.saved_tensors
        except Exception:
            layer.plain.fail_backward(ctx.saved.communicator)
            raise
        gradients = _Gradients.apply(dy, x, weight, layer, ctx.saved, wants[:3])
        return (*gradients, None, None)


class _Gradients(torch.autograd.Function):
    """The backward of _Function, which can be differentiated once more."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        layer: SyncBatchNorm,
        saved: Saved,
        wants: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        plain, saved = layer.plain, saved._replace(x=layer.to_array(x))
        dx, *gradients = plain.backward(saved, layer.to_array(dy), wants[0])
        ctx.save_for_backward(dy, x, weight)
        ctx.layer, ctx.saved = layer, saved
        return (
            None if dx is None else _tensor(dx, x, plain.keeps_dtype, plain.keeps_gradient_format),
            *(
                torch.from_numpy(gradient).to(layer.weight.dtype) if wanted else None
                for gradient, wanted in zip(gradients, wants[1:], strict=True)
            ),
        )

    @staticmethod
    def backward(
        ctx: Any, ddx: Tensor | None, ddweight: Tensor | None, ddbias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dy, x, weight = ctx.saved_tensors
        layer, saved = ctx.layer, ctx.saved._replace(x=ctx.layer.to_array(x))
        nothing = np.zeros(layer.plain.num_features, saved.x.dtype)
        of_dy, of_x, of_weight = layer.plain.double_backward(
            saved,
            layer.to_array(dy),
            np.zeros_like(saved.x) if ddx is None else layer.to_array(ddx),
            nothing if ddweight is None else layer.to_array(ddweight),
            nothing if ddbias is None else layer.to_array(ddbias),
        )
        return (
            _tensor(of_dy, dy, True, True),
            _tensor(of_x, x, True, True),
            None if weight is None else torch.from_numpy(of_weight).to(weight.dtype),
            None,
            None,
            None,
        )


@dataclass(frozen=True)
class _GroupCommunicator:
    """The communicator of a process group of several ranks."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(self.group))

    @property
    def world(self) -> Communicator:
        return _communicator(None)

    def all_gather(self, message: Array) -> Array:
        table = torch.empty(len(self.ranks), message.size, dtype=torch.float64)
        dist.all_gather(list(table.unbind(0)), torch.from_numpy(message), group=self.group)
        return table.numpy()

    def all_reduce(self, values: Array) -> Array:
        total = torch.from_numpy(values.copy())
        dist.all_reduce(total, group=self.group)
        return total.numpy()


def _communicator(process_group: dist.ProcessGroup | None) -> Communicator:
    if not dist.is_initialized():
        return Alone()
    group = dist.group.WORLD if process_group is None else process_group
    assert group is not None
    return _GroupCommunicator(group) if dist.get_world_size(group) > 1 else Alone()


def _context() -> str:
    if torch.is_inference_mode_enabled():
        return "inference_mode"
    if not torch.is_grad_enabled():
        return "no_grad"
    return "autocast" if torch.is_autocast_enabled("cpu") else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor(values: Array, x: Tensor, keeps_dtype: bool, keeps_format: bool) -> Tensor:
    """The values in the dtype and memory format of x, unless the mutant does not keep them."""
    memory = torch.preserve_format if keeps_format else torch.contiguous_format
    dtype = x.dtype if keeps_dtype else torch.float32
    return torch.empty_like(x, dtype=dtype, memory_format=memory).copy_(torch.from_numpy(values))
