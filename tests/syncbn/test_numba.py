"""The loops of the backend `numba` compute what the formulas say; what it lacks, it names."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("numba", reason="Numba is not installed: pip install numba")

from syncbn.torch import SyncBatchNorm  # noqa: E402
from syncbn.torch.backends import load  # noqa: E402


# Contiguous rows (R, C, S), and channels-last ones.
@pytest.mark.parametrize("shape", [(4, 3, 10), (40, 3, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_operations_are_the_formulas(shape: tuple[int, ...], dtype: str) -> None:
    torch.manual_seed(0)
    backend = load("numba")
    x, dy = (10 + torch.randn(2, *shape)).to(getattr(torch, dtype))
    wide, wide_dy = x.double(), dy.double()
    away = wide - wide.mean((0, 2), keepdim=True)
    mean, var = backend.stats(x)
    torch.testing.assert_close(mean, wide.mean((0, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var, away.square().mean((0, 2)), rtol=1e-5, atol=0)
    invstd, n = (var + 1e-5).rsqrt(), torch.tensor(40.0, dtype=torch.float64)
    sums = wide_dy.sum((0, 2)), (wide_dy * away).sum((0, 2))
    dx = backend.input_grad(dy, x, mean, invstd, None, *sums, n)
    slope = (invstd.square() * sums[1] / n).view(1, -1, 1)
    expected = (wide_dy - (sums[0] / n).view(1, -1, 1) - away * slope) * invstd.view(1, -1, 1)
    assert dx.dtype == x.dtype
    rounding = 2**-8 if dtype == "bfloat16" else 2e-5
    torch.testing.assert_close(dx.double(), expected, rtol=rounding, atol=1e-5)


def test_a_value_far_from_the_others_loses_no_digits() -> None:
    x = torch.zeros(4, 3, 10)
    x[0, :, 0] = 1e6  # the value that all others are compared with
    x[1:] = torch.randn(3, 3, 10)
    wide = x.double()
    mean, var = load("numba").stats(x)
    torch.testing.assert_close(mean, wide.mean((0, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(var, wide.var((0, 2), correction=0), rtol=1e-12, atol=0)


def test_the_mean_of_values_with_inf_is_inf() -> None:
    x = torch.ones(4, 3, 10)
    x[0, 1, 0] = torch.inf  # the value that all others are compared with
    mean, var = load("numba").stats(x)
    assert mean.tolist() == [1, torch.inf, 1]
    assert var[1].isnan()


def test_a_tensor_on_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="'numba' runs on cpu, got a tensor on meta"):
        load("numba").stats(torch.ones(2, 3, 4, device="meta"))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that takes a step with the backend after this code."""
    step = "SyncBatchNorm(3, backend='numba')(torch.randn(4, 3, 5, 5))"
    return subprocess.run(
        [sys.executable, "-c", f"{code}; import torch; from syncbn.torch import *; {step}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_missing_numba_is_named() -> None:
    failed = run("import sys; sys.modules['numba'] = None")
    assert failed.returncode == 1
    expected = "RuntimeError: backend 'numba' needs numba, which is not installed: pip install"
    assert expected in failed.stderr


def test_a_folder_that_cannot_be_written_is_named() -> None:
    # What Numba does if it finds no folder, which does not happen to root.
    failed = run(
        "import numba; from unittest.mock import Mock;"
        "numba.njit = Mock(side_effect=RuntimeError('cannot cache function: no locator available'))"
    )
    assert failed.returncode == 1
    assert "RuntimeError: backend 'numba' keeps compiled loops on disk: set NUMBA" in failed.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_half_is_read_and_rounded_as_pytorch_does(dtype: Any, channels_last: bool) -> None:
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = halves.view(-1, 1, 1) if channels_last else halves.view(1, 1, -1)
    zero, one, scale, shift = torch.tensor([[0.0], [1.0], [1.01], [0.3]], dtype=torch.float64)
    same = load("numba").normalize(x, zero, one, None, None)
    torch.testing.assert_close(same, x + 0.0, rtol=0, atol=0, equal_nan=True)
    y = load("numba").normalize(x, zero, one, scale, shift)
    expected = x.float().mul_(scale.float()).add_(shift.float())
    exact = (x.double() * scale.float().double() + shift.float().double()).float()
    near = torch.where(exact.to(dtype) == y, exact, expected).to(dtype)  # fused or not
    torch.testing.assert_close(y, near, rtol=0, atol=0, equal_nan=True)


def test_strided_vectors_compile_nothing_new() -> None:
    backend = load("numba")
    x = torch.randn(4, 3, 10)
    vectors = torch.randn(3, 4, dtype=torch.float64).unbind(1)
    expected = backend.normalize(x, *(v.clone() for v in vectors))
    signatures = list(backend._normalize.signatures)  # type: ignore[attr-defined]
    assert torch.equal(backend.normalize(x, *vectors), expected)
    assert backend._normalize.signatures == signatures  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(64, 3, 2000), (400_000, 3, 1)])
def test_threads_compute_what_one_does(shape: tuple[int, ...]) -> None:
    backend = load("numba")
    x, dy = torch.randn(2, *shape)

    def step() -> list[Any]:
        mean, var = backend.stats(x)
        sums = backend.reduce_grad(dy, x, mean)
        n = torch.tensor(1.0 * x.numel() / 3, dtype=torch.float64)
        y = backend.normalize(x, mean, var.rsqrt(), None, None)
        return [mean, var, *sums, y, backend.input_grad(dy, x, mean, var.rsqrt(), None, *sums, n)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = step()
        torch.set_num_threads(3)
        results = step()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_process_that_is_forked_has_threads_of_its_own() -> None:
    code = """if True:
        import os, torch
        from syncbn.torch.backends import load
        torch.set_num_threads(2)
        x = torch.randn(64, 3, 2000)
        load("numba").stats(x)
        child = os.fork()
        load("numba").stats(x)
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_step_without_weight_and_with_one_value_per_image() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    ours = SyncBatchNorm(3, affine=False, backend="numba", dtype=torch.float64)
    theirs = torch.nn.BatchNorm1d(3, affine=False, dtype=torch.float64)
    dy = torch.randn(6, 3, dtype=torch.float64)
    results = [torch.autograd.grad(layer(x), x, dy) for layer in (ours, theirs)]
    torch.testing.assert_close(*results)
