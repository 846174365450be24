"""The tools of the ladder, installed into `.toolchain` of the checkout and nowhere else.

They cannot live in one environment: triton and triton-ascend share a name, also with what PyTorch
for CUDA brings along, and torch_npu keeps PyTorch from starting where CANN is not. So each has a
folder, which goes first on the path where it is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from syncbn.conformance import ConformanceError

FOLDER = Path(__file__).resolve().parents[2] / ".toolchain"

# Wheels, each into a folder of its name.
WHEELS = {
    "triton-ascend": ["triton-ascend==3.2.0", "pybind11==3.1.0"],
    "ascendnpu-ir": ["ascendnpu-ir==1.2.0"],
    "triton": ["triton==3.9.0"],
    "torch_npu": ["torch_npu==2.13.0", "pyyaml"],
}

# A torch_npu that wants another PyTorch and so is only read: the one that docs/ascend.md names.
_WHEEL_TO_READ = "torch_npu==2.7.1.post2"

# Debian's MLIR 19, of the LLVM release that bishengir-compile is made of, and what it is linked to.
_PACKAGES = (
    *("mlir-19-tools", "libmlir-19", "llvm-19", "libllvm19"),
    *("libpfm4", "libz3-4", "libedit2", "libxml2"),
)
_LLVM = FOLDER / "llvm"


class MissingTool(ConformanceError, RuntimeError):
    """A tool that a rung needs is not there; says how to install it."""


def install() -> None:
    """Fetch whatever is not there yet, in these versions, for this Python (2.5 GB, unpacked)."""
    try:
        for name, requirements in WHEELS.items():
            _install_wheels(FOLDER / name, requirements)
        _install_packages()
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        raise MissingTool(f"the tool-chain is not complete, for this failed: {command}") from error


def missing() -> str:
    """What of the tools is not there, or is not what `install` would fetch; empty if nothing."""
    stale = [name for name, wanted in WHEELS.items() if not _is_current(FOLDER / name, wanted)]
    if not _is_current(_LLVM, _PACKAGES):
        stale.append("llvm")
    return ", ".join(stale)


def wheel(name: str) -> Path:
    """The folder of a wheel, for PYTHONPATH."""
    return _there(FOLDER / name)


def use(name: str) -> None:
    """Import a wheel from its folder from now on, here and in processes that are started."""
    folder = str(wheel(name))
    sys.path.insert(0, folder)
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{known}" if known else folder


def bishengir_compile() -> str:
    return str(_there(FOLDER / "ascendnpu-ir" / "ascendnpuir" / "bin" / "bishengir-compile"))


def llvm(tool: str) -> str:
    """mlir-opt, mlir-translate, opt or llc."""
    return str(_there(_LLVM / "usr" / "lib" / "llvm-19" / "bin" / tool))


def llvm_environment() -> dict[str, str]:
    """The environment in which they find their libraries."""
    libraries = [_LLVM / "usr/lib/llvm-19/lib", *(_LLVM / "usr/lib").glob("*-linux-gnu")]
    known = os.environ.get("LD_LIBRARY_PATH")
    path = ":".join([*map(str, libraries), *([known] if known else [])])
    return {**os.environ, "LD_LIBRARY_PATH": path}


def c_compiler() -> str:
    found = shutil.which("cc")
    if found is None:
        raise MissingTool("a C compiler is needed, and there is no cc: apt-get install gcc")
    return found


def _there(path: Path) -> Path:
    if not path.exists():
        raise MissingTool(f"{path} is not there: make kernels, or python -m audit kernels install")
    return path


def _stamp(requirements: Iterable[str]) -> str:
    return " ".join([*requirements, sys.implementation.cache_tag or ""])


def _is_current(folder: Path, requirements: Iterable[str]) -> bool:
    """Whether the folder holds what is required, for this Python."""
    stamp = folder / "stamp"
    return stamp.is_file() and stamp.read_text() == _stamp(requirements)


def _begin(folder: Path, requirements: Iterable[str]) -> Path:
    """A new folder to fill, which `_end` puts in place."""
    print(f"fetching {', '.join(requirements)} into {folder}", flush=True)
    unfinished = folder.with_name(f"{folder.name}.part")
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def _end(unfinished: Path, folder: Path, requirements: Iterable[str]) -> None:
    (unfinished / "stamp").write_text(_stamp(requirements))
    unfinished.rename(folder)


def _install_wheels(folder: Path, requirements: list[str]) -> None:
    if _is_current(folder, requirements):
        return
    unfinished = _begin(folder, requirements)
    quietly = ("--disable-pip-version-check", "--quiet", "--no-deps")
    pip = [sys.executable, "-m", "pip"]
    to = ["--target", str(unfinished)]
    subprocess.run([*pip, "install", *quietly, *to, *requirements], check=True)
    if folder.name == "torch_npu":
        to = ["--dest", str(FOLDER)]
        subprocess.run([*pip, "download", *quietly, *to, _WHEEL_TO_READ], check=True)
    _end(unfinished, folder, requirements)


def _install_packages() -> None:
    """Unpacked beside each other, not installed: that needs no root."""
    if _is_current(_LLVM, _PACKAGES):
        return
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise MissingTool(
                f"{tool}, of Debian or Ubuntu, fetches {', '.join(_PACKAGES)}: it is not here"
            )
    unfinished = _begin(_LLVM, _PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        lists = Path(folder) / "apt"
        (lists / "partial").mkdir(parents=True)
        apt = ["apt-get", "-qq", f"-oDir::State::Lists={lists}", f"-oDir::Cache={lists}"]
        subprocess.run([*apt, "update"], check=True)
        subprocess.run([*apt, "download", *_PACKAGES], check=True, cwd=folder)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(unfinished)], check=True)
    _end(unfinished, _LLVM, _PACKAGES)
    subprocess.run(
        [llvm("mlir-opt"), "--version"], check=True, env=llvm_environment(), capture_output=True
    )
