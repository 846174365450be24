"""Rung `registered`: compare the operators that the `aten` backend calls with torch_npu's.

It needs no NPU and no CANN. A toolchain folder holds the wheel for the installed PyTorch, and may
hold others:

    pip install --no-deps --target TOOLCHAIN/torch_npu torch_npu==2.13.0
    pip download --no-deps --dest TOOLCHAIN torch_npu==2.10.0

The installed wheel is imported in a process of its own, with empty libraries in the place of
CANN's. There the backend runs on fake tensors of the NPU, which hold no data, and its calls are
recorded. "registered" means that the wheel lists the operator with a schema that accepts the call,
and that its kernel is in PyTorch's dispatcher. The other wheels need another PyTorch, so they are
only read: "declared" means that they list the operator with such a schema.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# The file in which a wheel lists the operators that it has kernels for.
_LIST = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# For each kind of argument, the types of a schema that accept it.
_TAKEN_BY = {
    "Tensor": ("Tensor", "Optional[Tensor]"),
    "None": ("Optional[Tensor]",),
    "float": ("float",),
    "bool": ("bool",),
}


class Call(NamedTuple):
    """A call of an operator."""

    operator: str
    arguments: tuple[tuple[str, str], ...]  # (name, kind) of each, in order
    results: int  # their number


@dataclass(frozen=True)
class Finding:
    """What a version of torch_npu provides."""

    version: str
    subject: str  # an operator, or hccl
    evidence: str  # "registered" or "declared"
    fault: str  # what is wrong, or ""


def check(toolchain: Path) -> list[Finding]:
    """Check the wheels of a toolchain folder, whose layout is described above.

    Raises:
        FileNotFoundError: torch_npu, a C compiler or binutils is missing.
        RuntimeError: torch_npu cannot be imported.
    """
    wheel = _import(toolchain)
    findings = judge(wheel.version, wheel.calls, wheel.declared, wheel.registered)
    hccl = "" if "hccl" in wheel.backends else "is not a backend of torch.distributed"
    findings.append(Finding(wheel.version, "hccl", "registered", hccl))
    for file in sorted(toolchain.glob("torch_npu-*.whl")):
        with zipfile.ZipFile(file) as archive:
            schemas = _declared(archive.read(_LIST).decode())
        findings += judge(file.name.split("-")[1], wheel.calls, schemas)
    return findings


def planted(toolchain: Path) -> dict[str, str]:
    """The fault that `judge` finds in the wheel after its first operator was changed, by change."""
    wheel = _import(toolchain)
    call = wheel.calls[0]
    schema = wheel.declared[call.operator]
    without = {name: s for name, s in wheel.declared.items() if name != call.operator}
    shorter = wheel.declared | {call.operator: re.sub(r", [^,]*\) ->", ") ->", schema)}
    others = [name for name in wheel.registered if name != call.operator]
    faults = {
        "missing operator": judge(wheel.version, [call], without, wheel.registered),
        "changed schema": judge(wheel.version, [call], shorter, wheel.registered),
        "missing kernel": judge(wheel.version, [call], wheel.declared, others),
    }
    return {name: found[0].fault for name, found in faults.items()}


def judge(
    version: str,
    calls: Iterable[Call],
    declared: dict[str, str],
    registered: Iterable[str] | None = None,
) -> list[Finding]:
    """One finding for each operator that is called.

    Args:
        version: of torch_npu.
        calls: of the backend.
        declared: the wheel's schemas, by operator.
        registered: operators whose kernel is in the dispatcher, or None if that is unknown.
    """
    faults: dict[str, str] = {}
    for call in calls:
        fault = _misfit(call, declared.get(call.operator))
        if not fault and registered is not None and call.operator not in registered:
            fault = "has no PrivateUse1 kernel"
        faults[call.operator] = faults.get(call.operator) or fault
    evidence = "declared" if registered is None else "registered"
    return [Finding(version, name, evidence, fault) for name, fault in sorted(faults.items())]


def build_stand_ins(site: Path, folder: Path) -> None:
    """Build a library for each library of CANN that torch_npu is linked to and that is missing.

    Their functions do nothing and return 0. They are good for an import only.
    """
    torch_libraries = Path(torch.__file__).parent / "lib"
    ours, missing, provided = [], set(), set()
    waiting = list((site / "torch_npu").glob("_C*.so"))
    while waiting:
        ours.append(waiting.pop())
        for name in _needed(ours[-1]):
            if (library := site / "torch_npu" / "lib" / name).exists():
                waiting += [library] if library not in ours + waiting else []
            elif (library := torch_libraries / name).exists():
                provided |= _symbols(library, "--defined-only")
            elif name.endswith(".so"):  # CANN's carry no version, those of the system do
                missing.add(name)
    wanted = set().union(*(_symbols(library, "--undefined-only") for library in ours))
    for library in ours:
        provided |= _symbols(library, "--defined-only")
    process = ctypes.CDLL(None)  # Python and the C library
    functions = [name for name in sorted(wanted - provided) if not hasattr(process, name)]
    source = "".join(f"long {name}(void) {{ return 0; }}\n" for name in functions)
    for name in sorted(missing):
        target = [f"-Wl,-soname,{name}", "-o", str(folder / name)]
        command = ["cc", "-shared", "-w", "-x", "c", "-", *target]
        subprocess.run(command, input=source, text=True, check=True)
        source = ""  # the first library has all functions


class _Wheel(NamedTuple):
    """What an imported torch_npu provides, and the calls of the backend with it."""

    version: str
    calls: list[Call]
    registered: list[str]  # operators with a kernel in the dispatcher
    backends: list[str]  # of torch.distributed
    declared: dict[str, str]  # schemas, by operator


@functools.cache
def _import(toolchain: Path) -> _Wheel:
    """The result of `_facts` in a process that imports the torch_npu of the toolchain."""
    site = toolchain / "torch_npu"
    if not (site / "torch_npu").is_dir():
        raise FileNotFoundError(
            f"toolchain must hold torch_npu, got {toolchain}: pip install --no-deps --target "
            f"{site} torch_npu==VERSION"
        )
    with tempfile.TemporaryDirectory() as folder:
        build_stand_ins(site, Path(folder))
        environment = os.environ | {
            "LD_LIBRARY_PATH": _path(folder, os.environ.get("LD_LIBRARY_PATH")),
            "PYTHONPATH": _path(str(site), os.environ.get("PYTHONPATH")),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        }
        command = [sys.executable, "-m", __name__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"torch_npu of {site} cannot be checked:\n{done.stderr[-4000:]}")
    facts = json.loads(done.stdout.splitlines()[-1])
    facts["calls"] = [Call(name, tuple(map(tuple, given)), n) for name, given, n in facts["calls"]]
    return _Wheel(**facts, declared=_declared((site / _LIST).read_text()))


def _facts() -> dict[str, Any]:
    """The fields of `_Wheel` except `declared`."""
    torch_npu = importlib.import_module("torch_npu")
    calls = _record()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        "version": torch_npu.__version__,
        "calls": sorted(calls),
        "registered": [
            name for name in {c.operator for c in calls} if has_kernel(name, "PrivateUse1")
        ],
        "backends": torch.distributed.Backend.backend_list,
    }


def _record() -> set[Call]:
    """The batch-norm operators that the backend calls for tensors on an NPU."""
    from syncbn.torch.backends import aten

    with FakeTensorMode(), _Recorder() as recorder:
        for dtype in _DTYPES:
            x = torch.empty(4, 3, 2, dtype=dtype, device="npu")
            per_channel, n = torch.empty(3, device="npu"), torch.empty((), device="npu")
            for weight in (None, per_channel.to(dtype)):
                aten.stats(x)
                aten.normalize(x, per_channel, per_channel, weight, weight)
                aten.reduce_grad(x, x, per_channel)
                aten.input_grad(x, x, per_channel, per_channel, weight, per_channel, per_channel, n)
    return recorder.calls


class _Recorder(TorchDispatchMode):
    """Records calls of batch-norm operators and returns empty results in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[Call] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        if not schema.name.startswith("aten::batch_norm"):
            return func(*args, **(kwargs or {}))
        names = (argument.name for argument in schema.arguments)
        arguments = tuple((name, _kind(a)) for name, a in zip(names, args, strict=True))
        self.calls.add(Call(schema.name, arguments, len(schema.returns)))
        if len(schema.returns) == 1:
            return torch.empty_like(args[0])
        return tuple(args[0].new_empty(args[0].shape[1]) for _ in schema.returns)


