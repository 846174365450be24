"""Targets: whose layer is judged. A short name, or `torch:MODULE:CLASS` for anybody's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


class TargetError(ValueError):
    """A target that cannot be judged: no such name, no such class, or it cannot be built."""


@dataclass(frozen=True)
class Target:
    """A layer's class and what runs it.

    rung says what the results stand for: `device` is the layer itself on the device named.
    rank_ids: whether process_group may be a list of rank ids (the documented ERR-5 needs it).
    """

    name: str
    framework: str
    module: str
    cls: str
    device: str = "cpu"
    backend: str | None = None
    rung: str = "device"
    rank_ids: bool = False
    has_backends: bool = False

    @property
    def document(self) -> dict[str, Any]:
        return asdict(self)


_NAMED = {
    "syncbn.torch": Target(
        "syncbn.torch", "torch", "syncbn.torch", "SyncBatchNorm", rank_ids=True, has_backends=True
    ),
    "torch.nn": Target("torch.nn", "torch", "torch.nn", "SyncBatchNorm"),
}

DESCRIPTIONS = {
    "syncbn.torch": "the layer of this project for PyTorch",
    "torch.nn": "torch.nn.SyncBatchNorm (refuses CPU tensors)",
    "torch:MODULE:CLASS": "any class with the documented constructor arguments; MODULE may be "
    "importable or a path that ends in .py",
}


def parse(name: str, device: str = "cpu", backend: str | None = None) -> Target:
    """The target of a name.

    Raises:
        TargetError: no such name, or a backend for a target that has none.
    """
    if name in _NAMED:
        target = _NAMED[name]
    else:
        framework, _, rest = name.partition(":")
        module, _, cls = rest.rpartition(":")
        if framework != "torch" or not module or not cls:
            raise TargetError(
                f"target must be {', '.join(_NAMED)} or torch:MODULE:CLASS, got {name!r}"
            )
        target = Target(name, framework, module, cls)
    if backend is not None and not target.has_backends:
        raise TargetError(f"backend must not be given, target {name} has none, got {backend!r}")
    if target.has_backends and backend is None:
        backend = "auto"
    return replace(target, device=device, backend=backend)
