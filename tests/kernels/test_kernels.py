"""The kernels: how work is divided, what is launched, the twin, the backends, the ladder.

The tests of the twin need its library, which `make kernels` compiles. Those of the ladder's logic
need Triton.
"""

from __future__ import annotations

import ast
import importlib
import io
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

import audit.__main__ as command
from audit import ladder
from audit.ladder import toolchain, torch_npu
from syncbn import kernels, reference
from syncbn.conformance import runner, targets
from syncbn.conformance.case import Case, Step
from syncbn.conformance.pool import RankPool
from syncbn.conformance.ranks import torch as torch_ranks
from syncbn.kernels import twin
from syncbn.kernels.operations import Operations
from syncbn.kernels.plan import TILE, WIDTHS, all_tiles, plan
from syncbn.kernels.variants import DTYPES, TILED, Variant, variants
from syncbn.reference import bounds, formulas
from syncbn.reference.ratio import THRESHOLD
from syncbn.torch.backends import Running
from tests.syncbn.torch_layers import (
    assert_step,
    assert_within,
    dtype_name,
    make_layer,
    numpy_of,
    randn,
    state_of,
)

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
OF_TRITON = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
}
LAYOUTS = ("contiguous", "channels_last", "(N, C)")

SOURCE = Path(kernels.__file__).with_name("batch_norm.py")
# The arguments of every kernel. They are read from the source, because its import needs Triton.
KERNELS = {
    node.name: [argument.arg for argument in node.args.args]
    for node in ast.parse(SOURCE.read_text()).body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
}

needs_twin = pytest.mark.skipif(
    not twin.LIBRARY.is_file(), reason="no twin.so in .toolchain: make kernels compiles it"
)
derandomized = settings(derandomize=True, deadline=None, max_examples=200)

# At the edges of tiles and in between.
EDGES = [width + more for width in WIDTHS for more in (-1, 0, 1)]
SIZES = st.integers(1, 300) | st.sampled_from(EDGES) | st.integers(1, 2**20)
SHAPES = st.tuples(SIZES, SIZES, st.sampled_from([1, 2]) | SIZES)
TARGETS = st.sampled_from(sorted(TILE))
CORES = st.sampled_from([1, 3, 40, 48, 1056, 2**17])


