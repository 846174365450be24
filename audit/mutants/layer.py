"""A plain, right SyncBatchNorm in NumPy: a short method for each step of the algorithm.

No framework is imported; the skins beside this module (torch.py, mindspore.py) make layers of it.
The methods are that small because a mutant (faults.py) replaces one or two of them by wrong ones.
As it stands it is also the suite's own baseline of a careful float32 implementation: two passes,
pairwise sums, parts merged by Chan, and nothing on the way that overflows where no result does.

x, dy and dx are (N, C, +), whatever is per channel is (C,). They are float32, in which float16 and
bfloat16 are given, or float64; arithmetic is that of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from syncbn.contract import check_arguments, check_count, check_shape
from syncbn.protocol import PeerError, nothing_to_differentiate

Array: TypeAlias = npt.NDArray[Any]

FLOATING = ("float16", "bfloat16", "float32", "float64")

# The last word of a rank's message: what the rank will do after the all_gather.
IDLE, DIFFERENTIATE, FAIL = 0, 1, 2


class Ranks(Protocol):
    """The ranks of a process group, as one of them has it; what goes over the wire is float64."""

    @property
    def rank(self) -> int:
        """The global id of this rank."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ids of all ranks of the group, in its order."""

    @property
    def world(self) -> Ranks:
        """All ranks there are."""

    def all_gather(self, message: Array) -> Array:
        """The (M,) messages of all ranks as (ranks, M)."""

    def all_reduce(self, values: Array) -> Array:
        """The sum of the ranks' values (M,)."""


class Alone:
    """A group of this rank only, which does not communicate."""

    rank = 0
    ranks = (0,)

    @property
    def world(self) -> Ranks:
        return self

    def all_gather(self, message: Array) -> Array:
        return message[np.newaxis]

    def all_reduce(self, values: Array) -> Array:
        return values


@dataclass
class State:
    """Parameters and running statistics; None for what the layer does not have."""

    num_batches_tracked: int
    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None


class Statistics(NamedTuple):
    """Mean and biased variance of n values per channel."""

    mean: Array
    var: Array
    n: int


class Saved(NamedTuple):
    """What backward needs. ranks: whose inputs the statistics depend on; None if they are given."""

    x: Array
    weight: Array | None
    stats: Statistics
    ranks: Ranks | None


