"""What a training step on CPU calls and how much memory it takes, counted, which no load disturbs.

Counted are the forward and the backward of one process, of this project's layer and of
torch.nn.BatchNorm2d: the operations of ATen that the layer calls, those that they call in turn, and
the most memory that the tensors of a step take at a time, results included, as a multiple of the
input's.

    python -m benchmarks.step
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import profile

from benchmarks.layer import LAYOUTS, TINY, commit
from syncbn.torch import SyncBatchNorm

LARGE = (32, 512, 28, 28)
CASES = [(TINY, "float32"), *((LARGE, dtype) for dtype in ("float32", "bfloat16", "float16"))]
LAYERS = {"syncbn": SyncBatchNorm, "torch.nn": nn.BatchNorm2d}
OUT = Path(__file__).parent / "out" / "step.json"


def count(name: str, shape: tuple[int, ...], dtype: str, layout: str) -> dict[str, Any]:
    """The record of a layer whose first step, which does some work only once, is over."""
    x, dy = (
        torch.randn(shape).to(getattr(torch, dtype)).to(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    x.requires_grad_()
    layer = LAYERS[name](shape[1])
    y = layer(x)

    def backward() -> Any:
        return torch.autograd.grad(y, [x, *layer.parameters()], dy, retain_graph=True)

    backward()
    operations = [_operations(lambda: layer(x)), _operations(backward)]
    size = x.numel() * x.element_size()
    peaks = [_peak(lambda: layer(x)), _peak(backward)]
    return {
        "layer": name,
        "shape": shape,
        "dtype": dtype,
        "layout": layout,
        "operations": [outer for outer, _ in operations],
        "inner_operations": [inner for _, inner in operations],
        "peak": [round(peak / size, 2) for peak in peaks],
    }


def _operations(action: Callable[[], Any]) -> tuple[int, int]:
    """How many operations of ATen are called, and how many these call in turn."""
    with profile() as profiled:
        action()
    found = [event for event in profiled.events() if event.name.startswith("aten::")]
    outer = sum(
        event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")
        for event in found
    )
    return outer, len(found) - outer


def _peak(action: Callable[[], Any]) -> int:
    """The most bytes that tensors hold at a time, without those that were there before."""
    with profile(profile_memory=True) as profiled:
        results = action()
    del results
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure() -> list[dict[str, Any]]:
    return [
        count(name, shape, dtype, layout)
        for shape, dtype in CASES
        for layout in LAYOUTS
        for name in LAYERS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="(default benchmarks/out/step.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = measure()
    for record in records:
        print(*record.values(), sep="  ")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"commit": commit(), "torch": torch.__version__})
    lines = ",\n".join(map(json.dumps, records))
    args.out.write_text(f'{head[:-1]}, "records": [\n{lines}\n]}}\n')
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
