"""The cost of a step, counted: the counts stay at or below those that were reached.

A counting device changes what the process believes to have, so each test has a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from audit.ladder import toolchain

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "kept" / "cost.json"

# Launches, bytes read and bytes written.
OPERATIONS = {
    "x.add(x)": (1, 128, 128),
    "x.add(x[0])": (1, 128 + 32, 128),
    "x.add_(1)": (1, 128, 128),
    "x.view(-1)[3:].unbind(0)": (0, 0, 0),
    "x.new_empty(100), torch.empty(100, device=x.device)": (0, 0, 0),
    "x[:, :1].expand(4, 100).sum()": (1, 16, 4),
    "torch.zeros_like(x), torch.full((2,), 3.0, device=x.device)": (2, 0, 128 + 8),
    "x.half()": (1, 128, 64),
    "x[0].copy_(x[1])": (1, 32, 32),
    "torch.stack([x, x.view(4, 8)])": (1, 2 * 128, 256),
}
WAITS = ["x[0, 0].item()", "x[x > 3]", "x.cpu()", "x.copy_(torch.ones(4, 8))", "x.nonzero()"]
# How many copies of 128 bytes.
COLLECTIVES = {
    "dist.all_gather([x.new_empty(4, 8) for _ in range(2)], x)": 2,
    "dist.all_gather_into_tensor(x.new_empty(8, 8), x)": 0,
    "dist.all_gather_into_tensor(x.new_empty(1, 64), x.view(-1))": 0,
    "dist.all_reduce(x)": 0,
}
LIBRARY = "twice(x)"
ROUNDING = 0.002  # of multiples of the input, which are written with three digits

needs_tools = pytest.mark.skipif(
    bool(toolchain.missing()), reason=f"missing in .toolchain: {toolchain.missing()}"
)


def python(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def costs() -> dict[str, Any]:
    """What each code costs, with a 4 x 8 float32 tensor `x` of the device (128 bytes)."""
    script = f"""
import json, torch, torch.distributed as dist, warnings
from benchmarks.device import Counting, join_world, leave
join_world(2)
warnings.simplefilter("ignore")
twice = torch.library.custom_op(
    "counted::twice", lambda x: x * 2 + 1, mutates_args=(), schema="(Tensor x) -> Tensor"
)
costs = {{}}
for code in {[*OPERATIONS, *WAITS, *COLLECTIVES, LIBRARY]!r}:
    with Counting("npu") as counting:
        x = counting.tensor(torch.arange(32.0).view(4, 8))
        exec(code)
        costs[code] = counting.reset().__dict__
