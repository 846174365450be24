"""A plain and right SyncBatchNorm in NumPy: a short method for each step of the algorithm.

No framework is imported. torch.py and mindspore.py wrap it into layers. The methods are short
because a mutant (faults.py) replaces one or two of them by wrong ones. Unchanged, it is also the
suite's baseline of a careful float32 implementation: two passes, pairwise sums, a merge of parts
by Chan's formula, and no intermediate value that overflows where no result does.

x, dy and dx are (N, C, +); a value per channel is (C,). Both are float64 or float32; float16 and
bfloat16 values arrive as float32. Arithmetic is in the dtype of x. The five operations are `stats`,
`combine`, `normalize`, `reduce_grad` and `input_grad`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from syncbn import protocol
from syncbn.contract import check_arguments, check_count, check_input_dtype, check_shape
from syncbn.protocol import BACKWARD, FAIL, HEADER_WORDS, NOTHING, PeerError, Settings

Array: TypeAlias = npt.NDArray[Any]

# Messages are padded to a multiple of this many words, so that ranks whose layers differ in
# num_features exchange messages of one length (up to 123 channels) and can compare them.
_PAGE = 256
_BACKENDS = ("plain",)


class Communicator(Protocol):
    """The process group as one of its ranks sees it; the ranks exchange float64."""

    @property
    def rank(self) -> int:
        """The global id of this rank."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ids of all ranks of the group, in its order."""

    @property
    def world(self) -> Communicator:
        """All ranks of the job."""

    def all_gather(self, message: Array) -> Array:
        """The (M,) messages of all ranks as (ranks, M)."""

    def all_reduce(self, values: Array) -> Array:
        """The sum of the ranks' values (M,)."""


class Alone:
    """A group of this rank only, which does not communicate."""

    rank = 0
    ranks = (0,)

    @property
    def world(self) -> Communicator:
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
    """What backward needs.

    communicator: of the ranks whose inputs the statistics depend on; None if they are constants.
    """

    x: Array
    weight: Array | None
    stats: Statistics
    communicator: Communicator | None


