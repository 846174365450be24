"""What a training step of one rank costs in each framework, next to its own batch norm, on CPU.

Timed is forward plus backward, for the gradients of input, weight and bias, on one core and without
other ranks: the cost of the work, not of the collectives. The layers of this project take turns
with PyTorch's, MindSpore's and Flax's BatchNorm, each framework in a process of its own on the same
core; medians and quartiles over the turns.

mint.nn.SyncBatchNorm is left out: its kernels are Ascend's, and the time of their substitutes is
not theirs. Nor has mint.nn.BatchNorm2d a kernel for CPU, and torch.nn.SyncBatchNorm takes no tensor
of it.

    python -m benchmarks.peers
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.layer import BACKENDS, SHAPES, WARM_UP, commit, environment, positive

OUT = Path(__file__).parent / "out" / "peers.json"
SHAPE = SHAPES[2]

Steps = dict[str, Callable[[], Any]]  # a training step of each layer, by its name


def in_torch() -> Steps:
    import torch

    from syncbn.torch import SyncBatchNorm

    def step(layer: torch.nn.Module, layout: torch.memory_format) -> Callable[[], Any]:
        x, dy = (torch.from_numpy(a).contiguous(memory_format=layout) for a in _data())
        x.requires_grad_()
        return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    torch.set_num_threads(1)
    layers = {f"syncbn.torch, {name}": SyncBatchNorm(SHAPE[1], backend=name) for name in BACKENDS}
    return {
        f"{name}, {str(layout).removeprefix('torch.').removesuffix('_format')}": step(layer, layout)
        for name, layer in {
            "torch.nn.BatchNorm2d": torch.nn.BatchNorm2d(SHAPE[1]),
            **layers,
        }.items()
        for layout in (torch.contiguous_format, torch.channels_last)
    }


def in_mindspore() -> Steps:
    import mindspore as ms

    from syncbn.mindspore import SyncBatchNorm

    ms.set_device("CPU")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    x, dy = (ms.Tensor(a) for a in _data())

    def step(layer: Any) -> Callable[[], Any]:
        layer.set_train()
        gradients = ms.ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)
        of_layer = gradients(layer, ms.ParameterTuple(layer.trainable_params()))

        def run() -> None:
            of_layer(x, dy)
            ms.runtime.synchronize()

        return run

    return {
        "mindspore.nn.BatchNorm2d, contiguous": step(ms.nn.BatchNorm2d(SHAPE[1])),
        "syncbn.mindspore, contiguous": step(SyncBatchNorm(SHAPE[1])),
    }


def in_flax() -> Steps:
    import jax
    from flax import linen

    layer = linen.BatchNorm(use_running_average=False, momentum=0.9)
    x, dy = (jax.numpy.asarray(a.transpose(0, 2, 3, 1)) for a in _data())
    state = layer.init(jax.random.key(0), x)

    @jax.jit
    def step(state: Any, x: Any, dy: Any) -> Any:
        def forward(params: Any, x: Any) -> Any:
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            return layer.apply(variables, x, mutable=["batch_stats"])

        _, backward, moved = jax.vjp(forward, state["params"], x, has_aux=True)
        return backward(dy), moved

    return {
        "flax.linen.BatchNorm, jitted, channels_last": lambda: jax.block_until_ready(
            step(state, x, dy)
        )
    }


FRAMEWORKS = {"torch": in_torch, "mindspore": in_mindspore, "flax": in_flax}


def _data() -> tuple[Any, Any]:
    """Input and gradient of the output, (N, C, H, W) float32."""
    x, dy = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)
    return x, dy


def serve(framework: str, core: int, pipe: Connection) -> None:
    """Send the names of the layers; then, for each name that comes, the time of a step in ms."""
    os.sched_setaffinity(0, {core})  # threads of the framework share the core
    steps = FRAMEWORKS[framework]()
    pipe.send(list(steps))
    while name := pipe.recv():
        start = perf_counter()
        steps[name]()
        pipe.send((perf_counter() - start) * 1e3)


def measure(frameworks: list[str], repeat: int) -> dict[str, list[float]]:
    """The quartiles of every layer in milliseconds; all take turns."""
    context = multiprocessing.get_context("spawn")
    core = min(os.sched_getaffinity(0))
    pipes: dict[str, Connection] = {}
    servers = []
    for framework in frameworks:
        mine, theirs = context.Pipe()
        servers.append(context.Process(target=serve, args=(framework, core, theirs), daemon=True))
        servers[-1].start()
        theirs.close()
        pipes |= dict.fromkeys(mine.recv(), mine)
    samples: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(WARM_UP + repeat):
        for name, pipe in pipes.items():
            pipe.send(name)
            samples[name].append(pipe.recv())
    for pipe in set(pipes.values()):
        pipe.send("")
    for server in servers:
        server.join()
    return {
        name: np.quantile(times[WARM_UP:], [0.25, 0.5, 0.75]).round(2).tolist()
        for name, times in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=positive, default=15, help="turns (default 15)")
    parser.add_argument("--out", type=Path, default=OUT, help="(default benchmarks/out/peers.json)")
    args = parser.parse_args()
    here = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]
    if missing := [name for name in FRAMEWORKS if name not in here]:
        print(f"left out, not installed: {', '.join(missing)}")
    quartiles = measure(here, args.repeat)
    print(f"forward + backward of {SHAPE} in float32 on one core, ms: median (quartiles)")
    for name, (low, median, high) in quartiles.items():
        print(f"{name:<48}{median:8.2f} ({low:.2f} to {high:.2f})")
    head = {"commit": commit(), "environment": environment(), "shape": SHAPE}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps(head | {"repeat": args.repeat, "ms": quartiles}, indent=1) + "\n"
    )
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
