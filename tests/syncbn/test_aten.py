"""The aten backend on stand-ins for aclnn's kernels, their limits, and the vendor's own sequence.

The vendor's sequence is told from every backend of the layer for Ascend, the twin included.

What needs the stand-ins runs in a process of its own, for their registration would last.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn import reference
from syncbn.conformance.ranks.substitutes import torch as substitutes
from syncbn.reference.ratio import THRESHOLD, ratio
from syncbn.torch.backends import Backend, aten, load
from syncbn.torch.step import DTYPES
from tests.kernels.test_kernels import needs_twin
from tests.syncbn.torch_layers import (
    assert_step,
    assert_tracked,
    assert_within,
    make_layer,
    numpy_of,
    randn,
    reference_of,
)

Process = Callable[..., Any]


@pytest.fixture(scope="module")
def standing_in() -> Iterator[Process]:
    """Calls a function of this module where the stand-ins are installed."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=substitutes.install) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


# Shape and dtype of the input, arguments of the layer.
LAYERS: dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "2-D": ((5, 3), torch.float32, {}),
    "3-D": ((5, 3, 2), torch.float32, {}),
    "4-D": ((3, 3, 2, 4), torch.float32, {}),
    "5-D": ((2, 3, 2, 4, 1), torch.float32, {}),
    "one channel": ((5, 1, 2), torch.float32, {"eps": 0.0}),
    "many": ((64, 5, 128), torch.float32, {}),
    "untracked": ((5, 3, 2), torch.float32, {"track_running_stats": False}),
    "float16": ((5, 3, 2), torch.float16, {}),
    "bfloat16": ((5, 3, 2), torch.bfloat16, {}),
    "float16 throughout": ((5, 3, 2), torch.float16, {"dtype": torch.float16}),
    "bfloat16 throughout": ((5, 3, 2), torch.bfloat16, {"dtype": torch.bfloat16}),
    "float16, many": ((64, 5, 2048), torch.float16, {}),
}
# Mean and standard deviation of the input of 500 values per channel.
DATA = {"mean/std 1e4": (1e4, 1.0), "std 1e-6": (0.0, 1e-6), "both": (1e-2, 1e-6)}


class TestBackend:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", LAYERS)
    def test_layer(self, standing_in: Process, name: str, training: bool) -> None:
        standing_in(check_layer, name, training)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("name", DATA)
    def test_data(self, standing_in: Process, name: str, layout: str) -> None:
        standing_in(check_data, name, layout)

    @pytest.mark.parametrize("training", [True, False])
    def test_not_affine(self, standing_in: Process, training: bool) -> None:
        standing_in(check_not_affine, training)

    @pytest.mark.parametrize("training", [True, False])
    def test_empty(self, standing_in: Process, training: bool) -> None:
        standing_in(check_empty, training)

    def test_constant_channel(self, standing_in: Process) -> None:
        mean, var = standing_in(stats_of, torch.full((5, 3), 1e3))
        assert torch.equal(mean, torch.full((3,), 1e3))
        assert torch.equal(var, torch.zeros(3))
        assert standing_in(check_constant_channel) is None

    def test_variance_below_the_normal_numbers(self, standing_in: Process) -> None:
        """Where the square of invstd is infinite."""
        _, var = standing_in(stats_of, torch.tensor([[-1e-21], [1e-21]]))
        assert var.item() == pytest.approx(1e-42, rel=1e-2, abs=0)

    @pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e18])
    def test_scale(self, standing_in: Process, scale: float) -> None:
        standing_in(check_scale, scale)

    def test_infinite_variance(self, standing_in: Process) -> None:
        _, var = standing_in(stats_of, torch.tensor([[-1e30], [1e30]]))
        assert var.item() == torch.inf

    def test_sums_beyond_float16(self, standing_in: Process) -> None:
        x, dy = randn(4000, 1, dtype=torch.float16), torch.full((4000, 1), 100.0).half()
        sum_dy, _ = standing_in(sums_of, dy, x)
        assert sum_dy.item() == 4e5

    def test_no_float64(self, standing_in: Process) -> None:
        message = r"backend 'aten' has float64 on cuda only, got float64 on cpu: .*'composed'"
        with pytest.raises(TypeError, match=message):
            standing_in(run_float64)

    def test_compile(self, standing_in: Process) -> None:
        standing_in(check_compiled)


def check_layer(name: str, training: bool) -> None:
    shape, dtype, arguments = LAYERS[name]
    layer = make_layer(shape[1], backend="aten", **arguments).train(training)
    assert_step(layer, randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1))


