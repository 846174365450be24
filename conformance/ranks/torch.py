"""A rank of a PyTorch target."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import (  # type: ignore[attr-defined]  # public, but not marked so
    PrefixStore,
    TCPStore,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn.conformance.case import Case, Step
from syncbn.conformance.frameworks import FRAMEWORKS
from syncbn.conformance.ranks import network
from syncbn.conformance.ranks.base import Rank, by_role
from syncbn.conformance.ranks.process import Generator, Setting
from syncbn.conformance.ranks.substitutes import torch as substitutes

T = TypeVar("T")

_RANK_IDS = "the target takes a ProcessGroup, and torch checks the rank ids of that"


class TorchRank(Rank):
    """A process of torch.distributed; it forms a new world for each `join`."""

    framework = torch

    def __init__(self, target: dict[str, Any], rank: int, ranks: int, local_rank: int) -> None:
        torch.set_num_threads(1)
        self.device = _device(target["device"], ranks, local_rank, target["share_device"])
        self.collectives = target["collectives"] or _collectives(self.device.type)
        if target["share_device"] and self.collectives == "nccl":
            # NCCL refuses two ranks on one device of one host, so each rank is a host of its own.
            os.environ["NCCL_HOSTID"] = f"syncbn-rank-{rank}"
        # Otherwise gloo listens on the address that the name of the machine has.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network.own_interface())
        if target["rung"] == "interpreted":
            os.environ["TRITON_INTERPRET"] = "1"
        if target["rung"] == "substituted":
            substitutes.install()
        super().__init__(target, rank, ranks, local_rank)
        if not isinstance(self.cls(**{"num_features": 1} | self.layer_args), nn.Module):
            raise TypeError(f"{target['cls']} must be a torch.nn.Module")
        self.store: TCPStore | None = None
        self.worlds = 0

    def versions(self) -> dict[str, str]:
        versions = {"torch": torch.__version__, "collectives": self.collectives}
        if self.device.type == "cuda":
            versions["device"] = torch.cuda.get_device_name(self.device)
            versions["cuda"] = str(torch.version.cuda)
        if self.collectives == "nccl":
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if self.device.type == "npu":
            versions["torch_npu"] = sys.modules["torch_npu"].__version__
        return versions

    def host(self) -> int:
        if self.store is None:
            # By itself the store listens on every address of the machine, and takes any writer.
            with socket.create_server((network.meeting(), 0), backlog=self.ranks) as listener:
                port = listener.getsockname()[1]
                self.store = TCPStore(
                    network.meeting(),
                    port,
                    self.ranks,
                    True,
                    wait_for_workers=False,
                    master_listen_fd=os.dup(listener.fileno()),
                    use_libuv=False,  # that of torch 2.7.1 takes no socket
                )
        return self.store.port

    def join(self, port: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        self.groups = {}
        # One store for all worlds: every sixth client of a second store waits for 5 s.
        if self.store is None:
            self.store = TCPStore(network.meeting(), port, self.ranks, False)
        self.worlds += 1
        store = PrefixStore(f"world {self.worlds}", self.store)
        dist.init_process_group(
            self.collectives, store=store, rank=self.rank, world_size=self.ranks
        )

    def build(self, arguments: dict[str, Any]) -> nn.Module:
        layer: nn.Module = self.cls(**arguments).to(self.device)
        return layer

    def cast(self, layer: nn.Module, dtype: str) -> nn.Module:
        return layer.to(getattr(torch, dtype))

    def load_state(self, layer: nn.Module, state: dict[str, Tensor]) -> Sequence[str]:
        return layer.load_state_dict(state, strict=False).unexpected_keys

    def state(self, layer: nn.Module) -> dict[str, Tensor]:
        return layer.state_dict()

    def parameters(self, layer: nn.Module) -> dict[str, Tensor]:
        return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

    def create_group(self, ranks: tuple[int, ...]) -> Any:
        return dist.new_group(list(ranks))

    def tensor(self, values: npt.NDArray[Any], dtype: str) -> Tensor:
        return torch.tensor(values, dtype=getattr(torch, dtype), device=self.device)

    def array(self, tensor: Tensor) -> npt.NDArray[Any]:
        tensor = tensor.detach().cpu()
        known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        array: npt.NDArray[Any] = known.numpy().copy()
        return array

    def data_parallel(self, layer: nn.Module) -> nn.Module:
        # Broadcasting the buffers would hide that they differ.
        ids = None if self.device.type == "cpu" else [self.device]
        return DistributedDataParallel(layer, device_ids=ids, broadcast_buffers=False)

    def communicators(self) -> int:
        return len(dist.distributed_c10d._world.pg_map)

    def take(
        self,
        layer: nn.Module,
        parallel: nn.Module | None,
        x: Tensor,
        dy: Tensor | None,
        step: Step,
        counting: bool,
    ) -> tuple[dict[str, Any], list[int]]:
        wants_input, wants_parameters = step.wants_grad(self.rank)
        x.requires_grad_(wants_input and x.is_floating_point())
        x.grad = None
        for parameter in layer.parameters():
            parameter.requires_grad_(wants_parameters)
            parameter.grad = None
        for module in filter(None, (layer, parallel)):
            module.train(step.mode == "train")
        formats: list[bool] = []
        if x.requires_grad:  # a hook sees the gradient before autograd gives it the format of x
            x.register_hook(lambda grad: formats.append(self.is_channels_last(grad)))
        branches = [x.detach().neg().requires_grad_(x.requires_grad)] if parallel else []

        def forward() -> list[Tensor]:
            y: Tensor = checkpoint(layer, x, use_reentrant=False) if step.recompute else layer(x)
            return [y, *(parallel(branch) for branch in branches if parallel)]

        with self._around_forward(step):
            ys, collectives = _count(forward, counting)
        if dy is not None:
            gradients = [dy] * len(ys)
            _, in_backward = _count(lambda: torch.autograd.backward(ys, gradients), counting)
            collectives += in_backward
        learned = by_role(dict(layer.named_parameters()))
        results: dict[str, Any] = {f"grad_{name}": p.grad for name, p in learned.items()}
        results["grad_input_format"] = formats[-1] if formats else None
        return {"y": ys[0], "grad_input": x.grad, **results}, collectives

    def take_twice(
        self,
        layer: nn.Module,
        x: Tensor,
        dy: Tensor,
        cotangents: dict[str, Tensor],
        step: Step,
    ) -> dict[str, Any]:
        wants_input, wants_parameters = step.wants_grad(self.rank)
        layer.train(step.mode == "train")
        layer.requires_grad_(wants_parameters)
        x.requires_grad_(wants_input)
        dy.requires_grad_("grad_output" in step.second)
        learned = by_role(dict(layer.named_parameters()))
        inputs = {"input": x, **learned}
        inputs = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        y = layer(x)
        found = torch.autograd.grad(y, list(inputs.values()), dy, create_graph=True)
        first = {f"grad_{name}": grad for name, grad in zip(inputs, found, strict=True)}
        # With a constant dy, grad_bias is a constant and has no second derivative.
        again = [name for name, grad in first.items() if grad.requires_grad]
        if not again:
            raise RuntimeError("no gradient of the layer can be differentiated again")
        of_first = {"input": x, "grad_output": dy, "weight": learned.get("weight")}
        wanted = {name: t for name, t in of_first.items() if t is not None and t.requires_grad}
        wanted = {name: tensor for name, tensor in wanted.items() if name in step.second}
        second = torch.autograd.grad(
            [first[name] for name in again],
            list(wanted.values()),
            [cotangents[name] for name in again],
            materialize_grads=True,
        )
        names = [f"grad_grad_{name.removeprefix('grad_')}" for name in wanted]
        return {"y": y, **first, **dict(zip(names, second, strict=True))}

    def _around_forward(self, step: Step) -> contextlib.ExitStack:
        """The contexts in which the forward runs."""
        stack = contextlib.ExitStack()
        if step.recording == "no_grad":
            stack.enter_context(torch.no_grad())
        if step.recording == "inference_mode":
            stack.enter_context(torch.inference_mode())
        if step.autocast:
            dtype = getattr(torch, step.autocast)
            stack.enter_context(torch.autocast(self.device.type, dtype))
        if self.rank in step.lost:
            stack.enter_context(saved_tensors_hooks(lambda tensor: tensor, _lose))
        return stack

    def settings(self) -> tuple[Setting, ...]:
        return _SETTINGS

    def generators(self) -> tuple[Generator, ...]:
        of_cpu = Generator(torch.get_rng_state, torch.set_rng_state)
        if self.device.type == "cpu":
            return (of_cpu,)
        module = getattr(torch, self.device.type)
        return (of_cpu, Generator(module.get_rng_state, module.set_rng_state))

    def unsupported(self, case: Case) -> str | None:
        if "process_group" in case.layer and not self.rank_ids:
            return _RANK_IDS
        return super().unsupported(case)

    def is_channels_last(self, tensor: Tensor) -> bool:
        return tensor.dim() > 2 and tensor.movedim(1, -1).is_contiguous()


def _default_group() -> int | None:
    """What distinguishes a default process group from a later one."""
    return id(dist.group.WORLD) if dist.is_initialized() else None


def _autocast() -> tuple[tuple[bool, torch.dtype], ...]:
    kinds = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)


def _put_autocast(values: tuple[tuple[bool, torch.dtype], ...]) -> None:
    for kind, (enabled, dtype) in zip(("cpu", "cuda"), values, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _deterministic() -> tuple[bool, bool]:
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns


def _flushes_denormals() -> bool:
    """Whether this process takes numbers below the normal ones for 0, which torch does not tell."""
    return not (torch.tensor(1e-310, dtype=torch.float64) * 1.0).item()


_SETTINGS = (
    Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("the default device", torch.get_default_device, torch.set_default_device),
    Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    Setting("inference mode", torch.is_inference_mode_enabled),
    Setting("autocast", _autocast, _put_autocast),
    Setting("the number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting(
        "deterministic algorithms",
        _deterministic,
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    Setting("denormal numbers", _flushes_denormals, torch.set_flush_denormal),
    Setting("the default process group", _default_group),
)


def _lose(tensor: Tensor) -> Tensor:
    raise RuntimeError("a tensor that was saved for the backward is lost")


def _device(name: str, ranks: int, local_rank: int, share: bool) -> torch.device:
    """The device of a rank, of any type that PyTorch has, as a backend of PrivateUse1 adds one."""
    if name == "npu":
        importlib.import_module("torch_npu")
    if name == "cpu":
        return torch.device("cpu")
    module = getattr(torch, name, None)
    if module is None or not hasattr(module, "is_available") or not _is_type(name):
        raise ValueError(
            f"device must be a type of device of torch {torch.__version__}, got {name!r}: if a "
            "package adds it, import that in a set-up function (--setup)"
        )
    if not module.is_available():
        raise RuntimeError(f"there is no device {name}: torch {torch.__version__} finds none")
    count = module.device_count()
    if local_rank >= count and not share:
        raise RuntimeError(
            f"ranks must be at most {count}, the number of {name} devices, got {ranks}: start "
            "fewer ranks, or on cuda add --share-device"
        )
    device = torch.device(name, local_rank % count)
    module.set_device(device)
    return device


def _is_type(name: str) -> bool:
    try:
        return torch.device(name).type == name
    except RuntimeError:
        return False


def _collectives(device: str) -> str:
    """What carries the collectives of a device, unless the user names something else."""
    known = FRAMEWORKS["torch"].collectives
    return known[device][0] if device in known else dist.get_default_backend_for_device(device)


def _count(call: Callable[[], T], counting: bool) -> tuple[T, list[int]]:
    """The result of a call, and a list of the number of collectives that it issued."""
    if not counting:
        return call(), []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        result = call()
    names = [event.name for event in profile.events()]
    return result, [sum(name.startswith(("c10d::", "_c10d_functional::")) for name in names)]
