"""The PyTorch layer, as far as one process can tell; and the groups, on three ranks.

What several ranks compute together is judged by the conformance cases, not here.
"""

from __future__ import annotations

import copy
import datetime
import inspect
import itertools
import json
import multiprocessing
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import reference
from conformance.verdict import THRESHOLD, ratio
from reference import Bounded, bounds, formulas
from reference.formulas import Array
from syncbn.torch import SyncBatchNorm, create_group, function, functional
from syncbn.torch.backends import composed, load
from syncbn.torch.groups import Communicator

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that a sum is added up in one order on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _numpy(tensor: Tensor) -> Array:
    return np.array(tensor.detach().double())  # a copy: the layer may go on to change the tensor


def _assert_within(what: str, got: Tensor, expected: Bounded) -> None:
    worst = ratio(_numpy(got), expected).max(initial=0.0)
    assert worst <= THRESHOLD, f"{what} is wrong by {worst:.3g} times its bound"


def _layer(num_features: int = 3, **arguments: Any) -> SyncBatchNorm:
    """A layer whose parameters and running statistics tell channels apart."""
    layer = SyncBatchNorm(num_features, **arguments)
    ramp = torch.linspace(0.5, 1.5, num_features)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name != "num_batches_tracked":
                tensor.copy_(ramp if name in ("weight", "running_var") else ramp - 0.75)
    return layer


def _oracle(layer: Any) -> reference.SyncBatchNorm:
    """The reference, in the state that a BatchNorm is in."""
    state = {name: _numpy(tensor) for name, tensor in layer.state_dict().items()}
    steps = int(state.pop("num_batches_tracked", 0))
    return reference.SyncBatchNorm(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        dtype=_name(next(iter(layer.state_dict().values())).dtype),
        num_batches_tracked=steps,
        **state,
    )


