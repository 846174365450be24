"""The PyTorch layer, as far as one process shows it.

What several ranks compute together is judged by the conformance cases, not here.
"""

from __future__ import annotations

import copy
import doctest
import inspect
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from syncbn import reference
from syncbn.reference import Bounded, bounds, formulas
from syncbn.torch import SyncBatchNorm, functional, messages
from syncbn.torch import step as training_step
from syncbn.torch.backends import Running, aten, composed, load
from syncbn.torch.groups import Communicator
from tests.syncbn.torch_layers import (
    assert_step,
    assert_tracked,
    assert_untouched,
    assert_within,
    dtype_name,
    make_layer,
    numpy_of,
    randn,
    reference_of,
    state_of,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that a sum is added up in one order on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
            ("bias", True),
            ("device", None),
            ("backend", "auto"),
        ]
        kinds = {p.name: p.kind for p in parameters}
        ours = {name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY}
        assert ours == {"bias", "device", "backend"}
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
            ({"process_group": [0, -1]}, ValueError, "process_group must be 0 or more, got -1"),
            ({"process_group": [0, 0]}, ValueError, "rank_ids must be distinct"),
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

    def test_any_real_momentum(self) -> None:
        layer, same = SyncBatchNorm(3, momentum=Fraction(1, 4)), SyncBatchNorm(3, momentum=0.25)  # type: ignore[arg-type]
        layer(randn(5, 3)), same(randn(5, 3))
        assert_untouched(layer, state_of(same))

    def test_numpy_arguments(self) -> None:
        layer = SyncBatchNorm(np.int64(3), np.float32(1e-3), np.float32(0.25))  # type: ignore[arg-type]
        assert type(layer.num_features) is int
        assert_step(layer, randn(5, 3), randn(5, 3, seed=1))

    def test_repr(self) -> None:
        shown = repr(SyncBatchNorm(3, affine=False))
        assert shown.startswith("SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=False")
        assert "backend" not in shown
        assert "process_group" not in shown
        assert repr(SyncBatchNorm(3, backend="composed")).endswith(", backend='composed')")
        assert repr(SyncBatchNorm(3, process_group=[0])).endswith(", process_group=[0])")

    def test_example(self) -> None:
        results = doctest.testmod(sys.modules[SyncBatchNorm.__module__])
        assert results.failed == 0
        assert results.attempted > 4

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_state_dict_goes_to_and_from_batch_norm(self, dtype: torch.dtype) -> None:
        ours, theirs = make_layer(dtype=dtype), torch.nn.BatchNorm2d(3, dtype=dtype)
        ours(randn(4, 3, 2, 2, dtype=dtype))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        back = SyncBatchNorm(3, dtype=dtype)
        back.load_state_dict(theirs.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert_untouched(back, state_of(ours))

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
    )
    def test_copy(self, copied: Callable[[SyncBatchNorm], SyncBatchNorm]) -> None:
        layer = make_layer(momentum=None, backend="composed").eval()
        before = state_of(layer)
        clone = copied(layer)
        assert_untouched(clone, before)
        assert repr(clone) == repr(layer)
        clone.train()(randn(4, 3))
        assert not layer.training
        assert_untouched(layer, before)

    def test_deepcopy_of_a_cycle(self) -> None:
        layer = SyncBatchNorm(3)
        layer.holder = {"layer": layer}  # type: ignore[assignment]
        clone: Any = copy.deepcopy(layer)
        assert clone.holder["layer"] is clone is not layer

    def test_device(self) -> None:
        assert all(t.is_meta for t in SyncBatchNorm(3, device="meta").state_dict().values())


def _channels_last(batch: int, channels: int, *spatial: int) -> Tensor:
    return randn(batch, *spatial, channels).movedim(-1, 1)


def _of_unusual_strides(x: Tensor) -> Tensor:
    """channels_last, except that dimensions of size 1 have a stride of 1."""
    x = x.to(memory_format=torch.channels_last)
    pairs = zip(x.shape, x.stride(), strict=True)
    return x.as_strided(x.shape, [1 if size == 1 else stride for size, stride in pairs])


