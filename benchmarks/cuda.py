"""Everything that only a CUDA device can show: the suite, kernels, whole steps, and host waits.

    python -m benchmarks.cuda --out DIR

It needs no network. Each part runs in processes of its own with a deadline, and writes its result
before the next begins; a part that fails is reported and does not end the others.

- suite: `certify` with 1 and 4 ranks that share the device, for every backend; and with 1 rank
  for torch.nn.SyncBatchNorm.
- kernels: the four operations that read or write x, as a fraction of the bandwidth of a copy that
  was measured in the same turn. Bytes are the least that the operation can move. Each
  is recorded in a CUDA graph, so that only the device is timed.
- steps: forward and backward of the layer, of torch.nn.SyncBatchNorm and of torch.nn.BatchNorm2d:
  eager, compiled and in a CUDA graph. Both synchronized layers are in a world of FAKE_RANKS ranks
  with torch's fake process group, whose collectives copy and send nothing: one device cannot show
  what a network costs.
- waits: whether a step makes the host wait for the device (COMM-2), and what it launches.

`--device cpu` is a dry run of the script with small shapes. It shows nothing about a device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from syncbn.torch import SyncBatchNorm, backends, groups, layout

Shape = tuple[int, ...]

# The first four are of ResNet-50 with 32 images, the last two of a detector with 2.
SHAPES: list[Shape] = [
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 2048, 7, 7),
    (2, 64, 400, 608),
    (2, 256, 200, 304),
]
SMALL_SHAPES: list[Shape] = [(2, 8, 4, 4)]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BACKENDS = ("aten", "triton", "composed")
FAKE_RANKS = 8
WARM_UP = 3  # rounds that are not counted

Samples = dict[str, list[float]]  # milliseconds of every round, by what was timed


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        result = PARTS[options.part](options)
        (options.out / f"{options.part}.json").write_text(json.dumps(result, indent=1))
        return 0
    failed = suite(options) if "suite" in options.parts else 0
    for part in (part for part in PARTS if part in options.parts):
        command = [sys.executable, "-m", "benchmarks.cuda", "--part", part]
        command += ["--out", str(options.out), "--device", options.device]
        command += ["--repeat", str(options.repeat), "--modes", *options.modes]
        command += ["--shapes", str(options.shapes)]
        failed += _run_part(part, command, options.seconds)
    return int(failed > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the directory of the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repeat", type=int, default=20, help="rounds of each timing (default 20)")
    parser.add_argument("--seconds", type=float, default=150, help="the deadline of a part")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--parts", nargs="+", default=["suite", *PARTS], help="what to run")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled", "graph"])
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_part(name: str, command: list[str], seconds: float) -> int:
    """1 if the part failed. Its output goes to this process."""
    start = time.monotonic()
    print(f"== {name}", flush=True)
    try:
        status = subprocess.run(command, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        status = -1
        print(f"{name}: not finished in {seconds:.0f} s")
    print(f"== {name}: status {status}, {time.monotonic() - start:.1f} s", flush=True)
    return int(status != 0)


# The suite


def suite(options: argparse.Namespace) -> int:
    """How many runs did not pass. The reports are in OUT/suite."""
    on_cuda = options.device == "cuda"
    names = (
        [f"syncbn.torch-{backend}" for backend in BACKENDS] if on_cuda else ["syncbn.torch-auto"]
    )
    profile = "certify" if on_cuda else "smoke"
    failed, rows = 0, []
    for ranks in (4, 1):
        start = time.monotonic()
        running = {}
        for name in [*names, *(["torch.nn"] if on_cuda and ranks == 1 else [])]:
            target, _, backend = name.partition("-")
            command = [sys.executable, "-m", "syncbn.conformance", "run", "--target", target]
            command += ["--ranks", str(ranks), "--profile", profile, "--oracle", "none"]
            command += ["--device", options.device, *(["--share-device"] if on_cuda else [])]
            command += ["--backend", backend] if backend else []
            command += ["--out", str(options.out / "suite" / f"{name}-{ranks}")]
            running[name] = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        for name, process in running.items():
            left = max(1.0, options.seconds - (time.monotonic() - start))
            try:
                output, _ = process.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                process.terminate()
                output, _ = process.communicate()
                output += f"\nnot finished in {options.seconds:.0f} s"
            (options.out / "suite").mkdir(parents=True, exist_ok=True)
            (options.out / "suite" / f"{name}-{ranks}.log").write_text(output)
            expected = name == "torch.nn" or process.returncode == 0
            failed += not expected
            rows.append({"target": name, "ranks": ranks, "status": process.returncode})
            rows[-1] |= _summary(options.out / "suite" / f"{name}-{ranks}" / "report.json")
            last = [line for line in output.splitlines() if line.strip()][-2:]
            print(f"{name}, {ranks} ranks: status {process.returncode}: {' | '.join(last)}")
        print(f"== suite, {ranks} ranks: {time.monotonic() - start:.1f} s", flush=True)
    result = {"environment": _environment(options), "profile": profile, "rows": rows}
    (options.out / "suite.json").write_text(json.dumps(result, indent=1))
    return failed


def _summary(report: Path) -> dict[str, Any]:
    """What a report says in short; empty if the run was not finished."""
    if not report.exists():
        return {}
    document = json.loads(report.read_text())
    failing = [clause["id"] for clause in document["clauses"] if clause["verdict"] == "fail"]
    verdicts = Counter(case["verdict"] for case in document["cases"])
    return {
        "verdict": document["summary"]["verdict"],
        "required": document["summary"]["required"],
        "failing": failing,
        "cases": dict(verdicts),
        "seconds": document["seconds"],
    }


# Timing


def take_turns(actions: dict[str, Callable[[], Any]], repeat: int, device: str) -> Samples:
    """Time every action once a round, on the device's own clock. A failed action is left out."""
    samples: Samples = {name: [] for name in actions}
    for _ in range(WARM_UP + repeat):
        for name, action in actions.items():
            samples[name].append(_milliseconds(action, device))
    return {name: times[WARM_UP:] for name, times in samples.items()}


