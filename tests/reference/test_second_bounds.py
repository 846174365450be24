"""The bounds of second derivatives tell sound arithmetic from unsound, as test_bounds.py does.

A simulated second backward pass starts from the results of a simulated first one, and computes in
the type of its operands. Sound passes stay within the bound. An unsound pass exceeds the threshold
on the data that are named with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

from syncbn.conformance.data import round_to
from syncbn.reference import Cotangents
from syncbn.reference.ratio import THRESHOLD, ratio
from tests.reference import simulated
from tests.reference.simulated import EPS, Array, Batch, Results, Sum, column

QUANTITIES = ("grad_grad_input", "grad_grad_output", "grad_grad_weight")


@dataclass(frozen=True)
class Start:
    """The cotangents of the first gradients: a (C, n_r) of every rank, p and q (C,)."""

    a: list[Array]
    p: list[Array]
    q: list[Array]


@dataclass(frozen=True)
class Rank:
    """What the second backward pass of a rank computes with."""

    x: Array
    dy: Array
    a: Array
    p: Array
    q: Array
    mean: Array
    invstd: Array
    weight: Array
    n: Any
    sums: dict[str, Array]  # S, X, A, D, V, W over the group, k, j and B

    def per_value(self, *names: str) -> list[Array]:
        """Of these sums, (C, 1)."""
        return [column(self.sums[name]) for name in names]

    @property
    def gain(self) -> Array:
        return column(self.weight * self.invstd)


# The contributions to the gradient of x, and to that of dy.


def written(rank: Rank) -> tuple[list[Array], list[Array]]:
    s, n, p, q = column(rank.invstd), rank.n, column(rank.p), column(rank.q)
    d = rank.x - column(rank.mean)
    S, A, V, k, j, B = rank.per_value("S", "A", "V", "k", "j", "B")
    through_slopes = rank.gain * (k * (rank.a - A / n) + j * (rank.dy - S / n))
    to_x = s * (p * rank.dy - V / n) - through_slopes - d * (s * s * s * B / n)
    return [to_x], [rank.gain * (rank.a - A / n - d * j) + s * d * p + q]


def by_operation(rank: Rank) -> tuple[list[Array], list[Array]]:
    """As a framework adds what each operation of the first pass contributes."""
    s, n, p, q = column(rank.invstd), rank.n, column(rank.p), column(rank.q)
    d = rank.x - column(rank.mean)
    S, A, V, k, j, B = rank.per_value("S", "A", "V", "k", "j", "B")
    of_input_grad = -rank.gain * k * rank.a
    of_reduce_grad = (s * p - rank.gain * j) * rank.dy
    of_stats = (rank.gain * (k * A + j * S) - s * V) / n - d * (s * s * s * B / n)
    to_dy = [rank.gain * (rank.a - A / n - d * j), s * d * p + q]
    return [of_input_grad, of_reduce_grad, of_stats], to_dy


def folded(rank: Rank) -> tuple[list[Array], list[Array]]:
    s, n, p, q = column(rank.invstd), rank.n, column(rank.p), column(rank.q)
    m = column(rank.mean)
    S, A, V, k, j, B = rank.per_value("S", "A", "V", "k", "j", "B")
    slope = -s * s * s * B / n
    offset = (rank.gain * (k * A + j * S) - s * V) / n - m * slope
    to_x = rank.a * (-rank.gain * k) + rank.dy * (s * p - rank.gain * j) + rank.x * slope + offset
    slope = s * p - rank.gain * j
    return [to_x], [rank.a * rank.gain + rank.x * slope + (q - m * slope - rank.gain * A / n)]


def constant_statistics(rank: Rank) -> tuple[list[Array], list[Array]]:
    """Mean and variance are not differentiated."""
    to_x, to_dy = by_operation(rank)
    return to_x[:2], to_dy


# The part of a rank in the gradient of the weight


def scaled_dx(rank: Rank, total: Sum) -> Array:
    S, k = rank.per_value("S", "k")
    d = rank.x - column(rank.mean)
    return rank.invstd * total(rank.a * (rank.dy - S / rank.n - d * k))


def scaled_dy(rank: Rank, total: Sum) -> Array:
    A, j = rank.per_value("A", "j")
    d = rank.x - column(rank.mean)
    return rank.invstd * total(rank.dy * (rank.a - A / rank.n - d * j))


# Sums of the second pass


def of_group(parts: list[Array]) -> list[Array]:
    return [sum(parts[1:], parts[0])] * len(parts)


def of_rank(parts: list[Array]) -> list[Array]:
    """The adjoint of a sum over ranks is forgotten."""
    return parts


def group_count(counts: Array) -> Array:
    return np.full_like(counts, counts.sum())


def rank_count(counts: Array) -> Array:
    return counts


@dataclass(frozen=True)
class Pass:
    """How a second backward pass computes; the defaults are the formulas as written."""

    total: Sum = simulated.pairwise
    contributions: Callable[[Rank], tuple[list[Array], list[Array]]] = written
    part_of_weight: Callable[[Rank, Sum], Array] = scaled_dx
    reduce_grad: Callable[[Array, Array, Array, Sum], tuple[Array, Array]] = simulated.centred
    reduced: Callable[[list[Array]], list[Array]] = of_group
    counts: Callable[[Array], Array] = group_count
    of_grad_weight: float = 1.0  # what p counts


SOUND = {
    "as written": Pass(),
    "by operation": Pass(contributions=by_operation, part_of_weight=scaled_dy),
    "folded": Pass(contributions=folded),
    "sums in blocks": Pass(simulated.in_blocks),
}


def step(how: Pass, batch: Batch, start: Start) -> Results:
    """What the simulated ranks get; the gradient of the weight is added over them."""
    counts = np.array([x.shape[1] for x in batch.x], batch.weight.dtype)
    means, variances = zip(*(simulated.two_pass(x, how.total) for x in batch.x), strict=True)
    mean, var = simulated.chan(np.array(means), np.array(variances), counts)
    invstd = 1 / np.sqrt(var + EPS)
    group_sums = _first_sums(how, batch, mean)
    ns = how.counts(counts)
    ps = [p * batch.weight.dtype.type(how.of_grad_weight) for p in start.p]
    sums: dict[str, list[Array]] = {"S": group_sums[0], "X": group_sums[1]}
    shards = list(zip(batch.x, batch.dy, start.a, ps, start.q, strict=True))
    found = [how.reduce_grad(a, x, mean, how.total) for x, _, a, _, _ in shards]
    sums["A"], sums["D"] = (how.reduced(list(of_ranks)) for of_ranks in zip(*found, strict=True))
    found = [how.reduce_grad(column(p) * dy, x, mean, how.total) for x, dy, _, p, _ in shards]
    sums["V"], sums["W"] = (how.reduced(list(of_ranks)) for of_ranks in zip(*found, strict=True))
    sums["T"] = how.reduced([how.total(a * dy) for _, dy, a, _, _ in shards])
    results: Results = {name: [] for name in QUANTITIES}
    weight = np.zeros(len(mean))
    for index, (n, shard) in enumerate(zip(ns, shards, strict=True)):
        at = {name: values[index] for name, values in sums.items()}
        at["k"] = invstd * (at["X"] / n) * invstd
        at["j"] = invstd * (at["D"] / n) * invstd
        e = at["T"] - at["A"] * (at["S"] / n) - at["k"] * at["D"]
        at["B"] = batch.weight * (e - 2 * at["k"] * at["D"]) + at["W"]
        rank = Rank(*shard, mean, invstd, batch.weight, n, at)
        for name, contributions in zip(QUANTITIES, how.contributions(rank), strict=False):
            total: Any = 0
            for one in contributions:
                total = round_to(round_to(one, batch.dtype) + total, batch.dtype)
            results[name].append(total)
        weight += how.part_of_weight(rank, how.total)
    return results | {"grad_grad_weight": [weight]}


def _first_sums(how: Pass, batch: Batch, mean: Array) -> list[list[Array]]:
    """S and X, as every rank has them after the first backward pass."""
    shards = zip(batch.dy, batch.x, strict=True)
    found = [how.reduce_grad(dy, x, mean, how.total) for dy, x in shards]
    return [of_group(list(of_ranks)) for of_ranks in zip(*found, strict=True)]


def expected(batch: Batch, start: Start) -> Results:
    def shards(rows: list[Array]) -> list[Array]:
        return [row.T.astype(np.float64) for row in rows]

    norm = simulated.reference_of(batch)
    norm.forward(shards(batch.x), dtype=batch.dtype)
    cotangents = [
        Cotangents(a, p.astype(np.float64), q.astype(np.float64))
        for a, p, q in zip(shards(start.a), start.p, start.q, strict=True)
    ]
    found = norm.double_backward(shards(batch.dy), cotangents)
    return {
        "grad_grad_input": [simulated.transposed(one.input) for one in found],
        "grad_grad_output": [simulated.transposed(one.grad_output) for one in found],
        "grad_grad_weight": [found[0].weight],
    }


def start_of(batch: Batch, only_dy: bool = False) -> Start:
    """Random cotangents, or dy for that of dx and 0 for the others: A = S and D = X."""
    rng = np.random.default_rng(13)
    kind = batch.weight.dtype
    a = [round_to(rng.standard_normal(x.shape), batch.dtype).astype(kind) for x in batch.x]
    p, q = rng.standard_normal((2, len(batch.x), len(batch.weight))).astype(kind)
    if only_dy:
        return Start(batch.dy, list(0 * p), list(0 * q))
    return Start(a, list(p), list(q))


# Magnitudes whose third power is within float32's range: d s^3 B / n has no other form.
FAMILIES: dict[str, Callable[[], Batch]] = {
    f"normal, n={n}, mean/std={mean:g}": partial(simulated.normal, n, mean)
    for n in simulated.COUNTS
    for mean in (0, 1, 30, 1e3, 1e5)
}
FAMILIES |= {
    f"normal, n={n}, mean/std={mean:g}, scale={scale:g}": partial(simulated.normal, n, mean, scale)
    for n in simulated.COUNTS
    for mean, scale in ((0, 1e-6), (1e5, 1e-6), (0, 1e6), (1e3, 1e6))
}
FAMILIES |= {
    f"normal, n={n}, mean/std={mean:g}, {dtype}": partial(simulated.normal, n, mean, dtype=dtype)
    for n in simulated.COUNTS
    for dtype in ("float16", "bfloat16", "float64")
    for mean in (0, 30)
}
_OF_ANY_COUNT: dict[str, Callable[[int], Batch]] = {
    "8 ranks": partial(simulated.normal, mean=1, cuts=simulated.EIGHT),
    "orthogonal dy, mean/std=1000": partial(simulated.orthogonal_gradients, mean=1e3),
    "orthogonal dy, mean/std=100000": partial(simulated.orthogonal_gradients, mean=1e5),
    "parallel dy, mean/std=0": partial(simulated.parallel_gradients, mean=0),
    "alternating, size 1e5": partial(simulated.alternating, size=1e5),
    "1024 ulps above 1": partial(simulated.above_a_power_of_two, ulps=1024),
    "scales of ranks": simulated.scales_of_ranks,
}
FAMILIES |= {
    f"{name}, n={n}": partial(make, n)
    for n in simulated.COUNTS
    for name, make in _OF_ANY_COUNT.items()
}
FAMILIES |= {
    f"normal, n=8, mean/std={mean}, 4000 channels": partial(
        simulated.normal, 8, mean, channels=4000
    )
    for mean in (0, 1, 30)
}


@cache
def family(name: str) -> tuple[Batch, Start, Results]:
    batch = FAMILIES[name]()
    start = start_of(batch, only_dy=name.startswith("orthogonal"))
    return batch, start, expected(batch, start)


def largest(how: Pass, name: str) -> dict[str, float]:
    """The largest |got - expected| / bound, by quantity."""
    batch, start, wanted = family(name)
    with np.errstate(all="ignore"):  # what overflows fails by its ratio
        got = step(how, batch, start)
    return {
        name: max(
            float(ratio(part, bounded).max(initial=0))
            for part, bounded in zip(got[name], wanted[name], strict=True)
        )
        for name in QUANTITIES
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", SOUND)
def test_sound_arithmetic_stays_within_the_bound(how: str, name: str) -> None:
    found = largest(SOUND[how], name)
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bound_is_finite(name: str) -> None:
    _, _, wanted = family(name)
    assert all(np.isfinite(part.bound).all() for parts in wanted.values() for part in parts)


# A sound pass comes this near to the bound of every quantity: no bound is loose.
WITHIN_REACH = 0.04


@pytest.mark.parametrize("mean", [0, 1, 30])
def test_every_bound_is_within_reach(mean: float) -> None:
    found = largest(SOUND["as written"], f"normal, n=8, mean/std={mean}, 4000 channels")
    assert min(found.values()) >= WITHIN_REACH, found


# An unsound pass, and data on which it exceeds the threshold.
ANY = ["normal, n=8, mean/std=0", "normal, n=1000, mean/std=1", "normal, n=60000, mean/std=30"]
UNSOUND = {
    "sums of the rank": (Pass(reduced=of_rank), ANY),
    "count of the rank": (Pass(counts=rank_count), ANY),
    "constant statistics": (Pass(contributions=constant_statistics), ANY),
    "grad_weight is a constant": (Pass(of_grad_weight=0.0), ANY),
    "grad_weight counts twice": (Pass(of_grad_weight=2.0), ANY),
    "float16 accumulation": (Pass(total=simulated.in_float16), ANY[:2]),
    "raw moments": (
        Pass(reduce_grad=simulated.raw_moments),
        ["orthogonal dy, mean/std=100000, n=1000", "orthogonal dy, mean/std=100000, n=60000"],
    ),
}


@pytest.mark.parametrize(
    ("how", "name"), [(how, name) for how, (_, names) in UNSOUND.items() for name in names]
)
def test_unsound_arithmetic_exceeds_the_threshold(how: str, name: str) -> None:
    found = largest(UNSOUND[how][0], name)
    assert max(found.values()) > THRESHOLD, found
