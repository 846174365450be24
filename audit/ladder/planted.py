"""Kernels that the ladder must refuse, each with one fault that our kernels could have."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import triton
import triton.language as tl

from syncbn import kernels

_SOURCE = Path(kernels.__file__).with_name("batch_norm.py")


class Fault(NamedTuple):
    """A change of one line of batch_norm.py."""

    line: str
    planted: str  # what replaces it


FAULTS = {
    "dropped count": Fault(
        "tl.where(more_count > 0, more_mean, 0.0)", "tl.where(True, more_mean, 0.0)"
    ),
    "swapped weights": Fault("left * old + taken * batch", "taken * old + left * batch"),
    "forgotten run": Fault("sum_dy += _sum(of_dy,", "sum_dy = _sum(of_dy,"),
    "flipped sign": Fault("y = (x - mean) * scale + bias", "y = (x + mean) * scale + bias"),
    "dropped mask": Fault("d = tl.where(mask, x - mean, 0.0)", "d = x - mean"),
}


def faulty_kernels(fault: str, folder: Path) -> ModuleType:
    """The kernels with a fault, as a module whose source is in the folder."""
    line, planted = FAULTS[fault]
    text = _SOURCE.read_text()
    if text.count(line) != 1:
        raise ValueError(f"fault {fault!r} must have one line to change in {_SOURCE}: {line}")
    path = folder / "faulty_kernels.py"
    path.write_text(text.replace(line, planted))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SIGNATURE = {"x_ptr": "*fp32", "y_ptr": "*fp32", "size": "i32"}
CONSTANTS = {"BLOCK": 1024}


@triton.jit
def float64_sum(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Accumulates in float64, which no vector core has."""
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=0.0).to(tl.float64)
    tl.store(y_ptr, tl.sum(x, axis=0).to(tl.float32))


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def tuple_reduce(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Reduces two values together, which triton-ascend leaves unconverted without an error."""
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=0.0)
    total, squares = tl.reduce((x, x * x), 0, _add_both)
    tl.store(y_ptr, total)
    tl.store(y_ptr + 1, squares)


@triton.jit
def run_time_range(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Has a block whose size is known only at run time."""
    index = tl.arange(0, size)
    tl.store(y_ptr + index, tl.load(x_ptr + index))
