"""The settings of a layer that may change at any time, also after a graph has been compiled."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import mindspore as ms
from mindspore import Parameter, Tensor, ops

from syncbn.mindspore.backends import number

_layer_numbers = itertools.count()


class Values(NamedTuple):
    """The settings as the user gives them; see `syncbn.mindspore.SyncBatchNorm`."""

    eps: float
    momentum: float | None
    track_running_stats: bool


@ms.jit_class
class Numbers:
    """The settings of one layer as scalar tensors.

    A training step moves a running statistic to `(kept - share) * old + (taken + share) * batch`,
    where `share = cumulative / num_batches_tracked`.

    Attributes:
        eps: what is added to the variance.
        kept: 1 - momentum, or 1 if momentum is None.
        taken: momentum, or 0 if momentum is None.
        cumulative: 1 if momentum is None, else 0.
        tracks: 1 if a training step moves the running statistics, else 0.
    """

    eps: Tensor
    kept: Tensor
    taken: Tensor
    cumulative: Tensor
    tracks: Tensor

    def __init__(self, values: Values) -> None:
        for name, value in _numbers(values).items():
            setattr(self, name, number(value))


@ms.jit_class
class Settings:
    """The settings of one layer.

    A graph keeps the value that a Python attribute had when it was compiled, but it reads a
    Parameter whenever it runs. These Parameters belong to no cell, so they are in no checkpoint,
    and MindIR refuses them. So an exported graph has constants.

    Attributes:
        layer: a number that no other layer of this process has.
        values: as the user gave them.
        live: Parameters, which a compiled graph reads in every step.
        constant: plain tensors.
    """

    def __init__(self, values: Values) -> None:
        self.layer = next(_layer_numbers)
        self.values = values
        self.live, self.constant = Numbers(values), Numbers(values)
        for name, tensor in vars(self.constant).items():
            # The names of all parameters in a graph must differ.
            full_name = f"syncbn.{self.layer}.{name}"
            setattr(self.live, name, Parameter(tensor, name=full_name, requires_grad=False))

    def set(self, values: Values) -> None:
        """Take other settings from the next step on."""
        self.values = values
        self.constant = Numbers(values)
        for name, tensor in vars(self.constant).items():
            # In place: a function under ms.jit would not see the new tensor of `set_data`.
            ops.assign(getattr(self.live, name), tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        """The same settings for another layer."""
        return Settings(self.values)


def _numbers(values: Values) -> dict[str, float]:
    momentum = values.momentum
    # 1 - momentum is computed here: in float32, 1 - 0.999 has four digits left.
    kept, taken, cumulative = (1.0, 0.0, 1.0) if momentum is None else (1 - momentum, momentum, 0.0)
    return {
        "eps": values.eps,
        "kept": kept,
        "taken": taken,
        "cumulative": cumulative,
        "tracks": float(values.track_running_stats),
    }
