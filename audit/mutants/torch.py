"""Mutants as PyTorch layers on CPU: `torch:audit.mutants.torch:EqualWeightMean` is a target.

`SyncBatchNorm` is the right layer, the control; its argument `mutant` makes it another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from audit.mutants import CONTROL, MUTANTS, algorithm
from audit.mutants.layer import Alone, Array, Ranks, State
from syncbn.contract import check_dtype

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def __getattr__(name: str) -> type[SyncBatchNorm]:
    """The layer of a mutant, by the mutant's name."""
    if name not in MUTANTS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return type(name, (SyncBatchNorm,), {"default": name})


class SyncBatchNorm(nn.Module):
    """The documented layer. mutant: the name of the one that it is to be."""

    default = CONTROL

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

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
        check_dtype(dtype, _FLOATING)
        dtype = dtype or torch.float32
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
        y: Tensor = _Function.apply(*tensors, self, differentiates)
        return y

    def state(self) -> State:
        """A copy of parameters and statistics, which `track` puts back."""
        vectors = (self.weight, self.bias, self.running_mean, self.running_var)
        arrays = [None if v is None else _array(v).copy() for v in vectors]
        count = 0 if self.num_batches_tracked is None else int(self.num_batches_tracked)
        return State(count, *arrays)

    def track(self, state: State) -> None:
        for buffer, values in (
            (self.running_mean, state.running_mean),
            (self.running_var, state.running_var),
            (self.num_batches_tracked, np.array(state.num_batches_tracked)),
        ):
            if buffer is not None:
                buffer.copy_(torch.from_numpy(values))


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
        state, ranks = layer.state(), _ranks(layer.process_group)
        try:
            y, saved = layer.plain.forward(
                _array(x), _name(x.dtype), state, ranks, layer.training, differentiates
            )
        finally:  # a mutant may count what fails
            layer.track(state)
        # x as a tensor: asked for in backward, it lets checkpointing run the forward again.
        ctx.save_for_backward(x)
        ctx.layer, ctx.saved = layer, saved
        return _tensor(y, x, layer.plain.keeps_dtype, layer.plain.keeps_format)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer, wants = ctx.layer, ctx.needs_input_grad
        plain, saved = layer.plain, ctx.saved._replace(x=_array(x))
        dx, *gradients = plain.backward(saved, _array(dy), wants[0])
        return (
            _tensor(dx, x, plain.keeps_dtype, plain.keeps_gradient_format) if wants[0] else None,
            *(
                torch.from_numpy(gradient).to(layer.weight.dtype) if wanted else None
                for gradient, wanted in zip(gradients, wants[1:3], strict=True)
            ),
            None,
            None,
        )


@dataclass(frozen=True)
class _Group:
    """A process group of several ranks; see audit.mutants.layer.Ranks."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(self.group))

    @property
    def world(self) -> Ranks:
        return _ranks(None)

    def all_gather(self, message: Array) -> Array:
        table = torch.empty(len(self.ranks), message.size, dtype=torch.float64)
        dist.all_gather(list(table.unbind(0)), torch.from_numpy(message), group=self.group)
        return table.numpy()

    def all_reduce(self, values: Array) -> Array:
        total = torch.from_numpy(values.copy())
        dist.all_reduce(total, group=self.group)
        return total.numpy()


def _ranks(process_group: dist.ProcessGroup | None) -> Ranks:
    if not dist.is_initialized():
        return Alone()
    group = dist.group.WORLD if process_group is None else process_group
    assert group is not None
    return _Group(group) if dist.get_world_size(group) > 1 else Alone()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _array(tensor: Tensor) -> Array:
    """The same memory if NumPy has the dtype and sums it well; halves as float32."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    array: Array = (tensor.detach().float() if half else tensor.detach()).numpy()
    return array


def _tensor(values: Array, x: Tensor, keeps_dtype: bool, keeps_format: bool) -> Tensor:
    """Values like x: in its dtype and memory format."""
    memory = torch.preserve_format if keeps_format else torch.contiguous_format
    dtype = x.dtype if keeps_dtype else torch.float32
    return torch.empty_like(x, dtype=dtype, memory_format=memory).copy_(torch.from_numpy(values))
