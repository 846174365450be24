"""What only compiled code needs: to find out that it is compiled, and to order its collectives."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

_order = Parameter(Tensor(np.zeros(1, np.float32)), name="syncbn.order", requires_grad=False)

# The numbers of all layers that are a part of a graph, and those of an exported graph with whether
# it trains.
_compiled_layers: set[int] = set()
_exported_layers: set[tuple[int, bool]] = set()


def compiling() -> bool:
    """True while MindSpore compiles this code into a graph.

    The compiler does not take a function for a constant, and shows None in the place of one.
    """
    return _is_none_to_the_compiler(_some_function)


@ops.constexpr
def note_compiled(layer: int) -> bool:
    """Remember, while a graph is compiled, that the layer of this number is a part of it."""
    _compiled_layers.add(layer)
    return True


def was_compiled(layer: int) -> bool:
    """Whether the layer of this number is a part of a compiled graph."""
    return layer in _compiled_layers


@ops.constexpr
def note_exported(layer: int, compile_phase: str | None, training: bool) -> bool:
    """Whether a graph is compiled to be exported. The layer is then remembered."""
    exported = bool(compile_phase and compile_phase.startswith("export."))
    if exported:
        _exported_layers.add((layer, training))
    return exported


def was_exported(layer: int, training: bool) -> bool:
    """Whether the layer of this number is a part of an exported graph that trains, or does not."""
    return (layer, training) in _exported_layers


def may_sync_host() -> bool:
    """Whether a training step may read a value of the device, to raise an error.

    Reading makes the host wait for an accelerator in every step. It cuts a graph in pieces, which
    lose the order of collectives in parallel branches. So on an accelerator and in a graph only
    SYNCBN_DEBUG=1 allows it.
    """
    return _debugging() or (_on_cpu() and not compiling())


class InOrder(nn.Cell):
    """A collective that a graph does not reorder among those of other layers.

    To the compiler a collective has no effect. So on each rank it chooses the order of two that do
    not depend on each other, and ranks with different graphs (one has no data) would meet in
    different collectives. Therefore all layers read and write one parameter around them, which
    keeps the order of the program. It belongs to no cell and is in no checkpoint.

    This works in the forward. In a backward the compiler does not order reads and writes; see
    `Communicator.all_reduce`.
    """

    def __init__(self, collective: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.collective = collective

    def construct(self, values: Tensor) -> Tensor:
        if not compiling():
            return self.collective(values)
        # A zero that the compiler cannot fold into a constant. It sees through ops.depend.
        result = self.collective(values + _order.value().astype(values.dtype))
        known = ops.isfinite(result.reshape(-1)[:1]).astype(ms.float32)
        ops.assign(_order, ops.minimum(known, 0.0))
        return result


@ops.constexpr(check=False)
def _is_none_to_the_compiler(value: Any) -> bool:
    return value is None


def _some_function() -> None: ...


@ops.constexpr
def _debugging() -> bool:
    return os.environ.get("SYNCBN_DEBUG") == "1"


@ops.constexpr
def _on_cpu() -> bool:
    return ms.get_context("device_target") == "CPU"
