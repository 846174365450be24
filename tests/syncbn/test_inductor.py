"""The loops of the backend `inductor` compute what the formulas say; what it lacks, it names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from syncbn.torch import SyncBatchNorm  # noqa: E402
from syncbn.torch.backends import load  # noqa: E402

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler, g++"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # of the compiler itself
]


# Contiguous rows (R, C, S), and channels-last ones.
@pytest.mark.parametrize("shape", [(4, 3, 10), (40, 3, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_operations_are_the_formulas(shape: tuple[int, ...], dtype: str) -> None:
    torch.manual_seed(0)
    backend = load("inductor")
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
    mean, var = load("inductor").stats(x)
    torch.testing.assert_close(mean, wide.mean((0, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(var, wide.var((0, 2), correction=0), rtol=1e-12, atol=0)


def test_the_mean_of_values_with_inf_is_inf() -> None:
    x = torch.ones(4, 3, 10)
    x[0, 1, 0] = torch.inf  # the value that all others are compared with
    mean, var = load("inductor").stats(x)
    assert mean.tolist() == [1, torch.inf, 1]
    assert var[1].isnan()


def test_a_tensor_on_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="'inductor' runs on cpu, got a tensor on meta"):
        load("inductor").stats(torch.ones(2, 3, 4, device="meta"))


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    code = (
        "import torch; from syncbn.torch import SyncBatchNorm;"
        "SyncBatchNorm(3, backend='inductor')(torch.randn(4, 3, 5, 5))"
    )
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "RuntimeError: backend 'inductor' could not compile a loop. It needs a C++" in run.stderr


def test_a_step_without_weight_and_with_one_value_per_image() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    ours = SyncBatchNorm(3, affine=False, backend="inductor", dtype=torch.float64)
    theirs = torch.nn.BatchNorm1d(3, affine=False, dtype=torch.float64)
    dy = torch.randn(6, 3, dtype=torch.float64)
    results = [torch.autograd.grad(layer(x), x, dy) for layer in (ours, theirs)]
    torch.testing.assert_close(*results)
