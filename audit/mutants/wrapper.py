"""What the layers of torch.py and mindspore.py share: they run a mutant on their own tensors."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import numpy as np

from audit.mutants import CONTROL, MUTANTS
from audit.mutants.layer import Array, Communicator, Plain, Saved, State

_Layer = TypeVar("_Layer", bound="Wrapper")


def mutant_layer(name: str, base: type[_Layer]) -> type[_Layer]:
    """The subclass of `base` that is the mutant of that name, for the `__getattr__` of a module.

    Raises:
        AttributeError: there is no such mutant.
    """
    if name not in MUTANTS:
        raise AttributeError(f"module {base.__module__} has no attribute {name}")
    return type(name, (base,), {"default": name})


def _live(name: str) -> property:
    """An attribute of the layer that is an attribute of `plain`."""
    return property(
        lambda layer: getattr(layer.plain, name),
        lambda layer, value: layer.plain.set_attribute(name, value),
    )


class Wrapper:
    """A base class of layers: it runs `plain` on the tensors of the layer.

    default: the name of the mutant that the constructor builds if it is given none.
    """

    default: ClassVar[str] = CONTROL

    training: bool
    plain: Plain
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    eps = _live("eps")
    momentum = _live("momentum")
    track_running_stats = _live("track_running_stats")

    @staticmethod
    def to_array(tensor: Any) -> Array:
        """The values of a tensor, in the same memory if NumPy has the dtype; halves as float32."""
        raise NotImplementedError

    @staticmethod
    def assign(tensor: Any, values: Array) -> None:
        """Replace the values of a tensor."""
        raise NotImplementedError

    def run_forward(
        self, x: Array, dtype: str, communicator: Communicator, differentiates: bool
    ) -> tuple[Array, Saved]:
        """Plain.forward on a copy of the tensors, which then receive the new statistics."""
        state = self._state()
        try:
            return self.plain.forward(x, dtype, state, communicator, self.training, differentiates)
        finally:  # also after an error, because a mutant may count a step that fails
            self._assign_statistics(state)

    def _state(self) -> State:
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        arrays = [None if tensor is None else self.to_array(tensor).copy() for tensor in tensors]
        tracked = self.num_batches_tracked
        return State(0 if tracked is None else int(self.to_array(tracked)), *arrays)

    def _assign_statistics(self, state: State) -> None:
        for tensor, values in (
            (self.running_mean, state.running_mean),
            (self.running_var, state.running_var),
            (self.num_batches_tracked, np.array(state.num_batches_tracked)),
        ):
            if tensor is not None and values is not None:
                self.assign(tensor, values)