def check_data(name: str, layout: str) -> None:
    mean, std = DATA[name]
    x, dy = mean + std * randn(25, 20, 3), randn(25, 20, 3, seed=1)
    if layout == "contiguous":
        x, dy = x.movedim(-1, 1).contiguous(), dy.movedim(-1, 1).contiguous()
    else:
        x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
    assert_step(make_layer(backend="aten", momentum=1.0), x, dy)


def check_not_affine(training: bool) -> None:
    layer = make_layer(backend="aten", affine=False).train(training)
    expected_layer = reference_of(layer)
    x, dy = randn(5, 3, 2).requires_grad_(), randn(5, 3, 2, seed=1)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    (expected_y,) = expected_layer.forward([numpy_of(x)], training)
    (expected,) = expected_layer.backward([numpy_of(dy)])
    assert_within("y", y, expected_y)
    assert_within("dx", dx, expected.input)
    assert_tracked(layer, expected_layer)


def check_empty(training: bool) -> None:
    layer = make_layer(backend="aten").train(training)
    x = torch.zeros(0, 3, requires_grad=True)
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.zeros_like(y))
    assert [tuple(g.shape) for g in (y, *gradients)] == [(0, 3), (0, 3), (3,), (3,)]
    assert not any(g.any() for g in gradients)


def check_constant_channel() -> None:
    assert_step(make_layer(backend="aten"), torch.full((5, 3), 1e3), randn(5, 3, seed=1))


def check_scale(scale: float) -> None:
    layer = make_layer(backend="aten", momentum=1.0, eps=0.0)
    assert_step(layer, scale * (1 + randn(40, 3)), randn(40, 3, seed=1))


def check_compiled() -> None:
    layer = make_layer(backend="aten")
    again = torch.compile(layer, backend="eager")
    assert torch.equal(layer(randn(5, 3)), again(randn(5, 3)))


def stats_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return aten.stats(x.unsqueeze(-1))


