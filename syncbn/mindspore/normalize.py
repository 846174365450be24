"""y = (x - mean) * invstd * weight + bias, its gradient, and the gradient of that gradient.

Let m and v be the mean and the biased variance of all n values per channel that the group holds,
s = 1 / sqrt(v + eps), u = (x - m) s, w the weight, and M[.] the mean over those n values. A step
with the output gradient dy has

    dx = w s (dy - M[dy] - u M[dy u])      grad_weight = sum dy u      grad_bias = sum dy

where the two sums are those of this rank. Take a function of these three results with the
gradients g, gw and gb in them. With h = w g and k = gw dy - s (h M[dy u] + dy M[h u]), it has the
gradients

    in dy      s (h - M[h] - u M[h u]) + gw u + gb
    in weight  sum g s (dy - M[dy] - u M[dy u])                               of this rank
    in x       s (k - M[k] - u (M[k u] + s (M[h dy] - M[h] M[dy] - M[h u] M[dy u])))

The last line holds because a change of x_i moves every u_j by s (1[i = j] - 1/n - u_i u_j / n) and
s by -s^2 u_i / n, and because k is the derivative of the function in u. With the sums over ranks
of gw sum dy and gw sum dy u, written n M[gw dy] and n M[gw dy u],

    M[k]   = M[gw dy] - s (M[h] M[dy u] + M[dy] M[h u])
    M[k u] = M[gw dy u] - 2 s M[h u] M[dy u]

so a second backward costs one all_reduce of 5 C sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspore import Tensor, nn, ops
from mindspore.graph.api import _pynative_executor

from syncbn.mindspore.backends import Backend, statistics_dtype
from syncbn.mindspore.graph import compiling, may_sync_host
from syncbn.mindspore.groups import Communicator, Group
from syncbn.mindspore.layout import (
    axes_of_sums,
    canonical,
    channel_sums,
    count_of,
    is_recorded,
    per_channel,
    reserve,
)
from syncbn.mindspore.step import sum_over_ranks

# As an operator: MindSpore's own bprops use the function `ops.zeros_like`, and the compiler loses a
# function that both derivatives call.
_zeros_like = ops.ZerosLike()


class Normalize(nn.Cell):
    """y, where mean and invstd are functions of the inputs of all ranks.

    It is differentiable twice in PyNative and once in a graph. A second derivative differentiates
    `bprop`, which therefore leaves everything to a cell with a bprop of its own.

    Args:
        backend: of the five operations.
        group: the ranks whose inputs mean and invstd are functions of.
    """

    def __init__(self, backend: Backend, group: Group) -> None:
        super().__init__()
        self.normalize = backend.normalize
        self.gradients = _Gradients(backend, group)

    def construct(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        n: Tensor,
    ) -> Tensor:
        if count_of(x.shape) == 0:
            return ops.depend(ops.zeros(x.shape, x.dtype), mean)
        return self.normalize(canonical(x), mean, invstd, weight, bias).reshape(x.shape)

    def bprop(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        n: Tensor,
        out: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor | None, ...]:
        found = self.gradients(dout, x, weight, mean, invstd, n)
        return (
            found[0] * 1 if is_recorded() else found[0],  # see `is_recorded`
            None if weight is None else found[1].astype(weight.dtype),
            None if bias is None else found[2].astype(bias.dtype),
            found[5],
            found[5],
            found[6],
        )


class NormalizeByConstants(nn.Cell):
    """y = (x - mean) * scale + bias in the dtype of x, with sums of the dtype of statistics.

    mean, scale and bias are of shape (1, C, 1, ...), or bias is None. x keeps its shape, so that an
    exported graph takes any batch size. Every derivative exists, with mean as a constant.
    """

    def construct(self, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        y = (x - mean.astype(x.dtype)) * scale.astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype)

    def bprop(
        self,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        out: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor | None, ...]:
        axes = axes_of_sums(x.ndim)
        dy = dout.astype(statistics_dtype())
        centred = x.astype(statistics_dtype()) - mean.astype(statistics_dtype())
        return (
            dout * scale.astype(x.dtype),
            _zeros_like(mean),
            (dy * centred).sum(axes, keepdims=True).astype(scale.dtype),
            None if bias is None else dy.sum(axes, keepdims=True).astype(bias.dtype),
        )


class _Gradients(nn.Cell):
    """The gradients of a step, by one all_reduce. Differentiable once in dy, x and weight."""

    def __init__(self, backend: Backend, group: Group) -> None:
        super().__init__()
        self.reduce_grad, self.input_grad = backend.reduce_grad, backend.input_grad
        self.communicator = Communicator(group)
        self.last_derivative = _LastDerivative()

    def construct(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, n: Tensor
    ) -> tuple[Tensor, ...]:
        """dx, grad_weight, grad_bias; what `bprop` needs; zeros of the shapes of mean and n.

        `bprop` needs sum dy and sum dy (x - mean), (2 C,), of this rank and of the group.
        """
        # Also without data: the others wait for this rank's sums.
        if compiling():  # @jit.cond: True
            own = ops.depend(self._sums(dy, x, mean), (dy, mean))
            sums = self.communicator.all_reduce(own, _tag(mean))
        else:
            own, error = _caught(2 * mean.shape[0], mean.dtype, self._sums_and_room, dy, x, mean)
            sums = sum_over_ranks(own, error, self.communicator, _tag(mean))
        dx = ops.zeros(x.shape, x.dtype)
        if count_of(x.shape) != 0:
            sum_dy, sum_dy_xmu = _part(sums, 0, 2), _part(sums, 1, 2)
            dx = self.input_grad(
                canonical(dy), canonical(x), mean, invstd, weight, sum_dy, sum_dy_xmu, n
            ).reshape(x.shape)
        own_dy, own_dy_xmu = _part(own, 0, 2), _part(own, 1, 2)
        return (
            ops.depend(dx, sums),
            ops.depend(own_dy_xmu * invstd, sums),
            ops.depend(own_dy * 1, sums),
            own,
            sums,
            _zeros_like(mean),
            _zeros_like(n),
        )

    def _sums(self, dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
        """sum dy and sum dy (x - mean) of this rank, (2 C,)."""
        if count_of(x.shape) == 0:
            return ops.zeros((2 * mean.shape[0],), mean.dtype)
        return ops.cat(self.reduce_grad(canonical(dy), canonical(x), mean)).astype(mean.dtype)

    def _sums_and_room(self, dy: Tensor, x: Tensor, mean: Tensor) -> Tensor:
        """The same, with memory for dx."""
        sums = self._sums(dy, x, mean)
        reserve(x)
        return sums

    def bprop(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        n: Tensor,
        out: tuple[Tensor, ...],
        dout: tuple[Tensor, ...],
    ) -> tuple[Tensor | None, ...]:
        if compiling():  # @jit.cond: True
            # In the other branch it would lose many functions; see `_zeros_like`.
            raise RuntimeError(
                "SyncBatchNorm has no second derivative in training in a compiled graph: take it "
                "in PyNative mode, without ms.jit"
            )
        else:
            return self._second_gradients(dy, x, weight, mean, invstd, n, out, dout)

    def _second_gradients(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        n: Tensor,
        out: tuple[Tensor, ...],
        dout: tuple[Tensor, ...],
    ) -> tuple[Tensor | None, ...]:
        g, gw, gb = dout[0], dout[1], dout[2]
        own, sums = out[3], out[4]
        of_rank, error = _caught(
            5 * mean.shape[0], mean.dtype, _sums_of_second, g, gw, dy, x, weight, mean, invstd, own
        )
        means = sum_over_ranks(of_rank, error, self.communicator, _tag(invstd))
        means = means / ops.maximum(n, 1.0)
        found = dy, x, _zeros_like(mean)
        if count_of(x.shape) != 0:
            found = _second_gradients(g, gw, gb, dy, x, weight, mean, invstd, sums / n, means)
        found = self.last_derivative(ops.depend(found[0], means), found[1], found[2])
        return (
            found[0],
            found[1],
            None if weight is None else found[2].astype(weight.dtype),
            _zeros_like(mean),
            _zeros_like(invstd),
            _zeros_like(n),
        )


class _LastDerivative(nn.Cell):
    """Three values as they are. To differentiate them is an error."""

    def construct(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return a * 1, b * 1, c * 1

    def bprop(self, a: Tensor, b: Tensor, c: Tensor, out: Any, dout: Any) -> Any:
        raise RuntimeError(
            "SyncBatchNorm has no third derivative in training: differentiate it at most twice"
        )


def _caught(
    size: int, dtype: Any, sums: Callable[..., Tensor], *arguments: Any
) -> tuple[Tensor, Exception | None]:
    """In PyNative: the sums (size,), or zeros and the error that they have met."""
    try:
        found = sums(*arguments)
        if may_sync_host():
            _pynative_executor.sync()  # MindSpore raises errors of operators later
    except Exception as error:
        return ops.zeros((size,), dtype), error
    return found, None


def _tag(statistics: Tensor) -> Tensor:
    """The number by which ranks find that they meet in one call; see `Communicator.all_reduce`."""
    return ops.where(ops.isfinite(statistics), statistics, 0.0).sum()


def _sums_of_second(
    g: Tensor,
    gw: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    own: Tensor,
) -> Tensor:
    """sum h, sum h u, sum h dy, gw sum dy and gw sum dy u over this rank, (5 C,)."""
    of_data = [ops.zeros_like(mean)] * 3
    if count_of(x.shape) != 0:
        h, u, dy_rows = _weighted(g, weight), _normalized(x, mean, invstd), _rows(dy)
        of_data = [channel_sums(rows, x.dtype) for rows in (h, h * u, h * dy_rows)]
    own_dy, own_dy_xmu = _part(own, 0, 2), _part(own, 1, 2)
    return ops.cat([*of_data, gw * own_dy, gw * own_dy_xmu * invstd])


def _second_gradients(
    g: Tensor,
    gw: Tensor,
    gb: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    first_means: Tensor,
    means: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in dy, x and weight, by the formulas at the head of this module.

    first_means are M[dy] and M[dy (x - m)]; means are M[h], M[h u], M[h dy], M[gw dy], M[gw dy u].
    """
    h, u, dy_rows, s = _weighted(g, weight), _normalized(x, mean, invstd), _rows(dy), invstd
    dy_mean, dyu_mean = _part(first_means, 0, 2), _part(first_means, 1, 2) * s
    h_mean, hu_mean, hdy_mean = _part(means, 0, 5), _part(means, 1, 5), _part(means, 2, 5)
    gwdy_mean, gwdyu_mean = _part(means, 3, 5), _part(means, 4, 5)
    k_mean = gwdy_mean - s * (h_mean * dyu_mean + dy_mean * hu_mean)
    ku_mean = gwdyu_mean - 2 * s * hu_mean * dyu_mean
    s_slope = s * (hdy_mean - h_mean * dy_mean - hu_mean * dyu_mean)
    k = dy_rows * per_channel(gw - s * hu_mean) - h * per_channel(s * dyu_mean)
    grad_x = per_channel(s) * (k - per_channel(k_mean) - u * per_channel(ku_mean + s_slope))
    grad_dy = per_channel(s) * (h - per_channel(h_mean) - u * per_channel(hu_mean))
    grad_dy = grad_dy + per_channel(gw) * u + per_channel(gb)
    unweighted_dx = per_channel(s) * (dy_rows - per_channel(dy_mean) - u * per_channel(dyu_mean))
    return (
        grad_dy.astype(dy.dtype).reshape(dy.shape),
        grad_x.astype(x.dtype).reshape(x.shape),
        channel_sums(_rows(g) * unweighted_dx, x.dtype),
    )


def _rows(values: Tensor) -> Tensor:
    return canonical(values).astype(statistics_dtype())


def _weighted(g: Tensor, weight: Tensor | None) -> Tensor:
    rows = _rows(g)
    return rows if weight is None else rows * per_channel(weight)


def _normalized(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (_rows(x) - per_channel(mean)) * per_channel(invstd)


def _part(values: Tensor, place: int, count: int) -> Tensor:
    """One of the vectors (C,) that stand one after the other in (count C,)."""
    size = values.shape[0] // count
    return values[place * size : (place + 1) * size]
