"""The ranks of a group fail together, whatever the error, and differentiate twice together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import PeerError
from syncbn.torch import SyncBatchNorm, step
from syncbn.torch.backends import composed
from tests.syncbn import torch_ranks
from tests.syncbn.torch_layers import (
    assert_tracked,
    assert_untouched,
    make_layer,
    numpy_of,
    randn,
    reference_of,
    state_of,
)

RANKS = 3
GUILTY = 1


def _assert_next_step_works(rank: int) -> None:
    layer = make_layer()
    expected = reference_of(layer)
    y = layer(randn(4 + rank, 3, seed=rank))
    y.square().sum().backward()
    expected.forward([numpy_of(randn(4 + peer, 3, seed=peer)) for peer in range(RANKS)])
    assert_tracked(layer, expected)


def _assert_fails(rank: int, error: type[Exception], text: str, run: Callable[[], Any]) -> None:
    """The guilty rank raises its error, the others a PeerError that names it."""
    if rank == GUILTY:
        with pytest.raises(error, match=text):
            run()
    else:
        with pytest.raises(PeerError, match=f"rank {GUILTY} failed: {error.__name__}: .*{text}"):
            run()
    _assert_next_step_works(rank)


def _broken(rank: int, name: str) -> Any:
    """On the guilty rank, an operation of the backend runs out of memory."""
    if rank != GUILTY:
        return mock.MagicMock()
    return mock.patch.object(composed, name, side_effect=torch.OutOfMemoryError("planted"))


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def wrong_input(rank: int) -> None:
    good = randn(4, 3)
    for x, error, text in (
        (randn(4, 5), ValueError, "num_features=3"),
        (randn(3), ValueError, "at least 2 dimensions"),
        (randn(4, 3).double(), TypeError, "dtype of the parameters"),
        (torch.ones(4, 3, dtype=torch.int64), TypeError, "got int64"),
        (torch.eye(3).to_sparse(), TypeError, "dense tensor, got a torch.sparse_coo one"),
        (
            torch.nested.nested_tensor([good], layout=torch.jagged),
            TypeError,
            "dense tensor, got a nested one",
        ),
        (_inference(good), RuntimeError, "must not be an inference tensor"),
        (None, TypeError, "must be a torch.Tensor, got NoneType"),
        ([[1.0, 2.0, 3.0]], TypeError, "must be a torch.Tensor, got list"),
    ):
        layer = make_layer()
        before = state_of(layer)
        given = x if rank == GUILTY else good
        _assert_fails(rank, error, text, lambda given=given, layer=layer: layer(given))  # type: ignore[misc]
        assert_untouched(layer, before)


def wrong_vectors(rank: int) -> None:
    for name, value, error, text in (
        ("running_mean", torch.zeros(5), ValueError, "running_mean must have shape"),
        ("running_var", torch.zeros(3, 1), ValueError, "running_var must have shape"),
        ("running_var", None, ValueError, "must be given together"),
        ("running_mean", torch.zeros(3, dtype=torch.int64), TypeError, "running_mean must"),
        ("running_mean", torch.zeros(3, device="meta"), ValueError, "must be on the device"),
        ("bias", torch.nn.Parameter(torch.zeros(4)), ValueError, "bias must have shape"),
        ("running_mean", torch.zeros(1).expand(3), ValueError, "memory of its own"),
        ("running_var", _inference(torch.ones(3)), RuntimeError, "inference tensor"),
        ("num_batches_tracked", None, ValueError, "needs num_batches_tracked"),
        ("num_batches_tracked", torch.tensor(True), TypeError, "int64 scalar, got bool"),
        ("eps", "small", TypeError, "eps must be a float, got 'small' of type str"),
        ("eps", -1.0, ValueError, "eps must be zero or positive, got -1.0"),
        ("momentum", "small", TypeError, "momentum must be a number or None, got 'small'"),
        ("momentum", 2, ValueError, r"momentum must be in \[0, 1\], got 2"),
        ("backend", "aten", RuntimeError, "has kernels for cuda and npu"),
        ("backend", "nothing", ValueError, "backend must be one of"),
    ):
        layer = make_layer(momentum=None)
        if rank == GUILTY:
            setattr(layer, name, value)
        _assert_fails(rank, error, text, lambda layer=layer: layer(randn(4, 3)))  # type: ignore[misc]


def out_of_memory_in_forward(rank: int) -> None:
    layer = make_layer()
    x = torch.zeros(1, 3, 1).expand(2**28, 3, 2**20) if rank == GUILTY else randn(4, 3, 1)
    _assert_fails(rank, RuntimeError, "allocate memory", lambda: layer(x))
    with _broken(rank, "stats"):
        _assert_fails_once(rank, lambda: layer(randn(4, 3)))
    _assert_next_step_works(rank)


def out_of_memory_in_backward(rank: int) -> None:
    layer = make_layer()
    y = layer(randn(4, 3))
    with _broken(rank, "reduce_grad"):
        _assert_fails_once(rank, lambda: y.sum().backward())
    _assert_next_step_works(rank)
    x = randn(4, 3).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    patched = mock.patch.object(torch.Tensor, "sum", side_effect=torch.OutOfMemoryError("planted"))
    loss = dx.square().sum()
    with patched if rank == GUILTY else mock.MagicMock():
        _assert_fails_once(rank, loss.backward)
    _assert_next_step_works(rank)


def _assert_fails_once(rank: int, run: Callable[[], Any]) -> None:
    if rank == GUILTY:
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            run()
    else:
        with pytest.raises(PeerError, match=f"rank {GUILTY} failed: OutOfMemoryError: planted"):
            run()


def layers_that_differ(rank: int) -> None:
    for name, other, shown in (
        ("num_features", 5, "3 on rank 0, rank 2; 5 on rank 1"),
        ("num_features", 5000, "3 on rank 0, rank 2; 5000 on rank 1"),
        ("eps", 1e-3, "1e-05 on rank 0, rank 2; 0.001 on rank 1"),
        ("momentum", 0.5, "0.1 on rank 0, rank 2; 0.5 on rank 1"),
        ("momentum", None, "0.1 on rank 0, rank 2; None on rank 1"),
        ("dtype", torch.bfloat16, "float32 on rank 0, rank 2; bfloat16 on rank 1"),
        ("affine", False, "True on rank 0, rank 2; False on rank 1"),
        ("track_running_stats", False, "0.1 on rank 0, rank 2; None on rank 1"),
    ):
        given: dict[str, Any] = {"num_features": 3}
        if rank == GUILTY:
            given[name] = other
        layer = SyncBatchNorm(**given)
        before = state_of(layer)
        x = randn(
            4, layer.num_features, dtype=layer.weight.dtype if layer.affine else torch.float32
        )
        with pytest.raises(ValueError, match=f"must have the same .* on all ranks, got {shown}"):
            layer(x.requires_grad_())
        assert_untouched(layer, before)
        _assert_next_step_works(rank)


def many_channels(rank: int) -> None:
    """The first message has no room for all of them."""
    channels = step.INLINE_CHANNELS + 5
    layer = SyncBatchNorm(channels, momentum=1.0)
    shards = [randn(4 + peer, channels, seed=peer) for peer in range(RANKS)]
    layer(shards[rank])
    whole = torch.cat(shards).double()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    torch.testing.assert_close(layer.running_mean, whole.mean(0).float())
    torch.testing.assert_close(layer.running_var, whole.var(0).float())


def one_value_in_the_whole_group(rank: int) -> None:
    layer = make_layer()
    before = state_of(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(randn(1 if rank == GUILTY else 0, 3))
    assert_untouched(layer, before)
    _assert_next_step_works(rank)


# Second derivatives

_SIZES = (4, 0, 7)  # of the shards


def second_derivatives(rank: int) -> None:
    """Of a penalty on the gradient of the input, on uneven and empty shards."""
    for dtype in (torch.float64, torch.float32):
        for constant in (True, False):
            _assert_second_derivative(rank, make_layer(dtype=dtype), constant)


def _assert_second_derivative(rank: int, layer: SyncBatchNorm, constant: bool) -> None:
    """Equal to that of a BatchNorm in float64 on the whole batch; constant: dy is a constant."""
    dtype = layer.weight.dtype
    shards = [randn(size, 3, 2, seed=peer) for peer, size in enumerate(_SIZES)]
    read_outs = [randn(size, 3, 2, seed=9 + peer) for peer, size in enumerate(_SIZES)]

    def derivatives(x: Tensor, read_out: Tensor, norm: Any) -> tuple[Tensor, ...]:
        x.requires_grad_()
        y = norm(x) if constant else norm(x).pow(3)
        (dx,) = torch.autograd.grad((y * read_out).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), [x, norm.weight])

    whole = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    whole.load_state_dict(layer.state_dict())
    got_x, got_weight = derivatives(shards[rank].to(dtype), read_outs[rank].to(dtype), layer)
    of_x, of_weight = derivatives(torch.cat(shards).double(), torch.cat(read_outs).double(), whole)
    dist.all_reduce(got_weight)
    _assert_near(got_x, of_x.split(_SIZES)[rank], of_x)
    _assert_near(got_weight, of_weight, of_weight)


def second_derivatives_by_parameters(rank: int) -> None:
    """Of a penalty on the gradients of weight and bias, which every rank has of its own."""
    layer = make_layer(dtype=torch.float64)
    shards = [randn(size, 3, seed=peer, dtype=torch.float64) for peer, size in enumerate(_SIZES)]
    x = shards[rank].clone().requires_grad_()
    first = torch.autograd.grad(layer(x).pow(3).sum(), [*layer.parameters()], create_graph=True)
    loss = torch.stack([gradient.pow(2).sum() for gradient in first]).sum()
    (got,) = torch.autograd.grad(loss, x)

    whole = torch.cat(shards).requires_grad_()
    centred = whole - whole.mean(0)
    normalized = centred / (centred.pow(2).mean(0) + layer.eps).sqrt()
    dy = 3 * (normalized * layer.weight + layer.bias).pow(2)
    losses = [
        part.sum(0).pow(2).sum()
        for values in (dy * normalized, dy)
        for part in values.split(_SIZES)
    ]
    (expected,) = torch.autograd.grad(torch.stack(losses).sum(), whole)
    _assert_near(got, expected.split(_SIZES)[rank], expected)


def _assert_near(got: Tensor, expected: Tensor, whole: Tensor) -> None:
    """Equal to rounding, compared with the largest value of the whole result."""
    limit = (1e-12 if got.dtype == torch.float64 else 1e-6) * whole.abs().max()
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= limit).all()


CHECKS = [
    wrong_input,
    wrong_vectors,
    out_of_memory_in_forward,
    out_of_memory_in_backward,
    layers_that_differ,
    many_channels,
    one_value_in_the_whole_group,
    second_derivatives,
    second_derivatives_by_parameters,
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return torch_ranks.run(CHECKS, RANKS, tmp_path_factory.mktemp("ranks"), deadline=120.0)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_three_ranks(check: str, outcomes: list[dict[str, str]]) -> None:
    torch_ranks.assert_passed(check, outcomes)
