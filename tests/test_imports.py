"""Which way imports run: RULES says what each package may import, and this test reads the tree.

The imports are read from the source, so those inside functions count, and those of files which
need a framework that is not installed here. docs/architecture.md gives the reasons.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

try:
    import tomllib  # type: ignore[import-not-found]
except ModuleNotFoundError:  # before Python 3.11
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

# Directories that are imported as syncbn.NAME, through the links in syncbn/.
LINKED = ("kernels", "reference", "conformance", "launchers", "reports")
# Directories that are imported as NAME, in a checkout only.
UNSHIPPED = ("audit", "tests", "benchmarks", "examples")

FRAMEWORKS = ("torch", "torch_npu", "mindspore", "triton", "jax", "flax")

# Small modules without a framework, which every part of syncbn may use.
BASE = (
    "syncbn.backends",
    "syncbn.checkpoints",
    "syncbn.contract",
    "syncbn.extras",
    "syncbn.protocol",
)


class Rule(NamedTuple):
    """What a package may import besides itself and Python's library.

    Attributes:
        own: packages and modules of this project, each with all that is below it.
        others: top-level names of other projects' packages; None for any.
    """

    own: tuple[str, ...]
    others: tuple[str, ...] | None


# The longest name that is or contains a module is its rule.
RULES = {
    # The layer. Its five operations on Triton's kernels are the one way out of it.
    "syncbn": Rule(BASE, ()),
    "syncbn.torch": Rule(BASE, ("torch", "torch_npu")),
    "syncbn.torch.backends.numba": Rule(
        (*BASE, "syncbn.torch"), ("torch", "numpy", "numba", "llvmlite")
    ),
    "syncbn.torch.backends.triton": Rule(
        (*BASE, "syncbn.torch", "syncbn.kernels"), ("torch", "triton")
    ),
    "syncbn.torch.backends.twin": Rule((*BASE, "syncbn.torch", "syncbn.kernels"), ("torch",)),
    "syncbn.mindspore": Rule(BASE, ("mindspore", "numpy")),
    "syncbn.kernels": Rule(BASE, ("torch", "triton")),
    # The judge. Its controller never imports a framework, and no part of it the audit.
    "syncbn.reference": Rule(("syncbn.extras",), ("numpy",)),
    "syncbn.launchers": Rule(("syncbn.extras",), ()),
    "syncbn.reports": Rule(("syncbn.extras",), ("rich", "jsonschema", "tomli", "tomllib")),
    "syncbn.conformance": Rule(
        (*BASE, "syncbn.reference", "syncbn.launchers", "syncbn.reports"), ("numpy", "rich")
    ),
    "syncbn.conformance.plugin": Rule(("syncbn.conformance", "syncbn.reports"), ("pytest",)),
    "syncbn.conformance.sequences": Rule(("syncbn.conformance",), ("numpy", "hypothesis")),
    "syncbn.conformance.ranks.torch": Rule(
        (*BASE, "syncbn.conformance", "syncbn.torch"), ("numpy", "torch", "torch_npu")
    ),
    "syncbn.conformance.ranks.mindspore": Rule(
        (*BASE, "syncbn.conformance", "syncbn.mindspore"), ("numpy", "mindspore")
    ),
    "syncbn.conformance.ranks.substitutes.torch": Rule((), ("numpy", "torch")),
    "syncbn.conformance.ranks.substitutes.mindspore": Rule((), ("numpy", "mindspore")),
    # What never ships.
    "audit": Rule(("syncbn",), None),
    "examples": Rule(("syncbn.torch", "syncbn.mindspore"), None),
    "examples.jax_framework": Rule(("syncbn.conformance.frameworks",), ()),
    "examples.jax_rank": Rule(
        (
            "syncbn.conformance.case",
            "syncbn.conformance.ranks.base",
            "syncbn.conformance.ranks.network",
        ),
        ("numpy", "jax", "flax"),
    ),
    "benchmarks": Rule(("syncbn", "audit"), None),
    "tests": Rule(("syncbn", "audit", "examples", "benchmarks"), None),
}


def modules() -> dict[str, Path]:
    """Name and file of every module of the project."""
    found = {}
    for top in ("syncbn", *LINKED, *UNSHIPPED):
        prefix = ("syncbn",) if top in LINKED else ()
        for folder, _, names in os.walk(ROOT / top):  # does not follow the links
            for name in names:
                path = Path(folder, name)
                if path.suffix == ".py":
                    parts = (*prefix, *path.relative_to(ROOT).with_suffix("").parts)
                    found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that is imported, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in MODULES else base


def below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def violations(module: str, source: str) -> list[str]:
    """The imports of a module that its rule forbids."""
    name = max((name for name in RULES if below(module, (name,))), key=len)
    rule = RULES[name]
    # All packages are below `syncbn`; the rule of that name is for its own modules.
    own = rule.own if name == "syncbn" else (name, *rule.own)
    found = []
    for line, target in imported(source):
        top = target.partition(".")[0]
        if top in ("syncbn", *UNSHIPPED):
            allowed = target == "syncbn" or below(target, own)
        elif top in LINKED:
            allowed = False
        else:
            allowed = rule.others is None or top in (*sys.stdlib_module_names, *rule.others)
        if not allowed:
            found.append(f"{module}, line {line}: must not import {target} (rule of {name})")
    return found


def test_the_tree() -> None:
    found = [text for name, path in MODULES.items() for text in violations(name, path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("syncbn.contract", "import numpy"),
        ("syncbn.protocol", "from syncbn import torch"),
        ("syncbn.torch.layer", "import numpy as np"),
        ("syncbn.torch.layer", "from syncbn.kernels.plan import plan"),
        ("syncbn.torch.layer", "from syncbn import reference"),
        ("syncbn.torch.layer", "from syncbn.mindspore import SyncBatchNorm"),
        ("syncbn.mindspore.layer", "import torch"),
        ("syncbn.kernels.plan", "from syncbn.reference import Bounded"),
        ("syncbn.kernels.plan", "import audit.ladder"),
        ("syncbn.reference.bounds", "import torch"),
        ("syncbn.reference.bounds", "from syncbn.conformance import data"),
        ("syncbn.reports.table", "import numpy"),
        ("syncbn.reports.table", "from syncbn import conformance"),
        ("syncbn.launchers.local", "import rich"),
        ("syncbn.conformance.verdict", "def f():\n    import torch"),
        ("syncbn.conformance.cases", "from audit import failures"),
        ("syncbn.conformance.ranks.base", "import torch"),
        ("syncbn.conformance.ranks.torch", "import mindspore"),
        ("syncbn.conformance.runner", "import reports"),
        ("audit.mutate", "from conformance import runner"),
        ("audit.mutate", "import tests.conftest"),
        ("examples.digits", "from syncbn import conformance"),
        ("syncbn.torch.layer", "from .groups import Communicator"),
    ],
)
def test_what_is_forbidden_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("syncbn.torch.layer", "import torch.nn\nfrom syncbn import PeerError, contract"),
        ("syncbn.torch.backends.triton", "from syncbn.kernels import plan\nimport triton"),
        ("syncbn.conformance.ranks.torch", "from syncbn.conformance import wire\nimport torch"),
        ("syncbn.reference.bounds", "import math\nimport numpy as np"),
        ("tests.x", "import torch\nfrom audit import mutate\nfrom tests import conftest"),
    ],
)
def test_what_is_allowed_is_not(module: str, source: str) -> None:
    assert violations(module, source) == []


def loaded_by(statement: str) -> set[str]:
    """The top-level names that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{n.partition('.')[0] for n in sys.modules}})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_syncbn_loads_nothing_of_others() -> None:
    before = loaded_by("pass")
    new = loaded_by("import syncbn") - before - sys.stdlib_module_names
    assert new == {"syncbn"}


def test_the_controller_loads_no_framework() -> None:
    assert loaded_by("import syncbn.conformance.__main__").isdisjoint(FRAMEWORKS)


@pytest.mark.parametrize("name", LINKED)
def test_a_link_leads_to_the_package(name: str) -> None:
    link = ROOT / "syncbn" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_no_alias_and_no_hidden_types() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert "package-dir" not in project["setuptools"]
    for override in project["mypy"]["overrides"]:
        names = override["module"] if isinstance(override["module"], list) else [override["module"]]
        if any(below(name.removesuffix(".*"), ("syncbn", *UNSHIPPED)) for name in names):
            hides = {"follow_imports", "ignore_missing_imports", "ignore_errors"} & set(override)
            assert not hides, f"{names}: types of our own packages are hidden by {hides}"