class Plain:
    """The layer without its tensors. Arguments are those of the contract, with dtypes by name.

    Raises:
        TypeError, ValueError: an argument is wrong; see syncbn.contract.check_arguments.
    """

    # Whether y and dx get the dtype of x, y its memory format, and dx its memory format.
    # The wrappers read these.
    keeps_dtype = True
    keeps_format = True
    keeps_gradient_format = True

    # The context of the forward, set by the wrapper: "no_grad", "inference_mode", "autocast" or "".
    context = ""
    was_cast = False  # whether the layer was cast to another dtype, set by the wrapper of PyTorch

    def __deepcopy__(self, _: Any) -> Plain:
        """A copy that shares arrays, which no step changes, and the group, which is not copied."""
        return copy.copy(self)

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

    def set_attribute(self, name: str, value: Any) -> None:
        """Set eps, momentum or track_running_stats after construction."""
        setattr(self, name, value)

    def forward(
        self,
        x: Array,
        dtype: str,
        state: State,
        communicator: Communicator,
        training: bool,
        differentiates: bool,
    ) -> tuple[Array, Saved]:
        """y, and what backward needs. Moves the running statistics in `state`.

        Args:
            x: the input.
            dtype: name of the dtype that the input had before it became x.
            state: parameters and running statistics.
            communicator: of the process group.
            training: as opposed to eval.
            differentiates: whether a backward of this rank will reach the layer.

        Raises:
            TypeError, ValueError: the input is wrong (ERR-6), or the group trains on one value per
                channel (ERR-7).
            RuntimeError, PeerError: in training, another rank cannot take part (GRAD-4, ERR-9).
        """
        depends_on: Communicator | None
        if training:
            stats = self.train(x, dtype, state, communicator, differentiates)
            depends_on = communicator
        else:
            self.check_input(x, dtype)
            stats, depends_on = self.evaluate(x, state, communicator)
        y = self.normalize(x, stats, state.weight, state.bias)
        return y, Saved(x, state.weight, stats, depends_on)

    def backward(
        self, saved: Saved, dy: Array, wants_input: bool
    ) -> tuple[Array | None, Array | None, Array | None]:
        """dx if it is wanted, and the gradients of weight and bias: the sums of this rank alone."""
        x, weight, stats, communicator = saved
        sums = self.reduce_grad(dy, x, stats.mean)
        grad_weight, grad_bias = self.parameter_gradients(sums, stats)
        if communicator is not None:
            # Also if this rank wants no dx or has no data, because the others wait for its sums.
            sums = self.reduce_sums(sums, stats, communicator)
        if not wants_input:
            dx = None
        elif communicator is None:
            dx = dy * per_channel(self.scale(stats.var, weight), x)
        else:
            dx = self.input_grad(dy, x, stats, weight, sums)
        return dx, grad_weight, grad_bias

    # Statistics of the group

    def train(
        self,
        x: Array,
        dtype: str,
        state: State,
        communicator: Communicator,
        differentiates: bool,
    ) -> Statistics:
        """The statistics of the group, by one all_gather. Moves the running statistics."""
        table = self.exchange(x, dtype, communicator, differentiates)
        stats = self.combine_table(table, x.dtype)
        self.check_count(stats.n)
        if self.track_running_stats and state.running_mean is not None:
            self.track(state, stats)
        return stats

    def evaluate(
        self, x: Array, state: State, communicator: Communicator
    ) -> tuple[Statistics, Communicator | None]:
        """The running statistics; without them, the statistics of this rank's input."""
        if state.running_mean is not None:
            assert state.running_var is not None
            return Statistics(state.running_mean, state.running_var, n=0), None
        return self.combine_table(self.message(x, NOTHING)[np.newaxis], x.dtype), Alone()

    def check_input(self, x: Array, dtype: str) -> None:
        check_shape(x.shape, self.num_features)
        check_input_dtype(dtype, self.parameter_dtype if self.affine else None)

    def check_count(self, n: int) -> None:
        check_count(n)

    def exchange(
        self, x: Array, dtype: str, communicator: Communicator, differentiates: bool
    ) -> Array:
        """The messages of all ranks, none of which has failed.

        A rank that fails still joins the all_gather, so that no other rank waits for it.
        """
        error: Exception | None = None
        try:
            self.check_input(x, dtype)
            message = self.message(x, BACKWARD if differentiates else NOTHING)
        except Exception as caught:
            error, message = caught, self.message(None, FAIL)
        table = communicator.all_gather(message)
        self.raise_together(table, communicator.ranks, error)
        return table

    def raise_together(self, table: Array, ranks: tuple[int, ...], error: Exception | None) -> None:
        """Raise on every rank if the messages of all ranks show that the step must fail."""
        if error:
            raise error
        headers = table[:, :HEADER_WORDS].tolist()
        verdict = protocol.verdict([header[protocol.MARK] for header in headers], ranks)
        if verdict.failed:
            raise _peer_error(verdict.failed)
        if difference := self.disagreement(headers, ranks):
            raise ValueError(difference)
        if verdict.idle:
            raise RuntimeError(protocol.nothing_to_differentiate(verdict.idle))

    def disagreement(self, headers: list[list[float]], ranks: tuple[int, ...]) -> str | None:
        """How the layers of the ranks differ, or None."""
        return protocol.disagreement(headers, ranks, _BACKENDS)

    def message(self, x: Array | None, mark: int) -> Array:
        """The message of a rank: header, mean and var. x is None if the rank has failed."""
        settings = Settings(
            num_features=self.num_features,
            eps=self.eps,
            momentum=self.momentum if self.track_running_stats else None,
            dtype=self.parameter_dtype,
            affine=self.affine,
            track_running_stats=self.track_running_stats,
            backend=_BACKENDS[0],
        )
        count = 0 if x is None else self.count_of(x)
        words = np.zeros(-(-(HEADER_WORDS + 2 * self.num_features) // _PAGE) * _PAGE)
        words[:HEADER_WORDS] = protocol.header(mark, count, settings, _BACKENDS)
        if x is not None:
            statistics = np.concatenate(self.stats(x) if x.size else self.no_stats())
            words[HEADER_WORDS : HEADER_WORDS + len(statistics)] = statistics
        return words

    def count_of(self, x: Array) -> int:
        """The number of values per channel."""
        return x.size // self.num_features

    def no_stats(self) -> tuple[Array, Array]:
        """Mean and variance of a rank without data."""
        return np.zeros(self.num_features), np.zeros(self.num_features)

    def stats(self, x: Array) -> tuple[Array, Array]:
        """Mean and biased variance of x in two passes."""
        values = rows(x)
        mean = self.sum(values) / values.shape[1]
        return mean, self.mean_square(values - mean[:, np.newaxis])

    def sum(self, values: Array) -> Array:
        """The sum of each row. NumPy adds a contiguous row in pairs."""
        return values.sum(axis=1)

    def mean_square(self, values: Array) -> Array:
        """The mean square of each row.

        A power of two scales the row, because the sum of squares may overflow or underflow.
        """
        exponent = np.frexp(np.abs(values).max(axis=1))[1]
        scaled = np.ldexp(values, -exponent[:, np.newaxis])
        return np.ldexp(self.sum(np.square(scaled)) / values.shape[1], 2 * exponent)

    def combine_table(self, table: Array, dtype: Any) -> Statistics:
        """The statistics of all messages, the rows of `table`, in `dtype`."""
        statistics = table[:, HEADER_WORDS : HEADER_WORDS + 2 * self.num_features].astype(dtype)
        means, variances = np.split(statistics, 2, axis=1)
        return self.combine(means, variances, self.counts(table))

    def counts(self, table: Array) -> Array:
        """The counts of all messages."""
        return table[:, protocol.COUNT_HIGH] * protocol.COUNT_WORD + table[:, protocol.COUNT_LOW]

    def combine(self, means: Array, variances: Array, counts: Array) -> Statistics:
        """The statistics of all parts, (parts, C); a part with a count of 0 weighs nothing.

        Chan, Golub and LeVeque, The American Statistician 37 (1983), for many parts.
        """
        weights = self.weights(counts)[:, np.newaxis].astype(means.dtype)
        mean = (weights * means).sum(axis=0)
        var = self.combine_variances(weights, means - mean, variances)
        return Statistics(mean, var, int(counts.sum()))

    def weights(self, counts: Array) -> Array:
        """The share of each part in the values."""
        return counts / max(counts.sum(), 1)

    def combine_variances(self, weights: Array, deviations: Array, variances: Array) -> Array:
        """The variance of all parts; `deviations` are their means minus the mean of all."""
        return (weights * (variances + np.square(deviations))).sum(axis=0)

    # Running statistics

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
        """The weight of the newest batch after that many steps."""
        return 1 / steps if self.momentum is None else self.momentum

    def unbiased(self, var: Array, n: int) -> Array:
        return var * (n / (n - 1))

    def moved(self, running: Array, batch: Array, factor: float) -> Array:
        return (1 - factor) * running + factor * batch

    # Normalization

    def invstd(self, var: Array) -> Array:
        return 1 / np.sqrt(var + self.eps)

    def scale(self, var: Array, weight: Array | None) -> Array:
        return self.invstd(var) if weight is None else self.invstd(var) * weight

    def normalize(
        self, x: Array, stats: Statistics, weight: Array | None, bias: Array | None
    ) -> Array:
        """y = (x - mean) * invstd * weight + bias."""
        y = (x - per_channel(stats.mean, x)) * per_channel(self.scale(stats.var, weight), x)
        return y if bias is None else y + per_channel(bias, x)

    # Gradients

    def reduce_grad(self, dy: Array, x: Array, mean: Array) -> Array:
        """The sums of dy and of dy (x - mean) over the values of this rank, (2, C)."""
        dy = rows(dy)
        return np.stack([self.sum(dy), self.sum(dy * (rows(x) - mean[:, np.newaxis]))])

    def parameter_gradients(
        self, sums: Array, stats: Statistics
    ) -> tuple[Array | None, Array | None]:
        """The gradients of weight and bias."""
        return (sums[1] * self.invstd(stats.var), sums[0]) if self.affine else (None, None)

    def reduce_sums(self, sums: Array, stats: Statistics, communicator: Communicator) -> Array:
        """The sums of all ranks, (2, C), by one all_reduce.

        Raises:
            PeerError: a rank of the group has failed in the backward.
        """
        return self.reduce_together(sums, communicator, failed=False)

    def fail_backward(self, communicator: Communicator | None) -> None:
        """Join the all_reduce of the backward without sums, so that no other rank waits for it."""
        if communicator is not None:
            nothing = np.zeros((2, self.num_features))
            with contextlib.suppress(PeerError):  # the caller raises this rank's own error
                self.reduce_together(nothing, communicator, failed=True)

    def reduce_together(self, sums: Array, communicator: Communicator, failed: bool) -> Array:
        """The sums of all ranks; behind them travels a word for each rank, 1 if it has failed."""
        ranks = communicator.ranks
        marks = [float(failed and rank == communicator.rank) for rank in ranks]
        total = communicator.all_reduce(np.concatenate([sums.ravel(), marks], dtype=np.float64))
        total, marks_of_all = np.split(total, [sums.size])
        if marks_of_all.any():
            raise _peer_error(
                [rank for rank, mark in zip(ranks, marks_of_all, strict=True) if mark]
            )
        return total.reshape(sums.shape).astype(sums.dtype)

    def input_grad(
        self, dy: Array, x: Array, stats: Statistics, weight: Array | None, sums: Array
    ) -> Array:
        """dx = weight invstd (dy - sum_dy / n - (x - mean) invstd^2 sum_dy_xmu / n)."""
        mean_dy, slope = sums / max(stats.n, 1)
        for _ in range(2):  # one factor at a time, because invstd^2 may underflow
            slope = slope * self.invstd(stats.var)
        deviations = x - per_channel(stats.mean, x)
        through_statistics = per_channel(mean_dy, x) + deviations * per_channel(slope, x)
        return (dy - through_statistics) * per_channel(self.scale(stats.var, weight), x)

    def double_backward(
        self, saved: Saved, dy: Array, ddx: Array, ddweight: Array, ddbias: Array
    ) -> tuple[Array, Array, Array]:
        """The gradients in dy, x and weight of a function of the results of `backward` (GRAD-5).

        With s = invstd, d = x - mean, V = weight ddx, and the sums over the group A = sum dy,
        B = sum dy d, C1 = sum V, C2 = sum V d, C3 = sum V dy, the function is

            L = s (C3 - A C1 / n - s^2 B C2 / n) + sum of ddweight s dy d + ddbias dy over the group

        and its gradients follow from dmean/dx = 1 / n and ds/dx = -s^3 d / n. Without a group mean
        and s are constants.

        Args:
            saved: of the forward.
            dy: the argument of `backward`.
            ddx, ddweight, ddbias: the gradients of L in the results of `backward`.
        """
        x, weight, stats, communicator = saved
        wide_invstd = per_channel(self.invstd(stats.var), x)
        direct = wide_invstd * per_channel(ddweight, x)
        v = ddx if weight is None else ddx * per_channel(weight, x)
        deviations = x - per_channel(stats.mean, x)
        local = self.double_sums(dy, deviations, v, ddweight)
        if communicator is None:
            return (
                v * wide_invstd + deviations * direct + per_channel(ddbias, x),
                dy * direct,
                self.sum(rows(ddx * wide_invstd * dy)),
            )
        sums = self.reduce_sums(local, stats, communicator)
        a, b, c1, c2, c3, weighted_a, weighted_b = sums
        n, invstd = max(stats.n, 1), self.invstd(stats.var)
        ratio = invstd * invstd / n
        ddy = wide_invstd * (v - per_channel(c1 / n, x) - deviations * per_channel(ratio * c2, x))
        ddy = ddy + deviations * direct + per_channel(ddbias, x)
        through_mean = (-invstd * ratio * (c1 * b + c2 * a) + invstd * weighted_a) / n
        through_invstd = invstd * ratio * (c3 - a * c1 / n - 3 * ratio * b * c2 + weighted_b)
        products = v * per_channel(b, x) + dy * per_channel(c2, x)
        dx: Array = dy * direct - wide_invstd * per_channel(ratio, x) * products
        dx = dx - per_channel(through_mean, x) - deviations * per_channel(through_invstd, x)
        unweighted = self.input_grad(dy, x, stats, None, sums[:2])
        return ddy, dx, self.sum(rows(ddx * unweighted))

    def double_sums(self, dy: Array, deviations: Array, v: Array, ddweight: Array) -> Array:
        """The sums of this rank that `double_backward` needs, (7, C)."""
        terms = (dy, dy * deviations, v, v * deviations, v * dy)
        a, b, *others = (self.sum(rows(term)) for term in terms)
        return np.stack([a, b, *others, ddweight * a, ddweight * b])


def _peer_error(failed: Sequence[int]) -> PeerError:
    return protocol.peer_error(failed, ["see the error there"] * len(failed))


def rows(x: Array) -> Array:
    """(N, C, +) as contiguous (C, n)."""
    return np.ascontiguousarray(np.moveaxis(x, 1, 0)).reshape(x.shape[1], -1)


def per_channel(values: Array, x: Array) -> Array:
    """(C,) as (1, C, 1, ...) with the dtype and the number of dimensions of x."""
    return values.astype(x.dtype).reshape(1, -1, *(1,) * (x.ndim - 2))
