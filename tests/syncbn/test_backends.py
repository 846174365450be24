"""The table of the backends: complete, and readable without a framework."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import syncbn
from syncbn import backends as table
from syncbn.backends import MINDSPORE, TORCH, BackendInfo, choose

FOLDER = Path(syncbn.__file__).parent
OPERATIONS = {"stats", "combine", "normalize", "reduce_grad", "input_grad"}
ON_MESSAGES = {"torch": {"pack_stats", "combine_ranks", "pack_grad"}, "mindspore": set()}


def names_in(module: Path) -> set[str]:
    """The names that the top level of a module binds."""
    names: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names.update(n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    return names


@pytest.mark.parametrize(("framework", "backends"), [("torch", TORCH), ("mindspore", MINDSPORE)])
def test_every_module_of_backends_is_in_the_table(
    framework: str, backends: Mapping[str, BackendInfo]
) -> None:
    folder = FOLDER / framework / "backends"
    modules = {f"syncbn.{framework}.backends.{p.stem}": p for p in folder.glob("[!_]*.py")}
    assert {backend.module for backend in backends.values()} == set(modules)
    for name, backend in backends.items():
        assert backend.name == name
        assert names_in(modules[backend.module]) >= OPERATIONS | ON_MESSAGES[framework]


@pytest.mark.parametrize("backends", [TORCH, MINDSPORE])
def test_a_device_has_one_default(backends: Mapping[str, BackendInfo]) -> None:
    defaults = [device for backend in backends.values() for device in backend.default_on]
    assert len(defaults) == len(set(defaults))
    assert "cpu" in defaults


@pytest.mark.parametrize(
    ("installed", "on_npu", "on_cuda"),
    [
        ((), "aten", "aten"),
        (("triton",), "aten", "triton"),
        (("triton", "pybind11"), "aten", "triton"),
        (("triton-ascend",), "aten", "aten"),
        (("triton-ascend", "pybind11"), "triton", "aten"),
    ],
)
def test_the_default_depends_on_what_is_installed(
    installed: tuple[str, ...], on_npu: str, on_cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.delenv("SYNCBN_BACKEND", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", version)
    table._are_installed.cache_clear()
    chosen = {device: choose(TORCH, "auto", device).name for device in ("cpu", "cuda", "npu")}
    in_float64 = choose(TORCH, "auto", "cuda", float64=True).name
    table._are_installed.cache_clear()
    assert chosen == {"cpu": "composed", "cuda": on_cuda, "npu": on_npu}
    assert in_float64 == "aten"
    monkeypatch.setenv("SYNCBN_BACKEND", "aten")
    assert choose(TORCH, "auto", "npu").name == "aten"


def test_no_framework_is_imported() -> None:
    code = "import sys, syncbn.backends; print(*(sys.modules.keys() & {'torch', 'mindspore'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_an_internal_backend_can_be_chosen_but_is_not_offered() -> None:
    assert choose(TORCH, "twin", "cpu").internal
    offered = ", ".join(["auto", *(name for name, info in TORCH.items() if not info.internal)])
    with pytest.raises(ValueError, match=f"one of {offered}, got 'cudnn'"):
        choose(TORCH, "cudnn", "cpu")