def sums_of(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return aten.reduce_grad(dy.unsqueeze(-1), x.unsqueeze(-1), torch.zeros(x.shape[1]))


def run_float64() -> None:
    make_layer(backend="aten", dtype=torch.float64)(randn(5, 3).double())


class TestWithoutKernels:
    @pytest.mark.parametrize("tracking", [True, False])
    def test_on_cpu(self, tracking: bool) -> None:
        """Eval without running statistics takes the backend, as training does."""
        message = (
            r"backend 'aten' has kernels for cuda and npu \(by torch_npu\), got a tensor on cpu: "
            r"move .* or choose backend='composed'"
        )
        with pytest.raises(RuntimeError, match=message):
            make_layer(backend="aten", track_running_stats=tracking).train(tracking)(randn(5, 3))


class Calls(TorchDispatchMode):
    """Notes the dtypes with which batch-norm operators are called, and answers for them."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, list[Any]] = {}
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not name.startswith("batch_norm"):
            self.others.append(name)
            return func(*args, **(kwargs or {}))
        self.noted[name] = [a.dtype if isinstance(a, Tensor) else a for a in args]
        results = len(func._schema.returns)
        if results == 1:
            return torch.empty_like(args[0])
        wide = torch.float64 if args[0].dtype == torch.float64 else torch.float32
        values = [torch.empty(args[0].shape[1], dtype=wide, device=args[0].device)] * results
        return tuple(values)


class TestCuda:
    """What CUDA's kernels would get: tensors of the dtypes they want.

    x and dy are as they are, except where the kernel would add up images of halves in halves.
    """

    @pytest.mark.parametrize(
        ("dtype", "parameters"),
        [
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
            *((dtype, dtype) for dtype in DTYPES),
        ],
        ids=str,
    )
    def test_calls(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, parameters: torch.dtype
    ) -> None:
        monkeypatch.setattr(aten, "_check_device", lambda kind: None)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        with FakeTensorMode(), Calls() as calls:
            x = torch.empty(4, 3, 2, dtype=dtype, device="cuda")
            weight = torch.empty(3, dtype=parameters, device="cuda")
            of_group = torch.empty(3, device="cuda")
            n = torch.empty((), device="cuda")
            aten.stats(x)
            aten.normalize(x, of_group, of_group, weight, weight)
            aten.reduce_grad(x, x, of_group)
            images = calls.noted.pop("batch_norm_backward_reduce")
            matrix = torch.empty(8, 3, 1, dtype=dtype, device="cuda")
            aten.reduce_grad(matrix, matrix, of_group)
            aten.input_grad(x, x, of_group, of_group, weight, of_group, of_group, n)
        assert calls.noted == {
            "batch_norm_update_stats": [dtype, None, None, 0.0],
            "batch_norm_elemt": [dtype, wide, wide, wide, wide, 0.0],
            "batch_norm_backward_reduce": [dtype, dtype, wide, wide, None, True, False, False],
            "batch_norm_backward_elemt": [dtype, dtype, *[wide] * 5, torch.int32],
        }
        assert images[:2] == [wide, wide]
        assert "sub" not in calls.others


KERNELS = {
    "stats": "Stats",
    "gather": "GatherStatsWithCounts",
    "elemt": "Elemt",
    "reduce": "ReduceBackward",
    "backward": "ElemtBackward",
}
X, DY, ONES = torch.ones(4, 3, 2), torch.ones(4, 3, 2), torch.ones(3)
TABLE, COUNTS = torch.ones(2, 3), torch.tensor([8.0, 8.0])


def _stats(x: Tensor = X) -> Any:
    return torch.batch_norm_stats(x, 1e-5)


def _gather(
    x: Tensor = X, mean: Tensor = TABLE, counts: Tensor = COUNTS, running: Tensor | None = None
) -> Any:
    return torch.batch_norm_gather_stats_with_counts(
        x, mean, mean, running, running, 0.1, 0.5, counts
    )


def _elemt(x: Tensor = X, mean: Tensor = ONES, weight: Tensor | None = None) -> Any:
    return torch.batch_norm_elemt(x, weight, weight, mean, ONES.to(mean.dtype), 0.0)


def _reduce(dy: Tensor = DY, x: Tensor = X, mean: Tensor = ONES, weight: Any = None) -> Any:
    return torch.batch_norm_backward_reduce(dy, x, mean, mean, weight, True, True, True)


def _backward(dy: Tensor = DY, x: Tensor = X, mean: Tensor = ONES, count: Tensor = COUNTS) -> Any:
    return torch.batch_norm_backward_elemt(dy, x, mean, mean, None, mean, mean, count)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "stats, bfloat16": (lambda: _stats(X.bfloat16()), "input .* got torch.bfloat16"),
    "stats, float64": (lambda: _stats(X.double()), "input .* got torch.float64"),
    "stats, 1-D": (lambda: _stats(ONES), "2 to 8 dimensions, got 1"),
    "stats, 9-D": (lambda: _stats(torch.ones((1,) * 9)), "2 to 8 dimensions, got 9"),
    "stats, no channel": (lambda: _stats(X[:, :0]), "channel size"),
    "gather, empty input": (lambda: _gather(X[:0]), "input .*empty"),
    "gather, int32 counts": (lambda: _gather(counts=COUNTS.int()), "counts .*int32"),
    "gather, count of 0": (lambda: _gather(counts=COUNTS * 0), "positive integers, got .0.0"),
    "gather, half a count": (lambda: _gather(counts=COUNTS / 16), "positive integers, got .0.5"),
    "gather, another rank": (lambda: _gather(counts=COUNTS[:1]), r"mean .*\(1, 3\)"),
    "gather, invstd of 0": (lambda: _gather(mean=0 * TABLE), "invstd should be greater than 0"),
    "gather, short running": (lambda: _gather(running=ONES[:2]), r"runningMean .*\(3,\), got \(2"),
    "gather, float64": (lambda: _gather(running=ONES.double()), "runningMean .*float64"),
    "elemt, statistics of float32 with halves": (lambda: _elemt(X.half()), "mean .*float16, got"),
    "elemt, weight of float16": (lambda: _elemt(weight=ONES.half()), "weight .*float32, got"),
    "elemt, float64": (lambda: _elemt(X.double()), "input .*float64"),
    "elemt, channels": (lambda: _elemt(mean=ONES[:2]), r"mean .*shape \(3,\), got \(2,\)"),
    "elemt, no channel": (lambda: _elemt(X[:, :0]), "channel size"),
    "reduce, dtypes": (lambda: _reduce(DY.half()), "gradOut .*float32, got torch.float16"),
    "reduce, shapes": (lambda: _reduce(DY[:2]), r"gradOut .*\(4, 3, 2\), got \(2, 3, 2\)"),
    "reduce, float64": (lambda: _reduce(mean=ONES.double()), "mean .*float64"),
    "reduce, int32 weight": (lambda: _reduce(weight=ONES.int()), "weight .*int32"),
    "backward, int64 count": (lambda: _backward(count=COUNTS.long()), "counter .*int64"),
    "backward, shapes": (lambda: _backward(DY[:2]), r"gradOut .*got \(2, 3, 2\)"),
    "backward, channels": (lambda: _backward(mean=ONES[:2]), r"mean .*got \(2,\)"),
    "backward, float64": (lambda: _backward(x=X.double()), "input .*float64"),
}


class TestLimits:
    """The stand-ins refuse what aclnn does, and lose what it loses."""

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, standing_in: Process, name: str) -> None:
        kernel = KERNELS[name.partition(",")[0]]
        message = rf"call aclnnBatchNorm{kernel} failed, error code is 161002 .*{REFUSED[name][1]}"
        with pytest.raises(RuntimeError, match=message):
            standing_in(run_refused, name)

    @pytest.mark.parametrize("call", [_stats, _gather, _elemt, _reduce, _backward])
    def test_taken(self, standing_in: Process, call: Callable[[], Any]) -> None:
        assert standing_in(call) is not None

    def test_empty(self, standing_in: Process) -> None:
        mean, invstd = standing_in(_stats, X[:0])
        assert torch.equal(mean, torch.zeros(3))
        assert invstd.isnan().all()
        assert standing_in(_elemt, X[:0]).shape == (0, 3, 2)
        assert standing_in(_reduce, DY[:0], X[:0])[0].isnan().all()

    def test_dtypes_of_results(self, standing_in: Process) -> None:
        half, whole = torch.float16, torch.float32
        for mean, expected in ((ONES, whole), (ONES.half(), half)):
            results = standing_in(_reduce, DY.half(), X.half(), mean)
            assert [r.dtype for r in results] == [expected] * 4
        assert [r.dtype for r in standing_in(_stats, X.half())] == [whole] * 2
        results = standing_in(_gather, X.half(), TABLE.half())
        assert [r.dtype for r in results] == [half] * 2
        assert standing_in(_elemt, X.bfloat16(), ONES.bfloat16()).dtype == torch.bfloat16
        assert standing_in(_backward, DY.half(), X.half()).dtype == half

    def test_float16_sums_overflow(self, standing_in: Process) -> None:
        x = torch.full((1000, 3, 1), 100.0).half()
        assert standing_in(_reduce, x, x, ONES.half())[0].isinf().all()

    def test_elemt_takes_eps_out_and_in_again(self, standing_in: Process) -> None:
        y = standing_in(_normalized, 0.5 * X, 0.25 * ONES, 3 * ONES, 0.01)
        assert torch.allclose(y, torch.full_like(X, (0.5 - 0.25) * 3), rtol=1e-6)

    def test_a_variance_drowns_in_eps(self, standing_in: Process) -> None:
        _, invstd = standing_in(_stats, torch.tensor([[-1e-7], [1e-7]]))
        rebuilt = 1 / invstd.double().square() - 1e-5
        assert abs(rebuilt.item() - 1e-14) > 1e-14


def _normalized(x: Tensor, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    return torch.batch_norm_elemt(x, None, None, mean, invstd, eps)


def run_refused(name: str) -> None:
    REFUSED[name][0]()


@pytest.mark.parametrize("backend", ["composed", "aten", pytest.param("twin", marks=needs_twin)])
class TestVendor:
    """The vendor's sequence leaves the bound where no backend does, aten on the same kernels."""

    def test_is_right_on_plain_data(self, standing_in: Process, backend: str) -> None:
        ratios = standing_in(ratios_of, backend, 0.0, 1.0)
        assert all(value <= THRESHOLD for found in ratios.values() for value in found.values())

    def test_running_var(self, standing_in: Process, backend: str) -> None:
        """Raw moments lose it at mean/std 1e4, and invstd where var is far below eps."""
        ratios = standing_in(ratios_of, backend, 1e4, 1.0)
        assert ratios["ours"]["running_var"] <= THRESHOLD < ratios["moments"]["running_var"]
        ratios = standing_in(ratios_of, backend, 1e-2, 1e-6)
        assert ratios["ours"]["running_var"] <= THRESHOLD < ratios["vendor"]["running_var"]

    def test_gradients(self, standing_in: Process, backend: str) -> None:
        ratios = standing_in(ratios_of, backend, 1e4, 1.0)
        for name in ("dx", "grad_weight"):
            assert ratios["ours"][name] <= THRESHOLD < ratios["vendor"][name]


def ratios_of(backend: str, mean: float, std: float) -> dict[str, dict[str, float]]:
    """The largest errors over their bounds, on two ranks, with dy orthogonal to 1 and x on each.

    "ours" are those of the backend;
    "vendor" is the sequence of torch.nn.SyncBatchNorm and with it of torch_npu from 2.12 on;
    "moments" is that of torch_npu before, whose variance was mean(x^2) - mean(x)^2.
    """
    shards = (mean + std * randn(2, 250, 3, 1, dtype=torch.float64)).float()
    gradients = _orthogonal(shards, randn(2, 250, 3, 1, dtype=torch.float64, seed=1)).float()
    expected_layer = reference.SyncBatchNorm(3, momentum=1.0)
    expected_layer.forward([numpy_of(x) for x in shards])
    expected = expected_layer.backward([numpy_of(dy) for dy in gradients])
    results: dict[str, dict[str, Sequence[Tensor]]] = {
        "ours": _by_backend(load(backend), shards, gradients),
        "vendor": _by_vendor(shards, gradients),
        "moments": {"running_var": [_unbiased_by_moments(shards)]},
    }
    bounded = {
        "running_var": [expected_layer.running_var],
        "dx": [g.input for g in expected],
        "grad_weight": [g.weight for g in expected],
    }
    return {
        who: {
            name: max(
                float(ratio(numpy_of(got), exact).max())
                for got, exact in zip(values, bounded[name], strict=True)
            )
            for name, values in found.items()
        }
        for who, found in results.items()
    }


def _orthogonal(x: Tensor, dy: Tensor) -> Tensor:
    """dy (shards, N, C, 1), with every second row 0, less what of it lies along 1 and x."""
    kept = torch.zeros_like(dy)
    kept[:, ::2] = 1
    away = x.double() - x.double().mean(1, keepdim=True)
    basis = torch.cat([kept, away * kept], -1).movedim(1, 2)
    columns = (dy * kept).movedim(1, 2)
    columns = columns - basis @ torch.linalg.lstsq(basis, columns).solution
    return columns.movedim(2, 1).contiguous()


def _by_backend(ops: Backend, shards: Tensor, gradients: Tensor) -> dict[str, Sequence[Tensor]]:
    means, variances = zip(*(ops.stats(x) for x in shards), strict=True)
    counts = torch.tensor([250.0, 250.0])
    mean, var, invstd, n = ops.combine(torch.stack(means), torch.stack(variances), counts, 1e-5)
    sums = [ops.reduce_grad(dy, x, mean) for dy, x in zip(gradients, shards, strict=True)]
    sum_dy, sum_dy_xmu = (torch.stack(s).sum(0) for s in zip(*sums, strict=True))
    return {
        "running_var": [var * (n / (n - 1))],
        "grad_weight": [s * invstd for _, s in sums],
        "dx": [
            ops.input_grad(dy, x, mean, invstd, None, sum_dy, sum_dy_xmu, n)
            for dy, x in zip(gradients, shards, strict=True)
        ],
    }


def _by_vendor(shards: Tensor, gradients: Tensor) -> dict[str, Sequence[Tensor]]:
    """As torch.nn.modules._functions.SyncBatchNorm calls the kernels."""
    means, invstds = zip(*(torch.batch_norm_stats(x, 1e-5) for x in shards), strict=True)
    running_mean, running_var = torch.ones(2, 3)
    counts = torch.tensor([250.0, 250.0])
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        shards[0],
        torch.stack(means),
        torch.stack(invstds),
        running_mean,
        running_var,
        1.0,
        1e-5,
        counts,
    )
    sums = [
        torch.batch_norm_backward_reduce(dy, x, mean, invstd, torch.ones(3), True, True, True)
        for dy, x in zip(gradients, shards, strict=True)
    ]
    sum_dy, sum_dy_xmu, _, _ = (torch.stack(s).sum(0) for s in zip(*sums, strict=True))
    return {
        "running_var": [running_var],
        "grad_weight": [weight for _, _, weight, _ in sums],
        "dx": [
            torch.batch_norm_backward_elemt(
                dy, x, mean, invstd, torch.ones(3), sum_dy, sum_dy_xmu, counts.int()
            )
            for dy, x in zip(gradients, shards, strict=True)
        ],
    }


def _unbiased_by_moments(shards: Tensor) -> Tensor:
    """Products and sums rounded to float32, sums made in float64, as the stand-ins' are."""
    n = shards.shape[0] * shards.shape[1]
    totals, squares = (v.double().sum((0, 1, 3)).float() for v in (shards, shards * shards))
    mean = totals / n
    return (squares / n - mean * mean) * (n / (n - 1))
