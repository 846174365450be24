"""A device that counts: what a training step launches and moves, found without an accelerator.

A `DeviceTensor` holds its values on the CPU and claims to be on `npu` or `cuda`, so the layer takes
the path of that device. Inside the mode `Counting` every operation on such tensors is executed on
the CPU and counted as the device would pay for it:

- an operation that computes or copies is one launch;
- a view or an allocation is free;
- an operation reads the tensors it is given and writes those it returns, each element once;
- a collective is counted by itself; the copies that its form makes inside the transport (a gather
  into a list of tensors copies every row out of a flat buffer) are launches of the step;
- an operation of a library of this project (`torch.library`) costs what its implementation for the
  device costs;
- a value that the host reads, or a shape that depends on values, is a wait of the host.

The values are real: those of a world whose ranks all have the same data.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from syncbn.conformance.ranks.substitutes import torch as vendor

DEVICES = ("npu", "cuda")

# Operations that neither compute nor copy; views are recognized by their schema.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
_FREE |= {"_unsafe_view", "lift_fresh", "alias", "_reshape_alias", "wait_tensor", "barrier"}
# Operations that take a tensor for its shape or its dtype only, by the index of that argument.
_UNREAD = {"ones_like": 0, "zeros_like": 0, "full_like": 0, "rand_like": 0, "copy_": 0}
_UNREAD |= {"new_full": 0, "new_ones": 0, "new_zeros": 0, "fill_": 0, "zero_": 0}
_UNREAD |= {"batch_norm_gather_stats_with_counts": 0}
# Operations whose result, or its shape, the host reads.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"}


@dataclass
class Cost:
    """What was counted: launches by operation, bytes read and written, collectives, host waits."""

    launches: Counter[str] = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    collectives: int = 0
    waits: int = 0

    @property
    def moved(self) -> int:
        return self.read + self.written


class DeviceTensor(torch.Tensor):
    """A tensor that claims to be on `device`; `held` has its values, on the CPU.

    For the dispatcher all are on torch's spare device (named npu here), because a build of torch
    without CUDA cannot make a tensor of CUDA.
    """

    held: Tensor
    claimed: torch.device
    device = property(lambda self: self.claimed)
    is_cuda = property(lambda self: self.claimed.type == "cuda")

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> DeviceTensor:
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=torch.device("npu:0"),
        )
        tensor.held, tensor.claimed = values, device
        return tensor

    def __init__(self, values: Tensor, device: torch.device) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a DeviceTensor outside of the mode Counting")


class Counting(TorchDispatchMode):
    """Executes and counts what happens on tensors of `device`; `reset` starts a new count."""

    def __init__(self, device: str) -> None:
        super().__init__()
        if device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
        _prepare()
        self.device = torch.device(device, 0)
        key = torch._C._dispatch_key_for_device(device)
        self._keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        self.cost = Cost()

    def reset(self) -> Cost:
        """The count so far; the next one starts at zero."""
        cost, self.cost = self.cost, Cost()
        return cost

    def tensor(self, values: Tensor) -> Tensor:
        """These values on the device."""
        return DeviceTensor(values.detach(), self.device)

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module with its parameters and buffers on the device."""
        return module._apply(self.tensor)

    def values(self, tree: Any) -> Any:
        """The arguments of a kernel with tensors of the CPU in place of those of the device."""
        return tree_map(_values, tree)

    def launched(self, name: str, read: int, written: int) -> None:
        """Count one launch."""
        self.cost.launches[name] += 1
        self.cost.read += read
        self.cost.written += written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        to = kwargs.get("device")
        to = None if to is None else torch.device(to)
        if to is not None and to.type == "npu":  # as PyTorch's own code sees a tensor of the device
            to = self.device
        here = any(isinstance(leaf, DeviceTensor) for leaf in tree_leaves((args, kwargs)))
        if not here and (to is None or to.type != self.device.type):
            return func(*args, **kwargs)
        if func.namespace in ("c10d", "_c10d_functional"):
            return self._communicate(func, args, kwargs)
        if func.namespace not in ("aten", "prim", "prims"):
            with self:  # what the implementation does is counted
                return func.redispatch(self._keys, *args, **kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if to is not None:
            kwargs["device"] = "cpu"
        inner_args, inner_kwargs = tree_map(_values, (args, kwargs))
        result = _kernel(func)(*inner_args, **inner_kwargs)
        stays = to is None or to.type == self.device.type
        if stays:
            result = tree_map(self._wrapped, result)
        self._count(func, args, kwargs, result, crosses=not (here and stays))
        return return_and_correct_aliasing(func, args, kwargs, result) if stays else result

    def _wrapped(self, leaf: Any) -> Any:
        return self.tensor(leaf) if isinstance(leaf, Tensor) else leaf

    def _count(
        self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, crosses: bool
    ) -> None:
        """Count an operation; `crosses`: it may copy from or to the host."""
        name = func.overloadpacket.__name__
        if name in _FREE or func.is_view:
            return
        masked = name == "index" and any(
            leaf.dtype in (torch.bool, torch.uint8)
            for leaf in tree_leaves(args[1])
            if isinstance(leaf, Tensor)
        )
        from_host = name in ("copy_", "_to_copy") and any(
            isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor) and leaf.dim()
            for leaf in tree_leaves(args)
        )
        if name in _WAITS or masked or from_host or (crosses and name in ("copy_", "_to_copy")):
            self.cost.waits += 1
        read = [arg for index, arg in enumerate(args) if index != _UNREAD.get(name)]
        self.launched(name, _bytes((read, kwargs)), _bytes(result))

    def _communicate(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do a collective of a world of equal ranks, and count the copies that it makes."""
        name = func.overloadpacket.__name__
        inner_args, inner_kwargs = tree_map(_values, (args, kwargs))
        if name in _FREE:
            return tree_map(self._wrapped, func(*inner_args, **inner_kwargs))
        self.cost.collectives += 1
        if name == "allgather_":
            for row in tree_leaves(args[0]):
                self.launched("copy of a gathered row", _bytes(row), _bytes(row))
        elif name in ("all_reduce", "all_reduce_coalesced"):  # the functional one copies first
            self.launched("copy of what is reduced", _bytes(args[0]), _bytes(args[0]))
        if name in ("allreduce_", "all_reduce"):
            result = func(*inner_args, **inner_kwargs)
            for values in tree_leaves(result):
                if isinstance(values, Tensor):
                    values.mul_(dist.get_world_size())
            return tree_map(self._wrapped, result)
        if name == "_allgather_base_":
            # The fake transport takes flat tensors only.
            output, message, *rest = inner_args
            return func(output.view(-1), message.view(-1), *rest, **inner_kwargs)
        return tree_map(self._wrapped, func(*inner_args, **inner_kwargs))


def join_world(ranks: int) -> None:
    """Make this process rank 0 of a world whose other ranks are equal to it."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  # registers the transport

    _prepare()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=HashStore())


