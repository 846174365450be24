"""The tools of the ladder, installed into `.toolchain` of the checkout and nowhere else.

They cannot live in one environment: triton and triton-ascend share a name, and torch_npu keeps
PyTorch from starting where CANN is not. So each has a folder, which goes on PYTHONPATH where it is
needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".toolchain"

# Wheels, each into a folder of its name. triton-ascend is not among them: `make kernels` installs
# it as the extra `triton` of the project.
WHEELS = {
    "ascendnpu-ir": ["ascendnpu-ir==1.2.0"],
    "triton": ["triton==3.9.0"],
    "torch_npu": ["torch_npu==2.13.0", "pyyaml"],
}

# Debian's MLIR 19, of the LLVM release that bishengir-compile is made of.
_PACKAGES = ("mlir-19-tools", "libmlir-19", "llvm-19", "libllvm19", "libpfm4")
_LLVM = FOLDER / "llvm"


class MissingTool(RuntimeError):
    """A tool that a rung needs is not there; says how to install it."""


def install() -> None:
    """Fetch whatever is not there yet (2.3 GB, unpacked)."""
    for name, requirements in WHEELS.items():
        if not (FOLDER / name).is_dir():
            _install_wheels(FOLDER / name, requirements)
    if not _LLVM.is_dir():
        _install_packages()


def wheel(name: str) -> Path:
    """The folder of a wheel, for PYTHONPATH."""
    return _there(FOLDER / name)


def bishengir_compile() -> str:
    return str(_there(FOLDER / "ascendnpu-ir" / "ascendnpuir" / "bin" / "bishengir-compile"))


def llvm(tool: str) -> str:
    """mlir-opt, mlir-translate or llc."""
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
        raise MissingTool(f"{path} is not there: make kernels, or python -m syncbn.kernels install")
    return path


def _install_wheels(folder: Path, requirements: list[str]) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f"installing {', '.join(requirements)} into {folder}", flush=True)
    subprocess.run([*pip, "--no-deps", "--target", str(unfinished), *requirements], check=True)
    unfinished.rename(folder)


def _install_packages() -> None:
    """Unpacked beside each other, not installed: that needs no root."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise MissingTool(
                f"{', '.join(_PACKAGES)} are fetched by {tool}, which is not there: unpack those "
                f"packages of Debian or Ubuntu into {_LLVM}"
            )
    print(f"unpacking {', '.join(_PACKAGES)} into {_LLVM}", flush=True)
    lists, packages, unfinished = (FOLDER / name for name in ("apt", "packages", "llvm.part"))
    for folder in (lists / "partial", packages, unfinished):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    apt = ["apt-get", "-qq", f"-oDir::State::Lists={lists}", f"-oDir::Cache={lists}"]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *_PACKAGES], check=True, cwd=packages)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(unfinished)], check=True)
    unfinished.rename(_LLVM)
    for folder in (lists, packages):
        shutil.rmtree(folder)
