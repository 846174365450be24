"""A rank of a PyTorch target."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not marked so
from torch.utils.checkpoint import checkpoint

from conformance import data
from conformance.case import Case

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
T = TypeVar("T")

_COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_STATE = ("running_mean", "running_var", "num_batches_tracked")


class TorchRank:
    """Builds the target's layer with the documented arguments only, and calls it on tensors."""

    def __init__(self, target: dict[str, Any], rank: int, ranks: int, local_rank: int) -> None:
        torch.set_num_threads(1)
        if target["backend"] is not None:
            os.environ["SYNCBN_BACKEND"] = target["backend"]
        self.rank = rank
        self.ranks = ranks
        self.device = _device(target["device"], local_rank)
        self.rank_ids = target["rank_ids"]
        self.cls = _find(target["module"], target["cls"])
        if not isinstance(self.cls(1), nn.Module):
            raise TypeError(f"{target['cls']} must be a torch.nn.Module")
        self.store: TCPStore | None = None
        self.groups: dict[tuple[int, ...], Any] = {}

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "collectives": _COLLECTIVES[self.device.type]}

    def host(self) -> int:
        self.store = TCPStore("127.0.0.1", 0, self.ranks, True, wait_for_workers=False)
        return self.store.port

    def join(self, port: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        self.groups = {}
        if self.rank != 0:
            self.store = TCPStore("127.0.0.1", port, self.ranks, False)
        backend = _COLLECTIVES[self.device.type]
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.ranks)

    def run(self, case: Case) -> tuple[dict[str, Any], Arrays]:
        answer: dict[str, Any] = {"steps": []}
        arrays: Arrays = {}
        try:
            groups = self._groups(case)
            if case.group_of(self.rank) is None:
                return answer, arrays
            layer = self._build(case, groups)
        except Exception as error:
            answer["error"] = _describe(error)
            return answer, arrays
        if "signature" in case.checks:
            answer["signature"] = {
                name: repr(parameter.default)
                for name, parameter in inspect.signature(self.cls).parameters.items()
            }
        if "parameters" in case.checks:
            answer["parameters"] = _parameters(layer)
        if "state_names" in case.checks:
            answer["state_names"] = list(layer.state_dict())
        if "initial_values" in case.checks:
            arrays |= {f"initial/{name}": _array(t) for name, t in layer.state_dict().items()}
        for index, step in enumerate(case.steps):
            if not step.takes_part(self.rank):
                answer["steps"].append({})
                continue
            facts = self._step(layer, case, index, arrays)
            answer["steps"].append(facts)
            if "error" in facts and not case.fails(index, self.rank):
                break
        return answer, arrays

    def _groups(self, case: Case) -> dict[tuple[int, ...], Any]:
        """Every rank takes part in the creation of every group, once."""
        for ranks in case.groups or ():
            if ranks not in self.groups:
                self.groups[ranks] = dist.new_group(list(ranks))
        return self.groups

    def _build(self, case: Case, groups: dict[tuple[int, ...], Any]) -> nn.Module:
        arguments = {name: _literal(name, value) for name, value in case.layer.items()}
        group = case.group_of(self.rank)
        if case.groups is not None and group is not None:
            arguments["process_group"] = groups[group]
        layer = self.cls(**arguments).to(self.device)
        if case.state == "random" and case.error is None:
            state = {
                name: torch.tensor(values, dtype=getattr(torch, case.parameter_dtype))
                for name, values in data.initial_state(case).items()
            }
            unknown = layer.load_state_dict(state, strict=False).unexpected_keys
            if unknown:
                raise RuntimeError(f"the layer's state_dict has no {', '.join(unknown)}")
        return layer

    def _step(self, layer: nn.Module, case: Case, index: int, arrays: Arrays) -> dict[str, Any]:
        """One forward and backward; adds what the case checks to `arrays`."""
        step = case.steps[index]
        x = self._tensor(data.shard(case, index, self.rank), step, input=True)
        wants_input, wants_parameters = step.wants_grad(self.rank)
        x.requires_grad_(wants_input and x.is_floating_point())
        for parameter in layer.parameters():
            parameter.requires_grad_(wants_parameters)
            parameter.grad = None
        layer.train(step.mode == "train")
        untouched, version = x.detach().clone(), x._version

        def forward() -> Tensor:
            if step.recompute:
                y: Tensor = checkpoint(layer, x, use_reentrant=False)
            else:
                y = layer(x)
            return y

        facts: dict[str, Any] = {}
        counting = "collectives" in case.checks
        try:
            y, facts["collectives"] = _count(forward, counting)
            if not isinstance(y, Tensor):
                raise TypeError(f"forward must return a tensor, got {type(y).__name__}")
            if step.backward:
                dy = self._tensor(data.grad_output(case, index, self.rank), step, input=False)
                _, in_backward = _count(lambda: y.backward(dy), counting)
                facts["collectives"] += in_backward
        except Exception as error:
            facts["error"] = _describe(error)
        else:
            facts["format"] = _format(x, y)
            arrays |= _wanted(case, index, {"y": y, "grad_input": x.grad} | _gradients(layer))
        facts["input_unmodified"] = x._version == version and _same(x.detach(), untouched)
        arrays |= _wanted(case, index, {name: getattr(layer, name, None) for name in _STATE})
        return facts

    def _tensor(self, values: npt.NDArray[np.float64], step: Any, input: bool) -> Tensor:
        layout = step.layout_of(self.rank) if input else step.dy_layout_of(self.rank)
        dtype = getattr(torch, step.dtype_of(self.rank))
        return _lay_out(torch.tensor(values, dtype=dtype, device=self.device), layout)


