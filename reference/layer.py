"""The layer of one process group, on lists of shards: values, gradients, running statistics.

Shard r is the input of rank r of the group: float64, shape (N_r, C, *S_r). N_r and S_r may differ
between ranks, and a shard may be empty. Every result has a bound (syncbn.reference.bounds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from syncbn.reference import bounds, formulas, second
from syncbn.reference.bounds import Bounded, Precision, Statistics
from syncbn.reference.formulas import Array


@dataclass(frozen=True)
class Gradients:
    """What one rank gets from the backward pass.

    The parameter gradients are sums over the rank's own values; data-parallel training adds them.
    """

    input: Bounded  # of the shape of its shard
    weight: Bounded  # (C,)
    bias: Bounded  # (C,)


@dataclass(frozen=True)
class Cotangents:
    """Where the second backward pass of one rank starts: the cotangents of its first gradients."""

    input: Array  # of the shape of its shard
    weight: Array  # (C,)
    bias: Array  # (C,)


@dataclass(frozen=True)
class SecondGradients:
    """What one rank gets from the second backward pass; the bias has none."""

    input: Bounded  # of the shape of its shard
    grad_output: Bounded  # of the shape of its shard
    weight: Bounded  # (C,), the sum over all ranks; how they divide it is not defined


def averaged(gradients: Sequence[Gradients], dtype: str) -> list[Gradients]:
    """The gradients of all ranks after data parallelism averaged those of the parameters.

    dtype: name of the dtype of the parameters, in which the ranks add.
    """
    weight = bounds.of_average([one.weight for one in gradients], dtype)
    bias = bounds.of_average([one.bias for one in gradients], dtype)
    return [Gradients(one.input, weight, bias) for one in gradients]


@dataclass(frozen=True)
class _Pass:
    """Shards that were normalized with the same statistics."""

    shapes: list[tuple[int, ...]]
    x: Array  # (C, n), all shards side by side
    stats: Statistics
    of_batch: bool  # whether the statistics are functions of x

    @property
    def slices(self) -> list[slice]:
        counts = [math.prod(shape) // shape[1] for shape in self.shapes]
        ends = np.cumsum(counts)
        return [slice(int(end) - count, int(end)) for end, count in zip(ends, counts, strict=True)]


class SyncBatchNorm:
    """The layer of one process group, with the documented arguments and their defaults.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; None is the cumulative average.
        affine: whether the layer has weight and bias.
        track_running_stats: whether the layer has running statistics.
        dtype: name of the dtype of parameters and running statistics.
        weight: (C,); default ones.
        bias: (C,); default zeros.
        running_mean: (C,) at the start; default zeros.
        running_var: (C,) at the start; default ones.
        num_batches_tracked: at the start.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        dtype: str = "float32",
        weight: Array | None = None,
        bias: Array | None = None,
        running_mean: Array | None = None,
        running_var: Array | None = None,
        num_batches_tracked: int = 0,
    ) -> None:
        def start(value: Array | None, default: float) -> Array:
            return np.full(num_features, default) if value is None else np.asarray(value, float)

        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.dtype = dtype
        self.weight = start(weight if affine else None, 1.0)
        self.bias = start(bias if affine else None, 0.0)
        exact = np.zeros(num_features)
        self.running_mean = Bounded(start(running_mean, 0.0), exact)
        self.running_var = Bounded(start(running_var, 1.0), exact)
        self.num_batches_tracked = num_batches_tracked
        self._input_dtype = "float32"
        self._passes: list[_Pass] = []

    def forward(
        self, shards: Sequence[Array], training: bool = True, dtype: str = "float32"
    ) -> list[Bounded]:
        """y of every shard.

        In training, the statistics are those of all shards together, and the running statistics
        move. In eval, they are the running statistics or, if none are tracked, each shard's own.

        Args:
            shards: the input of each rank.
            training: whether this is a training step.
            dtype: name of the dtype of the input.

        Raises:
            ValueError: training on exactly one value per channel, whose variance is undefined.
        """
        self._input_dtype = dtype
        if training:
            self._passes = [self._batch_pass(shards)]
            if self.track_running_stats and self._passes[0].stats.n:
                self._update_running(self._passes[0].stats)
        elif self.track_running_stats:
            running = Statistics(self.running_mean, self.running_var, n=0)
            self._passes = [_Pass(_shapes(shards), _matrix(shards), running, of_batch=False)]
        else:
            self._passes = [self._batch_pass([shard], training=False) for shard in shards]
        return [y for one in self._passes for y in self._normalize(one)]

    def backward(self, grad_outputs: Sequence[Array]) -> list[Gradients]:
        """The gradients of sum(y * grad_output) over all shards of the last forward."""
        remaining = list(grad_outputs)
        result = []
        for one in self._passes:
            taken, remaining = remaining[: len(one.shapes)], remaining[len(one.shapes) :]
            result += self._gradients(one, _matrix(taken))
        return result

    def double_backward(
        self, grad_outputs: Sequence[Array], cotangents: Sequence[Cotangents]
    ) -> list[SecondGradients]:
        """The gradients of the first gradients (GRAD-5), for all shards of the last forward.

        They are the derivatives of the sum over ranks of <c.input, dx> + <c.weight, grad_weight>
        + <c.bias, grad_bias>, where c are the rank's cotangents and the others its gradients.

        Args:
            grad_outputs: what the first backward pass started from, of each rank.
            cotangents: what the second backward pass starts from, of each rank.
        """
        remaining = list(zip(grad_outputs, cotangents, strict=True))
        inputs, outputs, weights = [], [], []
        for one in self._passes:
            taken, remaining = remaining[: len(one.shapes)], remaining[len(one.shapes) :]
            to_input, to_grad_output, to_weight = self._second(one, taken)
            inputs += _split(to_input, one)
            outputs += _split(to_grad_output, one)
            weights.append(to_weight)
        weight = Bounded(*(np.sum(parts, axis=0) for parts in zip(*weights, strict=True)))
        return [SecondGradients(x, dy, weight) for x, dy in zip(inputs, outputs, strict=True)]

    @property
    def _u(self) -> float:
        return Precision(self._input_dtype).u

    def _batch_pass(self, shards: Sequence[Array], training: bool = True) -> _Pass:
        x = _matrix(shards)
        if training and x.shape[1] == 1:
            raise ValueError("the variance of 1 value per channel is undefined")
        if not x.size:
            nothing = Bounded(np.zeros(len(x)), np.zeros(len(x)))
            return _Pass(_shapes(shards), x, Statistics(nothing, nothing, n=0), of_batch=True)
        parts = [_matrix([shard]) for shard in shards if shard.size]
        means, variances = zip(*map(formulas.stats, parts), strict=True)
        mean, var, _ = formulas.combine(means, variances, [part.shape[1] for part in parts])
        stats = bounds.of_combine(x, mean, var, len(shards), self._u)
        return _Pass(_shapes(shards), x, stats, of_batch=True)

    def _update_running(self, stats: Statistics) -> None:
        self.num_batches_tracked += 1
        f = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        var = formulas.unbiased(stats.var.value, stats.n)
        var_bound = formulas.unbiased(stats.var.bound, stats.n) + 2 * self._u * var
        self.running_mean = self._moved(self.running_mean, stats.mean, f)
        self.running_var = self._moved(self.running_var, Bounded(var, var_bound), f)

    def _moved(self, old: Bounded, batch: Bounded, momentum: float) -> Bounded:
        value = formulas.running(old.value, batch.value, momentum)
        bound = bounds.of_running(old, batch, momentum, self._u)
        return bounds.rounded(Bounded(value, bound), self.dtype)

    def _normalize(self, one: _Pass) -> list[Bounded]:
        mean, var = one.stats.mean.value, one.stats.var.value
        scale = bounds.of_scale(one.stats.var, self.eps, self._u)
        y = formulas.normalize(one.x, mean, var, self.eps, self.weight, self.bias)
        bound = bounds.of_normalize(y, one.x, one.stats, scale, self.weight, self.bias, self._u)
        return _split(bounds.rounded(Bounded(y, bound), self._input_dtype), one)

    def _gradients(self, one: _Pass, dy: Array) -> list[Gradients]:
        scale = bounds.of_scale(one.stats.var, self.eps, self._u)
        inputs = _split(bounds.rounded(self._input_grad(one, dy, scale), self._input_dtype), one)
        result = []
        for part, dx in zip(one.slices, inputs, strict=True):
            sum_dy, sum_dy_xmu = self._reduce_grad(
                dy[:, part], one.x[:, part], one.stats.mean, ranks=1
            )
            grad_weight = Bounded(
                scale.value * sum_dy_xmu.value,
                bounds.of_grad_weight(sum_dy_xmu, scale, self._u),
            )
            result.append(
                Gradients(
                    dx,
                    bounds.rounded(grad_weight, self.dtype),
                    bounds.rounded(sum_dy, self.dtype),
                )
            )
        return result

    def _second(
        self, one: _Pass, taken: Sequence[tuple[Array, Cotangents]]
    ) -> tuple[Bounded, Bounded, Bounded]:
        group = second.Group(
            one.x,
            one.slices,
            one.stats,
            self.eps,
            self.weight,
            self._u,
            self._input_dtype,
            self.dtype,
        )
        counts = [part.stop - part.start for part in one.slices]
        dy = _matrix([grad_output for grad_output, _ in taken])
        a = _matrix([cotangents.input for _, cotangents in taken])
        p = np.repeat([cotangents.weight for _, cotangents in taken], counts, axis=0).T
        q = np.repeat([cotangents.bias for _, cotangents in taken], counts, axis=0).T
        differentiate = second.in_training if one.of_batch else second.in_eval
        return differentiate(group, dy, a, p, q)

    def _input_grad(self, one: _Pass, dy: Array, scale: bounds.Scale) -> Bounded:
        mean, var, n = one.stats.mean.value, one.stats.var.value, max(one.stats.n, 1)
        if not one.of_batch:
            dx = formulas.input_grad_in_eval(dy, var, self.eps, self.weight)
            return Bounded(dx, bounds.of_input_grad_in_eval(dx, scale, self._u))
        sums = self._reduce_grad(dy, one.x, one.stats.mean, ranks=len(one.shapes))
        stats = Statistics(one.stats.mean, one.stats.var, n)
        dx = formulas.input_grad(
            dy, one.x, mean, var, self.eps, self.weight, sums[0].value, sums[1].value, n
        )
        bound = bounds.of_input_grad(dx, dy, one.x, stats, scale, self.weight, *sums, self._u)
        return Bounded(dx, bound)

    def _reduce_grad(
        self, dy: Array, x: Array, mean: Bounded, ranks: int
    ) -> tuple[Bounded, Bounded]:
        sum_dy, sum_dy_xmu = formulas.reduce_grad(dy, x, mean.value)
        d_sum_dy, d_sum_dy_xmu = bounds.of_reduce_grad(dy, x, mean, sum_dy, ranks, self._u)
        return Bounded(sum_dy, d_sum_dy), Bounded(sum_dy_xmu, d_sum_dy_xmu)


def _shapes(shards: Sequence[Array]) -> list[tuple[int, ...]]:
    return [shard.shape for shard in shards]


def _matrix(shards: Sequence[Array]) -> Array:
    """Shards (N_r, C, *S_r) as one contiguous matrix (C, n)."""
    channels = shards[0].shape[1]
    return np.concatenate(
        [np.moveaxis(shard, 1, 0).reshape(channels, -1) for shard in shards], axis=1
    )


def _split(result: Bounded, one: _Pass) -> list[Bounded]:
    """A value and its bound (C, n) as shards: the inverse of `_matrix`."""

    def shard(matrix: Array, part: slice, shape: tuple[int, ...]) -> Array:
        n, channels, *spatial = shape
        return np.moveaxis(matrix[:, part].reshape(channels, n, *spatial), 0, 1)

    return [
        Bounded(shard(result.value, part, shape), shard(result.bound, part, shape))
        for part, shape in zip(one.slices, one.shapes, strict=True)
    ]
