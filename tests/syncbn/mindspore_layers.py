"""What the tests of the MindSpore layer share, in this process and in processes of their own."""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("GLOG_v", "3")  # errors only, or MindSpore writes pages of warnings

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, get_rank

from syncbn import reference
from syncbn.mindspore import SyncBatchNorm, normalize
from syncbn.reference import Bounded
from syncbn.reference.ratio import THRESHOLD, ratio

MODES = ("pynative", "jit", "graph")

ms.set_device("CPU")  # here, before any test: a runtime that has started keeps its device


class Step(NamedTuple):
    y: Tensor
    dx: Tensor
    gradients: dict[str, Tensor]


class Branches(nn.Cell):
    """y = c(a(x) + b(2 x)): two layers whose collectives do not depend on each other.

    The statistics that it shows are those of a, b and c, side by side.
    """

    def __init__(self, num_features: int, eager: bool = False, **arguments: Any) -> None:
        super().__init__()
        ms.set_context(mode=ms.PYNATIVE_MODE if eager else ms.GRAPH_MODE)
        self.a = SyncBatchNorm(num_features, **arguments)
        self.b = SyncBatchNorm(num_features, **arguments)
        self.c = SyncBatchNorm(num_features, **arguments)

    def construct(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(2 * x))

    @property
    def running_mean(self) -> Tensor:
        return self._side_by_side("running_mean")

    @property
    def running_var(self) -> Tensor:
        return self._side_by_side("running_var")

    def _side_by_side(self, name: str) -> Tensor:
        return Tensor(np.concatenate([getattr(cell, name).asnumpy() for cell in self.cells()]))


class LateGroups(nn.Cell):
    """Two layers for all ranks: one is older than communication, one had another group at first."""

    def __init__(self, num_features: int, **arguments: Any) -> None:
        super().__init__()
        with mock.patch.object(GlobalComm, "INITED", False):
            self.old = SyncBatchNorm(num_features, **arguments)
        self.changed = SyncBatchNorm(num_features, process_group=[get_rank()], **arguments)
        self.changed.process_group = None

    def construct(self, x: Tensor) -> Tensor:
        return self.old(x) + self.changed(x)


class OutOfMemory(SyncBatchNorm):
    """A layer that has no memory on rank 1: in an operation, for y, or for dx."""

    def __init__(self, num_features: int, place: str, **arguments: Any) -> None:
        super().__init__(num_features, **arguments)
        self.large = place == "y" and get_rank() == 1
        if get_rank() == 1:
            vector = ops.ones((num_features,), ms.float32)
            owner, name, planted = {
                "stats": (self._step.group_statistics, "stats", _no_memory),
                "y": (self._step.group_statistics, "stats", lambda x: (vector, vector)),
                "reduce_grad": (
                    self._step.normalize_by_group.gradients,
                    "reduce_grad",
                    _no_memory,
                ),
                "dx": (normalize, "reserve", _no_memory),
            }[place]
            setattr(owner, name, planted)

    def construct(self, x: Tensor) -> Tensor:
        # A view that needs no memory itself, whereas y would need 3 TiB.
        return super().construct(x[:1].expand((2**38, 3)) if self.large else x)


def _no_memory(*arguments: Any) -> Any:
    raise MemoryError("no memory for 4 bytes")


class FirstGradient(nn.Cell):
    """x -> the gradient in x of sum y^3, so that the gradient of this is a second derivative."""

    def __init__(self, num_features: int, **arguments: Any) -> None:
        super().__init__()
        self.norm = SyncBatchNorm(num_features, **arguments)

    def construct(self, x: Tensor) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            y = self.norm(x)
            return (y * y * y).sum()

        return ms.grad(loss)(x)


def randn(*shape: int, dtype: Any = ms.float32, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal(shape), dtype)


def dtype_name(dtype: Any) -> str:
    return str(dtype).lower()


def numpy_of(tensor: Tensor) -> npt.NDArray[np.float64]:
    return np.array(tensor.asnumpy(), np.float64)  # a copy: the layer may change the tensor