def _device(name: str, local_rank: int) -> torch.device:
    if name not in _COLLECTIVES:
        raise ValueError(f"device must be one of {', '.join(_COLLECTIVES)}, got {name!r}")
    if name == "npu":
        importlib.import_module("torch_npu")
    if name == "cpu":
        return torch.device("cpu")
    module = getattr(torch, name)
    if not module.is_available():
        raise RuntimeError(f"device {name} was asked for, but torch {torch.__version__} sees none")
    device = torch.device(name, local_rank % module.device_count())
    module.set_device(device)
    return device


def _find(module_name: str, class_name: str) -> Callable[..., nn.Module]:
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None or not Path(module_name).is_file():
            raise ImportError(f"no file {module_name}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    cls: Callable[..., nn.Module] = getattr(module, class_name)
    return cls


def _literal(name: str, value: Any) -> Any:
    """The Python value of a literal of a case; see conformance.case."""
    if isinstance(value, dict) and "float" in value:
        return float(value["float"])
    if isinstance(value, dict) and "numpy" in value:
        return np.dtype(value["numpy"]).type(value["value"])
    if name == "dtype" and isinstance(value, str):
        return getattr(torch, value, value)
    return value


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other places of memory."""
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        backwards = tuple(reversed(range(tensor.dim())))
        return tensor.permute(backwards).contiguous().permute(backwards)
    if layout == "sliced":
        wider = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7, dtype=tensor.dtype)
        view = wider.to(tensor.device)[..., ::2]
        return view.copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def _count(call: Callable[[], T], counting: bool) -> tuple[T, list[int]]:
    """The result of a call and, in a list, how many collectives it issued."""
    if not counting:
        return call(), []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        result = call()
    names = [event.name for event in profile.events()]
    return result, [sum(name.startswith(("c10d::", "_c10d_functional::")) for name in names)]


def _gradients(layer: nn.Module) -> dict[str, Tensor | None]:
    return {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}


def _wanted(case: Case, index: int, tensors: dict[str, Tensor | None]) -> Arrays:
    needed = set(case.checks) | (set(_STATE) if "ranks_agree" in case.checks else set())
    return {
        f"{index}/{name}": _array(tensor)
        for name, tensor in tensors.items()
        if tensor is not None and name in needed
    }


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """A copy, for a buffer lives on; NumPy has no bfloat16, but float32 holds its values."""
    tensor = tensor.detach().cpu()
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: npt.NDArray[Any] = wide.numpy().copy()
    return array


def _parameters(layer: nn.Module) -> dict[str, Any]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: {"shape": list(t.shape), "dtype": _dtype(t)} for name, t in tensors}


def _format(x: Tensor, y: Tensor) -> dict[str, Any]:
    def described(tensor: Tensor) -> dict[str, Any]:
        channels_last = tensor.dim() > 2 and tensor.movedim(1, -1).is_contiguous()
        return {
            "shape": list(tensor.shape),
            "dtype": _dtype(tensor),
            "contiguous": tensor.is_contiguous(),
            "channels_last": channels_last,
        }

    return {"x": described(x), "y": described(y)}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _describe(error: Exception) -> dict[str, Any]:
    types = [cls.__name__ for cls in type(error).__mro__]
    return {"types": types, "message": str(error)}
