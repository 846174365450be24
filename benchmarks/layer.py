"""What a training step of SyncBatchNorm costs, compared with torch.nn.BatchNorm2d, on CPU ranks.

Every rank is a process of one thread, joined to the others by Gloo, with a shard of its own.
Timed is forward plus backward, for the gradients of input, weight and bias, of
syncbn.torch.SyncBatchNorm over all ranks, with each of its backends for CPU, and of
torch.nn.BatchNorm2d, which does not synchronize, on the same shard in the same process. After a
warm-up they take turns, each after a barrier, so that all ranks do the same at a time and load
their cores equally. The ratio of a turn is SyncBatchNorm's time over BatchNorm2d's; medians and
quartiles are taken over the turns of all ranks. The two collectives of a step are timed alone in
the same way, on messages of their size.

Everything is timed twice. As the C library does by default, it returns some freed memory to the
system, and whichever layer takes it again pays for its pages, by the chance of the heap. The other
time it keeps the memory, and the ratio is that of the work alone.

The backend `numba` compiles its loops during the warm-up.

    python -m benchmarks.layer
    python -m benchmarks.layer --backends composed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from syncbn.torch import SyncBatchNorm
from syncbn.torch.backends import statistics_dtype
from syncbn.torch.groups import Communicator

Shape = tuple[int, ...]

# Of ResNet-50, with 32 images per rank: after the first convolution, and at the end of three of
# its four stages.
SHAPES: list[Shape] = [(32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 2048, 7, 7)]
TINY: Shape = (4, 64, 8, 8)
QUICK_SHAPES: list[Shape] = [(2, 8, 4, 4), (2, 16, 2, 2)]
HALVES = ("bfloat16", "float16")
CASES = [(shape, "float32") for shape in [*SHAPES, TINY]]
CASES += [(shape, half) for shape in [*SHAPES[1:3], TINY] for half in HALVES]
QUICK_CASES = [(shape, "float32") for shape in QUICK_SHAPES]
BACKENDS = ("composed", "numba")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# What the C library does with freed memory, by the variables that make it do so (glibc only).
MEMORY = {
    "returned": {},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
WARM_UP = 3  # rounds that are not counted
OUT = Path(__file__).parent / "out" / "layer.json"

Samples = dict[str, list[float]]  # milliseconds of every round, by what was timed


def take_turns(actions: dict[str, Callable[[], Any]], repeat: int) -> Samples:
    """Time every action once a round, each after a barrier."""
    samples: Samples = {name: [] for name in actions}
    for _ in range(WARM_UP + repeat):
        for name, action in actions.items():
            dist.barrier()
            start = perf_counter()
            action()
            samples[name].append((perf_counter() - start) * 1e3)
    return {name: times[WARM_UP:] for name, times in samples.items()}


def time_steps(
    shape: Shape, dtype: str, layout: str, repeat: int, backends: Sequence[str]
) -> Samples:
    """Forward plus backward of the layers on one random shard; the parameters are float32."""
    x, dy = (
        torch.randn(shape).to(getattr(torch, dtype)).to(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    x.requires_grad_()

    def step(layer: nn.Module) -> None:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    layers: dict[str, nn.Module] = {
        name: SyncBatchNorm(shape[1], backend=name) for name in backends
    }
    layers["plain"] = nn.BatchNorm2d(shape[1])
    return take_turns({name: partial(step, layer) for name, layer in layers.items()}, repeat)


def time_collectives(channels: int, repeat: int) -> Samples:
    """The all_gather of a forward (mean, var and 3 words) and the all_reduce of a backward."""
    ranks = Communicator.of(None)
    dtype = statistics_dtype(torch.device("cpu"))
    message, sums = (
        torch.zeros(2 * channels + 3, dtype=dtype),
        torch.zeros(2, channels, dtype=dtype),
    )
    return take_turns(
        {
            "all_gather": lambda: ranks.all_gather(message),
            "all_reduce": lambda: ranks.all_reduce(sums),
        },
        repeat,
    )


def time_cases(
    cases: list[tuple[Shape, str]], repeat: int, backends: Sequence[str]
) -> list[dict[str, Samples]]:
    """The samples of every case on this rank."""
    return [
        {layout: time_steps(shape, dtype, layout, repeat, backends) for layout in LAYOUTS}
        | {"collectives": time_collectives(shape[1], repeat)}
        for shape, dtype in cases
    ]


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function returns on each rank, as JSON; a rank is a process of one thread."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn(_run_rank, (ranks, folder, function, arguments), nprocs=ranks)
        return [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]


def _run_rank(
    rank: int, ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    meeting_point = (folder / "ranks").as_uri()
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=ranks)
    (folder / str(rank)).write_text(json.dumps(function(*arguments)))
    dist.destroy_process_group()


def measure(
    ranks: int,
    cases: list[tuple[Shape, str]],
    repeat: int,
    backends: Sequence[str],
    memory: str,
) -> list[dict[str, Any]]:
    """Start the ranks; one record per case, as it stands in the JSON file."""
    with patch.dict(os.environ, MEMORY[memory]):
        by_rank = on_ranks(ranks, time_cases, cases, repeat, backends)
    return [
        {"shape": shape, "dtype": dtype, "memory": memory}
        | {key: summary([one[key] for one in of_ranks]) for key in of_ranks[0]}
        for (shape, dtype), of_ranks in zip(cases, zip(*by_rank, strict=True), strict=True)
    ]


def summary(of_ranks: list[Samples]) -> dict[str, Any]:
    """Medians in ms over the samples of all ranks; of layers, also their ratios to `plain`."""
    pooled = {
        name: torch.cat([torch.tensor(samples[name]) for samples in of_ranks])
        for name in of_ranks[0]
    }
    result: dict[str, Any] = {f"{name}_ms": v.quantile(0.5).item() for name, v in pooled.items()}
    if "plain" in pooled:
        plain = pooled.pop("plain")
        result["ratio"] = {name: quartiles(times / plain) for name, times in pooled.items()}
    return result


def quartiles(values: torch.Tensor) -> dict[str, Any]:
    low, median, high = values.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"median": median, "quartiles": [low, high]}


def environment() -> dict[str, Any]:
    """What the times depend on, besides the code."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
    }


