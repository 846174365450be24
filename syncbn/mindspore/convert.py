"""Turn the batch normalization layers of a network into synchronized ones, and back.

A layer is converted in place: the object stays and becomes one of another class. So its parameters,
hooks, flags and training mode are the very same afterwards, and whatever refers to the layer (a
second place in the network, a hook's handle) still has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

import mindspore as ms
from mindspore import Parameter, mint, nn
from mindspore.communication import GlobalComm, get_rank

from syncbn.checkpoints import MINDSPORE_NN
from syncbn.contract import check_arguments
from syncbn.mindspore.groups import resolve
from syncbn.mindspore.layer import SyncBatchNorm

_CellT = TypeVar("_CellT", bound=nn.Cell)

_NN_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PLAIN = (*_NN_PLAIN, mint.nn.BatchNorm1d, mint.nn.BatchNorm2d, mint.nn.BatchNorm3d)
_SYNCHRONIZED = (nn.SyncBatchNorm, mint.nn.SyncBatchNorm)
_NN_BASE = nn.BatchNorm2d.__base__
# The bases of all of these and of InstanceNorm: what is similar, and may have to stay.
_SIMILAR = (
    _NN_BASE,
    nn.BatchNorm3d,
    nn.InstanceNorm2d.__base__,
    mint.nn.BatchNorm2d.__base__.__base__,
    SyncBatchNorm,
)

_SAME_NAMES = {name: name for name in (*MINDSPORE_NN, "num_batches_tracked")}

# The attributes of every cell that a layer's class decides.
_OF_CLASS = ("_params", "_cells", "_primitives", "mixed_precision_type", "_lazy_construct_sig")


class _Norm(NamedTuple):
    """What a layer of any of these classes is made of."""

    num_features: int
    eps: float
    momentum: float | None  # the weight of the newest batch
    parameters: dict[str, Parameter]  # those that there are, by the names of SyncBatchNorm
    prefix: str  # of the names of the parameters, up to the last dot


class _Change(NamedTuple):
    """A layer, what it is to become, and what both are made of."""

    layer: nn.Cell
    fresh: nn.Cell
    norm: _Norm


def convert_sync_batchnorm(network: _CellT, process_group: Any = None) -> _CellT:
    """Turn the batch normalization layers of a network into SyncBatchNorm, in place.

    These classes are converted, and no class derived from them: mindspore.nn.BatchNorm1d, 2d, 3d
    and SyncBatchNorm, and the four of the same names in mindspore.mint.nn. A layer that is similar
    (one of a subclass, InstanceNorm, one that always or never uses the statistics of its batch)
    stays as it is, and one warning names all of these.

    Parameters of mindspore.nn are renamed from gamma, beta, moving_mean and moving_variance to
    weight, bias, running_mean and running_var, and num_batches_tracked starts at 0. A graph of the
    network that was compiled before is compiled again, but not one of a function around it.

    Args:
        network: a network, or a single layer.
        process_group: see `SyncBatchNorm`. None leaves a layer that is synchronized already in its
            own group. All others are synchronized over all ranks.

    Returns:
        network, the same object.

    Raises:
        TypeError: network is not a mindspore.nn.Cell; process_group is none of what a layer takes.
        ValueError: process_group has a wrong rank id or is an unknown name; a layer has an eps or
            a momentum that SyncBatchNorm refuses.
        RuntimeError: process_group needs communication, which is not initialized.
        In each of these cases nothing has been converted.

    Example:
        >>> import mindspore
        >>> from syncbn.mindspore import convert_sync_batchnorm
        >>> network = mindspore.nn.SequentialCell(mindspore.nn.BatchNorm2d(8))
        >>> convert_sync_batchnorm(network)
        SequentialCell(
          (0): SyncBatchNorm(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
        )
    """
    resolve(process_group)
    changes: list[_Change] = []
    left: dict[str, str] = {}
    for name, layer in _norms(network):
        if type(layer) is SyncBatchNorm and process_group is None:
            continue
        reason = _why_left(layer, (*_PLAIN, *_SYNCHRONIZED, SyncBatchNorm))
        if reason:
            left[name] = reason
        else:
            group = _group_of(layer) if process_group is None else process_group
            changes.append(_synchronized(name, layer, group))
    for change in changes:
        _make(change)
    _forget_graphs(network)
    _warn("convert_sync_batchnorm", left)
    return network


def revert_sync_batchnorm(network: _CellT, batch_norm: type[nn.Cell] | None = None) -> _CellT:
    """Turn the synchronized batch normalization layers of a network into plain ones, in place.

    A layer that was converted from a plain one becomes one of that class again. Layers of
    mindspore.nn.SyncBatchNorm and mindspore.mint.nn.SyncBatchNorm are reverted as well. One warning
    names the layers that stay as they are: those of a subclass, and those that cannot be of a class
    of mindspore.nn, because they have no running statistics or the momentum None.

    Args:
        network: a network, or a single layer.
        batch_norm: the class for a layer that was not converted from a plain one: BatchNorm1d, 2d
            or 3d of mindspore.nn or of mindspore.mint.nn.

    Returns:
        network, the same object.

    Raises:
        TypeError: network is not a mindspore.nn.Cell, or batch_norm is no such class.
        ValueError: batch_norm is None, and a layer was not converted from a plain one.
        In each of these cases nothing has been reverted.
    """
    if batch_norm is not None and batch_norm not in _PLAIN:
        known = ", ".join(map(_name, _PLAIN))
        raise TypeError(f"batch_norm must be one of {known}, got {batch_norm!r}")
    changes: list[_Change] = []
    left: dict[str, str] = {}
    for name, layer in _norms(network):
        if not isinstance(layer, (SyncBatchNorm, *_SYNCHRONIZED)):
            continue
        target: Any = vars(layer).get("_converted_from") or batch_norm
        reason = _why_left(layer, (SyncBatchNorm, *_SYNCHRONIZED))
        if reason is None and target is None:
            raise ValueError(
                f"batch_norm must be given: layer {name!r} was not converted from a plain one"
            )
        if reason is None and target in _NN_PLAIN:
            reason = _why_not_of_nn(layer, target)
        if reason:
            left[name] = reason
        else:
            changes.append(_plain(layer, target))
    for change in changes:
        _make(change)
    _forget_graphs(network)
    _warn("revert_sync_batchnorm", left)
    return network


def _norms(network: nn.Cell) -> Iterator[tuple[str, Any]]:
    """The layers of batch and instance normalization, each once, without the parts of one."""
    if not isinstance(network, nn.Cell):
        raise TypeError(f"network must be a mindspore.nn.Cell, got {_name(type(network))}")
    parts: set[int] = set()
    for name, layer in network.cells_and_names():
        if isinstance(layer, _SIMILAR) and id(layer) not in parts:
            parts.update(id(part) for _, part in layer.cells_and_names())
            yield name, layer


def _why_left(layer: Any, exact: tuple[type, ...]) -> str | None:
    """Why a layer keeps its class, after the name of it; None if it is of one of these classes."""
    kind, reason = type(layer), None
    if kind not in exact:
        reason = "another class"
    elif "construct" in vars(layer):
        reason = "its construct was replaced"
    elif layer._recompute_cell is not None:
        reason = "recompute() was called on it; call it after the conversion"
    elif getattr(_core(layer), "use_batch_statistics", None) is not None:
        reason = f"use_batch_statistics={_core(layer).use_batch_statistics}"
    elif getattr(_core(layer), "format", "NCHW") != "NCHW":
        reason = f"data_format={_core(layer).format!r}"
    return reason and f"{_name(kind)}: {reason}"


def _why_not_of_nn(layer: Any, target: type) -> str | None:
    norm, reason = _read(layer), None
    if "running_mean" not in norm.parameters:
        reason = "it has no running statistics"
    elif norm.momentum is None:
        reason = "its momentum is None"
    return reason and f"{_name(type(layer))}: {reason}, which {_name(target)} needs"


def _core(layer: Any) -> Any:
    """The cell that has the parameters: a BatchNorm3d of mindspore.nn wraps a BatchNorm2d."""
    return layer.bn2d if type(layer) is nn.BatchNorm3d else layer


def _read(layer: Any) -> _Norm:
    core = _core(layer)
    names = MINDSPORE_NN if isinstance(core, _NN_BASE) else _SAME_NAMES
    found = {ours: core._params.get(theirs) for ours, theirs in names.items()}
    parameters = {name: parameter for name, parameter in found.items() if parameter is not None}
    prefix = next((p.name.rpartition(".")[0] for p in parameters.values()), "")
    if core is not layer:
        prefix = prefix.removesuffix("bn2d").removesuffix(".")
    momentum = core.momentum
    if isinstance(core, _NN_BASE):  # it stores 1 - momentum, which rounds 1 - 0.9
        momentum = _complement(1 - momentum)
    return _Norm(core.num_features, core.eps, momentum, parameters, prefix)


def _complement(number: float) -> float:
    """1 - number in decimal arithmetic, which has 1 - 0.9 = 0.1."""
    return float(1 - Decimal(repr(float(number))))


def _group_of(layer: Any) -> Any:
    """The process group of a layer, as `SyncBatchNorm` takes it."""
    if isinstance(layer, mint.nn.SyncBatchNorm):
        world = layer.process_group == GlobalComm.WORLD_COMM_GROUP
        return None if world else layer.process_group
    if isinstance(layer, nn.SyncBatchNorm) and layer.process_groups is not None:
        own = [get_rank()]
        return next((ranks for ranks in layer.process_groups or [] if own[0] in ranks), own)
    return None


def _synchronized(name: str, layer: Any, process_group: Any) -> _Change:
    norm = _read(layer)
    try:
        check_arguments(norm.num_features, float(norm.eps), norm.momentum, True, True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r} ({_name(type(layer))}): {error}") from None
    fresh = SyncBatchNorm(
        norm.num_features,
        float(norm.eps),
        norm.momentum,
        affine="weight" in norm.parameters,
        track_running_stats="running_mean" in norm.parameters,
        process_group=process_group,
        dtype=_dtype(norm),
        backend=getattr(layer, "backend", "auto"),
    )
    if "running_mean" in norm.parameters:
        fresh.track_running_stats = getattr(layer, "track_running_stats", True)
    fresh._converted_from = vars(layer).get("_converted_from")
    if type(layer) in _PLAIN:
        fresh._converted_from = type(layer)
    return _Change(layer, fresh, norm)


def _plain(layer: Any, target: Any) -> _Change:
    norm = _read(layer)
    arguments = {"affine": "weight" in norm.parameters, "dtype": _dtype(norm)}
    if target in _NN_PLAIN:
        assert norm.momentum is not None
        fresh = target(norm.num_features, norm.eps, _complement(norm.momentum), **arguments)
    else:
        arguments["track_running_stats"] = "running_mean" in norm.parameters
        fresh = target(norm.num_features, norm.eps, norm.momentum, **arguments)
        fresh.track_running_stats = getattr(layer, "track_running_stats", True)
    return _Change(layer, fresh, norm)


def _dtype(norm: _Norm) -> Any:
    return next((parameter.dtype for parameter in norm.parameters.values()), ms.float32)


def _make(change: _Change) -> None:
    """Make the layer of a change what `fresh` is, with the parameters that it has."""
    layer, fresh, norm = change
    core = _core(fresh)
    names = MINDSPORE_NN if isinstance(core, _NN_BASE) else _SAME_NAMES
    for name, parameter in norm.parameters.items():
        if name in names:
            core._params[names[name]] = parameter
    inner = "" if core is fresh else "bn2d."
    for key, parameter in core._params.items():
        if parameter is not None and (norm.prefix or inner):
            parameter.name = f"{norm.prefix}.{inner}{key}".removeprefix(".")
        elif parameter is not None:
            parameter.name = key
    attributes = vars(layer)
    for name in _specific(type(layer)):
        attributes.pop(name, None)
    layer.__class__ = type(fresh)
    attributes.update({name: vars(fresh)[name] for name in _specific(type(fresh))})
    attributes.update({name: vars(fresh)[name] for name in _OF_CLASS})
    if isinstance(layer, SyncBatchNorm):  # it keeps its precision; see its add_flags_recursive
        for flag in ("fp16", "fp32", "bf16"):
            attributes.pop(flag, None)
            layer.get_flags().pop(flag, None)


def _specific(kind: Any) -> frozenset[str]:
    """The attributes that a layer of this class has, and a cell has not."""
    built = kind(1)
    if kind is SyncBatchNorm:
        built._converted_from = None
    return frozenset(vars(built)) - frozenset(vars(nn.Cell()))


def _forget_graphs(network: nn.Cell) -> None:
    """Let the cells of a network be compiled again."""
    for _, cell in network.cells_and_names():
        cell.compile_cache.clear()


def _warn(function: str, left: dict[str, str]) -> None:
    if left:
        listed = ", ".join(f"{name!r} ({why})" for name, why in left.items())
        warnings.warn(f"{function} left these layers as they are: {listed}", stacklevel=3)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
