"""Targets: the layers that can be judged. A target has a short name, or FRAMEWORK:MODULE:CLASS."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from syncbn import backends
from syncbn.conformance import ConformanceError, frameworks
from syncbn.conformance.frameworks import FRAMEWORKS, Framework

ORACLE = "mindspore.mint"

# The devices that several ranks can share.
_SHARED = ("cuda",)

MODES = tuple(mode for framework in FRAMEWORKS.values() for mode in framework.modes)


class TargetError(ConformanceError, ValueError):
    """A target that cannot be judged: no such name, no such class, or it cannot be built."""


@dataclass(frozen=True)
class Target:
    """The class of a layer, and what runs it.

    name: as given by the user.
    framework: the name of one of FRAMEWORKS.
    module: where the class is: importable, or a path that ends in .py.
    cls: the name of the class.
    device: cpu, cuda, npu (Ascend), or another type of device that the framework has.
    backend: of our own layer, "auto" for its choice; None for any other layer.
    mode: how the framework runs the layer; None for a framework that has only one way.
    rung: what the results stand for. "device" is the layer itself on the device. On cpu some stand
        for Ascend: "substituted", "interpreted", "twin"; see syncbn.backends.BackendInfo.
    rank_ids: whether process_group may be a list of rank ids, which the documented ERR-5 needs.
    float64: whether the device and the layer's kernels have float64.
    collectives: what carries the collectives; None for the device's own.
    share_device: whether several ranks may use one accelerator.
    layer_args: arguments that every layer gets unless a case gives others, as literals of a case.
    setup: a function that every rank calls at its start with its id on its machine, before it
        imports the layer: "module:function", where the module may be a path that ends in .py.
    framework_file: the file that has the framework's record; None for one that is known by name.
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
    float64: bool = True
    collectives: str | None = None
    share_device: bool = False
    layer_args: dict[str, Any] = field(default_factory=dict, hash=False)
    setup: str | None = None
    framework_file: str | None = None

    @property
    def document(self) -> dict[str, Any]:
        return asdict(self)


def parse(
    name: str,
    device: str = "cpu",
    backend: str | None = None,
    mode: str | None = None,
    *,
    collectives: str | None = None,
    share_device: bool = False,
    layer_args: dict[str, Any] | None = None,
    setup: str | None = None,
    framework_file: str | None = None,
) -> Target:
    """The target of a name.

    Args:
        name: one of the names in `descriptions()`.
        device: cpu, cuda, npu, or another type of device that the framework has.
        backend: of our own layer; None is "auto".
        mode: one of the framework's modes; None is its first.
        collectives: one of the framework's for the device; None is its own.
        share_device: whether several ranks may use one accelerator.
        layer_args: arguments that every layer gets unless a case gives others.
        setup: a function that every rank calls at its start, as "module:function".
        framework_file: a file with the record of the target's framework.

    Raises:
        TargetError: there is no target of that name, or it cannot run like that.
    """
    if framework_file is not None:
        frameworks.add_file(framework_file)
    framework, module, cls = _resolve(name)
    ours = name == f"syncbn.{framework.name}"
    own = framework.own if framework.own and name == framework.own.name else None
    if setup is not None and not all(setup.rpartition(":")[::2]):
        raise TargetError(f"setup must be MODULE:FUNCTION, got {setup!r}")
    if backend is not None and not ours:
        raise TargetError(f"backend must not be given, target {name} has none, got {backend!r}")
    if mode is not None and not framework.modes:
        raise TargetError(f"mode must not be given, target {name} has none, got {mode!r}")
    if mode is not None and mode not in framework.modes:
        known = ", ".join(framework.modes)
        raise TargetError(f"mode must be one of {known} for target {name}, got {mode!r}")
    if mode is None and framework.modes:
        mode = framework.modes[0]
    if own and device == "cpu" and mode and mode in own.fails_on_cpu:
        known = ", ".join(m for m in framework.modes if m not in own.fails_on_cpu)
        reason = own.fails_on_cpu[mode]
        raise TargetError(f"mode must be {known} for target {name} on cpu, got {mode!r}: {reason}")
    _check_collectives(framework, name, device, collectives, share_device)
    rung, float64 = "device", device != "npu"
    if own and device == "cpu":
        rung = own.on_cpu
    if ours:
        backend = backend or "auto"
        rung = _backend(framework, backend, device).on_cpu if device == "cpu" else "device"
        float64 = device in _backend(framework, backend, device, float64=True).float64_on
    return Target(
        name,
        framework.name,
        module,
        cls,
        device,
        backend,
        mode,
        rung,
        rank_ids=ours,
        float64=float64,
        collectives=collectives,
        share_device=share_device,
        layer_args=layer_args or {},
        setup=setup,
        framework_file=framework_file,
    )


