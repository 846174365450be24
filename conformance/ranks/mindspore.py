"""A rank of a MindSpore target, in PyNative or in graph mode."""

from __future__ import annotations

import contextlib
import csv
import functools
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import mindspore as ms
import numpy.typing as npt
from mindspore import Parameter, Tensor, communication, nn, ops
from mindspore.common.api import _pynative_executor
from mindspore.communication._comm_helper import _ExistingGroup
from mindspore.communication.management import _init_with_store
from mindspore.mint import distributed as dist
from mindspore.ops.auto_generate import gen_ops_prim
from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from syncbn.conformance.case import Case, Step
from syncbn.conformance.ranks import network
from syncbn.conformance.ranks.base import Rank, Unsupported, by_role
from syncbn.conformance.ranks.process import Generator, Setting
from syncbn.conformance.ranks.substitutes import mindspore as substitutes

T = TypeVar("T")

_DEVICES = {"cpu": ("CPU", "mccl"), "npu": ("Ascend", "hccl")}
_MODES = {"pynative": ms.PYNATIVE_MODE, "graph": ms.GRAPH_MODE}
_FLOATING = ("bfloat16", "float16", "float32", "float64")
_LEARNED = ("weight", "bias")
_TIMEOUT = timedelta(minutes=10)  # longer than any deadline, so that the controller sees a hang

# The profiler's names of the kernels that communicate. It does not see those of mint.distributed,
# which are the classes in _UNSEEN.
_COLLECTIVE = re.compile(r"InnerComm\w+|AllReduce|AllGather|ReduceScatter|Broadcast|AlltoAll")
_UNSEEN = [cls for name, cls in vars(gen_ops_prim).items() if name.startswith("DistComm")]
# MindSpore appends to an error the places in its own sources.
_FRAMES = re.compile(r"\s*\n-{10,}\n- (C\+\+ Call Stack|The Traceback of).*", re.DOTALL)


