r"""Second derivatives of a step, with their bounds (GRAD-5 of the contract).

The first backward pass of rank r gives dx, grad_weight and grad_bias. Its second backward pass
starts from their cotangents: a of the shape of dx, and p and q (C,) of the two others. The ranks
together differentiate

    L = sum over ranks (sum a dx + p grad_weight + q grad_bias)

with respect to x, dy and weight. The bias has no second derivative: no first gradient contains it.

Notation of syncbn.reference.bounds, for one channel; P and Q are p and q of the rank that holds
the value. All sums are over the group:

    S = sum dy        X = sum dy d        A = sum a        D = sum a d
    V = sum P dy      W = sum P dy d      T = sum a dy
    k = s^2 X / n     j = s^2 D / n       E = T - A S / n - k D       B = g (E - 2 k D) + W

With dx = g s (dy - S / n - d k), grad_weight = s X and grad_bias = S,

    L = g s E + s W + sum Q dy

As dm/dx = 1 / n and ds/dx = -s^3 d / n, and as sum d = 0, the derivatives are

    to dy       g s (a - A / n - d j) + s d P + Q     input_grad of a, plus normalize with P and Q
    to weight   s E                                   summed over ranks
    to x        s (P dy - V / n) - g s (k (a - A / n) + j (dy - S / n)) - d s^3 B / n

In eval the statistics are constants: L = g s T + s W + sum Q dy, whose derivatives are
g s a + s d P + Q, s T and s P dy. If the layer tracks no statistics, each rank of an eval step is a
group of its own in training.

How the derivative to the weight is divided between ranks is not defined. Each rank has a copy of
the weight. If a rank scales dx by its copy, its part is s sum a (dy - S / n - d k) over its own
values; if it scales dy by its copy before the sums, its part is s sum dy (a - A / n - d j). Both
have the sum s E, and data-parallel training adds the parts.

The bounds, by the rules (a) to (d) of syncbn.reference.bounds. An implementation may write the
formulas as above, or leave the differentiation of the first backward pass to its framework, which
forms the same terms. S, X, A, D, k, j, the input_grad and the normalize have the bounds that are
derived there; V and W have those of S and X for P dy, whose product rounds once more. The others:

    E    u (h + 2) (sum|a dy| + (|A| sum|dy| + |S| sum|a|) / n + sum (|k a| + |j dy|) |d|)
             + 4u max(sum |k a| (|x| + |m|), sum |j dy| (|x| + |m|))
             + (|A k| + |S j|) dm + |k D| ((1 + ds)^2 - 1 + 4u)
         The first line forms and adds the terms, those of S, A, X and D included. E may be the sum
         of a e or of dy f, with e = dy - S / n - d k and f = a - A / n - d j: the second line is
         for e or f in the folded form, by rule (d). An error dm of the mean adds A dm to D and S dm
         to X.
    B    |g| (dE + 2 (|k| dD + |D| dk)) + dW + 4u (|g| (|E| + 2 |k D|) + |W|)
    s E  s (1 + ds) dE + |s E| (ds + 2u)
    x    s (1 + ds) (dV / n + 2u (|P dy| + |V| / n)) + |s (P dy - V / n)| (ds + 2u)
             + |g| s (1 + ds) (dk |a - A / n| + (|k| + dk) dA / n
                               + dj |dy - S / n| + (|j| + dj) dS / n
                               + 4u (|k| (|a| + |A| / n) + |j| (|dy| + |S| / n)))
             + |g s (k (a - A / n) + j (dy - S / n))| (ds + 3u)
             + (1 + ds)^3 s^3 / n (|d| dB + (|B| + dB) dm + 6u |B| (|x| + |m|))
             + |d s^3 B / n| ((1 + ds)^3 - 1 + 6u)
         in eval |s P dy| (ds + 2u)
    T    u (h + 1) sum|a dy|                                                             in eval

A framework adds the contributions of several operations to one gradient, and rounds each of them
and each partial sum to its dtype. x has up to three contributions (of input_grad, reduce_grad and
stats) and dy has two (of input_grad and reduce_grad). As any of their terms may be in any
contribution, rounding costs u_o (2 sum|terms| + |value|) for x and u_o (sum|terms| + |value|) for
dy. The gradient of weight is a sum of parts, of which each rank rounds its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from syncbn.reference import bounds, formulas
from syncbn.reference.bounds import Bounded, Scale, Statistics
from syncbn.reference.formulas import Array, column


@dataclass(frozen=True)
class Group:
    """The shards of a group side by side, and the arithmetic in which their step is judged."""

    x: Array  # (C, n)
    parts: list[slice]  # the columns of each rank
    stats: Statistics
    eps: float
    weight: Array  # (C,)
    u: float
    input_dtype: str
    dtype: str  # of the parameters

    @property
    def n(self) -> int:
        return max(self.stats.n, 1)

    @property
    def deviations(self) -> Array:
        """d (C, n)."""
        return self.x - column(self.stats.mean.value)

    @property
    def sizes(self) -> Array:
        """|x| + |m| (C, n)."""
        return np.abs(self.x) + column(np.abs(self.stats.mean.value))

    @cached_property
    def scale(self) -> Scale:
        return bounds.of_scale(self.stats.var, self.eps, self.u)

    @property
    def growth(self) -> Array:
        """1 + ds (C,)."""
        return 1 + self.scale.relative


class Reduced(NamedTuple):
    """dy or a, reduced over the group."""

    values: Array  # (C, n)
    sum: Bounded  # S or A, (C,)
    sum_xmu: Bounded  # X or D, (C,)
    slope: Bounded  # k or j, (C,)

    def centred(self, n: int) -> Array:
        """dy - S / n or a - A / n, (C, n)."""
        return self.values - column(self.sum.value / n)


def in_training(
    group: Group, dy: Array, a: Array, p: Array, q: Array
) -> tuple[Bounded, Bounded, Bounded]:
    """The derivatives of L to x (C, n), to dy (C, n) and to weight (C,), the sum over the ranks.

    Args:
        group: what was normalized.
        dy, a: (C, n).
        p, q: (C, n), P and Q above.
    """
    grad, tangent = _reduced(group, dy), _reduced(group, a)
    e = of_e(group, grad, tangent)
    w_sums = _of_products(group, p * dy)
    return (
        _to_input(group, grad, tangent, p * dy, w_sums, of_b(group, grad, tangent, e, w_sums[1])),
        _to_grad_output(group, _tangent_of_y(group, tangent), p, q),
        _to_weight(group, e, _parts_of_weight(group, grad, tangent)),
    )


def in_eval(
    group: Group, dy: Array, a: Array, p: Array, q: Array
) -> tuple[Bounded, Bounded, Bounded]:
    """As `in_training`, with statistics that are constants."""
    s, ds = column(group.scale.value), column(group.scale.relative)
    to_input = s * p * dy
    bounded = Bounded(to_input, np.abs(to_input) * (ds + 2 * group.u))
    first = formulas.input_grad_in_eval(a, group.stats.var.value, group.eps, group.weight)
    first_bound = bounds.of_input_grad_in_eval(first, group.scale, group.u)
    depth = bounds.depth(dy.shape[1], len(group.parts))
    t = Bounded((a * dy).sum(axis=1), group.u * (depth + 1) * np.abs(a * dy).sum(axis=1))
    of_ranks = [np.abs((a * dy)[:, part].sum(axis=1)) for part in group.parts]
    return (
        _rounded(bounded, np.abs(to_input), group.input_dtype),
        _to_grad_output(group, Bounded(first, first_bound), p, q),
        _to_weight(group, t, group.scale.value * np.sum(of_ranks, axis=0)),
    )


def _reduced(group: Group, dy: Array) -> Reduced:
    """S, X and k of dy; A, D and j of a."""
    total, total_xmu = _reduce_grad(group, dy)
    square = group.scale.value**2 / group.n
    slope = square * total_xmu.value
    rounding = np.abs(slope) * (group.growth**2 - 1 + 4 * group.u)
    bound = group.growth**2 * square * total_xmu.bound + rounding
    return Reduced(dy, total, total_xmu, Bounded(slope, bound))


def _reduce_grad(group: Group, dy: Array) -> tuple[Bounded, Bounded]:
    mean = group.stats.mean
    total, total_xmu = formulas.reduce_grad(dy, group.x, mean.value)
    found = bounds.of_reduce_grad(dy, group.x, mean, total, len(group.parts), group.u)
    return Bounded(total, found[0]), Bounded(total_xmu, found[1])


def _of_products(group: Group, p_dy: Array) -> tuple[Bounded, Bounded]:
    """V and W."""
    v, w = _reduce_grad(group, p_dy)
    rounding = group.u * np.abs(p_dy)
    return (
        Bounded(v.value, v.bound + rounding.sum(axis=1)),
        Bounded(w.value, w.bound + (rounding * np.abs(group.deviations)).sum(axis=1)),
    )


def of_e(group: Group, grad: Reduced, tangent: Reduced) -> Bounded:
    """E."""
    n, dm, u = group.n, group.stats.mean.bound, group.u
    total, total_a = grad.sum.value, tangent.sum.value
    k, j = grad.slope.value, tangent.slope.value
    products = grad.values * tangent.values
    k_d = k * tangent.sum_xmu.value
    value = products.sum(axis=1) - total_a * total / n - k_d

    dy, a = np.abs(grad.values), np.abs(tangent.values)
    slopes = column(np.abs(k)) * a, column(np.abs(j)) * dy
    terms = np.abs(products).sum(axis=1)
    terms += (np.abs(total_a) * dy.sum(axis=1) + np.abs(total) * a.sum(axis=1)) / n
    terms += (sum(slopes) * np.abs(group.deviations)).sum(axis=1)
    folded = np.max([(one * group.sizes).sum(axis=1) for one in slopes], axis=0)
    depth = bounds.depth(dy.shape[1], len(group.parts)) + 2
    bound = u * (depth * terms + 4 * folded) + (np.abs(total_a * k) + np.abs(total * j)) * dm
    return Bounded(value, bound + np.abs(k_d) * (group.growth**2 - 1 + 4 * u))


def of_b(group: Group, grad: Reduced, tangent: Reduced, e: Bounded, w: Bounded) -> Bounded:
    """B."""
    k, d = grad.slope, tangent.sum_xmu
    size = np.abs(group.weight)
    value = group.weight * (e.value - 2 * k.value * d.value) + w.value
    bound = size * (e.bound + 2 * (np.abs(k.value) * d.bound + np.abs(d.value) * k.bound))
    sizes = size * (np.abs(e.value) + 2 * np.abs(k.value * d.value)) + np.abs(w.value)
    return Bounded(value, bound + w.bound + 4 * group.u * sizes)


def _to_input(
    group: Group,
    grad: Reduced,
    tangent: Reduced,
    p_dy: Array,
    products: tuple[Bounded, Bounded],
    b: Bounded,
) -> Bounded:
    """s (P dy - V / n) - g s (k (a - A / n) + j (dy - S / n)) - d s^3 B / n."""
    n, s = group.n, column(group.scale.value)
    k, j = column(grad.slope.value), column(tangent.slope.value)
    gain = column(group.weight) * s
    of_weight = s * (p_dy - column(products[0].value / n))
    of_slopes = gain * (k * tangent.centred(n) + j * grad.centred(n))
    of_scale = group.deviations * s**3 * column(b.value / n)
    bound = weight_term_bound(group, p_dy, products[0], of_weight)
    bound += slopes_term_bound(group, grad, tangent, of_slopes)
    bound += scale_term_bound(group, b, of_scale)
    terms = s * (np.abs(p_dy) + column(np.abs(products[0].value) / n)) + np.abs(of_scale)
    terms += np.abs(gain * k) * _size(tangent, n) + np.abs(gain * j) * _size(grad, n)
    result = Bounded(of_weight - of_slopes - of_scale, bound)
    return _rounded(result, 2 * terms, group.input_dtype)


def weight_term_bound(group: Group, p_dy: Array, v: Bounded, value: Array) -> Array:
    """The bound of s (P dy - V / n)."""
    n, u = group.n, group.u
    inner = column(v.bound / n) + 2 * u * (np.abs(p_dy) + column(np.abs(v.value) / n))
    largest = column(group.scale.value * group.growth)
    return largest * inner + np.abs(value) * column(group.scale.relative + 2 * u)


def slopes_term_bound(group: Group, grad: Reduced, tangent: Reduced, value: Array) -> Array:
    """The bound of g s (k (a - A / n) + j (dy - S / n))."""
    n, u = group.n, group.u
    inner = np.zeros_like(value)
    for slope, other in ((grad.slope, tangent), (tangent.slope, grad)):
        size = np.abs(slope.value)
        inner += column(slope.bound) * np.abs(other.centred(n))
        inner += column((size + slope.bound) * other.sum.bound / n)
        inner += 4 * u * column(size) * _size(other, n)
    largest = column(np.abs(group.weight) * group.scale.value * group.growth)
    return largest * inner + np.abs(value) * column(group.scale.relative + 3 * u)


def scale_term_bound(group: Group, b: Bounded, value: Array) -> Array:
    """The bound of d s^3 B / n."""
    size, dm = np.abs(b.value), group.stats.mean.bound
    inner = np.abs(group.deviations) * column(b.bound) + column((size + b.bound) * dm)
    inner += 6 * group.u * column(size) * group.sizes
    cube = column(group.growth**3)
    largest = cube * column(group.scale.value**3 / group.n)
    return largest * inner + np.abs(value) * (cube - 1 + 6 * group.u)


def _size(one: Reduced, n: int) -> Array:
    """|dy| + |S| / n, or |a| + |A| / n."""
    return np.abs(one.values) + column(np.abs(one.sum.value) / n)


def _tangent_of_y(group: Group, tangent: Reduced) -> Bounded:
    """g s (a - A / n - d j)."""
    stats = Statistics(group.stats.mean, group.stats.var, group.n)
    sums = tangent.sum, tangent.sum_xmu
    value = formulas.input_grad(
        tangent.values,
        group.x,
        stats.mean.value,
        stats.var.value,
        group.eps,
        group.weight,
        sums[0].value,
        sums[1].value,
        group.n,
    )
    bound = bounds.of_input_grad(
        value, tangent.values, group.x, stats, group.scale, group.weight, *sums, group.u
    )
    return Bounded(value, bound)


def _to_grad_output(group: Group, first: Bounded, p: Array, q: Array) -> Bounded:
    """first + s d P + Q."""
    s, ds, u = column(group.scale.value), column(group.scale.relative), group.u
    second = s * group.deviations * p
    mean, dm = group.stats.mean
    off = column(dm) + u * (np.abs(group.x) + 2 * column(np.abs(mean)))
    bound = np.abs(p) * s * (1 + ds) * off + np.abs(second) * (ds + 2 * u)
    bound += u * (np.abs(second + q) + np.abs(q))
    terms = np.abs(first.value) + np.abs(second) + np.abs(q)
    result = Bounded(first.value + second + q, first.bound + bound)
    return _rounded(result, terms, group.input_dtype)


def _to_weight(group: Group, e: Bounded, sizes: Array) -> Bounded:
    """s E, whose parts are rounded; `sizes` adds up how large they are."""
    value = group.scale.value * e.value
    bound = group.scale.value * group.growth * e.bound
    bound += np.abs(value) * (group.scale.relative + 2 * group.u)
    ranks = len(group.parts)
    return Bounded(value, bound + ranks * bounds.rounding(sizes / ranks, group.dtype))


def _parts_of_weight(group: Group, grad: Reduced, tangent: Reduced) -> Array:
    """The sum over ranks of the size of the larger of the two forms of a rank's part."""
    slopes = column(grad.slope.value), column(tangent.slope.value)
    e = grad.centred(group.n) - group.deviations * slopes[0]
    f = tangent.centred(group.n) - group.deviations * slopes[1]
    total = np.zeros(len(group.weight))
    for part in group.parts:
        forms = [(tangent.values * e)[:, part], (grad.values * f)[:, part]]
        total += np.max([np.abs(form.sum(axis=1)) for form in forms], axis=0)
    return group.scale.value * total


def _rounded(result: Bounded, terms: Array, dtype: str) -> Bounded:
    """The result after it and contributions of these sizes are rounded to `dtype`."""
    bound = result.bound + bounds.rounding(terms, dtype)
    return bounds.rounded(Bounded(result.value, bound), dtype)
