"""The tools of the ladder, installed into `.toolchain` of the checkout and nowhere else.

They cannot share an environment: triton-ascend installs a package called triton, like upstream
triton and PyTorch for CUDA, and PyTorch does not start with torch_npu where CANN is missing. So
each has a folder, which comes first on the path where the tool is needed.
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

# A torch_npu for another PyTorch, which is only read: the version that docs/ascend.md names.
_WHEEL_TO_READ = "torch_npu==2.7.1.post2"

# Debian's MLIR 19, the LLVM release that bishengir-compile is built from, and its libraries.
_PACKAGES = (
    *("mlir-19-tools", "libmlir-19", "llvm-19", "libllvm19"),
    *("libpfm4", "libz3-4", "libedit2", "libxml2"),
)
_LLVM = FOLDER / "llvm"


class MissingTool(ConformanceError, RuntimeError):
    """A tool that a rung needs is missing; the text explains how to install it."""


def install() -> None:
    """Fetch every tool that is missing or outdated, for this Python (2.5 GB, unpacked)."""
    try:
        for name, requirements in WHEELS.items():
            _install_wheels(FOLDER / name, requirements)
        _install_packages()
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        raise MissingTool(f"the tool-chain is incomplete: this failed: {command}") from error


def missing() -> str:
    """Names of the tools that are missing or outdated, or ""."""
    stale = [name for name, wanted in WHEELS.items() if not _is_current(FOLDER / name, wanted)]
    if not _is_current(_LLVM, _PACKAGES):
        stale.append("llvm")
    return ", ".join(stale)


def wheel(name: str) -> Path:
    """The folder of a wheel, for PYTHONPATH."""
    return _there(FOLDER / name)


def use(name: str) -> None:
    """Import a wheel from its folder from now on, here and in processes that start later."""
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
    """The environment in which LLVM's tools find their libraries."""
    libraries = [_LLVM / "usr/lib/llvm-19/lib", *(_LLVM / "usr/lib").glob("*-linux-gnu")]
    known = os.environ.get("LD_LIBRARY_PATH")
    path = ":".join([*map(str, libraries), *([known] if known else [])])
    return {**os.environ, "LD_LIBRARY_PATH": path}


def c_compiler() -> str:
    found = shutil.which("cc")
    if found is None:
        raise MissingTool("a C compiler is needed, but there is no cc: apt-get install gcc")
    return found


def _there(path: Path) -> Path:
    if not path.exists():
        raise MissingTool(
            f"{path} is missing: run make kernels, or python -m audit kernels install"
        )
    return path


def _stamp(requirements: Iterable[str]) -> str:
    return " ".join([*requirements, sys.implementation.cache_tag or ""])


def _is_current(folder: Path, requirements: Iterable[str]) -> bool:
    """Whether the folder holds these requirements, for this Python."""
    stamp = folder / "stamp"
    return stamp.is_file() and stamp.read_text() == _stamp(requirements)


def _begin(folder: Path, requirements: Iterable[str]) -> Path:
    """An empty folder to fill, which `_end` renames to `folder`."""
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
    """Unpack Debian's packages into one folder; installing them would need root."""
    if _is_current(_LLVM, _PACKAGES):
        return
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise MissingTool(
                f"{tool} of Debian or Ubuntu is needed to fetch {', '.join(_PACKAGES)}"
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
