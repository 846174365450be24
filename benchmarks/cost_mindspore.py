"""What a training step launches in MindSpore's PyNative mode, counted without an NPU.

Counted are the operators of one step of this project's layer and of mint.nn.SyncBatchNorm, on one
rank of 2, with the kernels of Ascend (backend `aclnn`). MindSpore runs on the CPU, and both layers
take the path of an accelerator: statistics are float32, and the host reads nothing. MindSpore's
profiler counts the operators. The batch-norm kernels that only Ascend has are replaced by stubs,
which count one each and compute nothing. The collectives are stubs as well, and are counted by
themselves. What value_and_grad launches without a layer is counted alone, and is subtracted.

    python -m benchmarks.cost_mindspore
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn, ops
from mindspore.graph.api import _pynative_executor
from mindspore.mint.nn.layer import _functions, normalization
from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from syncbn.mindspore import SyncBatchNorm, backends, groups, layer, normalize, step

SHAPE = (4, 8, 6, 6)
RANKS = 2
DTYPES = ("float32", "float16", "bfloat16")
COLLECTIVES = {"all_gather", "all_reduce"}
OUT = Path(__file__).parent / "out" / "cost_mindspore.json"

_called: Counter[str] = Counter()  # stubs, by name


def install() -> None:
    """Replace, in this process, what only Ascend has, and make both layers take Ascend's path."""
    vector = Tensor(np.ones(SHAPE[1], np.float32))
    mint.full = ops.full
    mint.batch_norm_stats = _stub("batch_norm_stats", lambda *_: (vector, vector))
    mint.batch_norm_gather_stats_with_counts = _stub(
        "batch_norm_gather_stats_with_counts", lambda *_: (vector, vector)
    )
    mint.batch_norm_elemt = _stub("batch_norm_elemt", lambda x, *_: x)
    _functions.batch_norm_reduce_grad = _stub("batch_norm_reduce_grad", lambda *_: (vector,) * 4)
    _functions.batch_norm_elemt_grad = _stub("batch_norm_elemt_grad", lambda dy, *_: dy)
    _functions.AllGather = lambda group: lambda message: _gathered(message).reshape(-1)
    _functions.AllReduce = lambda group: _reduced
    normalization.get_group_size = lambda group: RANKS
    for module in (step, normalize, layer, groups, backends):
        for name, value in (("statistics_dtype", ms.float32), ("may_sync_host", False)):
            if hasattr(module, name):
                mock.patch.object(module, name, lambda value=value: value).start()
    two = groups.Group(tuple(range(RANKS)), "two", 0)
    mock.patch.object(layer, "resolve", return_value=two).start()
    for module in (step, normalize):
        if hasattr(module, "Communicator"):
            mock.patch.object(module, "Communicator", _Communicator).start()


class _Communicator(nn.Cell):
    """In the place of `syncbn.mindspore.groups.Communicator`."""

    def __init__(self, group: groups.Group) -> None:
        super().__init__()
        self.ranks, self.size = group.ranks, len(group.ranks)

    def all_gather(self, message: Tensor) -> Tensor:
        return _gathered(message)

    def all_reduce(self, values: Tensor, tag: Tensor) -> Tensor:
        return _reduced(values)


def _gathered(message: Tensor) -> Tensor:
    _called["all_gather"] += 1
    return Tensor(np.ones((RANKS, message.shape[0]), np.float32))


def _reduced(values: Tensor) -> Tensor:
    _called["all_reduce"] += 1
    return values


def _stub(name: str, result: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        _called[name] += 1
        return result(*arguments)

    return call


def operators(call: Callable[[], Any]) -> Counter[str]:
    """What a call launches, and its collectives, by name."""
    call()  # whose work may be done only once
    _pynative_executor.sync()
    _called.clear()
    with tempfile.TemporaryDirectory() as place:
        written = tensorboard_trace_handler(place, analyse_flag=False)
        with profile(activities=[ProfilerActivity.CPU], on_trace_ready=written):
            call()
            _pynative_executor.sync()
        found = Counter(_called)
        for file in Path(place).rglob("cpu_op_type_info_*.csv"):
            for row in csv.DictReader(file.read_text().splitlines()):
                found[row["op_type"]] += int(row["type_occurrences"])
    return found


def count(name: str, dtype: str) -> dict[str, Any]:
    """The operators of a forward, and those that value_and_grad adds: the backward."""
    x = Tensor(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    x = x.astype(getattr(ms, dtype))
    channels = SHAPE[1]
    subject = (
        SyncBatchNorm(channels, backend="aclnn")
        if name == "syncbn"
        else mint.nn.SyncBatchNorm(channels)
    )
    subject.set_train()
    differentiated = ms.value_and_grad(subject, 0, list(subject.trainable_params()))
    weight, bias = (ms.Parameter(Tensor(np.ones(channels, np.float32)), name=n) for n in "wb")
    # A layer of the same arguments that does nothing: what value_and_grad does itself.
    nothing = ms.value_and_grad(_Nothing(weight, bias), 0, [weight, bias])
    forward = operators(lambda: subject(x))
    whole = operators(lambda: differentiated(x))
    idle = operators(lambda: nothing(x))
    return {
        "layer": name,
        "dtype": dtype,
        "forward": _record(forward),
        "backward": _record(whole - forward - idle),
    }


class _Nothing(nn.Cell):
    def __init__(self, weight: ms.Parameter, bias: ms.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def construct(self, x: Tensor) -> Tensor:
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> Any:
        return (dout,), {self.weight: self.weight, self.bias: self.bias}


def _record(found: Counter[str]) -> dict[str, Any]:
    launches = {name: times for name, times in sorted(found.items()) if name not in COLLECTIVES}
    return {
        "launches": sum(launches.values()),
        "collectives": sum(found[name] for name in COLLECTIVES),
        "operations": launches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    ms.set_device("CPU")
    install()
    records = [
        count(name, dtype)
        for name in ("syncbn", "mint")
        for dtype in DTYPES
        if (name, dtype) != ("mint", "bfloat16")  # its kernel for statistics refuses it
    ]
    for record in records:
        print(json.dumps(record))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"mindspore": ms.__version__, "records": records}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