# An input, and whether y has its strides (True), or those of a contiguous or (None) of a
# channels-last tensor of its shape.
LAYOUTS: dict[str, tuple[Tensor, bool | None]] = {
    "2-D": (randn(8, 3), True),
    "3-D": (randn(8, 3, 5), True),
    "4-D": (randn(8, 3, 5, 2), True),
    "5-D": (randn(4, 3, 5, 2, 3), True),
    "6-D": (randn(2, 3, 5, 2, 3, 2), True),
    "channels_last": (_channels_last(8, 3, 5, 2), True),
    "channels_last-3d": (_channels_last(4, 3, 5, 2, 3), True),
    "channels_last-6-D": (_channels_last(2, 3, 5, 2, 3, 2), True),
    "channels_last-one-image": (_channels_last(1, 3, 5, 2), True),
    "sequence": (_channels_last(8, 3, 5), True),
    "single-pixel": (randn(8, 3, 1, 1), True),
    "single-channel": (randn(8, 1, 5, 2), True),
    "offset": (randn(9, 3, 5)[1:], True),
    "sliced-channels_last": (_channels_last(8, 3, 5, 4)[::2], None),
    "transposed-2-D": (randn(3, 8).t(), False),
    "transposed-image": (randn(8, 3, 5, 2).transpose(2, 3), False),
    "channels-first": (randn(3, 8, 5).transpose(0, 1), False),
    "every-other-image": (randn(16, 3, 5, 2)[::2], False),
    "some-channels": (randn(8, 7, 5, 2)[:, 1:6:2], False),
    "expanded-image": (randn(8, 3, 1, 1).expand(8, 3, 5, 2), False),
    "expanded-batch": (randn(1, 3, 5).expand(8, 3, 5), False),
    "expanded-value": (randn(1, 1, 1).expand(8, 3, 5), False),
}


class TestLayout:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_values_and_strides(self, layout: str, training: bool) -> None:
        x, kept = LAYOUTS[layout]
        before, version = x.clone(), x._version
        layer = make_layer(x.shape[1]).train(training)
        y, dx = assert_step(layer, x, randn(*x.shape, seed=1))
        packed = torch.empty(x.shape)
        if kept is None:
            packed = packed.movedim(1, -1).contiguous().movedim(-1, 1)
        strides = x.stride() if kept else packed.stride()
        assert y.shape == dx.shape == x.shape
        assert y.stride() == dx.stride() == strides
        assert torch.equal(x, before)
        assert x._version == version

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_output_may_be_changed_in_place(self, layout: str, training: bool) -> None:
        """As ReLU(inplace=True) behind the layer does."""
        x = LAYOUTS[layout][0].detach().requires_grad_()
        layer = make_layer(x.shape[1]).train(training)
        clone = copy.deepcopy(layer)
        (got,) = torch.autograd.grad(layer(x).relu_().square().sum(), x)
        (expected,) = torch.autograd.grad(clone(x).relu().square().sum(), x)
        assert torch.equal(got, expected)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
    @pytest.mark.parametrize("size", [(40, 2), (40, 1), (1, 40)], ids=str)
    def test_layout_of_grad_output(
        self, size: tuple[int, int], dtype: torch.dtype, training: bool
    ) -> None:
        """Also in layouts with which ATen's kernels lose digits, or give another gradient."""
        layer = make_layer().train(training)
        packed = randn(8, 3, *size, dtype=dtype, seed=1)
        layouts = [
            packed,
            packed.to(memory_format=torch.channels_last),
            _of_unusual_strides(packed),
            packed.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
            packed[:, :, :1, :1].expand(packed.shape),
            torch.ones((), dtype=dtype).expand(packed.shape),
        ]
        for x in (packed + 1, (packed + 1).to(memory_format=torch.channels_last)):
            for dy in layouts:
                assert_step(layer, x, dy)

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 2), (2, 3, 0), (2, 3, 5, 0)])
    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_empty(self, training: bool, track: bool, shape: tuple[int, ...]) -> None:
        layer = make_layer(track_running_stats=track).train(training)
        before = state_of(layer)
        x = _channels_last(*shape).bfloat16().requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert (y.shape, y.dtype) == (shape, torch.bfloat16)
        for tensor in (x, layer.weight, layer.bias):
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, torch.zeros_like(tensor))
        assert_untouched(layer, before)


