"""The bound tells sound arithmetic from unsound, on simulated layers.

Sound layers stay within the bound on every family of data. If they add blocks of values one by one
and all roundings of a block have one sign, they stay within the threshold. An unsound layer exceeds
the threshold on the families that are named with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

from syncbn.conformance.data import round_to
from syncbn.reference import Bounded, Gradients, averaged
from syncbn.reference.ratio import THRESHOLD, ratio
from tests.reference.simulated import (
    ALONE,
    BLOCK,
    COUNTS,
    EIGHT,
    EPS,
    IN_BLOCKS,
    SOUND,
    Array,
    Batch,
    Layer,
    Results,
    above_a_power_of_two,
    alternating,
    biased,
    clusters,
    column,
    constant,
    equal_weights,
    expected,
    in_float16,
    normal,
    of_the_rank,
    one_by_one,
    one_pass,
    orthogonal_gradients,
    outlier,
    pairwise,
    parallel_gradients,
    ratios,
    raw_moments,
    reference_of,
    scales_of_ranks,
    through_invstd,
)

FAMILIES: dict[str, Callable[[], Batch]] = {
    f"normal, n={n}, mean/std={mean:g}": partial(normal, n, mean)
    for n in COUNTS
    for mean in (0, 1, 30, 1e3, 1e5)
}
FAMILIES |= {
    # Away from 0 beyond scale 1e16, the coefficient of x in the folded dx underflows.
    f"normal, n={n}, mean/std={mean:g}, scale={scale:g}": partial(normal, n, mean, scale)
    for n in COUNTS
    for mean, scale in ((0, 1e-18), (1e5, 1e-18), (0, 1e-6), (1e5, 1e-6), (1e5, 1e15), (0, 1e18))
}
FAMILIES |= {
    f"normal, n={n}, mean/std={mean:g}, {dtype}": partial(normal, n, mean, dtype=dtype)
    for n in COUNTS
    for dtype in ("float16", "bfloat16", "float64")
    for mean in (0, 30, 1e3)
}
_OF_ANY_COUNT: dict[str, Callable[[int], Batch]] = {
    "float16, dx subnormal": partial(normal, mean=0, scale=1e4, dtype="float16"),
    "momentum 0.1": partial(normal, mean=1, momentum=0.1),
    "momentum 0.1, scale=1e-3": partial(normal, mean=0, scale=1e-3, momentum=0.1),
    "8 ranks": partial(normal, mean=1, cuts=EIGHT),
    "orthogonal dy, mean/std=30": partial(orthogonal_gradients, mean=30),
    "orthogonal dy, mean/std=1000": partial(orthogonal_gradients, mean=1e3),
    "orthogonal dy, mean/std=100000": partial(orthogonal_gradients, mean=1e5),
    "parallel dy, mean/std=0": partial(parallel_gradients, mean=0),
    "parallel dy, mean/std=1000": partial(parallel_gradients, mean=1e3),
    "constant": constant,
    "constant, 1 rank": partial(constant, cuts=ALONE),
    "clusters near": partial(clusters, gap=1e-3),
    "clusters far": partial(clusters, gap=-3),
    "alternating, size 1": partial(alternating, size=1),
    "alternating, size 1e5": partial(alternating, size=1e5),
    "4 ulps above 1": partial(above_a_power_of_two, ulps=4),
    "1024 ulps above 1": partial(above_a_power_of_two, ulps=1024),
    "outlier 5e3": partial(outlier, size=5e3),
    "outlier 1e5": partial(outlier, size=1e5),
    "scales of ranks": scales_of_ranks,
}
FAMILIES |= {
    f"{name}, n={n}": partial(make, n)
    for n in (8, 128, 1000, 60_000)
    for name, make in _OF_ANY_COUNT.items()
}
FAMILIES |= {
    f"normal, n=8, mean/std={mean}, 4000 channels": partial(normal, 8, mean, channels=4000)
    for mean in (0, 1, 30)
}
FAMILIES |= {
    f"constant, 1 rank, n={n}, 4000 channels": partial(constant, n, 4000, cuts=ALONE)
    for n in (BLOCK, 2 * BLOCK)
}
# Where the roundings of a block are aligned: blocks of b values may be b u off, not sqrt(b) u.
ALIGNED = ("constant", "clusters", "outlier")


@cache
def family(name: str) -> tuple[Batch, Results]:
    batch = FAMILIES[name]()
    return batch, expected(batch)


# Tests


def largest(layer: Layer, name: str) -> dict[str, float]:
    return {quantity: float(r.max()) for quantity, r in ratios(layer, *family(name)).items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", SOUND)
def test_sound_arithmetic_stays_within_the_bound(layer: str, name: str) -> None:
    found = largest(SOUND[layer], name)
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", IN_BLOCKS)
def test_sums_in_blocks_stay_within_the_threshold(layer: str, name: str) -> None:
    found = largest(IN_BLOCKS[layer], name)
    assert max(found.values()) <= (THRESHOLD if name.startswith(ALIGNED) else 1), found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bound_is_finite(name: str) -> None:
    _, wanted = family(name)
    assert all(np.isfinite(part.bound).all() for parts in wanted.values() for part in parts)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("layer", SOUND | IN_BLOCKS)
def test_a_search_for_the_worst_roundings_stays_within_the_bound(layer: str, mean: float) -> None:
    """A hill-climb over the low bits of every operand, in 256 channels at a time."""
    rng = np.random.default_rng(8)
    operands = rng.standard_normal((18, 256)).astype(np.float32)
    state = np.zeros((2, 256), np.float32)
    operands[:8] += np.float32(mean)

    def score(candidates: Array) -> Array:
        x, dy = candidates[:8].T, candidates[8:16].T
        batch = Batch(np.split(x, [2, 4], 1), np.split(dy, [2, 4], 1), *candidates[16:], *state)
        found = ratios((SOUND | IN_BLOCKS)[layer], batch, expected(batch))
        return np.max(list(found.values()), axis=0)

    best = score(operands)
    for _ in range(60):
        steps = rng.integers(-64, 65, operands.shape, np.int32)
        steps *= rng.random(operands.shape) < 0.3
        moved = (operands.view(np.int32) + steps).view(np.float32)
        found = score(moved)
        operands = np.where(found > best, moved, operands)
        best = np.maximum(best, found)
    assert best.max() <= 1


def eval_ratios(ops: Layer, mean: float, dtype: str) -> dict[str, float]:
    batch = normal(8, mean, channels=4000, cuts=ALONE, dtype=dtype)
    batch = replace(batch, running_mean=batch.running_mean + mean)
    (x,), (dy,), weight = batch.x, batch.dy, batch.weight
    running_mean, invstd = batch.running_mean, 1 / np.sqrt(batch.running_var + EPS)
    y = ops.normalize(x, running_mean, invstd, weight, batch.bias)
    dx = dy * column(weight * invstd)
    sum_dy, sum_dy_xmu = ops.reduce_grad(dy, x, running_mean, ops.total)

    norm = reference_of(batch)
    (expected_y,) = norm.forward([x.T.astype(np.float64)], training=False, dtype=dtype)
    (gradients,) = norm.backward([dy.T.astype(np.float64)])

    found = {
        "y": ratio(round_to(y, dtype).T, expected_y),
        "dx": ratio(round_to(dx, dtype).T, gradients.input),
        "grad_weight": ratio(sum_dy_xmu * invstd, gradients.weight),
        "grad_bias": ratio(sum_dy, gradients.bias),
    }
    return {name: float(ratios.max()) for name, ratios in found.items()}


@pytest.mark.parametrize("layer", SOUND)
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_sound_eval_stays_within_the_bound(layer: str, mean: float, dtype: str) -> None:
    found = eval_ratios(SOUND[layer], mean, dtype)
    assert max(found.values()) <= 1, found


# A sound layer comes this near to the bound of every quantity: none is loose, whatever another is.
WITHIN_REACH = 0.05


@pytest.mark.parametrize("mean", [0, 1, 30])
def test_every_bound_of_training_is_within_reach(mean: float) -> None:
    found = largest(SOUND["as written"], f"normal, n=8, mean/std={mean}, 4000 channels")
    assert min(found.values()) >= WITHIN_REACH, found


@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0])
def test_every_bound_of_eval_is_within_reach(mean: float) -> None:
    found = eval_ratios(SOUND["as written"], mean, "float32")
    assert min(found.values()) >= WITHIN_REACH, found


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_bound_of_an_average_over_ranks_is_kept_and_within_reach(ranks: int) -> None:
    """Each rank's gradient is exact; they are added up pairwise in float32, or one by one."""
    rng = np.random.default_rng(12)
    exact = rng.standard_normal((ranks, 4000)).astype(np.float32)
    bounded = [Bounded(one.astype(np.float64), np.zeros(4000)) for one in exact]
    gradients = [Gradients(one, one, one) for one in bounded]
    for got in (pairwise(exact.T) / ranks, one_by_one(exact.T) / ranks):
        for average in averaged(gradients, "float32"):
            for part in (average.weight, average.bias):
                assert WITHIN_REACH <= ratio(got, part).max() <= 1


