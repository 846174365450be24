"""What a training step launches and moves on an accelerator, counted without one.

Counted are the forward and the backward of one training step of this project's layer, by backend,
and of torch.nn.SyncBatchNorm on the same footing (`benchmarks.device`), on one rank of a world:
launches, the bytes that they read and write as multiples of the input's, and the waits of the host.
The collectives, one in each direction, are counted by themselves. The bytes of this project's own
kernels are those that their lowered code moves as it runs (`audit.ladder.traffic`).

    python -m benchmarks.cost
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from audit.ladder import toolchain
from benchmarks.device import Cost, Counting, join_world, leave
from syncbn.torch import SyncBatchNorm

SHAPE = (16, 64, 56, 56)  # of ResNet-50, 16 images per rank
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RANKS = (2, 8)
CORES = 40  # vector cores of an Ascend 910B3
OUT = Path(__file__).parent / "out" / "cost.json"


class Subject(NamedTuple):
    """A layer on a device; backend is empty for torch.nn.SyncBatchNorm."""

    backend: str
    device: str

    def layer(self, channels: int) -> nn.Module:
        if self.backend:
            return SyncBatchNorm(channels, backend=self.backend)
        return nn.SyncBatchNorm(channels)

    def __str__(self) -> str:
        return f"{self.backend or 'torch.nn'}, {self.device}"


SUBJECTS = [
    Subject("aten", "npu"),
    Subject("triton", "npu"),
    Subject("composed", "npu"),
    Subject("aten", "cuda"),
    Subject("", "npu"),
    Subject("", "cuda"),
]


def measure(subjects: list[Subject], quick: bool) -> Iterator[dict[str, Any]]:
    """One record for each subject, dtype, layout and number of ranks; quick: for some of them."""
    for ranks in RANKS[:1] if quick else RANKS:
        join_world(ranks)
        for subject in subjects:
            for dtype in DTYPES:
                for layout in ["contiguous"] if quick else LAYOUTS:
                    yield count(subject, SHAPE, dtype, layout, ranks)
        dist.destroy_process_group()


def count(
    subject: Subject, shape: tuple[int, ...], dtype: str, layout: str, ranks: int
) -> dict[str, Any]:
    """The cost of a step that is not the first one, whose work may be done only once."""
    x, dy = (
        torch.randn(shape).to(DTYPES[dtype]).to(memory_format=LAYOUTS[layout]) for _ in range(2)
    )
    with Counting(subject.device) as counting:
        if subject.backend == "triton":
            _count_kernels(counting)
        layer = counting.module(subject.layer(shape[1]))
        _step(counting, layer, x, dy)
        forward, backward = _step(counting, layer, x, dy)
    size = x.numel() * x.element_size()
    return {
        "layer": "syncbn" if subject.backend else "torch.nn",
        "backend": subject.backend,
        "device": subject.device,
        "dtype": dtype,
        "layout": layout,
        "ranks": ranks,
        "forward": _record(forward, size),
        "backward": _record(backward, size),
    }


def _step(counting: Counting, layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Cost, Cost]:
    """What the forward and the backward cost."""
    layer.zero_grad()
    leaf = counting.tensor(x).requires_grad_()
    counting.reset()
    y = layer(leaf)
    forward = counting.reset()
    y.backward(counting.tensor(dy))
    return forward, counting.reset()


def _record(cost: Cost, size: int) -> dict[str, Any]:
    return {
        "launches": sum(cost.launches.values()),
        "read": round(cost.read / size, 3),
        "written": round(cost.written / size, 3),
        "collectives": cost.collectives,
        "waits": cost.waits,
        "operations": dict(sorted(cost.launches.items())),
    }


def _count_kernels(counting: Counting) -> None:
    """Give the backend `triton` a launcher that runs lowered kernels and counts what they move."""
    from audit.ladder import traffic
    from syncbn.kernels.variants import Variant
    from syncbn.torch.backends import triton

    def launch(variant: Variant, programs: int, arguments: list[Any]) -> None:
        moved = traffic.run(variant, programs, counting.values(arguments))
        counting.launched(variant.kernel, moved.read, moved.written)

    triton._operations._launch = launch
    triton._operations._machine = lambda device: ("ascend", CORES)


def available() -> list[Subject]:
    """The subjects that can be counted here; those of our kernels need the ladder's tools."""
    if toolchain.missing():
        return [subject for subject in SUBJECTS if subject.backend != "triton"]
    toolchain.use("triton-ascend")
    warnings.filterwarnings("ignore", module="triton")  # there is no compiler of CANN here
    return SUBJECTS


def print_table(records: list[dict[str, Any]], shape: tuple[int, ...]) -> None:
    """One line per record that differs from those above it."""
    print(f"one training step, input {shape}; bytes are multiples of the input's, read + written")
    print(
        f"{'layer':<10}{'backend':<10}{'device':<7}{'dtype':<10}{'layout':<15}{'ranks':>5}"
        f"{'forward: launches':>19}{'bytes':>14}{'waits':>6}"
        f"{'backward: launches':>20}{'bytes':>14}{'waits':>6}"
    )
    for record in records:
        names = f"{record['layer']:<10}{record['backend']:<10}{record['device']:<7}"
        kind = f"{record['dtype']:<10}{record['layout']:<15}{record['ranks']:>5}"
        costs = "".join(
            f"{cost['launches']:>{width}}"
            f"{cost['read']:>7.2f} +{cost['written']:>5.2f}"
            f"{cost['waits']:>6}"
            for cost, width in ((record["forward"], 19), (record["backward"], 20))
        )
        print(names + kind + costs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="(default benchmarks/out/cost.json)")
    parser.add_argument("--quick", action="store_true", help="contiguous input and 2 ranks only")
    args = parser.parse_args()
    subjects = available()
    if missing := [str(subject) for subject in SUBJECTS if subject not in subjects]:
        print(f"left out: {'; '.join(missing)} ({toolchain.missing()} missing: make kernels)")
    records = list(measure(subjects, args.quick))
    print_table(records, SHAPE)
    write(args.out, records)
    print(f"written to {args.out}")
    leave()


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """JSON with one record per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"shape": SHAPE, "torch": torch.__version__})
    lines = ",\n".join(map(json.dumps, records))
    path.write_text(f'{head[:-1]}, "records": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
