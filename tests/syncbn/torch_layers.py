"""What the tests of the PyTorch layer share: layers, tensors, and the reference for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncbn import reference
from syncbn.reference import Bounded
from syncbn.reference.formulas import Array
from syncbn.reference.ratio import THRESHOLD, ratio
from syncbn.torch import SyncBatchNorm


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def numpy_of(tensor: Tensor) -> Array:
    return np.array(tensor.detach().double())  # a copy: the layer may go on to change the tensor


def assert_within(what: str, got: Tensor, expected: Bounded) -> None:
    worst = ratio(numpy_of(got), expected).max(initial=0.0)
    assert worst <= THRESHOLD, f"{what} is wrong by {worst:.3g} times its bound"


def make_layer(num_features: int = 3, **arguments: Any) -> SyncBatchNorm:
    """A layer whose parameters and running statistics differ between channels."""
    layer = SyncBatchNorm(num_features, **arguments)
    ramp = torch.linspace(0.5, 1.5, num_features)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name != "num_batches_tracked":
                tensor.copy_(ramp if name in ("weight", "running_var") else ramp - 0.75)
    return layer


def reference_of(layer: Any) -> reference.SyncBatchNorm:
    """The reference, in the state that a BatchNorm is in."""
    state = {name: numpy_of(tensor) for name, tensor in layer.state_dict().items()}
    steps = int(state.pop("num_batches_tracked", 0))
    return reference.SyncBatchNorm(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        dtype=dtype_name(next(iter(layer.state_dict().values())).dtype),
        num_batches_tracked=steps,
        **state,
    )


def assert_step(layer: SyncBatchNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx of a forward and backward, in which every result is within its bound."""
    expected_layer = reference_of(layer)
    x = x.detach().requires_grad_()
    y = layer(x)
    dx, dweight, dbias = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    (expected_y,) = expected_layer.forward([numpy_of(x)], layer.training, dtype=dtype_name(x.dtype))
    (expected,) = expected_layer.backward([numpy_of(dy)])
    assert_within("y", y, expected_y)
    assert_within("dx", dx, expected.input)
    assert_within("grad_weight", dweight, expected.weight)
    assert_within("grad_bias", dbias, expected.bias)
    assert_tracked(layer, expected_layer)
    return y, dx


def assert_tracked(layer: torch.nn.Module, expected_layer: reference.SyncBatchNorm) -> None:
    state = layer.state_dict()
    if "running_mean" in state:
        assert_within("running_mean", state["running_mean"], expected_layer.running_mean)
        assert_within("running_var", state["running_var"], expected_layer.running_var)
        assert state["num_batches_tracked"] == expected_layer.num_batches_tracked


def assert_untouched(layer: torch.nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def state_of(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}
