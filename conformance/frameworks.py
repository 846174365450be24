"""The frameworks whose layers can be judged, as data. No framework is imported here."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from syncbn import backends
from syncbn.backends import BackendInfo
from syncbn.conformance import ConformanceError

if TYPE_CHECKING:
    from syncbn.conformance.ranks.base import Rank


ENTRY_POINTS = "syncbn.frameworks"  # the group in which packages name their frameworks


class FrameworkError(ConformanceError, ValueError):
    """A framework that cannot be used. The message is one line."""


@dataclass(frozen=True)
class OwnLayer:
    """The SyncBatchNorm that a framework brings.

    name: the name of the target.
    module: where its class SyncBatchNorm is.
    on_cpu: what its results on CPU stand for; see syncbn.backends.BackendInfo.
    fails_on_cpu: why a mode cannot run on CPU, by mode.
    note: what a user must know about it.
    """

    name: str
    module: str
    on_cpu: str = "device"
    fails_on_cpu: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Framework:
    """A framework. If there are backends, this project has a layer: syncbn.NAME.SyncBatchNorm.

    name: its module, the extra of this package that installs it, and the start of a target's name.
    title: its name in texts.
    rank: the class of its rank, as "module:class"; a syncbn.conformance.ranks.base.Rank. The module
        is importable, or a path that ends in .py.
    backends: the backends of our layer; empty if there is none.
    own: its own layer, if it has one.
    modes: the ways in which it can run a layer, the default first; none if there is only one way.
    environment: variables that are set before a rank imports the framework, unless they are set.
    imports: large modules that the framework itself imports in the course of a run.
    collectives: what can carry the collectives of a device, its own first; empty if there is no
        choice.
    """

    name: str
    title: str
    rank: str
    backends: Mapping[str, BackendInfo] = field(default_factory=dict)
    own: OwnLayer | None = None
    modes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    collectives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        return find_spec(self.name) is not None

    @property
    def preload(self) -> tuple[str, ...]:
        """The modules that every rank will import."""
        own = self.rank.partition(":")[0]
        importable = () if own.endswith(".py") else (own,)
        return ("syncbn.conformance.ranks.worker", *importable, *self.imports)

    def missing_environment(self) -> dict[str, str]:
        """The variables that must be set before the framework is imported, and are not."""
        return {name: v for name, v in self.environment.items() if name not in os.environ}

    def rank_class(self) -> type[Rank]:
        """Import the framework and the class of its rank."""
        module, _, name = self.rank.rpartition(":")
        cls: type[Rank] = getattr(import_module(module), name)
        return cls


def import_module(name: str) -> ModuleType:
    """The module of a name, which is importable, or a path that ends in .py.

    Raises:
        ImportError: there is none.
    """
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise ImportError(f"no file {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # MindSpore's compiler looks for it there
    spec.loader.exec_module(module)
    return module


def find(name: str) -> Framework | None:
    """The framework of a name: one of FRAMEWORKS, or of an installed package's entry point."""
    if name not in FRAMEWORKS:
        for point in entry_points(group=ENTRY_POINTS, name=name):
            FRAMEWORKS[name] = _checked(point.load(), f"entry point {point.value}")
    return FRAMEWORKS.get(name)


def add_file(path: str) -> Framework:
    """Add the framework that a Python file has as FRAMEWORK.

    Raises:
        FrameworkError: the file has none.
    """
    try:
        record = import_module(path).FRAMEWORK
    except Exception as error:
        raise FrameworkError(
            f"framework must be a Python file with FRAMEWORK, got {path}: "
            f"{type(error).__name__}: {error}"
        ) from error
    framework = _checked(record, path)
    FRAMEWORKS[framework.name] = framework
    return framework


def _checked(record: Any, place: str) -> Framework:
    if not isinstance(record, Framework):
        raise FrameworkError(
            f"framework must be a syncbn.conformance.frameworks.Framework, got {record!r} from "
            f"{place}"
        )
    return record


FRAMEWORKS = {
    framework.name: framework
    for framework in (
        Framework(
            "torch",
            "PyTorch",
            "syncbn.conformance.ranks.torch:TorchRank",
            backends.TORCH,
            OwnLayer("torch.nn", "torch.nn", note="refuses CPU tensors"),
            imports=("torch._dynamo",),
            collectives={"cpu": ("gloo",), "cuda": ("nccl", "gloo"), "npu": ("hccl",)},
        ),
        Framework(
            "mindspore",
            "MindSpore",
            "syncbn.conformance.ranks.mindspore:MindSporeRank",
            backends.MINDSPORE,
            OwnLayer(
                "mindspore.mint",
                "mindspore.mint.nn",
                on_cpu="substituted",
                fails_on_cpu={
                    "graph": "MindSpore can compile neither its gradient nor its groups there"
                },
                note="on cpu with substitutes for its kernels, which only Ascend has",
            ),
            modes=("pynative", "graph"),
            environment={
                "GLOG_v": "3",  # errors only, or MindSpore writes pages of warnings
                "MS_OM_PATH": tempfile.gettempdir(),  # not into the user's directory
            },
        ),
    )
}
