"""Running statistics: STAT-1 to STAT-7."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from syncbn.conformance.case import ExpectedError, Step
from syncbn.conformance.cases.build import (
    GRADIENTS,
    MOVED,
    Draft,
    case,
    cases_of,
    even,
    groupings,
    uneven,
    varied,
    with_empty,
)


@cases_of("STAT-1")
def running_mean(ranks: int) -> Iterator[Draft]:
    for momentum in (0.1, 0.0, 1.0, 0.35):
        yield case(
            f"momentum={momentum!r}, 3 steps",
            *_three(ranks),
            layer={"momentum": momentum},
            checks=("running_mean",),
        )


@cases_of("STAT-2")
def running_var(ranks: int) -> Iterator[Draft]:
    for title, shapes in (
        ("even shards", even(ranks, 2, 3, 2)),
        ("uneven shards", uneven(ranks, 3, 2)),
        ("batch and spatial sizes", varied(ranks, 3)),
        ("few values", even(ranks, 2 if ranks == 1 else 1, 3)),
    ):
        step = Step(shapes, backward=False)
        yield case(title, step, layer={"momentum": 1.0}, checks=("running_var",))
    yield case("3 steps", *_three(ranks), checks=("running_var",))
    for title, grouping in groupings(ranks):
        if all(len(group) > 1 for group in grouping):
            step = Step(even(ranks, 1, 3, 2), backward=False)
            yield case(f"groups: {title}", step, groups=grouping, checks=("running_var",))


@cases_of("STAT-3")
def agreement(ranks: int) -> Iterator[Draft]:
    if ranks < 2:
        return
    checks = ("ranks_agree",)
    for momentum in (0.1, None):
        yield case(
            f"momentum={momentum}", *_three(ranks), layer={"momentum": momentum}, checks=checks
        )
    for dtype in ("float16", "bfloat16", "float64"):
        yield case(dtype, *_three(ranks, dtype=dtype), layer={"dtype": dtype}, checks=checks)
    step = Step(with_empty(ranks, {0}, 3, 4), backward=False)
    yield case("rank 0 is empty", step, step, checks=checks)
    for title, grouping in groupings(ranks):
        yield case(f"groups: {title}", *_three(ranks), groups=grouping, checks=checks)


@cases_of("STAT-4")
def cumulative(ranks: int) -> Iterator[Draft]:
    layer = {"momentum": None}
    checks = ("running_mean",)
    yield case("3 uneven steps", *_three(ranks), layer=layer, checks=checks)
    empty = Step(even(ranks, 0, 3, 4), backward=False)
    first, *rest = _three(ranks)
    yield case(
        "a step without data does not weigh", first, empty, *rest, layer=layer, checks=checks
    )


@cases_of("STAT-5")
def batches_tracked(ranks: int) -> Iterator[Draft]:
    evaluation = Step(uneven(ranks, 3, 4), mode="eval", backward=False)
    for momentum in (0.1, 0.0, None):
        yield case(
            f"momentum={momentum}",
            *_three(ranks),
            evaluation,
            layer={"momentum": momentum},
            checks=("num_batches_tracked",),
        )


@cases_of("STAT-6")
def unchanged(ranks: int) -> Iterator[Draft]:
    train = Step(uneven(ranks, 3, 4), backward=False)
    evaluation = Step(uneven(ranks, 3, 4), mode="eval")
    empty = Step(even(ranks, 0, 3, 4))
    yield case("eval", train, evaluation, evaluation, checks=MOVED)
    yield case("a group without data", train, empty, checks=MOVED)
    yield case("a group without data comes first", empty, train, checks=MOVED)


@cases_of("STAT-7")
def repeated(ranks: int) -> Iterator[Draft]:
    step = Step(uneven(ranks, 3, 4), recompute=True)
    yield case(
        "a recomputed forward counts twice, gradients once", step, step, checks=(*GRADIENTS, *MOVED)
    )
    all_ranks = tuple(range(ranks))
    aborted = Step(even(ranks, 2, 4, 5), error=ExpectedError("ValueError", all_ranks))
    good = Step(uneven(ranks, 3, 4))
    yield case("an aborted step changes nothing", good, aborted, good, checks=("y", *MOVED))


def _three(ranks: int, **fields: Any) -> tuple[Step, Step, Step]:
    """Three training steps of different sizes."""
    matrices = tuple((2 + rank % 3, 3) for rank in range(ranks))
    shapes = (uneven(ranks, 3, 4), matrices, varied(ranks, 3))
    first, second, third = (Step(shape, backward=False, **fields) for shape in shapes)
    return first, second, third
