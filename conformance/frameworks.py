"""The frameworks whose layers can be judged, as data. No framework is imported here."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from syncbn import backends
from syncbn.backends import BackendInfo

if TYPE_CHECKING:
    from syncbn.conformance.ranks.base import Rank


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
    """A framework. The layer of this project for it is syncbn.NAME.SyncBatchNorm.

    name: its module, the extra of this package that installs it, and the start of a target's name.
    title: its name in texts.
    rank: the class of its rank, as "module:class"; a syncbn.conformance.ranks.base.Rank.
    backends: the backends of our layer.
    own: its own layer.
    modes: the ways in which it can run a layer, the default first; none if there is only one way.
    environment: variables that are set before a rank imports the framework, unless they are set.
    imports: large modules that the framework itself imports in the course of a run.
    collectives: what can carry the collectives of a device, its own first; empty if there is no
        choice.
    """

    name: str
    title: str
    rank: str
    backends: Mapping[str, BackendInfo]
    own: OwnLayer
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
        return ("syncbn.conformance.ranks.worker", self.rank.partition(":")[0], *self.imports)

    def missing_environment(self) -> dict[str, str]:
        """The variables that must be set before the framework is imported, and are not."""
        return {name: v for name, v in self.environment.items() if name not in os.environ}

    def rank_class(self) -> type[Rank]:
        """Import the framework and the class of its rank."""
        module, _, name = self.rank.partition(":")
        cls: type[Rank] = getattr(importlib.import_module(module), name)
        return cls


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
