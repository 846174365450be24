"""The layers of the study that are no backend of ours, as one PyTorch class."""

from __future__ import annotations

from typing import Any

import numpy as np

from audit.mutants.layer import Array, Communicator, Plain, Saved, State, rows
from audit.mutants.torch import SyncBatchNorm
from syncbn.conformance.data import round_to

_CHAIN = 128  # values that are added one after the other


class Float64(Plain):
    """In float64, whatever the input: every result is rounded once."""

    dtype: str

    def forward(
        self,
        x: Array,
        dtype: str,
        state: State,
        communicator: Communicator,
        training: bool,
        differentiates: bool,
    ) -> tuple[Array, Saved]:
        self.dtype = dtype
        for name in ("weight", "bias", "running_mean", "running_var"):
            values = getattr(state, name)
            setattr(state, name, None if values is None else values.astype(np.float64))
        x = x.astype(np.float64)
        y, saved = super().forward(x, dtype, state, communicator, training, differentiates)
        return round_to(y, dtype), saved

    def backward(
        self, saved: Saved, dy: Array, wants_input: bool
    ) -> tuple[Array, Array | None, Array | None]:
        saved = saved._replace(x=saved.x.astype(np.float64))
        dx, weight, bias = super().backward(saved, dy.astype(np.float64), wants_input)
        return round_to(dx, self.dtype), weight, bias


class Chains(Plain):
    """Sums are formed in chains of up to 128 values, which are added in pairs."""

    def sum(self, values: Array) -> Array:
        if values.shape[1] == 0:
            return super().sum(values)
        padded = np.pad(values, ((0, 0), (0, -values.shape[1] % _CHAIN)))
        chains = padded.reshape(len(values), -1, _CHAIN)
        return np.ascontiguousarray(np.add.accumulate(chains, axis=2)[..., -1]).sum(axis=1)


class Welford(Plain):
    """Statistics are updated value by value, in chains of up to 128, which Chan's formula merges.

    The values are scaled by a power of two, for a sum of squares may overflow, or underflow.
    """

    def stats(self, x: Array) -> tuple[Array, Array]:
        values = rows(x)
        exponent = np.frexp(np.abs(values).max(axis=1))[1]
        mean, var = _welford(np.ldexp(values, -exponent[:, np.newaxis]))
        return np.ldexp(mean, exponent), np.ldexp(var, 2 * exponent)


def _welford(values: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each row."""
    chains = -(-values.shape[1] // _CHAIN)
    mean = np.zeros((len(values), chains), values.dtype)
    squares = np.zeros_like(mean)
    counts = np.zeros(chains, values.dtype)
    for start in range(0, values.shape[1], chains):
        newest = values[:, start : start + chains]
        live = slice(newest.shape[1])
        counts[live] += 1
        away = newest - mean[:, live]
        mean[:, live] += away / counts[live]
        squares[:, live] += away * (newest - mean[:, live])
    weights = counts / values.shape[1]
    whole = (mean * weights).sum(axis=1)
    parts = squares / counts + np.square(mean - whole[:, np.newaxis])
    return whole, (parts * weights).sum(axis=1)


SOUND = {layer.__name__: layer for layer in (Float64, Chains, Welford)}


class Layer(SyncBatchNorm):
    """The layer of audit.mutants; `mutant` may also be one of SOUND."""

    def __init__(self, *arguments: Any, mutant: str | None = None, **named: Any) -> None:
        super().__init__(*arguments, mutant=None if mutant in SOUND else mutant, **named)
        if mutant in SOUND:
            sound = SOUND[mutant].__new__(SOUND[mutant])  # like the plain layer, already made
            vars(sound).update(vars(self.plain))
            self.plain = sound