def _milliseconds(action: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        action()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _quartiles(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": round(median, 5), "low": round(low, 5), "high": round(high, 5)}


def _cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
    """Name, x and dy of each shape, dtype and layout."""
    for shape in SHAPES[: options.shapes] if options.device == "cuda" else SMALL_SHAPES:
        for dtype, kind in DTYPES.items():
            for memory, memory_format in LAYOUTS.items():
                x, dy = (
                    torch.randn(shape, device=options.device).to(kind, memory_format=memory_format)
                    for _ in range(2)
                )
                yield {"shape": shape, "dtype": dtype, "layout": memory}, x, dy


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    return {"device": options.device, "name": name, **versions, "repeat": options.repeat}


def _available(options: argparse.Namespace) -> tuple[str, ...]:
    return BACKENDS if options.device == "cuda" else ("composed",)


# The kernels


def kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and fraction of the copy's bandwidth of each operation of each backend."""
    rows = []
    for case, x, dy in _cases(options):
        channels_last = layout.is_channels_last(x)
        x_rows, dy_rows = layout.to_rows(x, channels_last), layout.to_rows(dy, channels_last)
        actions: dict[str, Callable[[], Any]] = {"copy": x_rows.clone}
        for name in _available(options):
            operations = backends.load(name, x)
            for operation, call in _operations(operations, x_rows, dy_rows).items():
                actions[f"{name} {operation}"] = call
        if options.device == "cuda":
            actions = {name: _captured(action) for name, action in actions.items()}
        times = take_turns(actions, options.repeat, options.device)
        moved = {"copy": 2, "stats": 1, "normalize": 2, "reduce_grad": 2, "input_grad": 3}
        size = x.numel() * x.element_size()
        speed = {
            name: moved[name.split()[-1]] * size / statistics.median(samples) / 1e6
            for name, samples in times.items()
        }
        for name, samples in times.items():
            ratio = round(speed[name] / speed["copy"], 4)
            rows.append(
                {**case, "what": name, "ms": _quartiles(samples), "GB/s": round(speed[name], 1)}
                | {"of_copy": ratio}
            )
        print(case, {row["what"]: row["of_copy"] for row in rows[-len(times) :]}, flush=True)
    return {"environment": _environment(options), "rows": rows}


def _operations(operations: Any, x: Tensor, dy: Tensor) -> dict[str, Callable[[], Any]]:
    channels = x.shape[1]
    dtype = backends.statistics_dtype(x.device)
    mean = torch.zeros(channels, dtype=dtype, device=x.device)
    invstd, sums = torch.ones_like(mean), torch.zeros_like(mean)
    weight, bias = (torch.ones(channels, device=x.device) for _ in range(2))
    n = mean.new_full((), x.numel() // channels)
    return {
        "stats": lambda: operations.stats(x),
        "normalize": lambda: operations.normalize(x, mean, invstd, weight, bias),
        "reduce_grad": lambda: operations.reduce_grad(dy, x, mean),
        "input_grad": lambda: operations.input_grad(dy, x, mean, invstd, weight, sums, sums, n),
    }


# Whole steps


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step of each layer, and its ratio to torch.nn.SyncBatchNorm's."""
    _fake_world()
    rows = []
    for mode in options.modes:
        for case, x, dy in _cases(options):
            if mode != "eager" and (case["shape"] not in (SHAPES[1], SHAPES[3], SMALL_SHAPES[0])):
                continue
            if mode != "eager" and (case["layout"], case["dtype"]) not in (
                ("contiguous", "float32"),
                ("channels_last", "bfloat16"),
            ):
                continue
            rows += _time_steps(options, mode, case, x.requires_grad_(), dy)
    return {"environment": _environment(options), "ranks": FAKE_RANKS, "rows": rows}


def _time_steps(
    options: argparse.Namespace, mode: str, case: dict[str, Any], x: Tensor, dy: Tensor
) -> list[dict[str, Any]]:
    actions: dict[str, Callable[[], Any]] = {}
    failed = {}
    for name, layer in _layers(options, x.shape[1]).items():
        try:
            action = _in_mode(mode, layer.to(x.device), x, dy)
            action()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        else:
            actions[name] = action
    times = take_turns(actions, options.repeat, options.device)
    peer = "torch.nn.SyncBatchNorm" if options.device == "cuda" else "torch.nn.BatchNorm2d"
    of_peer = statistics.median(times[peer]) if peer in times else None
    rows = [
        {**case, "mode": mode, "what": name, "ms": _quartiles(samples)}
        | {"of_torch": of_peer and round(statistics.median(samples) / of_peer, 4)}
        for name, samples in times.items()
    ]
    rows += [{**case, "mode": mode, "what": name, "failed": text} for name, text in failed.items()]
    shown = {row["what"]: row.get("of_torch", row.get("failed")) for row in rows}
    print(mode, case, peer, of_peer, "ms:", shown, flush=True)
    return rows


def _layers(options: argparse.Namespace, channels: int) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {"torch.nn.BatchNorm2d": nn.BatchNorm2d(channels)}
    if options.device == "cuda":
        layers["torch.nn.SyncBatchNorm"] = nn.SyncBatchNorm(channels)
    for name in _available(options):
        layers[f"syncbn {name}"] = SyncBatchNorm(channels, backend=name)
    return layers


def _in_mode(mode: str, layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    """A step of the layer; it returns the gradients of input, weight and bias."""
    call: Callable[[Tensor], Tensor] = layer
    if mode == "compiled":
        torch._dynamo.reset()
        call = torch.compile(layer, fullgraph=isinstance(layer, SyncBatchNorm))
    inputs = [x, *layer.parameters()]

    def step() -> Any:
        return torch.autograd.grad(call(x), inputs, dy)

    return _captured(step) if mode == "graph" else step


def _captured(step: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated once must not be captured
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _fake_world() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.pop("SYNCBN_DEBUG", None)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=FAKE_RANKS)
    # PyTorch 2.11's fake group cannot gather into one tensor of more than one dimension.
    for module, name in (
        (dist, "all_gather_single"),
        (dist, "all_gather_into_tensor"),
        (groups, "_all_gather"),
    ):
        if hasattr(module, name):
            setattr(module, name, _gather_into_tensor)


def _gather_into_tensor(output: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
    """What the transport leaves: here the same message from every rank."""
    output.view(FAKE_RANKS, -1).copy_(input.reshape(1, -1).expand(FAKE_RANKS, -1))


# Host waits and launches


def waits(options: argparse.Namespace) -> dict[str, Any]:
    """For each layer and dtype: the first wait of a step, if any, and its launches by name."""
    _fake_world()
    rows = []
    for dtype, kind in DTYPES.items():
        x = torch.randn(16, 64, 56, 56, device=options.device, dtype=kind).requires_grad_()
        dy = torch.randn_like(x)
        for name, layer in _layers(options, 64).items():
            row = {"dtype": dtype, "what": name}
            try:
                row |= _look(layer.to(x.device), x, dy, options.device)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
            print({key: value for key, value in row.items() if key != "by_name"}, flush=True)
    return {"environment": _environment(options), "ranks": FAKE_RANKS, "rows": rows}


def _look(layer: nn.Module, x: Tensor, dy: Tensor, device: str) -> dict[str, Any]:
    inputs = [x, *layer.parameters()]
    for _ in range(WARM_UP):
        torch.autograd.grad(layer(x), inputs, dy)
    found: dict[str, Any] = {"wait": _first_wait(lambda: torch.autograd.grad(layer(x), inputs, dy))}
    for part in ("forward", "backward"):
        y = layer(x)
        _synchronize(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            if part == "forward":
                layer(x)
            else:
                torch.autograd.grad(y, inputs, dy)
            _synchronize(device)
        names = Counter(event.name for event in seen.events() if "CUDA" in str(event.device_type))
        found[part] = sum(names.values())
        found["by_name"] = {**found.get("by_name", {}), part: dict(names)}
    return found


def _first_wait(step: Callable[[], Any]) -> str | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "waits": waits,
    "kernels": kernels,
    "steps": steps,
}

if __name__ == "__main__":
    sys.exit(main())