def _assert_step(layer: SyncBatchNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx of a forward and backward, in which every result is within its bound."""
    oracle = _oracle(layer)
    x = x.detach().requires_grad_()
    y = layer(x)
    dx, dweight, dbias = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    (expected_y,) = oracle.forward([_numpy(x)], layer.training, dtype=_name(x.dtype))
    (expected,) = oracle.backward([_numpy(dy)])
    _assert_within("y", y, expected_y)
    _assert_within("dx", dx, expected.input)
    _assert_within("grad_weight", dweight, expected.weight)
    _assert_within("grad_bias", dbias, expected.bias)
    _assert_tracked(layer, oracle)
    return y, dx


def _assert_tracked(layer: torch.nn.Module, oracle: reference.SyncBatchNorm) -> None:
    state = layer.state_dict()
    if "running_mean" in state:
        _assert_within("running_mean", state["running_mean"], oracle.running_mean)
        _assert_within("running_var", state["running_var"], oracle.running_var)
        assert state["num_batches_tracked"] == oracle.num_batches_tracked


def _assert_untouched(layer: SyncBatchNorm, before: dict[str, Tensor]) -> None:
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def _state(layer: SyncBatchNorm) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


class TestConstruction:
    def test_signature(self) -> None:
        parameters = list(inspect.signature(SyncBatchNorm).parameters.values())
        assert [(p.name, p.default) for p in parameters] == [
            ("num_features", inspect.Parameter.empty),
            ("eps", 1e-5),
            ("momentum", 0.1),
            ("affine", True),
            ("track_running_stats", True),
            ("process_group", None),
            ("dtype", None),
            ("device", None),
            ("backend", "auto"),
        ]
        kinds = {p.name: p.kind for p in parameters}
        ours = {name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY}
        assert ours == {"device", "backend"}
        assert len(set(kinds.values())) == 2

    @pytest.mark.parametrize("dtype", [None, *DTYPES])
    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize("affine", [True, False])
    def test_parameters_and_buffers(
        self, affine: bool, track: bool, dtype: torch.dtype | None
    ) -> None:
        layer = SyncBatchNorm(3, affine=affine, track_running_stats=track, dtype=dtype)
        learned = {"weight": 1.0, "bias": 0.0} if affine else {}
        tracked = {"running_mean": 0.0, "running_var": 1.0} if track else {}
        counted = {"num_batches_tracked"} if track else set()
        assert set(dict(layer.named_parameters())) == set(learned)
        assert set(dict(layer.named_buffers())) == set(tracked) | counted
        state = layer.state_dict()
        for name, value in (learned | tracked).items():
            assert torch.equal(state[name], torch.full((3,), value, dtype=dtype or torch.float32))
            assert state[name].dtype == (dtype or torch.float32)
        for name in counted:
            assert torch.equal(state[name], torch.tensor(0))
        for name in {"weight", "bias", "running_mean", "running_var"} - set(state):
            assert getattr(layer, name) is None

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"num_features": 3.0}, TypeError, "num_features"),
            ({"eps": 1}, TypeError, "eps"),
            ({"momentum": 1.5}, ValueError, "momentum"),
            ({"affine": 1}, TypeError, "affine"),
            ({"track_running_stats": None}, TypeError, "track_running_stats"),
            ({"dtype": torch.int64}, TypeError, "dtype .* got torch.int64"),
            ({"dtype": "float32"}, TypeError, "dtype .* got 'float32'"),
            ({"process_group": {0, 1}}, TypeError, r"process_group .* got \{0, 1\}"),
            ({"process_group": 3}, TypeError, "process_group .* got 3"),
            ({"process_group": True}, TypeError, "process_group .* got True"),
            ({"process_group": "pair"}, RuntimeError, "process_group .*init_process_group"),
            ({"process_group": [0]}, RuntimeError, "process_group .*init_process_group"),
            ({"backend": "cudnn"}, ValueError, "backend .* auto, composed.* got 'cudnn'"),
            ({"backend": None}, ValueError, "backend .* auto, composed.* got None"),
        ],
    )
    def test_refused(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            SyncBatchNorm(**({"num_features": 3} | arguments))

    def test_parameters_are_float32_whatever_the_default(self) -> None:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            layer = SyncBatchNorm(3)
        finally:
            torch.set_default_dtype(default)
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert layer.state_dict()[name].dtype == torch.float32

    def test_numpy_arguments(self) -> None:
        layer = SyncBatchNorm(np.int64(3), np.float32(1e-3), np.float32(0.25))  # type: ignore[arg-type]
        assert type(layer.num_features) is int
        _assert_step(layer, _randn(5, 3), _randn(5, 3, seed=1))

    def test_repr(self) -> None:
        shown = repr(SyncBatchNorm(3, affine=False))
        assert shown.startswith("SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=False")
        assert "backend" not in shown
        assert repr(SyncBatchNorm(3, backend="composed")).endswith(", backend='composed')")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_state_dict_goes_to_and_from_batch_norm(self, dtype: torch.dtype) -> None:
        ours, theirs = _layer(dtype=dtype), torch.nn.BatchNorm2d(3, dtype=dtype)
        ours(_randn(4, 3, 2, 2, dtype=dtype))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        back = SyncBatchNorm(3, dtype=dtype)
        back.load_state_dict(theirs.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        _assert_untouched(back, _state(ours))

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
    )
    def test_copy(self, copied: Callable[[SyncBatchNorm], SyncBatchNorm]) -> None:
        layer = _layer(momentum=None, backend="composed").eval()
        before = _state(layer)
        clone = copied(layer)
        _assert_untouched(clone, before)
        assert repr(clone) == repr(layer)
        clone.train()(_randn(4, 3))
        assert not layer.training
        _assert_untouched(layer, before)

    def test_deepcopy_of_a_cycle(self) -> None:
        layer = SyncBatchNorm(3)
        layer.holder = {"layer": layer}  # type: ignore[assignment]
        clone: Any = copy.deepcopy(layer)
        assert clone.holder["layer"] is clone is not layer

    def test_device(self) -> None:
        assert all(t.is_meta for t in SyncBatchNorm(3, device="meta").state_dict().values())


def _channels_last(batch: int, channels: int, *spatial: int) -> Tensor:
    return _randn(batch, *spatial, channels).movedim(-1, 1)


# Input, and whether the output has its strides; where not, the output is contiguous.
LAYOUTS: dict[str, tuple[Tensor, bool]] = {
    "2-D": (_randn(8, 3), True),
    "3-D": (_randn(8, 3, 5), True),
    "4-D": (_randn(8, 3, 5, 2), True),
    "5-D": (_randn(4, 3, 5, 2, 3), True),
    "6-D": (_randn(2, 3, 5, 2, 3, 2), True),
    "channels_last": (_channels_last(8, 3, 5, 2), True),
    "channels_last-3d": (_channels_last(4, 3, 5, 2, 3), True),
    "channels_last-6-D": (_channels_last(2, 3, 5, 2, 3, 2), True),
    "channels_last-one-image": (_channels_last(1, 3, 5, 2), True),
    "sequence": (_channels_last(8, 3, 5), True),
    "single-pixel": (_randn(8, 3, 1, 1), True),
    "single-channel": (_randn(8, 1, 5, 2), True),
    "offset": (_randn(9, 3, 5)[1:], True),
    "transposed-2-D": (_randn(3, 8).t(), False),
    "transposed-image": (_randn(8, 3, 5, 2).transpose(2, 3), False),
    "channels-first": (_randn(3, 8, 5).transpose(0, 1), False),
    "every-other-image": (_randn(16, 3, 5, 2)[::2], False),
    "some-channels": (_randn(8, 7, 5, 2)[:, 1:6:2], False),
    "expanded-image": (_randn(8, 3, 1, 1).expand(8, 3, 5, 2), False),
    "expanded-batch": (_randn(1, 3, 5).expand(8, 3, 5), False),
    "expanded-value": (_randn(1, 1, 1).expand(8, 3, 5), False),
}


class TestLayout:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_values_and_strides(self, layout: str, training: bool) -> None:
        x, kept = LAYOUTS[layout]
        before, version = x.clone(), x._version
        layer = _layer(x.shape[1]).train(training)
        y, dx = _assert_step(layer, x, _randn(*x.shape, seed=1))
        strides = x.stride() if kept else torch.empty(x.shape).stride()
        assert y.shape == dx.shape == x.shape
        assert y.stride() == dx.stride() == strides
        assert torch.equal(x, before)
        assert x._version == version

    @pytest.mark.parametrize("x", [_randn(4, 3, 5, 2), _channels_last(4, 3, 5, 2)])
    def test_layout_of_grad_output(self, x: Tensor) -> None:
        layer = _layer()
        values = _randn(4, 3, 1, 1, seed=1)
        expanded = values.expand(4, 3, 5, 2)
        packed = torch.empty(4, 3, 5, 2).copy_(expanded)
        for dy in (expanded, packed, packed.to(memory_format=torch.channels_last)):
            _assert_step(layer, x, dy)

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 2), (2, 3, 0), (2, 3, 5, 0)])
    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_empty(self, training: bool, track: bool, shape: tuple[int, ...]) -> None:
        layer = _layer(track_running_stats=track).train(training)
        before = _state(layer)
        x = _channels_last(*shape).bfloat16().requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert (y.shape, y.dtype, y.stride()) == (shape, torch.bfloat16, x.stride())
        for tensor in (x, layer.weight, layer.bias):
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, torch.zeros_like(tensor))
        _assert_untouched(layer, before)


# (R, C, S) below, at and above the limits of a block; the last have rows left over.
SHAPES = [
    *itertools.product((1, 7, 8, 127, 128, 129), (1, 3, 65), (1, 5)),
    *((16384 + 5, 1, 1), (16384 + 5, 3, 5), (16384 + 5, 65, 1)),
]


class TestComposed:
    @pytest.mark.parametrize("dtype", DTYPES, ids=_name)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_leaf_operations(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.check(1 + 2 * _randn(*shape), _randn(*shape, seed=1), dtype)

    @pytest.mark.parametrize("shape", [(100_000, 3, 1), (129, 3, 500), (7, 3, 20_000)], ids=str)
    def test_mean_far_above_deviation(self, shape: tuple[int, int, int]) -> None:
        self.check(1e4 + _randn(*shape), _randn(*shape, seed=1), torch.float32)

    def test_why_the_kernel_is_given_blocks(self) -> None:
        x = 1e4 + _randn(100_000, 3)
        _, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        exact = x.double().var(0, correction=0)
        assert (var - exact).abs().min() > exact.max()

    def test_combine(self) -> None:
        parts = [5 + _randn(3, size, dtype=torch.float64, seed=size) for size in (1, 40, 300)]
        whole = _numpy(torch.cat(parts, dim=1))
        precision = reference.Precision("float64")
        expected = bounds.of_moments(whole, *formulas.moments(whole), len(parts), precision.u)
        moments = [formulas.moments(_numpy(part)) for part in parts]
        # An empty part may say what it likes.
        moments.insert(1, (np.full(3, 7.0), np.full(3, 9.0)))
        means, variances = (torch.from_numpy(np.stack(m)) for m in zip(*moments, strict=True))
        counts = torch.tensor([1.0, 0.0, 40.0, 300.0], dtype=torch.float64)
        mean, var, invstd, n = composed.combine(means, variances, counts, 1e-5)
        _assert_within("mean", mean, expected.mean)
        _assert_within("var", var, expected.var)
        assert torch.equal(invstd, (var + 1e-5).rsqrt())
        assert n == 341

    def test_combine_nothing(self) -> None:
        zeros = torch.zeros(2, 3, dtype=torch.float64)
        mean, var, invstd, n = composed.combine(zeros, zeros, zeros[:, 0], 0.25)
        assert torch.equal(mean, zeros[0])
        assert torch.equal(var, zeros[0])
        assert torch.equal(invstd, zeros[0] + 2)
        assert n == 0

    @staticmethod
    def check(x: Tensor, dy: Tensor, dtype: torch.dtype) -> None:
        """All five operations on (R, C, S), one after the other, each within its bound."""
        x, dy = x.to(dtype), dy.to(dtype)
        rows, channels, spatial = x.shape
        weight, bias = torch.linspace(-2, 2, channels), torch.linspace(3, -1, channels)
        u = reference.Precision(_name(dtype)).u
        matrix, dy_matrix = (_numpy(t.transpose(0, 1).flatten(1)) for t in (x, dy))
        exact = bounds.of_moments(matrix, *formulas.moments(matrix), 1, u)
        exact_sums = formulas.sums(dy_matrix, matrix, exact.mean.value)
        sum_bounds = bounds.of_sums(dy_matrix, matrix, exact.mean, exact_sums[0], 1, u)
        oracle = reference.SyncBatchNorm(
            channels, track_running_stats=False, weight=_numpy(weight), bias=_numpy(bias)
        )
        (exact_y,) = oracle.forward([_numpy(x)], training=False, dtype=_name(dtype))
        (exact_gradients,) = oracle.backward([_numpy(dy)])

        mean, var = composed.stats(x)
        _assert_within("mean", mean, exact.mean)
        _assert_within("var", var, exact.var)
        count = torch.full((1,), rows * spatial, dtype=torch.float64)
        mean, _, invstd, n = composed.combine(mean[None], var[None], count, 1e-5)
        y = composed.normalize(x, mean, invstd, weight, bias)
        _assert_within("y", y, exact_y)
        sums = composed.reduce_grad(dy, x, mean)
        for what, got, value, bound in zip(
            ("sum_dy", "sum_dy_xmu"), sums, exact_sums, sum_bounds, strict=True
        ):
            _assert_within(what, got, Bounded(value, bound))
        dx = composed.input_grad(dy, x, mean, invstd, weight, *sums, n)
        _assert_within("dx", dx, exact_gradients.input)

        assert y.dtype == dx.dtype == dtype
        assert y.shape == dx.shape == x.shape
        assert {t.dtype for t in (mean, var, invstd, n, *sums)} == {torch.float64}


@pytest.mark.parametrize("count", [0, 1, 2**20 - 1, 2**24 + 1, 2**40 - 1])
def test_a_count_survives_a_float32_message(count: int) -> None:
    message = function._pack(torch.zeros(2, 3), count, 0).float()
    assert function._counts(message.double().unsqueeze(0)).tolist() == [count]


class TestTypes:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("x", "parameters"),
        [
            *((dtype, dtype) for dtype in DTYPES),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
        ],
    )
    def test_accepted(self, x: torch.dtype, parameters: torch.dtype, training: bool) -> None:
        layer = _layer(dtype=parameters).train(training)
        dy = _randn(9, 3, 5, dtype=x, seed=1)
        y, dx = _assert_step(layer, _randn(9, 3, 5, dtype=x), dy)
        assert y.dtype == dx.dtype == x
        layer(_randn(9, 3, 5, dtype=x)).backward(dy)
        for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
            assert tensor is not None
            assert tensor.dtype == parameters
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == parameters

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("x", "parameters"),
        [
            (torch.float16, torch.bfloat16),
            (torch.bfloat16, torch.float16),
            (torch.float16, torch.float64),
            (torch.float32, torch.float16),
            (torch.float32, torch.float64),
            (torch.float64, torch.float32),
        ],
    )
    def test_refused(self, x: torch.dtype, parameters: torch.dtype, training: bool) -> None:
        layer = _layer(dtype=parameters).train(training)
        before = _state(layer)
        with pytest.raises(TypeError, match=f"input must have .*{parameters} .* got {x}"):
            layer(_randn(9, 3, dtype=x))
        _assert_untouched(layer, before)


class TestRefusedInput:
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (None, TypeError, "input must be a torch.Tensor, got NoneType"),
            ([[1.0, 2.0, 3.0]], TypeError, "input must be a torch.Tensor, got list"),
            (np.ones((4, 3)), TypeError, "input must be a torch.Tensor, got ndarray"),
            (torch.tensor(1.0), ValueError, r"at least 2 dimensions .* got 0 in shape \(\)"),
            (torch.ones(3), ValueError, r"at least 2 dimensions .* got 1 in shape \(3,\)"),
            (torch.ones(4, 0), ValueError, r"at least 1 channel, got 0 in shape \(4, 0\)"),
            (torch.ones(3, 4), ValueError, r"num_features=3 .* got 4 in shape \(3, 4\)"),
            (torch.ones(4, 3, dtype=torch.int64), TypeError, r"dtypes .* got torch\.int64"),
            (torch.ones(4, 3, dtype=torch.complex64), TypeError, r"got torch\.complex64"),
            (torch.ones(4, 3, device="meta"), ValueError, "parameters, cpu, got meta"),
        ],
    )
    def test_input(
        self,
        x: Any,
        error: type[Exception],
        message: str,
        track: bool,
        training: bool,
        momentum: float | None,
    ) -> None:
        layer = _layer(momentum=momentum, track_running_stats=track).train(training)
        before = _state(layer)
        with pytest.raises(error, match=message):
            layer(x)
        _assert_untouched(layer, before)
        _assert_step(layer, _randn(4, 3), _randn(4, 3, seed=1))

    @pytest.mark.parametrize("training", [True, False])
    def test_channels_without_parameters(self, training: bool) -> None:
        layer = SyncBatchNorm(3, affine=False, track_running_stats=False).train(training)
        with pytest.raises(ValueError, match=r"num_features=3 .* got 4 in shape \(5, 4\)"):
            layer(_randn(5, 4))

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
    def test_one_value_in_training(self, shape: tuple[int, ...], momentum: float | None) -> None:
        layer = _layer(momentum=momentum)
        before = _state(layer)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(_randn(*shape))
        _assert_untouched(layer, before)


class TestTraining:
    @pytest.mark.parametrize("momentum", [0, 0.0, 0.1, 1, 1.0, None])
    def test_momentum(self, momentum: float | None) -> None:
        layer = _layer(momentum=momentum)
        for step in range(3):
            _assert_step(layer, _randn(5, 3, seed=step), _randn(5, 3, seed=9))

    def test_without_tracking(self) -> None:
        _assert_step(_layer(track_running_stats=False), _randn(5, 3), _randn(5, 3, seed=1))

    def test_tracking_turned_off_later(self) -> None:
        """The running statistics stand still in training and serve in eval, as in BatchNorm."""
        layer = _layer()
        before = _state(layer)
        layer.track_running_stats = False
        layer(_randn(5, 3))
        _assert_untouched(layer, before)
        assert torch.equal(layer.eval()(_randn(5, 3)), _layer().eval()(_randn(5, 3)))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode: Callable[[], Any]) -> None:
        layer = _layer()
        clone = copy.deepcopy(layer)
        expected = layer(_randn(5, 3))
        with mode():
            y = clone(_randn(5, 3))
        assert torch.equal(y, expected)
        assert not y.requires_grad
        _assert_untouched(clone, _state(layer))


class TestEval:
    def test_running_statistics(self) -> None:
        layer = _layer().eval()
        before = _state(layer)
        _assert_step(layer, _randn(5, 3, 2), _randn(5, 3, 2, seed=1))
        _assert_untouched(layer, before)

    def test_local_statistics_without_tracking(self) -> None:
        layer = _layer(track_running_stats=False)
        trained = _assert_step(layer, _randn(5, 3, 2), _randn(5, 3, 2, seed=1))
        evaluated = _assert_step(layer.eval(), _randn(5, 3, 2), _randn(5, 3, 2, seed=1))
        assert all(map(torch.equal, trained, evaluated))

    def test_one_value_without_tracking(self) -> None:
        layer = _layer(track_running_stats=False).eval()
        assert torch.equal(layer(torch.zeros(1, 3)), layer.bias.unsqueeze(0))
        _assert_step(layer, _randn(1, 3, 1), _randn(1, 3, 1, seed=1))

    def test_a_training_step_after_it_does_not_disturb_its_backward(self) -> None:
        layer, x = _layer(), _randn(5, 3)
        (expected,) = torch.autograd.grad(layer.eval()(x).square().sum(), layer.weight)
        y = layer(x)
        layer.train()(x)
        (got,) = torch.autograd.grad(y.square().sum(), layer.weight)
        assert torch.equal(got, expected)


class TestFunctional:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("track", [True, False])
    def test_is_the_layer(self, track: bool, training: bool) -> None:
        layer = _layer(track_running_stats=track).train(training)
        clone = copy.deepcopy(layer)
        y = functional.sync_batch_norm(
            _randn(5, 3),
            clone.running_mean,
            clone.running_var,
            clone.weight,
            clone.bias,
            training,
            num_batches_tracked=clone.num_batches_tracked,
        )
        assert torch.equal(y, layer(_randn(5, 3)))
        _assert_untouched(clone, _state(layer))

    def test_input_alone(self) -> None:
        layer = SyncBatchNorm(3)
        assert torch.equal(functional.sync_batch_norm(_randn(5, 3)), layer(_randn(5, 3)))

    def test_running_statistics_need_no_counter(self) -> None:
        layer = SyncBatchNorm(3)
        layer(_randn(5, 3))
        mean, var = torch.zeros(3), torch.ones(3)
        functional.sync_batch_norm(_randn(5, 3), mean, var)
        assert torch.equal(mean, layer.running_mean)  # type: ignore[arg-type]
        assert torch.equal(var, layer.running_var)  # type: ignore[arg-type]

    def test_cumulative_average_needs_a_counter(self) -> None:
        mean, var = torch.zeros(3), torch.ones(3)
        with pytest.raises(ValueError, match=r"momentum=None .* needs num_batches_tracked"):
            functional.sync_batch_norm(_randn(5, 3), mean, var, momentum=None)
        assert torch.equal(mean, torch.zeros(3))
        assert torch.equal(var, torch.ones(3))

    @pytest.mark.parametrize("given", ["running_mean", "weight", "bias"])
    def test_channels_are_those_of_any_tensor_given(self, given: str) -> None:
        with pytest.raises(ValueError, match=r"num_features=4 .* got 3"):
            functional.sync_batch_norm(_randn(5, 3), **{given: torch.ones(4)})  # type: ignore[arg-type]


class TestBackend:
    @pytest.fixture(autouse=True)
    def no_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SYNCBN_BACKEND", raising=False)

    def test_names(self) -> None:
        assert load("auto") is load("composed") is composed

    @pytest.mark.parametrize("name", ["", "cudnn"])
    @pytest.mark.parametrize("training", [True, False])
    def test_unknown_in_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, training: bool, name: str
    ) -> None:
        layer = _layer().train(training)
        before = _state(layer)
        monkeypatch.setenv("SYNCBN_BACKEND", name)
        message = f"SYNCBN_BACKEND must be one of auto, composed.* got '{name}'"
        with pytest.raises(ValueError, match=message):
            SyncBatchNorm(3)
        with pytest.raises(ValueError, match=message):
            layer(_randn(5, 3))
        _assert_untouched(layer, before)

    def test_argument_goes_before_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = _layer()(_randn(5, 3))
        monkeypatch.setenv("SYNCBN_BACKEND", "composed")
        assert torch.equal(_layer()(_randn(5, 3)), expected)
        monkeypatch.setenv("SYNCBN_BACKEND", "cudnn")
        assert torch.equal(_layer(backend="composed")(_randn(5, 3)), expected)


class TestAutograd:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("channels_last", [True, False])
    def test_gradcheck(self, channels_last: bool, training: bool) -> None:
        layer = _layer(dtype=torch.float64, momentum=0).train(training)

        def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            given = {"weight": weight, "bias": bias}
            x = x.movedim(-1, 1) if channels_last else x
            return torch.func.functional_call(layer, given, (x,))

        x = _randn(*((4, 5, 3) if channels_last else (4, 3, 5)), dtype=torch.float64)
        inputs = [t.detach().requires_grad_() for t in (x, layer.weight, layer.bias)]
        assert torch.autograd.gradcheck(call, inputs)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)), ids=str)
    def test_requires_grad(self, wanted: tuple[bool, bool, bool], training: bool) -> None:
        def gradients(wanted: tuple[bool, ...]) -> list[Tensor | None]:
            layer = _layer().train(training)
            tensors: list[Tensor] = [_randn(5, 3), layer.weight, layer.bias]
            for tensor, flag in zip(tensors, wanted, strict=True):
                tensor.requires_grad_(flag)
            y = layer(tensors[0])
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.backward(_randn(5, 3, seed=1))
            return [tensor.grad for tensor in tensors]

        for got, every, flag in zip(gradients(wanted), gradients((True,) * 3), wanted, strict=True):
            assert every is not None
            assert torch.equal(got, every) if flag and got is not None else got is None and not flag

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_parameter_gradients_stay_local(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        """The sums that the ranks add up in place are not those that were returned."""

        def gradients() -> tuple[Tensor, ...]:
            layer = _layer(dtype=dtype)
            y = layer(_randn(5, 3, dtype=dtype))
            return torch.autograd.grad(y.square().sum(), list(layer.parameters()))

        alone = gradients()
        monkeypatch.setattr(Communicator, "all_reduce", lambda _, sums: sums.mul_(2))
        assert all(map(torch.equal, gradients(), alone))

    def test_backward_twice(self) -> None:
        x = _randn(5, 3).requires_grad_()
        y = _layer()(x)
        once = torch.autograd.grad(y, x, _randn(5, 3, seed=1), retain_graph=True)
        twice = torch.autograd.grad(y, x, _randn(5, 3, seed=1))
        assert torch.equal(*once, *twice)

    def test_double_backward(self) -> None:
        x = _randn(5, 3).requires_grad_()
        (dx,) = torch.autograd.grad(_layer()(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.sum().backward()

    @pytest.mark.parametrize("training", [True, False])
    def test_input_changed_before_backward(self, training: bool) -> None:
        x = _randn(5, 3)
        y = _layer().train(training)(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("host_looks", [True, False])
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("shape", [(5, 3, 2), (300, 3), (0, 3)])
    def test_the_host_waits_only_to_look(
        self,
        monkeypatch: pytest.MonkeyPatch,
        shape: tuple[int, ...],
        momentum: float | None,
        host_looks: bool,
    ) -> None:
        for module in (function, functional):
            monkeypatch.setattr(module, "host_may_look", lambda device: host_looks)
        if not host_looks:  # a peer without values; it has nothing to differentiate, unseen
            monkeypatch.setattr(
                Communicator, "all_gather", lambda _, m: torch.stack([torch.zeros_like(m), m])
            )
        layer = _layer(momentum=momentum)
        x = _randn(*shape).requires_grad_()
        with _Operations() as operations:
            layer(x).sum().backward()
        waiting = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal")
        waited = operations.seen & {f"aten::{name}" for name in waiting}
        assert waited == ({"aten::_local_scalar_dense"} if host_looks else set())
        assert "aten::add_" in operations.seen


class _Operations(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


class TestWithTorch:
    """The layer under what users wrap around it."""

    @pytest.fixture
    def world_of_one(self, tmp_path: Path) -> Iterator[None]:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.usefixtures("world_of_one")
    def test_distributed_data_parallel(self) -> None:
        plain = torch.nn.Sequential(torch.nn.Linear(2, 3), _layer())
        wrapped = DistributedDataParallel(copy.deepcopy(plain))
        for step in range(2):
            for model in (plain, wrapped):
                model(_randn(5, 2, seed=step)).square().sum().backward()
        for ours, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.equal(ours.grad, theirs.grad)
        _assert_untouched(wrapped.module[1], plain[1].state_dict())

    def test_autocast(self) -> None:
        linear, layer = torch.nn.Linear(2, 3), _layer()
        clone = copy.deepcopy(layer)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = linear(_randn(5, 2))
            y = layer(hidden)
        assert hidden.dtype == y.dtype == torch.bfloat16
        assert torch.equal(y, clone(hidden))
        _assert_untouched(layer, _state(clone))
        y.float().square().sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32

    def test_checkpoint(self) -> None:
        x = _randn(5, 3, 2, 2).requires_grad_()
        layer, theirs = _layer(), torch.nn.BatchNorm2d(3)
        theirs.load_state_dict(layer.state_dict())
        oracle = _oracle(layer)
        for _ in range(2):  # the recomputation is a second training forward
            oracle.forward([_numpy(x)])
        (expected,) = torch.autograd.grad(copy.deepcopy(layer)(x).square().sum(), x)
        for model in (layer, theirs):
            y: Tensor = checkpoint(model, x, use_reentrant=False)
            y.square().sum().backward()
            _assert_tracked(model, oracle)
            if model is layer:
                assert x.grad is not None
                assert torch.equal(x.grad, expected)

    @pytest.mark.parametrize("training", [True, False])
    # Dynamo instantiates every autograd.Function that it traces.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compile(self, training: bool) -> None:
        layer = _layer().train(training)
        clone = copy.deepcopy(layer)
        compiled = torch.compile(clone, backend="eager")
        for step in range(2):
            x, dy = _randn(5, 3, 2, seed=step).requires_grad_(), _randn(5, 3, 2, seed=9)
            y, again = layer(x), compiled(x)
            assert torch.equal(y, again)
            for ours, theirs in zip(
                torch.autograd.grad(y, [x, *layer.parameters()], dy),
                torch.autograd.grad(again, [x, *clone.parameters()], dy),
                strict=True,
            ):
                assert torch.equal(ours, theirs)
        _assert_untouched(clone, _state(layer))


RANKS = 3
DEADLINE = 90.0  # seconds for all that the ranks do
TIMEOUT = datetime.timedelta(seconds=20)  # for a collective, so that a lost rank is soon missed


def _assert_statistics_of(members: list[int], layer: SyncBatchNorm, rank: int) -> None:
    """A training step takes the statistics of these ranks together."""
    oracle = _oracle(layer)
    layer(_randn(5, 3, seed=rank))
    oracle.forward([_numpy(_randn(5, 3, seed=member)) for member in members])
    _assert_tracked(layer, oracle)


def members_make_a_group(rank: int) -> None:
    if rank in (0, 1):
        pair = create_group("pair", [1, 0])
        assert isinstance(pair, dist.ProcessGroup)
        assert dist.get_process_group_ranks(pair) == [0, 1]
        assert create_group("pair", (0, np.int64(1))) is pair  # type: ignore[arg-type]
        assert create_group("alias", [0, 1]) is pair
        assert create_group(None, [0, 1]) is pair
        for process_group in ("pair", "alias", [0, 1], (1, 0), pair):
            assert SyncBatchNorm(3, process_group=process_group).process_group is pair
        _assert_statistics_of([0, 1], _layer(process_group="pair"), rank)


def one_outside_evaluates(rank: int) -> None:
    layer = _layer(process_group=[0, 1])
    if rank != 2:
        return
    assert layer.process_group == dist.GroupMember.NON_GROUP_MEMBER
    assert create_group(None, [1, 0]) == dist.GroupMember.NON_GROUP_MEMBER
    for member in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        _assert_step(member.eval(), _randn(5, 3), _randn(5, 3, seed=1))
        before = _state(member)
        with pytest.raises(ValueError, match=r"process_group must contain .* without rank 2"):
            member.train()(_randn(5, 3))
        _assert_untouched(member, before)


def equal_lists_share_a_communicator(rank: int) -> None:
    first = SyncBatchNorm(3, process_group=[0, 1])
    with mock.patch.object(dist, "new_group") as new_group:
        layers = [SyncBatchNorm(3, process_group=[i % 2, 1 - i % 2]) for i in range(200)]
    new_group.assert_not_called()
    assert all(layer.process_group is first.process_group for layer in layers)


def wrong_groups_are_refused(rank: int) -> None:
    for ids in ([0, 3], [-1], (3,)):
        with pytest.raises(ValueError, match=r"process_group must be in \[0, 3\), got "):
            SyncBatchNorm(3, process_group=ids)
    with pytest.raises(ValueError, match=r"distinct, got \[0, 0\]"):
        SyncBatchNorm(3, process_group=[0, 0])
    with pytest.raises(ValueError, match=r"empty list"):
        SyncBatchNorm(3, process_group=[])
    with pytest.raises(ValueError, match=r"known: .*\), got 'trio'"):
        SyncBatchNorm(3, process_group="trio")
    for wrong in ({0, 1}, 1, True, 1.5, object):
        with pytest.raises(TypeError, match="process_group must be None, a ProcessGroup"):
            SyncBatchNorm(3, process_group=wrong)
    with pytest.raises(TypeError, match=r"ints, got 1\.0 of type float in it"):
        SyncBatchNorm(3, process_group=[0, 1.0])
    with pytest.raises(TypeError, match=r"name must be a str or None, got 7"):
        create_group(7, [0, 1])  # type: ignore[arg-type]
    if rank != 2:
        with pytest.raises(ValueError, match=r"got 'pair' for ranks \[0, 2\].* ranks \[0, 1\]"):
            create_group("pair", [0, 2])


def a_copy_shares_the_group(rank: int) -> None:
    world = SyncBatchNorm(3, process_group=dist.group.WORLD)
    layers = [world] if rank == 2 else [_layer(process_group="pair"), world]
    for layer in layers:
        clone, again = copy.deepcopy(torch.nn.Sequential(layer, layer))
        assert clone is again
        assert isinstance(clone, SyncBatchNorm)
        assert clone.process_group is layer.process_group
        assert clone.weight is not layer.weight
        assert torch.equal(layer(_randn(5, 3, seed=rank)), clone(_randn(5, 3, seed=rank)))
        _assert_untouched(clone, _state(layer))


def one_rank_evaluates_alone(rank: int) -> None:
    if rank == 0:
        for track in (True, False):
            layer = _layer(track_running_stats=track).eval()
            _assert_step(layer, _randn(5, 3), _randn(5, 3, seed=1))


def groups_went_with_their_world(rank: int) -> None:
    with pytest.raises(ValueError, match=r"known: none\), got 'pair'"):
        SyncBatchNorm(3, process_group="pair")


def a_call_from_outside_leaves_no_trace(rank: int) -> None:
    if rank == 2:
        assert create_group(None, [0, 1]) == dist.GroupMember.NON_GROUP_MEMBER
    if rank in (0, 2):
        create_group("pair", [0, 2])
        _assert_statistics_of([0, 2], _layer(process_group="pair"), rank)


# Each list runs in a world of its own.
WORLDS: list[list[Callable[[int], None]]] = [
    [
        members_make_a_group,
        one_outside_evaluates,
        equal_lists_share_a_communicator,
        wrong_groups_are_refused,
        a_copy_shares_the_group,
        one_rank_evaluates_alone,
    ],
    [groups_went_with_their_world, a_call_from_outside_leaves_no_trace],
]


def _run_rank(rank: int, folder: Path) -> None:
    """Take the checks in order, up to one that fails: the ranks would no longer be in step."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    outcome: dict[str, str] = {}
    for index, checks in enumerate(WORLDS):
        store = f"file://{folder}/world-{index}"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=RANKS, timeout=TIMEOUT
        )
        for check in checks:
            try:
                check(rank)
                dist.barrier()
                outcome[check.__name__] = "passed"
            except BaseException:
                outcome[check.__name__] = traceback.format_exc()
                return
            finally:
                (folder / str(rank)).write_text(json.dumps(outcome))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What became of every check on every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_run_rank, args=(rank, folder)) for rank in range(RANKS)]
    ends = time.monotonic() + DEADLINE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
    files = [folder / str(rank) for rank in range(RANKS)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.parametrize("check", [check.__name__ for checks in WORLDS for check in checks])
def test_groups_on_three_ranks(check: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        found = outcome.get(check, "not reached, or not done by the deadline")
        assert found == "passed", f"rank {rank}: {found}"
