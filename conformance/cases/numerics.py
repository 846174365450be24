"""Extreme numbers, dtypes and communication: NUM-1 to NUM-4, COMM-1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from syncbn.conformance.case import Data, Step
from syncbn.conformance.cases.build import (
    ALL,
    GRADIENTS,
    RUNNING,
    Draft,
    case,
    cases_of,
    even,
    uneven,
    varied,
    with_empty,
)


@cases_of("NUM-1")
def numerics(ranks: int) -> Iterator[Draft]:
    def draft(title: str, step: Step, **layer: Any) -> Draft:
        return case(title, step, layer={"momentum": 1.0} | layer, checks=ALL)

    shapes = tuple((8 + rank, 3, 16, 16) for rank in range(ranks))
    for ratio in (0.0, 1.0, 30.0, 1e3, 1e4, 1e5):
        for layout in ("contiguous", "channels_last"):
            step = Step(
                shapes, x=Data(ratio=ratio), layout=layout, dy_layout=layout, dy_zero_sum=True
            )
            yield draft(f"mean/std {ratio:g}, {layout}", step)
    yield draft(
        "mean/std 1e5, matrices",
        Step(tuple((500 + rank, 3) for rank in range(ranks)), x=Data(ratio=1e5)),
    )
    for scale in (1e-18, 1e-9, 1e9, 1e18):
        step = Step(shapes, x=Data(ratio=1.0, scale=scale))
        yield draft(f"scale {scale:g}", step, eps=0.0)
    for mode in ("train", "eval"):
        step = Step(even(ranks, 4, 3, 7), mode=mode, backward=False)
        yield case(f"eps=0.0, {mode}", step, layer={"eps": 0.0}, checks=("y",))
    for title, images in (
        ("few images", even(ranks, 2, 3, 32, 32)),
        ("matrices", tuple((300 + rank, 3) for rank in range(ranks))),
    ):
        yield draft(f"scale 1e18, {title}", Step(images, x=Data(scale=1e18)), eps=0.0)
    for ratio in (0.0, 1e5):
        step = Step(even(ranks, 8, 256, 64), x=Data(ratio, 1e18), paired=True)
        yield draft(
            f"scale 1e18, mean/std {ratio:g}, 256 channels", step, eps=0.0, num_features=256
        )
    for ratio in (1e3, 1e5):
        step = Step(even(ranks, 40, 3, 5), x=Data(ratio), paired=True)
        yield draft(f"mean/std {ratio:g}, dy orthogonal to x", step)
    for scale in (1e-4, 1e-6):
        yield draft(f"std {scale:g}, far below sqrt(eps)", Step(shapes, x=Data(10.0, scale)))
    yield draft("constant channels", Step(shapes, x=Data(ratio=1e3, constant=True)))
    if ranks > 1:
        flat = Step(even(ranks, 4, 3, 5), x=Data(flat=(1,)))
        yield draft("channel 1 constant on each rank", flat, eps=0.0)
    overflow = Step(shapes, x=Data(ratio=1.0, scale=1e30))
    yield case("scale 1e30, where the variance overflows", overflow, checks=("defined",))
    for ratio in (0.0, 1e5):
        step = Step(shapes, dtype="float64", x=Data(ratio=ratio), dy_zero_sum=True)
        yield draft(f"float64, mean/std {ratio:g}", step, dtype="float64")
    # Equal values are all rounded the same way, so the error of adding them one by one shows.
    for dtype in ("float32", "float64"):
        alike = Data(ratio=1.0, flat=(0, 1, 2))
        step = Step(even(ranks, 2, 3, 70, 71), dtype=dtype, x=alike)
        yield draft(f"{dtype}, equal values on each rank", step, dtype=dtype)


@cases_of("NUM-2")
def halves(ranks: int) -> Iterator[Draft]:
    for dtype in ("float16", "bfloat16"):
        for parameters in ("float32", dtype):
            for title, shapes, layout in (
                ("images", varied(ranks, 3), "contiguous"),
                ("channels_last", uneven(ranks, 3, 16, 16), "channels_last"),
                ("matrices", uneven(ranks, 3), "contiguous"),
                ("many values", even(ranks, 16, 3, 40, 40), "contiguous"),
            ):
                step = Step(shapes, dtype=dtype, x=Data(ratio=3.0), layout=layout)
                # dy sums to 0, or grad_weight of so many values would exceed float16.
                evaluate = Step(shapes, dtype=dtype, mode="eval", layout=layout, dy_zero_sum=True)
                yield case(
                    f"{dtype}, parameters {parameters}, {title}",
                    step,
                    evaluate,
                    layer={"dtype": parameters},
                    checks=(*ALL, "format"),
                )
    if ranks > 1:  # on one rank the mean of dy is too small
        step = Step((*even(ranks - 1, 1, 1, 5), (1, 1, 800_000)), dtype="float16")
        yield case("sums of dy beyond 65504", step, layer={"num_features": 1}, checks=ALL)


@cases_of("NUM-3")
def counts(ranks: int) -> Iterator[Draft]:
    for dtype in ("float32", "float16", "bfloat16"):
        for count in (2049, 65521):
            shapes = tuple((1, 1, count + rank) for rank in range(ranks))
            step = Step(shapes, dtype=dtype, x=Data(ratio=1.0))
            yield case(
                f"{count} values per rank, {dtype}",
                step,
                layer={"num_features": 1, "dtype": dtype, "momentum": 1.0},
                checks=ALL,
            )
    shapes = tuple((1, 1, 2**24 + 3 if rank == 0 else 5) for rank in range(ranks))
    step = Step(shapes, x=Data(ratio=1.0), backward=False)
    yield case(
        "2^24 + 3 values on rank 0",
        step,
        deadline=120.0,
        layer={"num_features": 1, "momentum": 1.0},
        checks=RUNNING,
    )


@cases_of("NUM-4")
def poison(ranks: int) -> Iterator[Draft]:
    for value in ("nan", "inf"):
        for mode in ("train", "eval"):
            place = (ranks - 1, 0, 1, 0)
            step = Step(even(ranks, 2, 3, 4), mode=mode, x=Data(poison=((place, value),)))
            yield case(
                f"{value} in channel 1 of the last rank, {mode}",
                step,
                checks=("y", *GRADIENTS, "running_mean"),
            )
    evaluate = Step(uneven(ranks, 3, 5), mode="eval", backward=False)
    yield case("a negative running_var in channel 0", evaluate, state="negative", checks=("y",))


@cases_of("COMM-1")
def collectives(ranks: int) -> Iterator[Draft]:
    train = Step(uneven(ranks, 3, 4))
    evaluate = Step(uneven(ranks, 3, 4), mode="eval")
    for layer in ({}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}):
        title = ", ".join(f"{name}={value}" for name, value in layer.items()) or "defaults"
        yield case(title, train, evaluate, layer=layer, checks=("collectives",))
    step = Step(with_empty(ranks, {0}, 3, 4))
    yield case("rank 0 is empty", step, checks=("collectives",))
    # Communicators are counted after each step, not after each repetition.
    forward = replace(train, backward=False)
    checks = ("communicators", "running_mean")
    many = replace(forward, repeat=199)
    yield case("200 steps", forward, many, checks=checks, deadline=120.0)