def leave() -> NoReturn:
    """End this process, without the end of the interpreter.

    A thread of autograd for a device that is not there may still hold Python objects. Python before
    3.12 aborts the process if the thread gives them up while the interpreter ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@functools.cache
def _prepare() -> None:
    """Let this process believe that it has the devices, and the vendor's kernels for them.

    Before its first backward, which counts the devices.
    """
    module = ModuleType("npu")
    module._lazy_init = lambda: None  # type: ignore[attr-defined]
    module.is_available = lambda: True  # type: ignore[attr-defined]
    module.is_initialized = lambda: True  # type: ignore[attr-defined]
    _setup_privateuseone_for_python_backend("npu", module)
    # A tensor made with device="cuda" must not look for a driver.
    torch.cuda._initialized = True
    vendor.install()
    for key in ("PrivateUse1", "CUDA"):  # a search for them succeeds on the device
        for name in vendor.KERNELS:
            _LIBRARY.impl(name, _never_called, key)


_LIBRARY = Library("aten", "IMPL")


def _never_called(*args: Any) -> Any:
    raise RuntimeError("the mode Counting executes every operation of a DeviceTensor itself")


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether the operation is made of others on every device, as `to` is."""
    key = "CompositeImplicitAutograd"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def _values(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, DeviceTensor) else leaf


def _kernel(func: Any) -> Callable[..., Any]:
    """What stands for the operation's kernel on a device: those of batch norm take any dtypes."""
    name = func.overloadpacket.__name__
    return _batch_norm(func) if name.startswith("batch_norm_") else func


def _batch_norm(func: Any) -> Callable[..., Any]:
    """Statistics are float32 whatever the dtype of the data, which that of y and dx is."""

    def run(x: Tensor, *rest: Any) -> Any:
        wide = tree_map(_float32, (x, *rest))
        result = func(*wide)
        return result.to(x.dtype) if isinstance(result, Tensor) else result

    return run


def _float32(leaf: Any) -> Any:
    half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if half else leaf


def _bytes(tree: Any) -> int:
    """Bytes of the elements of all tensors of the device; an expanded element is one."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, DeviceTensor)}
    total = 0
    for tensor in tensors.values():
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= size if stride else min(size, 1)
        total += elements * tensor.element_size()
    return total
