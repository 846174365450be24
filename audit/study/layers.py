"""The layers of the study that are not backends of this project, as one PyTorch class."""

from __future__ import annotations

from typing import Any

import numpy as np

from audit.mutants.layer import Array, Communicator, Plain, Saved, State, rows
from audit.mutants.torch import SyncBatchNorm
from syncbn.conformance.data import round_to

_CHAIN = 128  # values that are added one after the other


class Float64(Plain):
    """Computes in float64 for every input dtype, and rounds each result once."""

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
    """Sums chains of up to 128 values one after the other, and then the chains in pairs."""

    def sum(self, values: Array) -> Array:
        if values.shape[1] == 0:
            return super().sum(values)
        padded = np.pad(values, ((0, 0), (0, -values.shape[1] % _CHAIN)))
        chains = padded.reshape(len(values), -1, _CHAIN)
        return np.ascontiguousarray(np.add.accumulate(chains, axis=2)[..., -1]).sum(axis=1)


class Welford(Plain):
    """Updates the statistics value by value in chains of up to 128, and combines them as Chan does.

    A power of two scales the values, because a sum of squares may overflow or underflow.
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
    for start in range(0, values.shape[1], chains):  # one value of each chain
        newest = values[:, start : start + chains]
        present = slice(newest.shape[1])
        counts[present] += 1
        deviation = newest - mean[:, present]
        mean[:, present] += deviation / counts[present]
        squares[:, present] += deviation * (newest - mean[:, present])
    weights = counts / values.shape[1]
    total = (mean * weights).sum(axis=1)
    parts = squares / counts + np.square(mean - total[:, np.newaxis])
    return total, (parts * weights).sum(axis=1)


SOUND = {layer.__name__: layer for layer in (Float64, Chains, Welford)}


class Layer(SyncBatchNorm):
    """The layer of audit.mutants. Its argument `mutant` may also be one of SOUND."""

    def __init__(self, *arguments: Any, mutant: str | None = None, **named: Any) -> None:
        super().__init__(*arguments, mutant=None if mutant in SOUND else mutant, **named)
        if mutant in SOUND:
            sound = SOUND[mutant].__new__(SOUND[mutant])  # without __init__: Plain's has run
            vars(sound).update(vars(self.plain))
            self.plain = sound