print(json.dumps(costs))
leave()
"""
    result: dict[str, Any] = json.loads(python("-c", script).splitlines()[-1])
    return result


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[k] for k in ("layer", "backend", "device", "dtype", "layout", "ranks"))


def test_counts_are_at_or_below_those_reached(tmp_path: Path) -> None:
    out = tmp_path / "new" / "cost.json"
    table = python("-m", "benchmarks.cost", "--quick", "--out", str(out))
    kept = {key(record): record for record in json.loads(KEPT.read_text())["records"]}
    records = json.loads(out.read_text())["records"]
    assert ("left out: triton, npu" in table) == bool(toolchain.missing())
    assert len(records) == (15 if toolchain.missing() else 18)
    for record in records:
        for direction in ("forward", "backward"):
            now, reached = record[direction], kept[key(record)][direction]
            where = f"{direction} of {key(record)}"
            assert now["collectives"] == 1, where
            for what in ("launches", "waits"):
                assert now[what] <= reached[what], f"{what}, {where}: {now['operations']}"
            for what in ("read", "written"):
                assert now[what] <= reached[what] + ROUNDING, f"{what}, {where}"


@pytest.mark.skipif(
    importlib.util.find_spec("mindspore") is None, reason="mindspore is not installed"
)
def test_counts_in_mindspore_are_at_or_below_those_reached(tmp_path: Path) -> None:
    out = tmp_path / "cost_mindspore.json"
    python("-W", "ignore", "-m", "benchmarks.cost_mindspore", "--out", str(out))
    kept = json.loads((KEPT.parent / "cost_mindspore.json").read_text())["records"]
    records = json.loads(out.read_text())["records"]
    assert [(r["layer"], r["dtype"]) for r in records] == [(r["layer"], r["dtype"]) for r in kept]
    for record, reached in zip(records, kept, strict=True):
        for direction in ("forward", "backward"):
            now, before = record[direction], reached[direction]
            where = f"{direction} of {record['layer']} in {record['dtype']}"
            assert now["collectives"] == 1, where
            assert now["launches"] <= before["launches"], f"{where}: {now['operations']}"


@pytest.mark.parametrize("code", OPERATIONS)
def test_what_an_operation_costs(code: str, costs: dict[str, Any]) -> None:
    cost = costs[code]
    assert (sum(cost["launches"].values()), cost["read"], cost["written"]) == OPERATIONS[code]
    assert cost["waits"] == cost["collectives"] == 0


@pytest.mark.parametrize("code", WAITS)
def test_a_wait_of_the_host_is_counted(code: str, costs: dict[str, Any]) -> None:
    assert costs[code]["waits"] == 1


@pytest.mark.parametrize("code", COLLECTIVES)
def test_a_copy_inside_a_collective_is_a_launch(code: str, costs: dict[str, Any]) -> None:
    cost = costs[code]
    assert cost["collectives"] == 1
    assert sum(cost["launches"].values()) == COLLECTIVES[code]
    assert cost["read"] == cost["written"] == 128 * COLLECTIVES[code]


def test_an_operation_of_a_library_costs_what_its_implementation_costs(
    costs: dict[str, Any],
) -> None:
    assert costs[LIBRARY]["launches"] == {"mul": 1, "add": 1}


@pytest.mark.parametrize("device", ["npu", "cuda"])
def test_a_counted_step_has_the_values_of_one_over_two_equal_ranks(device: str) -> None:
    script = f"""
import torch
from benchmarks.cost import Subject
from benchmarks.device import Counting, join_world, leave
join_world(2)
x, dy = torch.randn(2, 3, 8, 5, 5).unbind(0)
plain, whole = torch.nn.BatchNorm2d(8), torch.cat([x, x]).requires_grad_()
expected = plain(whole)
expected.backward(torch.cat([dy, dy]))
for backend in ("", "aten", "composed"):
    with Counting({device!r}) as counting:
        layer = counting.module(Subject(backend, {device!r}).layer(8))
        leaf = counting.tensor(x).requires_grad_()
        y = layer(leaf)
        assert y.device.type == {device!r}
        assert y.is_cuda == ({device!r} == "cuda")
        y.backward(counting.tensor(dy))
    torch.testing.assert_close(y.held, expected[:3])
    torch.testing.assert_close(leaf.grad.held, whole.grad[:3])
    torch.testing.assert_close(layer.running_var.held, plain.running_var)
leave()
"""
    python("-c", script)


@needs_tools
@pytest.mark.parametrize("layout", ["planes", "columns"])
def test_the_bytes_of_a_kernel_are_those_that_its_lowered_code_moves(layout: str) -> None:
    shape = (6, 5, 200) if layout == "planes" else (1200, 5, 1)
    script = f"""
import json
from audit.ladder import toolchain
toolchain.use("triton-ascend")
import torch
from audit.ladder import traffic
from syncbn.kernels.operations import Operations
moved = {{}}
def launch(variant, programs, arguments):
    moved[variant.kernel] = traffic.run(variant, programs, arguments)
operations = Operations(launch, lambda device: ("ascend", 3))
x = torch.randn({shape}).half()
mean, invstd = torch.zeros(5), torch.ones(5)
y = operations.normalize(x, mean, invstd, None, None)
assert y.equal(x)
operations.reduce_grad(x, x.clone(), mean)
print(json.dumps(moved))
"""
    moved = json.loads(python("-W", "ignore", "-c", script).splitlines()[-1])
    size = 6 * 5 * 200 * 2
    vector = 5 * 4
    read, written = moved["normalize"]
    assert written == size
    assert size + 4 * vector <= read <= size + 12 * 4 * vector  # of every item, at most 12
    read, written = moved["reduce_grad"]
    assert 2 * vector <= written <= 3 * 2 * vector
    assert 2 * size + vector <= read <= 2 * size + 3 * vector