def _kind(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return "Tensor"
    return "None" if argument is None else type(argument).__name__


def _misfit(call: Call, declared: str | None) -> str:
    """Why an operator of that schema does not accept the call, or ""."""
    if declared is None:
        return "is not listed"
    schema = torch._C.parse_schema(declared)
    names = [argument.name for argument in schema.arguments]
    if names != [name for name, _ in call.arguments]:
        wanted = ", ".join(name for name, _ in call.arguments)
        return f"takes ({', '.join(names)}), is called with ({wanted})"
    for argument, (name, kind) in zip(schema.arguments, call.arguments, strict=True):
        if str(argument.type) not in _TAKEN_BY.get(kind, ()):
            return f"takes {name} as {argument.type}, is called with {kind}"
    if len(schema.returns) != call.results:
        return f"has {len(schema.returns)} results, is called for {call.results}"
    return ""


def _declared(listing: str) -> dict[str, str]:
    """Schemas of the PyTorch operators in a wheel's list, by operator."""
    schemas = re.findall(r"^- func: ((\w+)\(.*)$", listing, re.MULTILINE)
    return {f"aten::{name}": f"aten::{schema}" for schema, name in schemas}


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "--dynamic", library))


def _symbols(library: Path, which: str) -> set[str]:
    """Names of a library's strong dynamic symbols, without versions."""
    lines = (line.split() for line in _output("nm", "--dynamic", which, library).splitlines())
    return {name.partition("@")[0] for *_, kind, name in lines if kind not in "wv"}


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _path(*folders: str | None) -> str:
    return os.pathsep.join(folder for folder in folders if folder)


if __name__ == "__main__":
    print(json.dumps(_facts()))
