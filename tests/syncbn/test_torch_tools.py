"""Tools that trace, export, fuse, vectorize or differentiate a BatchNorm do it with the layer.

Each is used on the layer and on torch.nn.BatchNorm2d with the same state, and gives the same.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from syncbn.torch import SyncBatchNorm
from tests.syncbn.torch_layers import make_layer, randn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

X = randn(4, 3, 5, 2)
OTHER = randn(6, 3, 5, 2, seed=1)


def batch_norm_of(layer: SyncBatchNorm) -> nn.BatchNorm2d:
    """A BatchNorm2d with the same settings and state."""
    norm = nn.BatchNorm2d(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
    )
    norm.load_state_dict(layer.state_dict())
    return norm.train(layer.training)


def network(norm: nn.Module) -> nn.Module:
    """A small network around a norm, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU()).train(norm.training)


@pytest.fixture
def layer() -> SyncBatchNorm:
    return make_layer().eval()


class TestEval:
    """With running statistics it is plain batch normalization."""

    @pytest.mark.parametrize("frozen", [True, False])
    @pytest.mark.parametrize("grad", [True, False])
    def test_jit_trace_and_save(self, layer: SyncBatchNorm, grad: bool, frozen: bool) -> None:
        layer.requires_grad_(not frozen)
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(layer, X)
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            loaded = torch.jit.load(file)
            assert torch.equal(loaded(OTHER), layer(OTHER))
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert "aten::batch_norm" in kinds

    def test_fx(self, layer: SyncBatchNorm) -> None:
        model = network(layer)
        traced = torch.fx.symbolic_trace(model)
        assert torch.equal(traced(OTHER), model(OTHER))

    def test_fuse_conv_bn_eval(self, layer: SyncBatchNorm) -> None:
        model = network(layer)
        fused = nn.utils.fuse_conv_bn_eval(model[0], layer)  # type: ignore[index]
        expected = nn.utils.fuse_conv_bn_eval(model[0], batch_norm_of(layer))  # type: ignore[index]
        assert torch.equal(fused(X), expected(X))

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("dynamic", [True, False])
    def test_export(self, layer: SyncBatchNorm, dynamic: bool, strict: bool) -> None:
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        exported = torch.export.export(layer, (X,), dynamic_shapes=shapes, strict=strict)
        x = OTHER if dynamic else X
        assert torch.equal(exported.module()(x), layer(x))

    def test_vmap(self, layer: SyncBatchNorm) -> None:
        batches = torch.stack([X, X + 1])
        expected = torch.stack([layer(x) for x in batches])
        torch.testing.assert_close(torch.vmap(layer)(batches), expected)

    def test_functional_transforms(self, layer: SyncBatchNorm) -> None:
        norm = batch_norm_of(layer)
        for transform in (
            lambda f: torch.func.grad(lambda x: f(x).square().sum())(X),
            lambda f: torch.func.jvp(f, (X,), (randn(*X.shape, seed=2),)),
            lambda f: torch.func.jacrev(f)(X),
            lambda f: torch.func.jacfwd(f)(X),
            lambda f: torch.func.hessian(lambda x: f(x).pow(3).sum())(X[:1]),
        ):
            torch.testing.assert_close(transform(layer), transform(norm))

    def test_batched_gradients(self, layer: SyncBatchNorm) -> None:
        gradients = []
        for module in (layer, batch_norm_of(layer)):
            x = X.clone().requires_grad_()
            rows = torch.stack([randn(*X.shape, seed=2), randn(*X.shape, seed=3)])
            gradients.append(torch.autograd.grad(module(x), x, rows, is_grads_batched=True))
        torch.testing.assert_close(gradients[0], gradients[1])

    @pytest.mark.parametrize("affine", [True, False])
    def test_second_derivative(self, affine: bool) -> None:
        layer = make_layer(dtype=torch.float64, affine=affine).eval()
        inputs = [t.detach().requires_grad_() for t in (X.double(), *layer.parameters())]
        assert torch.autograd.gradgradcheck(_call(layer), inputs)

    def test_second_derivative_with_constant_dy(self, layer: SyncBatchNorm) -> None:
        for ours, theirs in zip(
            _penalty_gradients(layer), _penalty_gradients(batch_norm_of(layer)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)

    def test_meta(self, layer: SyncBatchNorm) -> None:
        y = copy.deepcopy(layer).to("meta")(X.to("meta"))
        assert y.is_meta
        assert y.shape == X.shape

    def test_fake_tensors(self, layer: SyncBatchNorm) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = layer(mode.from_tensor(X))
        assert y.shape == X.shape


def _call(layer: SyncBatchNorm) -> Callable[..., Tensor]:
    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        names = ("weight", "bias")[: len(parameters)]
        given = dict(zip(names, parameters, strict=True))
        y: Tensor = torch.func.functional_call(layer, given, (x,))
        return y

    return call


def _penalty_gradients(norm: nn.Module) -> list[Any]:
    """Gradients of a penalty on the gradient of the input, whose dy is a constant."""
    model = network(norm)
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    parameters = [*model.parameters()]
    return list(torch.autograd.grad(dx.square().sum(), parameters, allow_unused=True))
