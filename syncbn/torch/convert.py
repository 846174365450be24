"""Turn the batch normalization layers of a model into synchronized ones, and back.

A layer is converted in place: the object stays and becomes one of another class. So its parameters,
buffers, hooks, flags and other attributes are the very same afterwards, and whatever refers to the
layer (a second place in the model, a hook's handle, a compiled model, FSDP) still has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm as TorchSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase, _NormBase

from syncbn.contract import check_arguments, check_shape
from syncbn.torch.groups import ProcessGroupLike, check_group
from syncbn.torch.layer import SyncBatchNorm

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


class BatchNorm(_BatchNorm):
    """Like torch.nn.BatchNorm2d, of inputs (N, C, +) with any number of dimensions from 2 on."""

    def _check_input_dim(self, input: Tensor) -> None:
        check_shape(input.shape, self.num_features)


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm)


def convert_sync_batchnorm(module: _ModuleT, process_group: ProcessGroupLike = None) -> _ModuleT:
    """Turn the batch normalization layers of a model into SyncBatchNorm, in place.

    These classes are converted, and no class derived from them: torch.nn.BatchNorm1d, 2d and 3d,
    torch.nn.SyncBatchNorm, and SyncBatchNorm of apex. A layer that is similar (one of a subclass,
    InstanceNorm, a lazy one without channels, one whose forward was replaced) stays as it is, and
    one warning names all of these. No process group is needed to convert.

    Args:
        module: a model, or a single layer.
        process_group: see `SyncBatchNorm`. None leaves a layer that is synchronized already in its
            own group; all others are synchronized over all ranks.

    Returns:
        module, the same object.

    Raises:
        TypeError: module is not a torch.nn.Module; process_group is none of what a layer takes.
        ValueError: process_group has a wrong rank id or is an unknown name; a layer has an eps or
            a momentum that SyncBatchNorm refuses.
        RuntimeError: process_group was destroyed.
        In each of these cases nothing has been converted.
    """
    check_group(process_group)
    layers: dict[str, Any] = {}
    left: dict[str, str] = {}
    for name, layer in _norms(module):
        why = None
        if not isinstance(layer, SyncBatchNorm):
            why = _why_left(layer, (*_PLAIN, TorchSyncBatchNorm))
        if why is None:
            layers[name] = layer
        else:
            left[name] = why
    for name, layer in layers.items():
        _check(name, layer)
    for layer in layers.values():
        if not isinstance(layer, SyncBatchNorm):
            layer._converted_from = type(layer)
            layer.__class__ = SyncBatchNorm
            layer.eps = float(layer.eps)
        if process_group is not None:
            layer.process_group = process_group
    _warn("convert_sync_batchnorm", left)
    return module


def revert_sync_batchnorm(module: _ModuleT, batch_norm: type[_BatchNorm] | None = None) -> _ModuleT:
    """Turn the synchronized batch normalization layers of a model into plain ones, in place.

    A layer that was converted from torch.nn.BatchNorm1d, 2d or 3d becomes that again. Layers of
    torch.nn.SyncBatchNorm and of apex are reverted as well. One warning names the layers that stay
    as they are: those of a subclass, and those whose forward was replaced.

    Args:
        module: a model, or a single layer.
        batch_norm: the class for a layer that was not converted from a plain one:
            torch.nn.BatchNorm1d, 2d or 3d; None for `BatchNorm`, which takes any input (N, C, +).

    Returns:
        module, the same object.

    Raises:
        TypeError: module is not a torch.nn.Module, or batch_norm is no such class.
    """
    batch_norm = BatchNorm if batch_norm is None else batch_norm
    if batch_norm not in _PLAIN:
        known = ", ".join(map(_name, _PLAIN))
        raise TypeError(f"batch_norm must be one of {known}, got {batch_norm!r}")
    left: dict[str, str] = {}
    for name, layer in _norms(module):
        if not isinstance(layer, (SyncBatchNorm, TorchSyncBatchNorm)) and not _is_apex(type(layer)):
            continue
        why = _why_left(layer, (SyncBatchNorm, TorchSyncBatchNorm))
        if why is not None:
            left[name] = why
            continue
        origin = vars(layer).pop("_converted_from", None)
        layer.__class__ = origin if origin in _PLAIN else batch_norm
        for attribute in ("process_group", "backend", "_trained_with_others"):
            vars(layer).pop(attribute, None)
    _warn("revert_sync_batchnorm", left)
    return module


def _norms(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers derived from torch's base of batch and instance normalization, each once."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {_name(type(module))}")
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase):
            yield name, layer


def _why_left(layer: Any, exact: tuple[type, ...]) -> str | None:
    """Why a layer keeps its class, after the name of it; None if it is of one of these classes."""
    kind = type(layer)
    reason = None
    if isinstance(layer, _LazyNormBase):
        reason = "lazy, and has seen no input yet"
    elif kind not in exact and not _is_apex(kind):
        reason = "another class"
    elif "forward" in vars(layer):
        reason = "its forward was replaced"
    elif getattr(layer, "fuse_relu", False) or getattr(layer, "channel_last", False):
        reason = "fuse_relu or channel_last of apex"
    return reason and f"{_name(kind)}: {reason}"


def _is_apex(kind: type) -> bool:
    """By name, because apex may not be installed."""
    return kind.__module__.startswith("apex.") and kind.__name__ == "SyncBatchNorm"


def _check(name: str, layer: Any) -> None:
    try:
        check_arguments(
            layer.num_features,
            float(layer.eps),
            layer.momentum,
            layer.affine,
            layer.track_running_stats,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r} ({_name(type(layer))}): {error}") from None


def _warn(function: str, left: dict[str, str]) -> None:
    if left:
        listed = ", ".join(f"{name!r} ({why})" for name, why in left.items())
        warnings.warn(f"{function} left these layers as they are: {listed}", stacklevel=3)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