def same(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and one.asnumpy().tobytes() == other.asnumpy().tobytes()


def make_layer(num_features: int = 3, **arguments: Any) -> SyncBatchNorm:
    """A layer in training whose parameters and running statistics differ between channels.

    In float64 they are no numbers of float32, so that one that is rounded shows.
    """
    layer = SyncBatchNorm(num_features, **arguments)
    ramp = np.linspace(0.4, 1.6, num_features)
    for name, parameter in layer.parameters_dict().items():
        if name != "num_batches_tracked":
            values = ramp if name in ("weight", "running_var") else ramp - 0.75
            parameter.set_data(Tensor(values, parameter.dtype))
    return layer.set_train()


def state_of(layer: nn.Cell) -> dict[str, Tensor]:
    return {name: Tensor(p.asnumpy().copy()) for name, p in layer.parameters_dict().items()}


def step(layer: nn.Cell, x: Tensor, dy: Tensor, mode: str = "pynative") -> Step:
    """One forward and backward, in which x and every parameter that learns want a gradient."""
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    learned = layer.trainable_params()

    def with_loss(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y = layer(x)
        return (y * dy).sum(), y

    differentiated = ms.value_and_grad(with_loss, 0, learned or None, has_aux=True)
    if mode == "jit":
        differentiated = ms.jit(differentiated)
    try:
        (_, y), found = differentiated(x, dy)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    dx, gradients = found if learned else (found, ())
    return Step(y, dx, {p.name: g for p, g in zip(learned, gradients, strict=True)})


def forward(layer: nn.Cell, x: Tensor, mode: str) -> Tensor:
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)

    def call(x: Tensor) -> Tensor:
        return layer(x)

    try:
        return ms.jit(call)(x) if mode == "jit" else layer(x)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def assert_within(what: str, got: Tensor, expected: Bounded) -> None:
    worst = ratio(numpy_of(got), expected).max(initial=0.0)
    assert worst <= THRESHOLD, f"{what} is wrong by {worst:.3g} times its bound"


def reference_of(layer: SyncBatchNorm) -> reference.SyncBatchNorm:
    """The reference, in the state that the layer is in."""
    parameters = layer.parameters_dict()
    state = {name: numpy_of(parameter) for name, parameter in parameters.items()}
    steps = int(state.pop("num_batches_tracked", 0))
    dtypes = [dtype_name(p.dtype) for p in parameters.values()]
    return reference.SyncBatchNorm(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        dtype=dtypes[0] if dtypes else "float32",
        num_batches_tracked=steps,
        **state,
    )


def assert_step(layer: SyncBatchNorm, x: Tensor, dy: Tensor, mode: str = "pynative") -> Step:
    """A step in which every result is within its bound."""
    expected_layer = reference_of(layer)
    before = numpy_of(x)
    taken = step(layer, x, dy, mode)
    (y,) = expected_layer.forward([before], layer.training, dtype=dtype_name(x.dtype))
    (expected,) = expected_layer.backward([numpy_of(dy)])
    assert np.array_equal(numpy_of(x), before)
    assert (taken.y.dtype, taken.y.shape) == (taken.dx.dtype, taken.dx.shape) == (x.dtype, x.shape)
    assert_within("y", taken.y, y)
    assert_within("dx", taken.dx, expected.input)
    for name, gradient in taken.gradients.items():
        assert gradient.dtype == getattr(layer, name).dtype
        assert_within(f"gradient of {name}", gradient, getattr(expected, name))
    assert_tracked(layer, expected_layer)
    return taken


def assert_tracked(layer: SyncBatchNorm, expected_layer: reference.SyncBatchNorm) -> None:
    if layer.track_running_stats:
        assert_within("running_mean", layer.running_mean, expected_layer.running_mean)
        assert_within("running_var", layer.running_var, expected_layer.running_var)
        assert (
            int(numpy_of(layer.parameters_dict()["num_batches_tracked"]))
            == expected_layer.num_batches_tracked
        )


def assert_untouched(layer: nn.Cell, before: dict[str, Tensor]) -> None:
    after = state_of(layer)
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert same(tensor, before[name]), name