# An unsound layer, and data that every suite must hold against it.
UNSOUND = {
    "one running sum": (
        Layer(total=one_by_one),
        [
            "normal, n=60000, mean/std=100000",
            "constant, n=60000",
            "clusters near, n=60000",
            "clusters far, n=60000",
            "alternating, size 1e5, n=60000",
            "outlier 1e5, n=60000",
        ],
    ),
    "float16 accumulation": (
        Layer(total=in_float16),
        [
            "normal, n=8, mean/std=0",
            "normal, n=1000, mean/std=30, float16",
            "normal, n=1000, mean/std=0, bfloat16",
        ],
    ),
    "one-pass variance": (
        Layer(stats=one_pass),
        [
            "normal, n=8, mean/std=1000",
            "normal, n=1000, mean/std=100000",
            "normal, n=60000, mean/std=1000",
            "constant, n=1000",
        ],
    ),
    "variance from invstd": (
        Layer(stats=through_invstd),
        [
            "normal, n=8, mean/std=0, scale=1e-06",
            "normal, n=60000, mean/std=0, scale=1e-06",
            "normal, n=1000, mean/std=100000, scale=1e-18",
        ],
    ),
    "raw moments in backward": (
        Layer(reduce_grad=raw_moments),
        [
            "orthogonal dy, mean/std=1000, n=128",
            "orthogonal dy, mean/std=100000, n=1000",
            "orthogonal dy, mean/std=100000, n=60000",
        ],
    ),
    "equal weights": (
        Layer(combine=equal_weights),
        ["normal, n=8, mean/std=0", "normal, n=60000, mean/std=0"],
    ),
    "biased running_var": (
        Layer(unbiased=biased),
        ["normal, n=8, mean/std=0", "normal, n=1000, mean/std=1"],
    ),
    "local count in running_var": (
        Layer(unbiased=of_the_rank),
        ["normal, n=8, mean/std=0", "normal, n=1000, mean/std=1"],
    ),
}


@pytest.mark.parametrize(
    ("layer", "name"), [(layer, name) for layer, (_, names) in UNSOUND.items() for name in names]
)
def test_unsound_arithmetic_exceeds_the_threshold(layer: str, name: str) -> None:
    found = largest(UNSOUND[layer][0], name)
    assert max(found.values()) > THRESHOLD, found