class TestPlan:
    @derandomized
    @given(SHAPES, TARGETS, CORES)
    def test_every_tile_is_taken_once(
        self, shape: tuple[int, int, int], target: str, cores: int
    ) -> None:
        rows, channels, spatial = shape
        tiles, per_part, parts, programs = plan(shape, target, cores)
        assert tiles in all_tiles(target)
        if tiles.columns:
            blocks, count = _ceil(channels, tiles.block), _ceil(rows, tiles.block_r)
        else:
            blocks = channels
            count = _ceil(rows, tiles.block_r) * _ceil(spatial, tiles.block)
        assert (parts - 1) * per_part < count <= parts * per_part
        assert programs == min(blocks * parts, cores, 65535)
        assert per_part <= 256
        busiest = _ceil(blocks * parts, programs) * per_part
        # Never worse than one part, or as many as there are programs.
        for other in (_ceil(count, 256), min(count, max(1, cores // blocks))):
            if (other_part := _ceil(count, other)) <= 256:
                items = blocks * _ceil(count, other_part)
                assert busiest * 0.9 <= _ceil(items, min(cores, 65535)) * other_part

    def test_the_fewest_parts_that_keep_the_programs_busy(self) -> None:
        for shape, parts, programs in (
            (
                (32, 256, 3136),
                1,
                40,
            ),  # 256 items of 40 programs: 7 rounds, of which the last has 16
            ((32, 64, 3136), 3, 40),  # 64 would leave 16 of 80 idle
            ((32, 20, 3136), 2, 40),
            ((100_352, 64, 1), 40, 40),
            ((2, 3, 16), 1, 3),
        ):
            cut = plan(shape, "ascend", 40)
            assert (cut.parts, cut.programs) == (parts, programs), shape

    @derandomized
    @given(SHAPES, TARGETS)
    def test_tiles(self, shape: tuple[int, int, int], target: str) -> None:
        _, channels, spatial = shape
        tiles = plan(shape, target, 1).tiles
        assert tiles.columns == (spatial == 1)
        values = channels if tiles.columns else spatial
        widths = [t.block for t in all_tiles(target) if t.columns == tiles.columns]
        assert tiles.block == min((w for w in widths if w >= values), default=max(widths))

    @pytest.mark.parametrize("target", TILE)
    def test_all_tiles(self, target: str) -> None:
        every = all_tiles(target)
        chosen = {plan((5, size, 1), target, 8).tiles for size in range(1, 1025)}
        chosen |= {plan((5, 7, size), target, 8).tiles for size in range(1, 1025)}
        assert set(every) == chosen
        assert len(every) == len(chosen)
        assert all(tiles.block_r * tiles.block == TILE[target] for tiles in every)
        assert all(tiles.block_r >= 16 for tiles in every if tiles.columns)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class Launches:
    """Records what is launched, and checks it against the kernel's signature."""

    def __init__(self, target: str = "ascend", cores: int = 3) -> None:
        self.launched: list[tuple[Variant, list[Any]]] = []
        self.operations = Operations(self._launch, lambda device: (target, cores))

    def _launch(self, variant: Variant, programs: int, arguments: list[Any]) -> None:
        signature = variant.signature(KERNELS[variant.kernel])
        for (name, kind), argument in zip(signature.items(), arguments, strict=True):
            if kind.startswith("*"):
                assert argument.dtype == OF_TRITON[kind[1:]], name
                assert argument.is_contiguous(), name
            else:
                assert type(argument) is {"i32": int, "fp32": float}[kind], name
        assert 1 <= programs <= 65535
        self.launched.append((variant, arguments))


class TestVariants:
    @pytest.mark.parametrize("target", TILE)
    def test_symbols(self, target: str) -> None:
        symbols = [variant.symbol for variant in variants(target)]
        assert len(set(symbols)) == len(symbols)
        assert all(symbol.isidentifier() for symbol in symbols)
        assert {variant.kernel for variant in variants(target)} == set(KERNELS)

    @pytest.mark.parametrize("target", TILE)
    def test_every_argument_has_a_type_or_a_value(self, target: str) -> None:
        for variant in variants(target):
            names = KERNELS[variant.kernel]
            signature = variant.signature(names)
            assert [*signature, *variant.constants] == names
            assert {name for name in names if name.endswith("_ptr")} == {
                name for name, kind in signature.items() if kind.startswith("*")
            }

    @derandomized
    @given(SHAPES, TARGETS, CORES, st.sampled_from(FLOATS))
    def test_what_is_launched_is_there(
        self, shape: tuple[int, int, int], target: str, cores: int, dtype: torch.dtype
    ) -> None:
        launches = Launches(target, cores)
        x = torch.empty(shape, dtype=dtype, device="meta")
        _every_operation(launches.operations, x, torch.float32)
        launched = [variant for variant, _ in launches.launched]
        assert {variant.kernel for variant in launched} == set(KERNELS)
        assert set(launched) <= set(variants(target))
        assert all(OF_TRITON[v.dtype] == dtype for v in launched if v.kernel in TILED)

    def test_gradients_of_a_dtype_that_the_kernel_does_not_write(self) -> None:
        """On CUDA with SYNCBN_DEBUG=1 a layer without parameters has float64 statistics."""
        launches = Launches("cuda")
        x, vector = torch.empty(4, 3, 5, device="meta"), torch.empty(3, device="meta")
        _, *gradients = launches.operations.pack_grad(x, x, vector, vector, torch.float64)
        assert [gradient.dtype for gradient in gradients] == [torch.float64] * 2


def _every_operation(
    operations: Operations, x: Tensor, statistics_dtype: torch.dtype
) -> dict[str, Any]:
    """The results on input (R, C, S), with statistics that are views, as the layer's may be."""
    channels = x.shape[1]
    table = torch.ones(2, 2 * channels + 3, dtype=statistics_dtype, device=x.device)
    means, variances = table[:, 3:].view(-1, 2, channels).unbind(1)
    vector = torch.ones(2 * channels, dtype=statistics_dtype, device=x.device)[::2]
    buffers = torch.ones(2, channels, dtype=x.dtype, device=x.device).unbind(0)
    steps = torch.ones((), dtype=torch.int64, device=x.device)
    return {
        "stats": operations.stats(x),
        "pack_stats": operations.pack_stats(x, vector[:3]),
        "combine": operations.combine(means, variances, table[:, 1], 1e-5),
        "normalize": operations.normalize(x, vector, vector, vector.half(), None),
        "combine_ranks": [
            operations.combine_ranks(
                table[:, 1:], None, True, 1e-5, Running(buffers[0], buffers[1], steps, momentum)
            )
            for momentum in (0.1, None)
        ],
        "reduce_grad": operations.reduce_grad(x, x, vector),
        "pack_grad": operations.pack_grad(x, x, vector, vector, x.dtype),
        "input_grad": operations.input_grad(
            x, x, vector, vector, None, vector, vector, vector.sum()
        ),
    }


class TestOperations:
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_results(self, dtype: torch.dtype) -> None:
        found = _every_operation(
            Launches().operations, torch.ones(5, 3, 2, dtype=dtype), torch.float64
        )
        for name, shape in (("normalize", (5, 3, 2)), ("input_grad", (5, 3, 2))):
            assert (found[name].shape, found[name].dtype) == (shape, dtype)
        for name, shapes in (
            ("stats", [3, 3]),
            ("combine", [3, 3, 3, None]),
            ("reduce_grad", [3, 3]),
        ):
            assert [list(t.shape) for t in found[name]] == [[s] if s else [] for s in shapes]
            assert {t.dtype for t in found[name]} == {torch.float32}

    @pytest.mark.parametrize("name", ["stats", "normalize", "reduce_grad", "input_grad"])
    def test_refused(self, name: str) -> None:
        x, vector = torch.ones(5, 3, 2, dtype=torch.float64), torch.ones(3)
        more = {
            "stats": (),
            "normalize": (vector, vector, None, None),
            "reduce_grad": (x, vector),
            "input_grad": (x, vector, vector, None, vector, vector, torch.ones(())),
        }
        launches = Launches()
        message = r"input must have .* torch\.float32, .* torch\.bfloat16, got torch\.float64"
        with pytest.raises(TypeError, match=message):
            getattr(launches.operations, name)(x, *more[name])
        assert launches.launched == []

    def test_values_are_kept(self) -> None:
        """They are converted, and each is in the kernel's place for it."""
        launches = Launches()
        table = torch.arange(14.0, dtype=torch.float64).view(2, 7)
        launches.operations.combine(table[:, :3], table[:, 3:6], table[:, 6], 0.25)
        ((variant, arguments),) = launches.launched
        assert variant.running == "none"
        messages = torch.cat([torch.zeros(2, 1), table[:, 6:], table[:, :6]], 1)
        assert torch.equal(arguments[0], messages.float())
        assert arguments[-7:] == [2, 3, 2, 0, 0.25, 0.0, 1.0]

    def test_weights_of_running_statistics(self) -> None:
        """1 - momentum is formed on the host: in float32, 1 - 0.999 has four digits left."""
        launches = Launches()
        running = Running(torch.ones(3), torch.ones(3), torch.tensor(1), 0.999)
        launches.operations.combine_ranks(torch.ones(2, 8), None, True, 0.25, running)
        ((variant, arguments),) = launches.launched
        assert variant.running == "moving"
        assert arguments[-7:] == [2, 3, 2, 0, 0.25, 0.999, 1 - 0.999]
        assert [id(t) for t in arguments[5:8]] == [id(t) for t in running[:3]]

    def test_a_whole_eps(self) -> None:
        """It is converted to a float."""
        table = torch.ones(2, 3)
        Launches().operations.combine(table, table, table[:, 0], 1)


# Mean and standard deviation of the layer's input.
DATA = st.one_of(
    st.tuples(st.floats(-1e4, 1e4), st.just(1.0)),
    st.integers(-18, 18).map(lambda e: (10.0**e, 10.0**e)),
    st.tuples(st.just(0.0) | st.floats(1e-3, 1e3), st.just(0.0)),
)
POISON = st.none() | st.sampled_from([np.inf, -np.inf, np.nan])


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """x and dy in one of LAYOUTS, of up to 20 000 values."""
    layout = draw(st.sampled_from(LAYOUTS), "layout")
    sizes, left = [1, 1, 1], 20_000
    for axis in draw(st.permutations(range(2 if layout == "(N, C)" else 3))):
        edges = [edge for edge in EDGES if edge <= left]
        sizes[axis] = draw(st.integers(1, min(left, 40)) | st.sampled_from(edges or [1]))
        left //= sizes[axis]
    assume(sizes[0] * sizes[2] > 1)
    dtype = draw(st.sampled_from(FLOATS))
    mean, std = draw(DATA)
    if dtype == torch.float16:  # whose range is smaller
        assume(std == 0 or 1e-3 <= std <= 1e3)
    seed = draw(st.integers(0, 2**20))
    x = mean + std * randn(*sizes, dtype=torch.float64, seed=seed)
    if value := draw(POISON):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    x, dy = (
        x.to(dtype),
        (draw(st.sampled_from([0.0, 3.0])) + randn(*sizes, seed=seed + 1)).to(dtype),
    )
    return _laid_out(x, layout), _laid_out(dy, layout)


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """t (N, C, S) in one of LAYOUTS."""
    if layout == "(N, C)":
        return t.squeeze(2)
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else t


@needs_twin
class TestTwin:
    @settings(derandomized, max_examples=500)
    @given(batches(), st.sampled_from([0.0, 1e-5]), st.booleans())
    def test_step(self, batch: tuple[Tensor, Tensor], eps: float, training: bool) -> None:
        x, dy = batch
        layer = make_layer(x.shape[1], backend="twin", eps=eps, momentum=1.0).train(training)
        with np.errstate(all="ignore"):  # where x is poisoned
            matrix = numpy_of(x.movedim(1, 0).flatten(1))
            u = reference.Precision(dtype_name(x.dtype)).u
            var = bounds.of_stats(matrix, *formulas.stats(matrix), u).var
            assume(not (var.bound >= var.value + eps).any())  # else no result is defined
            assert_step(layer, x, dy)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize(
        "shape", [(5000, 12, 2), (65_000, 3), (1, 12, 70_000)], ids=lambda s: f"{len(s)}-D"
    )
    def test_more_tiles_than_are_added_up_at_a_time(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        x, dy = 3 + randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
        assert_step(make_layer(shape[1], backend="twin"), x, dy)

    @pytest.mark.parametrize("first", [1, 40_000, 60_000])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_tiles_whose_means_differ(self, layout: str, first: int) -> None:
        """All values before `first` are one constant, and the others another; then a ramp."""
        values = torch.full((65_000,), 1e4 / 3)
        values[first:] = -7.7
        ramp = torch.linspace(1e4, 1e4 + 3, 65_000)
        x = torch.stack([values, ramp])
        x = x.T if layout == "(N, C)" else _laid_out(x.view(2, 65, 1000).transpose(0, 1), layout)
        assert_step(make_layer(2, backend="twin", momentum=1.0), x, randn(*x.shape))

    @pytest.mark.parametrize("arguments", [{"affine": False}, {"track_running_stats": False}])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_nothing_learned_or_tracked(self, layout: str, arguments: dict[str, Any]) -> None:
        x = _laid_out(randn(9, 3, 5), layout)
        ours, theirs = (make_layer(backend=name, **arguments) for name in ("twin", "composed"))
        for layer in (ours, theirs):
            layer(x)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(state_of(ours), state_of(theirs))

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_parameters_of_half_precision(self, dtype: torch.dtype) -> None:
        layer = make_layer(backend="twin", dtype=dtype)
        y, dx = assert_step(layer, randn(9, 3, 5, dtype=dtype), randn(9, 3, 5, dtype=dtype, seed=1))
        assert y.dtype == dx.dtype == dtype

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_bitwise_the_same_whatever_was_in_memory(self, layout: str, dtype: torch.dtype) -> None:
        size = 1 if layout == "(N, C)" else 37
        x, dy = (_laid_out(3 + randn(301, 17, size, dtype=dtype, seed=s), layout) for s in (0, 1))

        def results() -> list[Tensor]:
            layer = make_layer(17, backend="twin")
            given_ = x.clone().requires_grad_()
            y = layer(given_)
            return [y, *torch.autograd.grad(y, [given_, *layer.parameters()], dy), *layer.buffers()]

        once = results()
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            assert torch.empty(3).isnan().all()
            again = results()
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(map(torch.equal, once, again))

    def test_combine(self) -> None:
        """Counts of 0 are ignored, whatever their parts hold; there are several blocks."""
        channels = 1100
        parts = [5 + randn(channels, size, dtype=torch.float64, seed=size) for size in (1, 40, 300)]
        whole = numpy_of(torch.cat(parts, dim=1))
        expected = bounds.of_combine(whole, *formulas.stats(whole), 3, 2.0**-24)
        moments = [formulas.stats(numpy_of(part)) for part in parts]
        nothing = np.full(channels, np.nan)
        moments = [(nothing, nothing), moments[0], (nothing, nothing + np.inf), *moments[1:]]
        means, variances = (torch.from_numpy(np.stack(m)) for m in zip(*moments, strict=True))
        counts = torch.tensor([0.0, 1.0, 0.0, 40.0, 300.0])
        mean, var, invstd, n = twin.operations().combine(means, variances, counts, 1e-5)
        assert_within("mean", mean, expected.mean)
        assert_within("var", var, expected.var)
        torch.testing.assert_close(invstd, (var + 1e-5).rsqrt())
        assert n == 341

    def test_combine_nothing(self) -> None:
        nothing = torch.full((2, 3), torch.nan)
        mean, var, invstd, n = twin.operations().combine(nothing, nothing, torch.zeros(2), 0.25)
        assert torch.equal(mean, torch.zeros(3))
        assert torch.equal(var, torch.zeros(3))
        assert torch.equal(invstd, torch.full((3,), 2.0))
        assert n == 0

    def test_parts_that_agree_have_their_mean(self) -> None:
        means, counts = torch.full((7, 3), 0.1), torch.arange(7.0)
        mean, var, _, _ = twin.operations().combine(means, 0 * means, counts, 0.25)
        assert torch.equal(mean, means[0])
        assert torch.equal(var, torch.zeros(3))

    def test_float64(self) -> None:
        layer = make_layer(backend="twin", dtype=torch.float64)
        x = randn(5, 3, dtype=torch.float64)
        with pytest.raises(TypeError, match=r"input must have .* got torch\.float64"):
            layer(x)
        assert layer.eval()(x).dtype == torch.float64  # by PyTorch's own batch normalization


class TestTwinLibrary:
    def test_missing(self, tmp_path: Path) -> None:
        library = tmp_path / "twin.so"
        with pytest.raises(RuntimeError, match=f"'twin' needs {library}: make kernels compiles it"):
            twin.operations(library)

    @pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
    def test_of_other_kernels(self, tmp_path: Path) -> None:
        for name, sources in (("other", "0123"), ("same", twin.sources())):
            program = f'const char *twin_sources = "{sources}";'
            command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / name)]
            subprocess.run(command, input=program, text=True, check=True)
        with pytest.raises(RuntimeError, match="other was compiled from other kernels: make kern"):
            twin.operations(tmp_path / "other")
        twin.operations(tmp_path / "same")

    @pytest.mark.parametrize(
        "tensor", [torch.ones(3, 2).t(), torch.ones(3, device="meta")], ids=["strided", "elsewhere"]
    )
    def test_what_it_cannot_read_is_refused(self, tensor: Tensor) -> None:
        with pytest.raises(ValueError, match="contiguous CPU tensors"):
            twin._words(tensor)


@pytest.fixture(scope="module")
def interpreting() -> Iterator[Callable[..., None]]:
    """Calls a function of this module in a process that interprets kernels."""
    _needs_triton()
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_interpret) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


class TestTriton:
    def test_on_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _needs_triton()
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        message = (
            r"backend 'triton' runs on npu and cuda \(on cpu with TRITON_INTERPRET=1\), got a "
            r"tensor on cpu: move .* or choose backend='composed'"
        )
        layer = make_layer(backend="triton")
        with pytest.raises(RuntimeError, match=message):
            layer(randn(5, 3))

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)
        for module in ("syncbn.torch.backends.triton", "syncbn.kernels.batch_norm"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        message = "'triton' needs .*, which is not installed: pip install triton-ascend"
        with pytest.raises(RuntimeError, match=message):
            make_layer(backend="triton")

    def test_a_broken_one_is_not_called_missing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "triton.py").write_text("import no_such_module_of_triton")
        monkeypatch.syspath_prepend(tmp_path)
        for module in ("syncbn.torch.backends.triton", "syncbn.kernels.batch_norm", "triton"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(ModuleNotFoundError, match="no_such_module_of_triton"):
            make_layer(backend="triton")

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_interpreted(
        self, interpreting: Callable[..., None], dtype: torch.dtype, layout: str
    ) -> None:
        interpreting(check_interpreted, dtype, layout)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("towards", [-np.inf, np.inf], ids=["less", "more"])
    def test_division_that_is_not_exact(
        self, interpreting: Callable[..., None], towards: float, layout: str
    ) -> None:
        """On CUDA a quotient is off by some roundings: a / a need not be 1."""
        interpreting(check_division, towards, layout)


def _needs_triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton-ascend")


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def check_interpreted(dtype: torch.dtype, layout: str) -> None:
    size = 1 if layout == "(N, C)" else 4
    x, dy = (_laid_out(3 + randn(9, 5, size, dtype=dtype, seed=s), layout) for s in (0, 1))
    layer = make_layer(5, backend="triton")
    for training in (True, False):
        assert_step(layer.train(training), x, dy)


def check_division(towards: float, layout: str) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    exact = InterpreterBuilder.create_fdiv

    def divide(self: Any, a: Any, b: Any) -> Any:
        quotient = exact(self, a, b)
        quotient.data = np.nextafter(quotient.data, np.float32(towards), dtype=np.float32)
        return quotient

    InterpreterBuilder.create_fdiv = divide
    try:
        constant = torch.full((49_000, 3, 1) if layout == "(N, C)" else (70, 3, 700), 1e4 / 3)
        x = _laid_out(torch.cat([constant, constant + randn(*constant.shape)], 1), layout)
        layer = make_layer(6, backend="triton", momentum=1.0)
        assert_step(layer, x, randn(*x.shape, seed=1))
    finally:
        InterpreterBuilder.create_fdiv = exact


class TestRung:
    """The conformance suite on the backends that stand for Ascend."""

    @staticmethod
    def case(dtype: str) -> Case:
        step = Step(((4, 3, 5),), dtype=dtype, layout="channels_last")
        layer = {"num_features": 3, "dtype": dtype}
        return Case("FWD-1", dtype, 1, layer, (step,), ("y", "grad_input", "running_var"))

    @pytest.mark.parametrize("backend", ["aten", "triton", pytest.param("twin", marks=needs_twin)])
    def test_on_cpu(self, backend: str) -> None:
        if backend == "triton":
            _needs_triton()
        with RankPool(targets.parse("syncbn.torch", backend=backend), 1) as pool:
            single, double = (
                runner.run_case(pool, self.case(dtype)).verdict for dtype in ("float32", "float64")
            )
        assert single.verdict == "pass", single.message
        assert double.verdict == "unsupported"
        assert str(double.message).endswith("no float64")

    @pytest.mark.parametrize(("device", "there"), [("npu", False), ("cuda", True), ("cpu", True)])
    def test_float64(self, monkeypatch: pytest.MonkeyPatch, device: str, there: bool) -> None:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # by the launcher
        for name in ("SYNCBN_BACKEND", "GLOO_SOCKET_IFNAME"):  # which a rank sets
            monkeypatch.setenv(name, "")
        monkeypatch.setattr(torch_ranks, "_device", lambda *_: SimpleNamespace(type=device))
        target = targets.parse("syncbn.torch", device, "composed")
        rank = torch_ranks.TorchRank(target.document, 0, 1, 0)
        assert rank.unsupported(self.case("float32")) is None
        assert (rank.unsupported(self.case("float64")) is None) == there


@pytest.fixture
def check() -> Any:
    """The module of the ladder, which imports Triton."""
    _needs_triton()
    return importlib.import_module("audit.ladder.rungs")


@pytest.fixture
def planted() -> Any:
    _needs_triton()
    return importlib.import_module("audit.ladder.planted")


class TestPlanted:
    def test_every_fault_has_its_line(self, planted: Any) -> None:
        text = SOURCE.read_text()
        assert planted.FAULTS
        for fault in planted.FAULTS.values():
            assert text.count(fault.line) == 1
            assert fault.planted not in text

    def test_faulty_kernels(self, planted: Any, tmp_path: Path) -> None:
        for name, fault in planted.FAULTS.items():
            kernels = planted.faulty_kernels(name, tmp_path)
            (source,) = tmp_path.glob("*.py")
            assert source.read_text() == SOURCE.read_text().replace(fault.line, fault.planted)
            assert all(hasattr(kernels, kernel) for kernel in KERNELS)

    def test_a_line_that_is_gone(
        self, planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for line in ("no such line", "@triton.jit"):
            monkeypatch.setitem(planted.FAULTS, "gone", planted.Fault(line, "other"))
            with pytest.raises(ValueError, match=f"fault 'gone' must have one line .*{line}"):
                planted.faulty_kernels("gone", tmp_path)


class TestCheck:
    """The check, with rungs whose results are given."""

    @pytest.fixture
    def run_rung(
        self, check: Any, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., tuple[bool, list[str]]]:
        """Runs a rung with these results; whether all holds, and the lines that were printed."""

        def run_rung(**found: Any) -> tuple[bool, list[str]]:
            rungs = {"twin": lambda: check.Found(**({"cells": [], "refusals": []} | found))}
            monkeypatch.setattr(check, "RUNGS", rungs | {"other": None})
            text = io.StringIO()
            good = check.check(["twin"], Console(file=text, width=200))
            return good, [line.rstrip() for line in text.getvalue().splitlines()]

        return run_rung

    def test_all_holds(self, check: Any, run_rung: Any) -> None:
        cells = [
            check.Cell("stats", "planes", "fp32", "twin", measure=0.5),
            check.Cell("combine", "channels", "fp32", "twin"),
        ]
        finding = torch_npu.Finding("2.0", "aten::op", "registered", "")
        good, lines = run_rung(
            cells=cells, refusals=[check.Refusal("twin", "a sign", "9 times")], findings=[finding]
        )
        assert good
        assert lines[0].startswith("twin holds, ")
        assert [line.split() for line in lines[1:5]] == [
            ["twin"],
            ["kernel", "layout", "dtype", "ratio"],
            ["combine", "channels", "fp32", "code"],
            ["stats", "planes", "fp32", "0.5"],
        ]
        assert lines[5:] == [
            "torch_npu 2.0: aten::op registered",
            "planted on twin, a sign: refused: 9 times",
            "pass: 2 cells, 1 operators, 1 planted faults on twin",
            "not run: other",
        ]

    def test_faults(self, check: Any, run_rung: Any) -> None:
        for found, line in (
            (
                {"cells": [check.Cell("stats", "planes", "fp32", "twin", "9 times")]},
                "twin of stats planes fp32: 9 times",
            ),
            (
                {"refusals": [check.Refusal("twin", "a sign", "")]},
                "planted on twin, a sign: NOT REFUSED",
            ),
            (
                {"findings": [torch_npu.Finding("2.0", "aten::op", "declared", "is gone")]},
                "torch_npu 2.0: aten::op FAULT: is gone",
            ),
        ):
            good, lines = run_rung(**found)
            assert not good
            assert lines[0].startswith("twin DOES NOT HOLD, ")
            assert line in lines
            assert lines[-2].startswith("FAIL: ")

    def test_one_fault_among_what_holds(self, check: Any, run_rung: Any) -> None:
        faults = [check.Refusal("twin", "a sign", reason) for reason in ("9 times", "", "9 times")]
        assert not run_rung(refusals=faults)[0]
        cells = [check.Cell("stats", "planes", dtype, "twin") for dtype in DTYPES]
        cells.insert(1, check.Cell("combine", "channels", "fp32", "twin", "9 times"))
        assert not run_rung(cells=cells)[0]

    def test_messages_are_printed_as_they_are(self, check: Any, run_rung: Any) -> None:
        message = "error: expected [bold] [/store], got [tt.load]"
        cell = check.Cell("stats", "planes", "fp32", "twin", message)
        refusal = check.Refusal("twin", "a sign", message)
        finding = torch_npu.Finding("2.0", "aten::op", "declared", message)
        _, lines = run_rung(cells=[cell], refusals=[refusal], findings=[finding])
        assert sum(message in line for line in lines) == 3

    def test_a_tool_that_fails_is_a_fault(
        self, check: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> Any:
            raise RuntimeError("no such luck")

        monkeypatch.setattr(check, "RUNGS", {"twin": fail})
        text = io.StringIO()
        assert not check.check(["twin"], Console(file=text, width=200))
        assert "no such luck" in text.getvalue()

    def test_the_worst_tile_of_a_kernel(self, check: Any) -> None:
        def cell(measure: float | None, fault: str = "", kernel: str = "stats") -> Any:
            return check.Cell(kernel, "planes", "fp32", "twin", fault, measure)

        cells = [cell(2.0), cell(3.0), cell(1.0), cell(7.0, kernel="normalize")]
        expected = {cell(3.0), cell(7.0, kernel="normalize")}
        for one in itertools.permutations(cells):
            assert set(check._worst(list(one))) == expected
        for one in itertools.permutations([cell(2.0), cell(None, "refused"), cell(5.0)]):
            assert check._worst(list(one)) == [cell(None, "refused")]

    def test_ratios(self, check: Any) -> None:
        found = {"planes": {"stats": THRESHOLD, "combine": 0.1}, "columns": {"stats": 0.2}}
        assert check._beyond_the_bound(found) == ""
        assert all(not cell.fault for cell in check._cells_of_ratios("twin", "fp16", found))
        found["columns"]["stats"] = 9.0
        assert check._beyond_the_bound(found) == "stats of columns: 9 times the bound"
        assert set(check._cells_of_ratios("twin", "fp16", found)) == {
            check.Cell("stats", "planes", "fp16", "twin", "", THRESHOLD),
            check.Cell("combine", "channels", "fp16", "twin", "", 0.1),
            check.Cell("stats", "columns", "fp16", "twin", "9 times the bound", 9.0),
        }

    def test_a_kernel_that_is_not_lowered_is_a_fault(
        self, check: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> str:
            raise check.lowered.Refused("triton-ascend left tt.reduce unlowered")

        monkeypatch.setattr(check, "_linalg", refuse)
        monkeypatch.setattr(check.lowered, "lower", refuse)
        found = check._lowered()
        assert {cell.fault for cell in found.cells} == {"triton-ascend left tt.reduce unlowered"}
        assert {cell.kernel for cell in found.cells} == set(KERNELS)
        assert {refusal.fault for refusal in found.refusals} == {
            "float64",
            "tuple reduce",
            "over-large tile",
        }


class TestLowering:
    """triton-adapter-opt may die of a signal and take the same kernel when it is run again."""

    @pytest.fixture
    def lowered(self) -> Any:
        return importlib.import_module("audit.ladder.lowered")

    @pytest.mark.parametrize(("status", "deaths", "runs"), [(-6, 3, 4), (-6, 9, 4), (1, 1, 1)])
    def test_again(self, lowered: Any, status: int, deaths: int, runs: int) -> None:
        taken: list[int] = []

        def run() -> str:
            taken.append(len(taken))
            if len(taken) <= deaths:
                raise subprocess.CalledProcessError(status, "triton-adapter-opt")
            return "linalg"

        if deaths < runs:
            assert lowered._again(run) == "linalg"
        else:
            with pytest.raises(subprocess.CalledProcessError):
                lowered._again(run)
        assert len(taken) == runs


class TestToolchain:
    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(toolchain, "FOLDER", tmp_path)
        monkeypatch.setattr(toolchain, "_LLVM", tmp_path / "llvm")

    @pytest.mark.parametrize(
        ("tool", "path"),
        [
            (lambda: toolchain.wheel("triton"), "triton"),
            (toolchain.bishengir_compile, "ascendnpu-ir/ascendnpuir/bin/bishengir-compile"),
            (lambda: toolchain.llvm("llc"), "llvm/usr/lib/llvm-19/bin/llc"),
        ],
        ids=["wheel", "bishengir-compile", "llc"],
    )
    def test_missing(self, tool: Callable[[], Any], path: str, tmp_path: Path) -> None:
        message = f"{tmp_path / path} is missing: run make kernels, or python -m audit kernels inst"
        with pytest.raises(toolchain.MissingTool, match=message):
            tool()
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
        assert str(tool()) == str(tmp_path / path)

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda _: None)
        with pytest.raises(toolchain.MissingTool, match="no cc: apt-get install gcc"):
            toolchain.c_compiler()
        with pytest.raises(
            toolchain.MissingTool, match=r"^apt-get of Debian or Ubuntu is needed to fetch mlir"
        ):
            toolchain._install_packages()

    def test_what_is_there_is_not_installed_again(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def run(command: list[str], **_: Any) -> None:
            if "--target" in command:
                fetched.append(Path(command[command.index("--target") + 1]).name)

        fetched: list[str] = []
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(toolchain, "_install_packages", lambda: None)
        assert run_command("install") == 0
        assert fetched == [f"{name}.part" for name in toolchain.WHEELS]
        assert toolchain.missing() == "llvm"
        fetched.clear()
        assert run_command("install") == 0
        assert fetched == []
        monkeypatch.setitem(toolchain.WHEELS, "triton", ["triton==99.0"])
        assert toolchain.missing() == "triton, llvm"
        assert run_command("install") == 0
        assert fetched == ["triton.part"]

    def test_what_cannot_be_fetched(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def run(command: list[str], **_: Any) -> None:
            raise subprocess.CalledProcessError(1, command)

        monkeypatch.setattr(subprocess, "run", run)
        assert run_command("install") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "this failed:" in line
        assert "triton-ascend==3.2.0" in line
        assert toolchain.missing() == ", ".join([*toolchain.WHEELS, "llvm"])

    def test_check_without_tools(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert run_command("check", "--rungs", "twin") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"in {tmp_path}: triton-ascend, ascendnpu-ir, triton, torch_npu, llvm." in line
        assert "make kernels" in line

    @pytest.mark.parametrize(("good", "status"), [(True, 0), (False, 1)])
    def test_exit_status(self, monkeypatch: pytest.MonkeyPatch, good: bool, status: int) -> None:
        monkeypatch.setattr(ladder, "check", lambda rungs: good)
        assert run_command("check") == status

    def test_rungs(self, check: Any) -> None:
        assert set(ladder.RUNGS) == set(check.RUNGS)


def run_command(*arguments: str) -> int:
    """The exit status of python -m audit kernels."""
    return command.main(["kernels", *arguments])