def descriptions() -> dict[str, str]:
    """What can be given as a target, and what it is."""
    found = {
        f"syncbn.{framework.name}": f"the layer of this project for {framework.title}"
        for framework in FRAMEWORKS.values()
        if framework.backends
    }
    for own in (framework.own for framework in FRAMEWORKS.values()):
        if own is None:
            continue
        found[own.name] = f"{own.module}.SyncBatchNorm ({own.note})"
    for name in FRAMEWORKS:
        found[f"{name}:MODULE:CLASS"] = (
            "any class with the documented constructor arguments; MODULE is importable, or a path "
            "that ends in .py"
        )
    return found


def oracle(name: str, target: Target) -> Target | str:
    """The target to compare another one with, or why there is none.

    Args:
        name: ORACLE, "none", or "auto" for ORACLE if it is installed.
        target: the target that is judged.

    Raises:
        TargetError: ORACLE is not installed, or is the target itself.
    """
    if name == "none":
        return "--oracle none"
    chosen = parse(ORACLE, "npu" if target.device == "npu" else "cpu")
    framework = FRAMEWORKS[chosen.framework]
    reason = None
    if target.name == chosen.name:
        reason = f"{chosen.name} is the target itself"
    elif not framework.installed:
        reason = f"{framework.title} is not installed: pip install 'syncbn[{framework.name}]'"
    if reason and name != "auto":
        raise TargetError(f"oracle must be another layer that is there, got {name!r}: {reason}")
    return reason or chosen


def _resolve(name: str) -> tuple[Framework, str, str]:
    """The framework, the module and the class of a target's name."""
    for framework in FRAMEWORKS.values():
        if framework.backends and name == f"syncbn.{framework.name}":
            return framework, name, "SyncBatchNorm"
        if framework.own is not None and name == framework.own.name:
            return framework, framework.own.module, "SyncBatchNorm"
    given, _, rest = name.partition(":")
    module, _, cls = rest.rpartition(":")
    found = frameworks.find(given)
    if found is None or not module or not cls:
        raise TargetError(f"target must be one of {', '.join(descriptions())}, got {name!r}")
    return found, module, cls


def _check_collectives(
    framework: Framework, name: str, device: str, collectives: str | None, share_device: bool
) -> None:
    """Raise TargetError unless the device has these collectives, and ranks that can share it."""
    known = framework.collectives.get(device, ())
    foreign = bool(framework.collectives) and device not in framework.collectives
    if collectives is not None and collectives not in known and not foreign:
        offered = f"one of {', '.join(known)}" if known else "left out"
        raise TargetError(
            f"collectives must be {offered} for target {name} on {device}, got {collectives!r}"
        )
    if share_device and device not in _SHARED:
        raise TargetError(
            f"share-device must be left out on {device}: it lets ranks share {', '.join(_SHARED)}"
        )


def _backend(
    framework: Framework, name: str, device: str, float64: bool = False
) -> backends.BackendInfo:
    if name == "auto":  # not SYNCBN_BACKEND: the ranks set that themselves
        return backends.default(framework.backends, device, float64)
    try:
        return backends.choose(framework.backends, name, device)
    except ValueError as error:
        raise TargetError(f"{error} for target syncbn.{framework.name}") from error