class MindSporeRank(Rank):
    """A process of MindSpore, which can form only one world in its life."""

    framework = ms

    def __init__(self, target: dict[str, Any], rank: int, ranks: int, local_rank: int) -> None:
        if target["device"] not in _DEVICES:
            known = ", ".join(_DEVICES)
            raise ValueError(f"device must be one of {known}, got {target['device']!r}")
        self.platform, self.collectives = _DEVICES[target["device"]]
        # Otherwise MindSpore takes the first network interface that it finds.
        os.environ.setdefault("MS_WORKER_IP", network.own_address())
        if self.platform == "CPU":
            ms.set_device(self.platform)
        else:
            ms.set_device(self.platform, local_rank)
        ms.runtime.launch_blocking()  # otherwise a later operation raises the error
        ms.set_context(mode=_MODES[target["mode"]])
        self.mode = target["mode"]
        if target["rung"] == "substituted":
            substitutes.install()
        super().__init__(target, rank, ranks, local_rank)
        if not (isinstance(self.cls, type) and issubclass(self.cls, nn.Cell)):
            raise TypeError(f"{target['cls']} must be a mindspore.nn.Cell")
        self.joined = False
        self.loss = _Loss()

    def versions(self) -> dict[str, str]:
        return {"mindspore": ms.__version__, "collectives": self.collectives}

    def host(self) -> int:
        # A free port, because MindSpore's store cannot choose one. Later it is just a new number.
        with socket.socket() as probe:
            probe.bind((network.meeting(), 0))
            port: int = probe.getsockname()[1]
        return port

    def join(self, port: int) -> None:
        if self.joined:
            self._prove_in_step(port)
        elif "MS_ROLE" in os.environ:  # msrun has brought the ranks together
            communication.init()
        else:
            store = dist.TCPStore(network.meeting(), port, self.ranks, self.rank == 0, _TIMEOUT)
            _init_with_store(self.collectives, _TIMEOUT, self.ranks, self.rank, store)
        self.joined = True

    def build(self, arguments: dict[str, Any]) -> nn.Cell:
        layer: nn.Cell = self.cls(**arguments)
        return layer

    def load_state(self, layer: nn.Cell, state: dict[str, Tensor]) -> Sequence[str]:
        given = {name: Parameter(tensor, name=name) for name, tensor in state.items()}
        unknown: list[str] = ms.load_param_into_net(layer, given)[1]
        return unknown

    def state(self, layer: nn.Cell) -> dict[str, Tensor]:
        parameters: dict[str, Tensor] = layer.parameters_dict()
        return parameters

    def parameters(self, layer: nn.Cell) -> dict[str, Tensor]:
        return self.state(layer) | dict(layer.named_buffers())

    def create_group(self, ranks: tuple[int, ...]) -> str:
        """The name of the group. Only members create it: another rank would break it for all."""
        name = "ranks " + ",".join(map(str, ranks))
        if self.rank in ranks:
            communication.create_group(name, list(ranks))
        return name

    def tensor(self, values: npt.NDArray[Any], dtype: str) -> Tensor:
        return Tensor(values, dtype=getattr(ms, dtype))

    def array(self, tensor: Tensor) -> npt.NDArray[Any]:
        known = tensor.astype(ms.float32) if tensor.dtype == ms.bfloat16 else tensor
        array: npt.NDArray[Any] = known.asnumpy().copy()
        return array

    def settings(self) -> tuple[Setting, ...]:
        return (
            Setting(
                "the mode",
                lambda: ms.get_context("mode"),
                lambda mode: ms.set_context(mode=mode),
            ),
        )

    def generators(self) -> tuple[Generator, ...]:
        return (Generator(ms.get_rng_state, ms.set_rng_state),)

    def unsupported(self, case: Case) -> str | None:
        for dtype in _FLOATING:
            if dtype in case.dtypes and (reason := _lacks(dtype)):
                return f"MindSpore {ms.__version__} has no {dtype} on {self.platform}: {reason}"
        if reason := super().unsupported(case):
            return reason
        if case.cast or any(step.copied for step in case.steps):
            return "the suite neither copies nor casts layers of MindSpore"
        if case.ddp:
            return "the suite has no data parallelism of MindSpore, which has none on CPU"
        if any(step.lost for step in case.steps):
            return "the suite cannot make a backward of MindSpore fail"
        if any(step.recording == "inference_mode" for step in case.steps):
            return "MindSpore has no inference mode"
        if self.mode == "graph" and any(step.recording != "on" for step in case.steps):
            return "a graph of MindSpore records what is differentiated, and has no other switch"
        if self.mode == "graph" and any(step.recompute for step in case.steps):
            return "in a graph MindSpore recomputes operations, not the forward of a layer"
        if self.mode == "graph" and any(_idles(case, step) for step in case.steps):
            return "a compiled forward cannot see whether it will be differentiated"
        raises = self.mode == "graph" and any(step.error for step in case.steps)
        if raises and self.platform == "CPU" and "float64" in case.dtypes:
            return "MindSpore rounds float64 in a graph that can raise: its TensorMove has none"
        if "collectives" in case.checks:
            if self.platform != "CPU":
                return "collectives of MindSpore are counted on CPU only"
            if raises:
                return "MindSpore's profiler, which counts collectives, breaks a graph that raises"
        return None

    def describe(self, error: Exception) -> dict[str, Any]:
        # Without this, later gradients fail after an error inside a gradient.
        _pynative_executor.clear_res()
        described = super().describe(error)
        return described | {"message": _FRAMES.sub("", described["message"]).strip()}

    def data_parallel(self, layer: nn.Cell) -> nn.Cell:
        raise NotImplementedError  # see `unsupported`

    def communicators(self) -> int:
        return len(_ExistingGroup.ITEMS)

    def take(
        self,
        layer: nn.Cell,
        parallel: nn.Cell | None,
        x: Tensor,
        dy: Tensor | None,
        step: Step,
        counting: bool,
    ) -> tuple[dict[str, Tensor | None], list[int]]:
        wants_input, wants_parameters = step.wants_grad(self.rank)
        learned = _learned(layer)
        for parameter in learned.values():
            parameter.requires_grad = wants_parameters
        for cell in filter(None, (layer, parallel)):
            cell.set_train(step.mode == "train")
        if parallel is not None:
            parallel.update_parameters_name("beside.")  # a graph needs different names
        weights = [*learned.values()] if wants_parameters else []
        position = 0 if wants_input and x.is_floating_point() else None
        module = layer
        if step.autocast:
            module = ms.amp.auto_mixed_precision(
                _Network(layer), "auto", getattr(ms, step.autocast)
            )
        recomputing, loss, compiled = step.recompute, self.loss, self.mode == "graph"

        # Plain functions of tensors, because graph mode compiles them.
        def forward(x: Tensor) -> Tensor:
            return ms.recompute(module, x) if recomputing else module(x)

        def with_loss(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            if compiled:
                # MindSpore 2.10.0 ignores the strides of an input of a graph that can raise, unless
                # an operation has used the input before. Ours can raise with SYNCBN_DEBUG=1. In a
                # network dy comes from an operation; the layer itself uses x.
                x = ops.depend(x, ops.neg(dy))
            y = forward(x)
            if parallel is not None:
                return loss(y, dy) + loss(parallel(-ops.stop_gradient(x)), dy), y
            return loss(y, dy), y

        in_forward = _count_aside(layer, lambda: forward(x)) if counting else 0
        if dy is None or (position is None and not weights):
            with ms._no_grad() if step.recording == "no_grad" else contextlib.nullcontext():
                y = forward(x)
            y.asnumpy()  # a graph runs asynchronously: this waits for it, and raises its errors
            return {"y": y}, [in_forward]
        both = ms.value_and_grad(with_loss, position, weights or None, has_aux=True)
        ((_, y), gradients), in_both = _count(lambda: both(x, dy), counting)
        y.asnumpy()
        if not weights:
            gradients = (gradients, ())
        elif position is None:
            gradients = (None, gradients)
        dx, of_weights = gradients
        names = [f"grad_{name}" for name in learned] if wants_parameters else []
        by_weight = dict(zip(names, of_weights, strict=True))
        return {"y": y, "grad_input": dx, **by_weight}, [in_forward, in_both - in_forward]

    def take_twice(
        self, layer: nn.Cell, x: Tensor, dy: Tensor, cotangents: dict[str, Tensor], step: Step
    ) -> dict[str, Any]:
        # In a graph, a gradient of a gradient cannot give other results as well.
        with _undone(layer):
            results, _ = self.take(layer, None, x, dy, step, False)
        wants_input, wants_parameters = step.wants_grad(self.rank)
        learned = _learned(layer) if wants_parameters else {}
        weights = [*learned.values()]
        starts = tuple(cotangents[f"grad_{name}"] for name in learned)

        # Plain functions of tensors: in graph mode they are compiled.
        def loss(x: Tensor, dy: Tensor) -> Tensor:
            return (layer(x) * dy).sum()

        first = ms.grad(loss, 0 if wants_input else None, weights or None)

        def of_first(x: Tensor, dy: Tensor, start: Tensor) -> Tensor:
            found = first(x, dy)
            if not starts:
                return (found * start).sum()
            of_weights = found[1] if wants_input else found
            total = (of_weights[0] * starts[0]).sum() + (of_weights[1] * starts[1]).sum()
            return total + (found[0] * start).sum() if wants_input else total

        again = {name: p for name, p in learned.items() if name in step.second}
        wanted = (wants_input and "input" in step.second, "grad_output" in step.second)
        places = tuple(place for place in (0, 1) if wanted[place])
        second = ms.grad(of_first, places or None, [*again.values()] or None)
        try:
            found = second(x, dy, cotangents["grad_input"])
        except RuntimeError as error:
            if self.mode == "graph" and "second derivative" in str(error):
                raise Unsupported(self.describe(error)["message"]) from error
            raise
        of_places = (found[0] if again else found) if places else ()
        of_again = (found[1] if places else found) if again else ()
        names = [("grad_grad_input", "grad_grad_output")[place] for place in places]
        names += [f"grad_grad_{name}" for name in again]
        return results | dict(zip(names, (*_tuple(of_places), *_tuple(of_again)), strict=True))

    def _prove_in_step(self, nonce: int) -> None:
        """Raise if a rank is still in a collective of an earlier case.

        MindSpore cannot form a second world. But the old one is as good as a new one if its
        collectives, and those of its groups, give the right results for new numbers.
        """
        world = (tuple(range(self.ranks)), None)
        for ranks, group in (world, *self.groups.items()):
            if self.rank in ranks:
                for turn in range(3):
                    _prove(self.rank, ranks, group, nonce + turn)


def _idles(case: Case, step: Step) -> bool:
    """Whether a rank is at fault for having nothing to differentiate."""
    at_fault = step.error.ranks if step.error else ()
    idle = set(step.frozen_input)
    if case.affine:
        idle.intersection_update(step.frozen_parameters)
    return step.backward and not idle.isdisjoint(at_fault)


class _Network(nn.Cell):
    """A network of one layer, whose parameters keep their names."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Loss(nn.Cell):
    """A loss whose gradient in y is dy itself, in its layout."""

    def construct(self, y: Tensor, dy: Tensor) -> Tensor:
        return y.sum()

    def bprop(self, y: Tensor, dy: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy


def _prove(rank: int, ranks: Sequence[int], group: str | None, nonce: int) -> None:
    numbers = {member: (nonce * 31 + member * 7) % 4093 for member in ranks}
    mine = Tensor([numbers[rank]], ms.float32)
    gathered = [ops.zeros_like(mine) for _ in ranks]
    dist.all_gather(gathered, mine, group)
    summed = ops.zeros_like(mine) + mine
    dist.all_reduce(summed, group=group)
    sent = ops.zeros_like(mine) + mine
    dist.broadcast(sent, ranks[0], group)
    got = [float(tensor.asnumpy()[0]) for tensor in (*gathered, summed, sent)]
    expected = [*numbers.values(), sum(numbers.values()), numbers[ranks[0]]]
    if got != expected:
        raise RuntimeError(f"the ranks are out of step: got {got}, expected {expected}")


@functools.cache
def _lacks(dtype: str) -> str | None:
    """Why the platform cannot compute with a dtype as every layer must; None if it can."""
    try:
        values = Tensor([1.0, 2.0], getattr(ms, dtype))
        ops.assign(Parameter(values, name="values"), values)
        values.sum()
    except (TypeError, RuntimeError) as error:
        _pynative_executor.clear_res()
        lines = [line for line in str(error).splitlines() if re.search(r"\w", line)]
        return next((line for line in lines if not line.startswith("- ")), "")
    return None


def _learned(layer: nn.Cell) -> dict[str, Parameter]:
    """The weight and the bias of a layer, if it has them."""
    parameters = by_role({parameter.name: parameter for parameter in layer.get_parameters()})
    return {name: parameters[name] for name in _LEARNED if name in parameters}


def _tuple(found: Any) -> tuple[Tensor, ...]:
    """Gradients as a tuple: MindSpore gives one of them alone."""
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _count_aside(layer: nn.Cell, call: Callable[[], Any]) -> int:
    """How many collectives a call issues. The layer is afterwards as it was before."""
    with _undone(layer):
        return _count(call, True)[1]


@contextlib.contextmanager
def _undone(layer: nn.Cell) -> Iterator[None]:
    """Afterwards the parameters and statistics of the layer are as before."""
    before = {parameter: parameter.asnumpy().copy() for parameter in layer.get_parameters()}
    yield
    for parameter, values in before.items():
        parameter.set_data(Tensor(values, parameter.dtype))


def _count(call: Callable[[], T], counting: bool) -> tuple[T, int]:
    """The result of a call and how many collectives it issued."""
    if not counting:
        return call(), 0
    unseen = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def counting_call(*arguments: Any) -> Any:
            nonlocal unseen
            unseen += 1
            return original(*arguments)

        return counting_call

    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        for cls in _UNSEEN:
            stack.enter_context(mock.patch.object(cls, "__call__", counted(cls.__call__)))
        written = tensorboard_trace_handler(place, analyse_flag=False)
        with profile(activities=[ProfilerActivity.CPU], on_trace_ready=written):
            result = call()
        kernels = [
            kernel
            for file in Path(place).rglob("cpu_op_type_info_*.csv")
            for kernel in csv.DictReader(file.read_text().splitlines())
        ]
    counts = [int(k["type_occurrences"]) for k in kernels if _COLLECTIVE.fullmatch(k["op_type"])]
    return result, sum(counts) + unseen
