"""Targets: whose layer is judged. A short name, or `FRAMEWORK:MODULE:CLASS` for anybody's."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, replace
from typing import Any

from syncbn.conformance import ConformanceError


class TargetError(ConformanceError, ValueError):
    """A target that cannot be judged: no such name, no such class, or it cannot be built."""


@dataclass(frozen=True)
class Target:
    """A layer's class and what runs it.

    rung says what the results stand for: `device` is the layer itself on the device named. On cpu
    some stand for Ascend: `substituted`, with stand-ins for kernels that only Ascend has
    (syncbn.conformance.ranks.substitutes); `twin`, with our
    kernels as Ascend's compiler lowered them; `interpreted`, with our kernels in Triton's
    interpreter.
    mode: how MindSpore runs it, one of MODES; None for a framework that knows but one way.
    rank_ids: whether process_group may be a list of rank ids (the documented ERR-5 needs it).
    """

    name: str
    framework: str
    module: str
    cls: str
    device: str = "cpu"
    backend: str | None = None
    mode: str | None = None
    rung: str = "device"
    rank_ids: bool = False
    has_backends: bool = False

    @property
    def document(self) -> dict[str, Any]:
        return asdict(self)


MODES = ("pynative", "graph")

_NAMED = {
    "syncbn.torch": Target(
        "syncbn.torch", "torch", "syncbn.torch", "SyncBatchNorm", rank_ids=True, has_backends=True
    ),
    "syncbn.mindspore": Target(
        "syncbn.mindspore",
        "mindspore",
        "syncbn.mindspore",
        "SyncBatchNorm",
        rank_ids=True,
        has_backends=True,
    ),
    "torch.nn": Target("torch.nn", "torch", "torch.nn", "SyncBatchNorm"),
    "mindspore.mint": Target("mindspore.mint", "mindspore", "mindspore.mint.nn", "SyncBatchNorm"),
}

DESCRIPTIONS = {
    "syncbn.torch": "the layer of this project for PyTorch",
    "syncbn.mindspore": "the layer of this project for MindSpore",
    "torch.nn": "torch.nn.SyncBatchNorm (refuses CPU tensors)",
    "mindspore.mint": "mindspore.mint.nn.SyncBatchNorm; on cpu with substitutes for its kernels, "
    "which only Ascend has",
    "torch:MODULE:CLASS": "any class with the documented constructor arguments; MODULE may be "
    "importable or a path that ends in .py",
    "mindspore:MODULE:CLASS": "likewise",
}


def parse(
    name: str, device: str = "cpu", backend: str | None = None, mode: str | None = None
) -> Target:
    """The target of a name.

    Raises:
        TargetError: no such name, or a backend or a mode that the target does not have.
    """
    if name in _NAMED:
        target = _NAMED[name]
    else:
        framework, _, rest = name.partition(":")
        module, _, cls = rest.rpartition(":")
        if framework not in ("torch", "mindspore") or not module or not cls:
            raise TargetError(
                f"target must be {', '.join(_NAMED)}, torch:MODULE:CLASS or "
                f"mindspore:MODULE:CLASS, got {name!r}"
            )
        target = Target(name, framework, module, cls)
    if backend is not None and not target.has_backends:
        raise TargetError(f"backend must not be given, target {name} has none, got {backend!r}")
    if target.has_backends and backend is None:
        backend = "auto"
    if mode is not None and target.framework != "mindspore":
        raise TargetError(f"mode must not be given, target {name} has none, got {mode!r}")
    if target.framework == "mindspore" and mode is None:
        mode = "pynative"
    target = replace(target, device=device, backend=backend, mode=mode)
    if (name, device, mode) == ("mindspore.mint", "cpu", "graph"):
        raise TargetError(
            "mode must be pynative for target mindspore.mint on cpu, where MindSpore can compile "
            "neither its gradient nor its groups, got 'graph'"
        )
    return replace(target, rung=_rung(target))


def oracle(name: str, target: Target) -> Target | str:
    """The target to compare another one with, or why there is none.

    Args:
        name: of a target, "none", or "auto" for mindspore.mint if it is there.
        target: what is judged.

    Raises:
        TargetError: the oracle that was asked for is not installed, or is the target itself.
    """
    if name == "none":
        return "none was asked for"
    chosen = parse("mindspore.mint", "npu" if target.device == "npu" else "cpu")
    reason = None
    if target.name == chosen.name:
        reason = f"{chosen.name} is the target itself"
    elif importlib.util.find_spec("mindspore") is None:
        reason = "MindSpore is not installed: pip install 'syncbn[mindspore]'"
    if reason and name != "auto":
        raise TargetError(f"oracle must be another layer that is there, got {name!r}: {reason}")
    return reason or chosen


def _rung(target: Target) -> str:
    if target.device != "cpu":
        return "device"
    if target.name == "mindspore.mint" or target.backend in ("aclnn", "aten"):
        return "substituted"
    return {"twin": "twin", "triton": "interpreted"}.get(target.backend or "", "device")