def processor() -> str:
    """The name of the processor, or only its architecture where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str | None:
    """The commit of the checkout, marked if files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() or None


def print_table(cases: list[dict[str, Any]]) -> None:
    """One line per case and backend."""
    print("forward + backward, median ms: SyncBatchNorm / BatchNorm2d, their ratio (quartiles)")
    print(
        f"{'shape':<20}{'dtype':<10}{'memory':<10}{'backend':<10}{'contiguous':<36}"
        f"{'channels_last':<36}all_gather  all_reduce"
    )
    for case in cases:
        alone = case["collectives"]
        for backend in case["contiguous"]["ratio"]:
            layers = "".join(f"{show(case[layout], backend):<36}" for layout in LAYOUTS)
            print(
                f"{case['shape']!s:<20}{case['dtype']:<10}{case['memory']:<10}{backend:<10}{layers}"
                f"{alone['all_gather_ms']:10.3f}  {alone['all_reduce_ms']:10.3f}"
            )


def show(turns: dict[str, Any], backend: str) -> str:
    """Both times in ms, and the ratio with its quartiles."""
    ratio = turns["ratio"][backend]
    low, high = ratio["quartiles"]
    times = f"{turns[f'{backend}_ms']:.2f} / {turns['plain_ms']:.2f}"
    return f"{times}  {ratio['median']:.2f} ({low:.2f}-{high:.2f})"


def positive(text: str) -> int:
    """An argument of the command line that must be a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=positive, default=2, help="processes (default 2)")
    parser.add_argument("--repeat", type=positive, default=25, help="turns (default 25)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--out", type=Path, default=OUT, help="(default benchmarks/out/layer.json)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args()

    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": environment(),
        "ranks": args.ranks,
        "repeat": args.repeat,
        "cases": [
            case
            for memory in MEMORY
            for case in measure(
                args.ranks,
                QUICK_CASES if args.quick else CASES,
                args.repeat,
                args.backends,
                memory,
            )
        ],
    }
    if args.ranks > cores():
        print(f"warning: {args.ranks} ranks on {cores()} cores: the times include waiting for one")
    print(", ".join(f"{key}: {value}" for key, value in result["environment"].items()))
    print(f"commit: {result['commit']}, ranks: {args.ranks}, turns: {args.repeat}")
    print_table(result["cases"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