class Plain:
    """The layer but for its tensors; the arguments are those of the contract, dtypes by name.

    Raises:
        TypeError, ValueError: an argument is wrong; see syncbn.contract.check_arguments.
    """

    # For the skins: whether y and dx get the dtype of x, y its memory format, dx its memory format.
    keeps_dtype = True
    keeps_format = True
    keeps_gradient_format = True

    def __init__(
        self,
        num_features: Any,
        eps: Any,
        momentum: Any,
        affine: Any,
        track_running_stats: Any,
        parameter_dtype: str,
    ) -> None:
        check_arguments(num_features, eps, momentum, affine, track_running_stats)
        self.num_features = int(num_features)
        self.eps = float(eps)
        self.momentum = None if momentum is None else float(momentum)
        self.affine: bool = affine
        self.track_running_stats: bool = track_running_stats
        self.parameter_dtype = parameter_dtype

    def forward(
        self,
        x: Array,
        dtype: str,
        state: State,
        ranks: Ranks,
        training: bool,
        differentiates: bool,
    ) -> tuple[Array, Saved]:
        """y, and what backward needs; the running statistics in `state` move.

        Args:
            dtype: name of the dtype of the input that x holds.
            ranks: the process group.
            differentiates: whether a backward of this rank will reach the layer.

        Raises:
            TypeError, ValueError: the input is wrong (ERR-6), or the group trains on one value per
                channel (ERR-7).
            RuntimeError, PeerError: in training, another rank cannot take part (GRAD-4, ERR-9).
        """
        depends_on: Ranks | None
        if training:
            stats, depends_on = self.train(x, dtype, state, ranks, differentiates), ranks
        else:
            self.check_input(x, dtype)
            stats, depends_on = self.evaluate(x, state, ranks)
        y = self.normalize(x, stats, state.weight, state.bias)
        return y, Saved(x, state.weight, stats, depends_on)

    def backward(
        self, saved: Saved, dy: Array, wants_input: bool
    ) -> tuple[Array | None, Array | None, Array | None]:
        """dx if it is wanted, and the gradients of weight and bias: the sums of this rank alone."""
        x, weight, stats, ranks = saved
        sums = self.local_sums(dy, x, stats.mean)
        grad_weight, grad_bias = self.parameter_gradients(sums, stats)
        if ranks is not None:
            # Also if this rank wants no dx, or has no data: the others wait for its sums.
            sums = self.reduce_sums(sums, stats, ranks)
        if not wants_input:
            dx = None
        elif ranks is None:
            dx = dy * wide(self.scale(stats.var, weight), x)
        else:
            dx = self.input_gradient(dy, x, stats, weight, sums)
        return dx, grad_weight, grad_bias

    def train(
        self, x: Array, dtype: str, state: State, ranks: Ranks, differentiates: bool
    ) -> Statistics:
        """The statistics of the group, by one all_gather; moves the running ones."""
        table = self.exchange(x, dtype, ranks, differentiates)
        stats = self.merge(table, x.dtype)
        self.check_count(stats.n)
        if self.track_running_stats:
            self.track(state, stats)
        return stats

    def evaluate(self, x: Array, state: State, ranks: Ranks) -> tuple[Statistics, Ranks | None]:
        """The running statistics, or without them those of this rank's input."""
        if self.track_running_stats:
            assert state.running_mean is not None
            assert state.running_var is not None
            return Statistics(state.running_mean, state.running_var, n=0), None
        return self.merge(self.pack(x, IDLE)[np.newaxis], x.dtype), Alone()

    def check_input(self, x: Array, dtype: str) -> None:
        check_shape(x.shape, self.num_features)
        if dtype not in FLOATING:
            raise TypeError(f"input must have a dtype of {', '.join(FLOATING)}, got {dtype}")
        half = dtype in ("float16", "bfloat16")
        of_parameters = dtype == self.parameter_dtype
        if self.affine and not of_parameters and not (half and self.parameter_dtype == "float32"):
            raise TypeError(
                f"input must have the dtype of the parameters, {self.parameter_dtype} (float16 and "
                f"bfloat16 also go with float32), got {dtype}"
            )

    def check_count(self, n: int) -> None:
        check_count(n)

    def exchange(self, x: Array, dtype: str, ranks: Ranks, differentiates: bool) -> Array:
        """The messages of all ranks, none of which has failed.

        A rank that fails joins the all_gather all the same, so that none waits for it.
        """
        problem: Exception | None = None
        message = np.zeros(2 * self.num_features + 2)
        try:
            self.check_input(x, dtype)
            message[:] = self.pack(x, DIFFERENTIATE if differentiates else IDLE)
        except Exception as error:
            problem = error
            message[-1] = FAIL
        table = ranks.all_gather(message)
        self.raise_together(table[:, -1], ranks, problem)
        return table

    def raise_together(self, marks: Array, ranks: Ranks, problem: Exception | None) -> None:
        """Raise on every rank if the last words of all messages show that the step must fail."""
        if problem:
            raise problem
        failed = [rank for rank, mark in zip(ranks.ranks, marks, strict=True) if mark == FAIL]
        if failed:
            names = ", ".join(f"rank {rank}" for rank in failed)
            raise PeerError(f"{names} failed: see the error raised there")
        idle = [rank for rank, mark in zip(ranks.ranks, marks, strict=True) if mark == IDLE]
        if idle and len(idle) < len(marks):
            raise RuntimeError(nothing_to_differentiate(idle))

    def pack(self, x: Array, intention: int) -> Array:
        """What a rank tells the others, (2C + 2,): mean, var, count, intention."""
        count = x.size // self.num_features
        mean, var = self.local_statistics(x) if count else (np.zeros(self.num_features),) * 2
        return np.concatenate([mean, var, [count, intention]], dtype=np.float64)

    def local_statistics(self, x: Array) -> tuple[Array, Array]:
        """Mean and biased variance of x in two passes."""
        values = rows(x)
        mean = self.sum(values) / values.shape[1]
        return mean, self.mean_square(values - mean[:, np.newaxis])

    def sum(self, values: Array) -> Array:
        """Of each row, which NumPy adds up in pairs because it is contiguous."""
        return values.sum(axis=1)

    def mean_square(self, values: Array) -> Array:
        """Of each row, scaled by a power of two: the sum of squares may overflow, or underflow."""
        exponent = np.frexp(np.abs(values).max(axis=1))[1]
        scaled = np.ldexp(values, -exponent[:, np.newaxis])
        return np.ldexp(self.sum(np.square(scaled)) / values.shape[1], 2 * exponent)

    def merge(self, table: Array, dtype: Any) -> Statistics:
        """Statistics of all parts, the rows of `table`; a count of 0 weighs nothing.

        Chan, Golub and LeVeque, The American Statistician 37 (1983), for many parts.
        """
        means = table[:, : self.num_features].astype(dtype)
        variances = table[:, self.num_features : -2].astype(dtype)
        counts = table[:, -2]
        weights = self.weights(counts)[:, np.newaxis].astype(dtype)
        mean = (weights * means).sum(axis=0)
        var = self.merge_variances(weights, means - mean, variances)
        return Statistics(mean, var, int(counts.sum()))

    def weights(self, counts: Array) -> Array:
        """The share of each part in the values."""
        return counts / max(counts.sum(), 1)

    def merge_variances(self, weights: Array, away: Array, variances: Array) -> Array:
        """From the variances of the parts, and how far their means are from the mean."""
        return (weights * (variances + np.square(away))).sum(axis=0)

    def track(self, state: State, stats: Statistics) -> None:
        """Move the running statistics, unless the whole group is empty."""
        assert state.running_mean is not None
        assert state.running_var is not None
        if stats.n == 0:
            return
        state.num_batches_tracked += 1
        factor = self.factor(state.num_batches_tracked)
        state.running_mean = self.moved(state.running_mean, stats.mean, factor)
        unbiased = self.unbiased(stats.var, stats.n)
        state.running_var = self.moved(state.running_var, unbiased, factor)

    def factor(self, steps: int) -> float:
        """The weight of the newest of so many batches."""
        return 1 / steps if self.momentum is None else self.momentum

    def unbiased(self, var: Array, n: int) -> Array:
        return var * (n / (n - 1))

    def moved(self, running: Array, batch: Array, factor: float) -> Array:
        return (1 - factor) * running + factor * batch

    def invstd(self, var: Array) -> Array:
        return 1 / np.sqrt(var + self.eps)

    def scale(self, var: Array, weight: Array | None) -> Array:
        return self.invstd(var) if weight is None else self.invstd(var) * weight

    def normalize(
        self, x: Array, stats: Statistics, weight: Array | None, bias: Array | None
    ) -> Array:
        y = (x - wide(stats.mean, x)) * wide(self.scale(stats.var, weight), x)
        return y if bias is None else y + wide(bias, x)

    def local_sums(self, dy: Array, x: Array, mean: Array) -> Array:
        """sum dy and sum dy (x - mean) of this rank, (2, C)."""
        dy = rows(dy)
        return np.stack([self.sum(dy), self.sum(dy * (rows(x) - mean[:, np.newaxis]))])

    def parameter_gradients(
        self, sums: Array, stats: Statistics
    ) -> tuple[Array | None, Array | None]:
        return (sums[1] * self.invstd(stats.var), sums[0]) if self.affine else (None, None)

    def reduce_sums(self, sums: Array, stats: Statistics, ranks: Ranks) -> Array:
        """The sums of all ranks, (2, C)."""
        total = ranks.all_reduce(sums.astype(np.float64).ravel())
        return total.reshape(sums.shape).astype(sums.dtype)

    def input_gradient(
        self, dy: Array, x: Array, stats: Statistics, weight: Array | None, sums: Array
    ) -> Array:
        """dx = weight s (dy - sum_dy / n - (x - mean) s^2 sum_dy_xmu / n)."""
        mean_dy, slope = sums / max(stats.n, 1)
        for _ in range(2):  # one after the other, for s^2 may underflow
            slope = slope * self.invstd(stats.var)
        through_statistics = wide(mean_dy, x) + (x - wide(stats.mean, x)) * wide(slope, x)
        return (dy - through_statistics) * wide(self.scale(stats.var, weight), x)


def rows(x: Array) -> Array:
    """(N, C, +) as contiguous (C, n)."""
    return np.ascontiguousarray(np.moveaxis(x, 1, 0)).reshape(x.shape[1], -1)


def wide(v: Array, x: Array) -> Array:
    """(C,) as (1, C, 1, ...), of the dtype of x."""
    return v.astype(x.dtype).reshape(1, -1, *(1,) * (x.ndim - 2))
