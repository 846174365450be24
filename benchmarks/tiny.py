"""Where a tiny training step spends its time, on CPU ranks.

A step on (4, 64, 8, 8) has next to no work: its time is that of its calls. Every rank is a process
of one thread, joined to the others by Gloo. The parts of a step are timed from outside, by
functions that stand in the place of the layer's own; two readings of the clock per part are in the
figures. What is left of the whole is Python's, of the module, the checks and autograd.
torch.nn.BatchNorm2d, which does not synchronize, takes turns with the layer.

    python -m benchmarks.tiny
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.layer import BACKENDS, TINY, WARM_UP, commit, environment, on_ranks, positive
from syncbn.torch import SyncBatchNorm, layout
from syncbn.torch.backends import load
from syncbn.torch.groups import Communicator

# The parts of a step, in the order in which it takes them, and the functions that they are.
BACKEND = ("pack_stats", "combine_ranks", "normalize", "pack_grad", "input_grad")
COLLECTIVES = ("all_gather", "all_reduce")
LAYOUT = ("to_rows", "restored")
OUT = Path(__file__).parent / "out" / "tiny.json"


def time_parts(layer: nn.Module, backend: str, steps: int) -> dict[str, float]:
    """The median of every part in microseconds, of the whole step, and of BatchNorm2d's."""
    x, dy = torch.randn(2, *TINY)
    x.requires_grad_()
    plain = nn.BatchNorm2d(TINY[1])
    samples: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + perf_counter() - start

        return call

    def step(module: nn.Module) -> float:
        dist.barrier()
        start = perf_counter()
        torch.autograd.grad(module(x), [x, *module.parameters()], dy)
        return perf_counter() - start

    with ExitStack() as replaced:
        owners = ((load(backend), BACKEND), (Communicator, COLLECTIVES), (layout, LAYOUT))
        for owner, names in owners:
            for name in names:
                stand_in = timed(name, getattr(owner, name))
                replaced.enter_context(patch.object(owner, name, stand_in))
        for _ in range(WARM_UP + steps):
            spent.clear()
            whole = step(layer)
            for name, time in spent.items():
                samples[name].append(time)
            samples["the rest"].append(whole - sum(spent.values()))
            samples["the step"].append(whole)
            samples["BatchNorm2d"].append(step(plain))
    return {name: 1e6 * median(times[WARM_UP:]) for name, times in samples.items()}


def time_backends(steps: int) -> dict[str, dict[str, float]]:
    """The medians of each backend on this rank."""
    return {
        name: time_parts(SyncBatchNorm(TINY[1], backend=name), name, steps) for name in BACKENDS
    }


def measure(ranks: int, steps: int) -> list[dict[str, Any]]:
    """One record per backend: the parts in microseconds, those of the slowest rank."""
    by_rank = on_ranks(ranks, time_backends, steps)
    return [
        {"ranks": ranks, "backend": backend}
        | {"us": {part: max(of[backend][part] for of in by_rank) for part in by_rank[0][backend]}}
        for backend in BACKENDS
    ]


def print_table(records: list[dict[str, Any]]) -> None:
    """One line per part."""
    print("microseconds" + "".join(f"{r['backend']:>12}, {r['ranks']} ranks" for r in records))
    for part in records[-1]["us"]:
        print(f"{part:<14}" + "".join(f"{r['us'].get(part, 0.0):>20.1f}" for r in records))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=positive, default=500, help="(default 500)")
    parser.add_argument("--out", type=Path, default=OUT, help="(default benchmarks/out/tiny.json)")
    args = parser.parse_args()
    records = [record for ranks in (1, 2) for record in measure(ranks, args.steps)]
    print_table(records)
    head = {"commit": commit(), "environment": environment(), "shape": TINY, "steps": args.steps}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(head | {"records": records}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
