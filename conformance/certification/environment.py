"""Where the runs of a certificate were made, and the digests of the suite that judged."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import syncbn
from syncbn.conformance import report

# Only variables whose names start like this are kept, because others may hold secrets.
_VARIABLES = (
    "ASCEND",
    "CANN",
    "CUBLAS",
    "CUDA",
    "GLOG",
    "GLOO",
    "HCCL",
    "INF_NAN_MODE",
    "MKL",
    "MS_",
    "NCCL",
    "NVIDIA",
    "OMP",
    "OPENBLAS",
    "PYTHONHASHSEED",
    "PYTHONPATH",
    "PYTORCH",
    "SYNCBN",
    "TORCH",
    "TRITON",
)
# The tool that reports the accelerators of a type of device.
TOOLS = {"cuda": "nvidia-smi", "npu": "npu-smi"}
_SUITE = ("conformance", "launchers", "reference", "reports")
_DATA = ("profiles/*.txt", "regressions/*.json", "schema/*.json")


def environment() -> dict[str, Any]:
    """The machine, its software and the suite, as they are now; values are texts, by name."""
    return {
        "host": platform.node(),
        "machine": {
            "platform": platform.platform(),
            "architecture": platform.machine(),
            "cpu": _cpu(),
            "cores": str(os.cpu_count()),
            "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')} bytes",
        },
        "accelerator": dict(_accelerators()),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "packages": {
            str(found.metadata["Name"]): found.version
            for found in sorted(metadata.distributions(), key=lambda one: str(one.name))
        },
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) and "KEY" not in name
        },
        "suite": report.suite() | {"files": suite_files()},
    }


def suite_files() -> dict[str, str]:
    """The SHA-256 of each file of this suite, by its path below the folder of `syncbn`."""
    root = Path(syncbn.__file__).parent
    found = [*root.glob("*.py")]
    for package in _SUITE:
        found += (root / package).rglob("*.py")
        found += [path for data in _DATA for path in (root / package).glob(data)]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(found)
    }


def differences(before: dict[str, Any], after: dict[str, Any], place: str = "") -> Iterator[str]:
    """The places at which two environments differ."""
    for name in sorted({*before, *after}):
        one, other = before.get(name), after.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other, f"{place}{name}.")
        elif one != other:
            yield f"{place}{name}"


def _cpu() -> str:
    """The model of the processor, as Linux reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"^(?:model name|Hardware)\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor()


def _accelerators() -> Iterator[tuple[str, str]]:
    """What the tools of the drivers report of the accelerators, and the version of CANN."""
    query = "--query-gpu=index,name,driver_version,vbios_version,memory.total"
    for name, command in (
        ("nvidia-smi", ["nvidia-smi", query, "--format=csv,noheader"]),
        ("npu-smi", ["npu-smi", "info", "-l"]),
        ("npu-smi board", ["npu-smi", "info", "-t", "board", "-i", "0"]),
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        yield name, done.stdout.strip()[:10000]
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    for path in Path(home or "/nonexistent").glob("version.*"):
        yield f"CANN {path.name}", path.read_text(errors="replace").strip()[:10000]