# (R, C, S) below, at and above the limits of a block; the last have rows left over.
SHAPES = [
    *itertools.product((1, 7, 8, 127, 128, 129), (1, 3, 65), (1, 5)),
    *((16384 + 5, 1, 1), (16384 + 5, 3, 5), (16384 + 5, 65, 1)),
]


class TestComposed:
    @pytest.fixture(autouse=True, params=["native kernels", "formulas"])
    def _ways(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the kernels of the CPU, and as on devices that are not a CPU."""
        if request.param == "formulas":
            monkeypatch.setattr(composed, "_has_native_kernels", lambda x: False)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_five_operations(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.check(1 + 2 * randn(*shape), randn(*shape, seed=1), dtype)

    @pytest.mark.parametrize("shape", [(100_000, 3, 1), (129, 3, 500), (7, 3, 20_000)], ids=str)
    def test_mean_far_above_deviation(self, shape: tuple[int, int, int]) -> None:
        self.check(1e4 + randn(*shape), randn(*shape, seed=1), torch.float32)

    @pytest.mark.parametrize("shape", [(64, 3, 1), (200, 3, 7), (9, 3, 600)], ids=str)
    @pytest.mark.parametrize("scale", [1e-18, 3e18], ids=str)
    def test_scale(self, shape: tuple[int, int, int], scale: float) -> None:
        """The sum of 64 squares of 3e18 is beyond float32, their mean is not."""
        x = scale * randn(*shape)
        exact = x.double().transpose(0, 1).flatten(1)
        mean, var = composed.stats(x)
        torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-5, atol=1e-6 * scale)
        torch.testing.assert_close(var.double(), exact.var(1, correction=0), rtol=1e-5, atol=0.0)

    def test_an_infinity_stays_in_its_channel(self) -> None:
        x = randn(64, 3, 1)
        x[5, 1] = torch.inf
        mean, var = composed.stats(x)
        assert mean.isfinite().tolist() == var.isfinite().tolist() == [True, False, True]

    def test_why_the_kernel_is_given_blocks(self) -> None:
        x = 1e4 + randn(100_000, 3)
        _, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        exact = x.double().var(0, correction=0)
        assert (var - exact).abs().min() > exact.max()

    def test_combine(self) -> None:
        parts = [5 + randn(3, size, dtype=torch.float64, seed=size) for size in (1, 40, 300)]
        whole = numpy_of(torch.cat(parts, dim=1))
        precision = reference.Precision("float64")
        expected = bounds.of_combine(whole, *formulas.stats(whole), len(parts), precision.u)
        moments = [formulas.stats(numpy_of(part)) for part in parts]
        # An empty part may have any values.
        moments.insert(1, (np.full(3, 7.0), np.full(3, 9.0)))
        means, variances = (torch.from_numpy(np.stack(m)) for m in zip(*moments, strict=True))
        counts = torch.tensor([1.0, 0.0, 40.0, 300.0], dtype=torch.float64)
        mean, var, invstd, n = composed.combine(means, variances, counts, 1e-5)
        assert_within("mean", mean, expected.mean)
        assert_within("var", var, expected.var)
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
        u = reference.Precision(dtype_name(dtype)).u
        matrix, dy_matrix = (numpy_of(t.transpose(0, 1).flatten(1)) for t in (x, dy))
        exact = bounds.of_stats(matrix, *formulas.stats(matrix), u)
        exact_sums = formulas.reduce_grad(dy_matrix, matrix, exact.mean.value)
        sum_bounds = bounds.of_reduce_grad(dy_matrix, matrix, exact.mean, exact_sums[0], 1, u)
        expected_layer = reference.SyncBatchNorm(
            channels, track_running_stats=False, weight=numpy_of(weight), bias=numpy_of(bias)
        )
        (exact_y,) = expected_layer.forward([numpy_of(x)], training=False, dtype=dtype_name(dtype))
        (exact_gradients,) = expected_layer.backward([numpy_of(dy)])

        mean, var = composed.stats(x)
        assert_within("mean", mean, exact.mean)
        assert_within("var", var, exact.var)
        count = torch.full((1,), rows * spatial, dtype=torch.float64)
        mean, _, invstd, n = composed.combine(mean[None], var[None], count, 1e-5)
        y = composed.normalize(x, mean, invstd, weight, bias)
        assert_within("y", y, exact_y)
        sums = composed.reduce_grad(dy, x, mean)
        for what, got, value, bound in zip(
            ("sum_dy", "sum_dy_xmu"), sums, exact_sums, sum_bounds, strict=True
        ):
            assert_within(what, got, Bounded(value, bound))
        dx = composed.input_grad(dy, x, mean, invstd, weight, *sums, n)
        assert_within("dx", dx, exact_gradients.input)

        assert y.dtype == dx.dtype == dtype
        assert y.shape == dx.shape == x.shape
        assert {t.dtype for t in (mean, var, invstd, n, *sums)} == {torch.float64}


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
        layer = make_layer(dtype=parameters).train(training)
        dy = randn(9, 3, 5, dtype=x, seed=1)
        y, dx = assert_step(layer, randn(9, 3, 5, dtype=x), dy)
        assert y.dtype == dx.dtype == x
        layer(randn(9, 3, 5, dtype=x)).backward(dy)
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
        layer = make_layer(dtype=parameters).train(training)
        before = state_of(layer)
        with pytest.raises(
            TypeError, match=f"input must have .*{dtype_name(parameters)} .* got {dtype_name(x)}"
        ):
            layer(randn(9, 3, dtype=x))
        assert_untouched(layer, before)


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
            (torch.ones(4, 3, dtype=torch.int64), TypeError, "dtypes .* got int64"),
            (torch.ones(4, 3, dtype=torch.complex64), TypeError, "got complex64"),
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
        layer = make_layer(momentum=momentum, track_running_stats=track).train(training)
        before = state_of(layer)
        with pytest.raises(error, match=message):
            layer(x)
        assert_untouched(layer, before)
        assert_step(layer, randn(4, 3), randn(4, 3, seed=1))

    @pytest.mark.parametrize("training", [True, False])
    def test_channels_without_parameters(self, training: bool) -> None:
        layer = SyncBatchNorm(3, affine=False, track_running_stats=False).train(training)
        with pytest.raises(ValueError, match=r"num_features=3 .* got 4 in shape \(5, 4\)"):
            layer(randn(5, 4))

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
    def test_one_value_in_training(self, shape: tuple[int, ...], momentum: float | None) -> None:
        layer = make_layer(momentum=momentum)
        before = state_of(layer)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(randn(*shape))
        assert_untouched(layer, before)


class TestTraining:
    @pytest.mark.parametrize("momentum", [0, 0.0, 0.1, 1, 1.0, None])
    def test_momentum(self, momentum: float | None) -> None:
        layer = make_layer(momentum=momentum)
        for step in range(3):
            assert_step(layer, randn(5, 3, seed=step), randn(5, 3, seed=9))

    def test_momentum_near_one_with_float32_statistics(self) -> None:
        """As on Ascend. In float32, 1 - 0.999 has four digits left."""
        mean, var = torch.full((3,), 5.0), torch.full((3,), 7.0)
        messages.move(Running(mean, var, None, 0.999), torch.zeros(3), torch.zeros(3))
        for buffer, old in ((mean, 5.0), (var, 7.0)):
            expected = torch.full((3,), (1 - 0.999) * old)
            torch.testing.assert_close(buffer, expected, rtol=2.0**-22, atol=0.0)

    def test_without_tracking(self) -> None:
        assert_step(make_layer(track_running_stats=False), randn(5, 3), randn(5, 3, seed=1))

    def test_tracking_turned_off_later(self) -> None:
        """The running statistics stand still in training and serve in eval, as in BatchNorm."""
        layer = make_layer()
        before = state_of(layer)
        layer.track_running_stats = False
        layer(randn(5, 3))
        assert_untouched(layer, before)
        assert torch.equal(layer.eval()(randn(5, 3)), make_layer().eval()(randn(5, 3)))

    @pytest.mark.parametrize("training", [True, False])
    def test_attributes_are_live(self, training: bool) -> None:
        """What is set after construction takes effect at the next step."""
        for changed in ({"eps": 0.5}, {"momentum": 0.75}, {"momentum": None}):
            layer = make_layer()
            layer(randn(5, 3))
            built = make_layer(**changed)
            built.load_state_dict(layer.state_dict())
            for name, value in changed.items():
                setattr(layer, name, value)
            for module in (layer, built):
                module.train(training)
            assert torch.equal(layer(randn(5, 3, seed=1)), built(randn(5, 3, seed=1)))
            assert_untouched(layer, state_of(built))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode: Callable[[], Any]) -> None:
        layer = make_layer()
        clone = copy.deepcopy(layer)
        expected = layer(randn(5, 3))
        with mode():
            y = clone(randn(5, 3))
        assert torch.equal(y, expected)
        assert not y.requires_grad
        assert_untouched(clone, state_of(layer))


class TestEval:
    def test_running_statistics(self) -> None:
        layer = make_layer().eval()
        before = state_of(layer)
        assert_step(layer, randn(5, 3, 2), randn(5, 3, 2, seed=1))
        assert_untouched(layer, before)

    def test_local_statistics_without_tracking(self) -> None:
        layer = make_layer(track_running_stats=False)
        trained = assert_step(layer, randn(5, 3, 2), randn(5, 3, 2, seed=1))
        evaluated = assert_step(layer.eval(), randn(5, 3, 2), randn(5, 3, 2, seed=1))
        assert all(map(torch.equal, trained, evaluated))

    def test_one_value_without_tracking(self) -> None:
        layer = make_layer(track_running_stats=False).eval()
        assert torch.equal(layer(torch.zeros(1, 3)), layer.bias.unsqueeze(0))
        assert_step(layer, randn(1, 3, 1), randn(1, 3, 1, seed=1))

    def test_a_training_step_after_it_does_not_disturb_its_backward(self) -> None:
        layer, x = make_layer(), randn(5, 3)
        (expected,) = torch.autograd.grad(layer.eval()(x).square().sum(), layer.weight)
        y = layer(x)
        layer.train()(x)
        (got,) = torch.autograd.grad(y.square().sum(), layer.weight)
        assert torch.equal(got, expected)

    def test_float64_too(self) -> None:
        """Its running statistics need no conversion, and must not be saved themselves."""
        layer, x = make_layer(dtype=torch.float64), randn(5, 3, dtype=torch.float64)
        y = layer.eval()(x.requires_grad_())
        layer.train()(x)
        y.square().sum().backward()


class TestFunctional:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("track", [True, False])
    def test_is_the_layer(self, track: bool, training: bool) -> None:
        layer = make_layer(track_running_stats=track).train(training)
        clone = copy.deepcopy(layer)
        y = functional.sync_batch_norm(
            randn(5, 3),
            clone.running_mean,
            clone.running_var,
            clone.weight,
            clone.bias,
            training,
            num_batches_tracked=clone.num_batches_tracked,
        )
        assert torch.equal(y, layer(randn(5, 3)))
        assert_untouched(clone, state_of(layer))

    def test_input_alone(self) -> None:
        layer = SyncBatchNorm(3)
        assert torch.equal(functional.sync_batch_norm(randn(5, 3)), layer(randn(5, 3)))

    def test_running_statistics_need_no_counter(self) -> None:
        layer = SyncBatchNorm(3)
        layer(randn(5, 3))
        mean, var = torch.zeros(3), torch.ones(3)
        functional.sync_batch_norm(randn(5, 3), mean, var)
        assert torch.equal(mean, layer.running_mean)  # type: ignore[arg-type]
        assert torch.equal(var, layer.running_var)  # type: ignore[arg-type]

    def test_cumulative_average_needs_a_counter(self) -> None:
        mean, var = torch.zeros(3), torch.ones(3)
        with pytest.raises(ValueError, match=r"momentum=None .* needs num_batches_tracked"):
            functional.sync_batch_norm(randn(5, 3), mean, var, momentum=None)
        assert torch.equal(mean, torch.zeros(3))
        assert torch.equal(var, torch.ones(3))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"running_var": torch.ones(2)}, r"running_var must have shape \(3,\), got \(2,\)"),
            ({"running_mean": torch.ones(3, 1)}, r"running_mean must have .* got \(3, 1\)"),
            ({"bias": torch.ones(4)}, r"bias must have shape \(3,\), got \(4,\)"),
            ({"running_var": None}, "running_mean and running_var must be given together"),
            ({"running_mean": None}, "running_mean and running_var must be given together"),
        ],
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_wrong_arguments_change_nothing(
        self, arguments: dict[str, Any], message: str, training: bool
    ) -> None:
        layer = make_layer()
        before = state_of(layer)
        given = layer.state_dict() | {"training": training} | arguments
        with pytest.raises((ValueError, RuntimeError), match=message):
            functional.sync_batch_norm(randn(5, 3), **given)
        assert_untouched(layer, before)

    def test_unknown_group_in_training(self) -> None:
        layer = make_layer()
        before = state_of(layer)
        with pytest.raises(RuntimeError, match="needs torch"):
            functional.sync_batch_norm(
                randn(5, 3), layer.running_mean, layer.running_var, process_group="missing"
            )
        assert_untouched(layer, before)

    @pytest.mark.parametrize("training", [True, False])
    def test_wrong_input_without_parameters(self, training: bool) -> None:
        for wrong, error in ((None, TypeError), (torch.ones(3), ValueError)):
            with pytest.raises(error, match="input must "):
                functional.sync_batch_norm(wrong, training=training)  # type: ignore[arg-type]

    @pytest.mark.parametrize("given", ["running_mean", "weight", "bias"])
    def test_channels_are_those_of_any_tensor_given(self, given: str) -> None:
        arguments: dict[str, Any] = {given: torch.ones(4)}
        if given == "running_mean":
            arguments["running_var"] = torch.ones(4)
        with pytest.raises(ValueError, match=r"num_features=4 .* got 3"):
            functional.sync_batch_norm(randn(5, 3), **arguments)


class TestBackend:
    @pytest.fixture(autouse=True)
    def no_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SYNCBN_BACKEND", raising=False)

    def test_names(self) -> None:
        assert load("auto") is load("composed") is composed
        assert load("aten") is aten

    @pytest.mark.parametrize(
        ("kind", "default"), [("cpu", composed), ("meta", composed), ("cuda", aten), ("npu", aten)]
    )
    def test_defaults(self, monkeypatch: pytest.MonkeyPatch, kind: str, default: Any) -> None:
        """Without Triton, which the tests may have; test_backends.py has the rule."""
        monkeypatch.setattr("syncbn.backends._are_installed", lambda distributions: False)
        x: Any = SimpleNamespace(device=SimpleNamespace(type=kind), dtype=torch.float32)
        assert load("auto", x) is default
        assert load("composed", x) is composed
        monkeypatch.setenv("SYNCBN_BACKEND", "composed")
        assert load("auto", x) is composed
        assert load("aten", x) is aten
        monkeypatch.setenv("SYNCBN_BACKEND", "auto")
        assert load("auto", x) is default

    @pytest.mark.parametrize("name", ["", "cudnn"])
    def test_unknown_in_the_environment(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        layer = make_layer()
        before = state_of(layer)
        monkeypatch.setenv("SYNCBN_BACKEND", name)
        message = f"SYNCBN_BACKEND must be one of auto, composed.* got '{name}'"
        with pytest.raises(ValueError, match=message):
            SyncBatchNorm(3)
        with pytest.raises(ValueError, match=message):
            layer(randn(5, 3))
        assert_untouched(layer, before)

    def test_argument_goes_before_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = make_layer()(randn(5, 3))
        monkeypatch.setenv("SYNCBN_BACKEND", "composed")
        assert torch.equal(make_layer()(randn(5, 3)), expected)
        monkeypatch.setenv("SYNCBN_BACKEND", "cudnn")
        assert torch.equal(make_layer(backend="composed")(randn(5, 3)), expected)


class TestAutograd:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("channels_last", [True, False])
    def test_gradcheck(self, channels_last: bool, training: bool) -> None:
        layer = make_layer(dtype=torch.float64, momentum=0).train(training)

        def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            given = {"weight": weight, "bias": bias}
            x = x.movedim(-1, 1) if channels_last else x
            return torch.func.functional_call(layer, given, (x,))

        x = randn(*((4, 5, 3) if channels_last else (4, 3, 5)), dtype=torch.float64)
        inputs = [t.detach().requires_grad_() for t in (x, layer.weight, layer.bias)]
        assert torch.autograd.gradcheck(call, inputs)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)), ids=str)
    def test_requires_grad(self, wanted: tuple[bool, bool, bool], training: bool) -> None:
        def gradients(wanted: tuple[bool, ...]) -> list[Tensor | None]:
            layer = make_layer().train(training)
            tensors: list[Tensor] = [randn(5, 3), layer.weight, layer.bias]
            for tensor, flag in zip(tensors, wanted, strict=True):
                tensor.requires_grad_(flag)
            y = layer(tensors[0])
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.backward(randn(5, 3, seed=1))
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
            layer = make_layer(dtype=dtype)
            y = layer(randn(5, 3, dtype=dtype))
            return torch.autograd.grad(y.square().sum(), list(layer.parameters()))

        alone = gradients()
        _two_equal_ranks(monkeypatch)
        assert all(map(torch.equal, gradients(), alone))

    def test_backward_twice(self) -> None:
        x = randn(5, 3).requires_grad_()
        y = make_layer()(x)
        once = torch.autograd.grad(y, x, randn(5, 3, seed=1), retain_graph=True)
        twice = torch.autograd.grad(y, x, randn(5, 3, seed=1))
        assert torch.equal(*once, *twice)

    @pytest.mark.parametrize("training", [True, False])
    def test_input_changed_before_backward(self, training: bool) -> None:
        x = randn(5, 3)
        y = make_layer().train(training)(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("host_syncs", [True, False])
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("shape", [(5, 3, 2), (300, 3), (0, 3)])
    def test_the_host_waits_only_for_errors(
        self,
        monkeypatch: pytest.MonkeyPatch,
        shape: tuple[int, ...],
        momentum: float | None,
        host_syncs: bool,
    ) -> None:
        for module in (training_step, composed):
            monkeypatch.setattr(module, "may_sync_host", lambda device: host_syncs)
        _two_equal_ranks(monkeypatch)
        layer = make_layer(momentum=momentum)
        x = randn(*shape).requires_grad_()
        layer(x).sum().backward()
        with _Operations() as operations:
            layer(x).sum().backward()
        waiting = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal")
        waited = operations.seen & {f"aten::{name}" for name in waiting}
        assert bool(waited) == host_syncs
        assert "aten::add_" in operations.seen


def _two_equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be one of two ranks that have the same data."""
    world = Communicator((0, 1), None)
    monkeypatch.setattr(Communicator, "of_key", lambda key: world)
    monkeypatch.setattr(Communicator, "all_gather", lambda _, message: torch.stack([message] * 2))
    monkeypatch.setattr(Communicator, "all_reduce", lambda _, sums: sums.mul_(2))


class _Operations(TorchDispatchMode):
    """The names of the operations that ran, those inside of the layer's own included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.add(func.name().split(".")[0])
        if func.namespace == "syncbn":
            with self:
                return getattr(training_step, func._opname)(*args, **(kwargs or {}))
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
        plain = torch.nn.Sequential(torch.nn.Linear(2, 3), make_layer())
        wrapped = DistributedDataParallel(copy.deepcopy(plain))
        for step in range(2):
            for model in (plain, wrapped):
                model(randn(5, 2, seed=step)).square().sum().backward()
        for ours, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.equal(ours.grad, theirs.grad)
        assert_untouched(wrapped.module[1], plain[1].state_dict())

    def test_autocast(self) -> None:
        linear, layer = torch.nn.Linear(2, 3), make_layer()
        clone = copy.deepcopy(layer)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = linear(randn(5, 2))
            y = layer(hidden)
        assert hidden.dtype == y.dtype == torch.bfloat16
        assert torch.equal(y, clone(hidden))
        assert_untouched(layer, state_of(clone))
        y.float().square().sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32

    def test_checkpoint(self) -> None:
        x = randn(5, 3, 2, 2).requires_grad_()
        layer, theirs = make_layer(), torch.nn.BatchNorm2d(3)
        theirs.load_state_dict(layer.state_dict())
        expected_layer = reference_of(layer)
        for _ in range(2):  # the recomputation is a second training forward
            expected_layer.forward([numpy_of(x)])
        (expected,) = torch.autograd.grad(copy.deepcopy(layer)(x).square().sum(), x)
        for model in (layer, theirs):
            y: Tensor = checkpoint(model, x, use_reentrant=False)
            y.square().sum().backward()
            assert_tracked(model, expected_layer)
            if model is layer:
                assert x.grad is not None
                assert torch.equal(x.grad, expected)
