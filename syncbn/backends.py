"""The backends of the layer, as data. The layer reads it, and so does whatever judges the layer.

No framework is imported here. Devices are named as PyTorch names them: cpu, cuda, npu (Ascend).
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BackendInfo:
    """One implementation of the five operations.

    name: the value of `backend=` and of SYNCBN_BACKEND.
    module: the module of the five operations, imported when a layer uses the backend.
    default_on: the devices that use it if no backend is named.
    preferred_on: the devices that use it rather than their default, and the distributions that must
        be installed for that.
    float64_on: the devices on which it computes in float64.
    on_cpu: what its results on CPU stand for: "device" is the backend itself; "substituted" is the
        backend with substitutes for kernels that CPU does not have; "interpreted" are our kernels
        in Triton's interpreter; "twin" are our kernels as Ascend's compiler lowered them.
    compiles: whether a step may take seconds, because it compiles loops for a new kind of data.
    needs: the modules that it imports and that the framework does not bring.
    install: how to install them.
    internal: whether it exists for tests only. Error messages do not offer it.
    """

    name: str
    module: str
    default_on: tuple[str, ...] = ()
    preferred_on: tuple[tuple[str, tuple[str, ...]], ...] = ()
    float64_on: tuple[str, ...] = ()
    on_cpu: str = "device"
    compiles: bool = False
    needs: tuple[str, ...] = ()
    install: str = ""
    internal: bool = False


def _by_name(*backends: BackendInfo) -> Mapping[str, BackendInfo]:
    return {backend.name: backend for backend in backends}


_TRITON = "pip install triton-ascend pybind11 (Ascend) or triton (CUDA)"

TORCH = _by_name(
    BackendInfo(
        "composed",
        "syncbn.torch.backends.composed",
        default_on=("cpu",),
        float64_on=("cpu", "cuda"),
    ),
    BackendInfo(
        "numba",
        "syncbn.torch.backends.numba",
        float64_on=("cpu",),
        compiles=True,
        needs=("numba",),
        install="pip install 'syncbn[numba]'",
    ),
    BackendInfo(
        "aten",
        "syncbn.torch.backends.aten",
        default_on=("cuda", "npu"),
        float64_on=("cuda",),
        on_cpu="substituted",
    ),
    BackendInfo(
        "triton",
        "syncbn.torch.backends.triton",
        # It launches less and moves less than `aten`, most of all in halves (docs/performance.md,
        # docs/cuda.md), and on CUDA it is right for scales where the kernels of `aten` overflow.
        preferred_on=(("npu", ("triton-ascend", "pybind11")), ("cuda", ("triton",))),
        on_cpu="interpreted",
        needs=("triton", "pybind11"),
        install=_TRITON,
    ),
    BackendInfo(
        "twin",
        "syncbn.torch.backends.twin",
        on_cpu="twin",
        needs=("triton", "pybind11"),
        install=_TRITON,
        internal=True,
    ),
)

MINDSPORE = _by_name(
    BackendInfo(
        "composed",
        "syncbn.mindspore.backends.composed",
        default_on=("cpu",),
        float64_on=("cpu",),
    ),
    # Its operations run on CPU as well, with the limits of Ascend's kernels.
    BackendInfo(
        "aclnn",
        "syncbn.mindspore.backends.aclnn",
        default_on=("npu",),
        on_cpu="substituted",
    ),
)


def default(backends: Mapping[str, BackendInfo], device: str, float64: bool = False) -> BackendInfo:
    """The backend of a device type; the first for a device that is no backend's default.

    float64: whether it must compute in float64. If none does on the device, it raises later.
    """
    fitting = [b for b in backends.values() if not float64 or device in b.float64_on]
    fitting = fitting or [*backends.values()]
    for backend in fitting:
        if _are_installed(dict(backend.preferred_on).get(device)):
            return backend
    of_device = [backend for backend in fitting if device in backend.default_on]
    return of_device[0] if of_device else fitting[0]


@functools.cache
def _are_installed(distributions: tuple[str, ...] | None) -> bool:
    """Whether there are any and all are installed."""
    try:
        return bool([importlib.metadata.version(name) for name in distributions or ()])
    except importlib.metadata.PackageNotFoundError:
        return False


def choose(
    backends: Mapping[str, BackendInfo], name: str, device: str, float64: bool = False
) -> BackendInfo:
    """The backend that a layer uses.

    Args:
        backends: TORCH or MINDSPORE.
        name: of a backend; "auto" for the one that SYNCBN_BACKEND names, or without it for the
            default of the device.
        device: a device type.
        float64: whether the data are float64, which not every default has.

    Raises:
        ValueError: there is no backend of that name.
    """
    source = "backend"
    if name == "auto":
        source, name = "SYNCBN_BACKEND", os.environ.get("SYNCBN_BACKEND", "auto")
    if name == "auto":
        return default(backends, device, float64)
    if name not in backends:
        offered = [backend.name for backend in backends.values() if not backend.internal]
        raise ValueError(f"{source} must be one of {', '.join(['auto', *offered])}, got {name!r}")
    return backends[name]
