"""The backward of training and second derivatives: GRAD-1 to GRAD-5."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from syncbn.conformance.case import SECOND, ExpectedError, Step
from syncbn.conformance.cases.build import (
    GRADIENTS,
    Draft,
    Shapes,
    case,
    cases_of,
    empty_patterns,
    even,
    groupings,
    uneven,
    varied,
    with_empty,
)


@cases_of("GRAD-1")
def input_gradients(ranks: int) -> Iterator[Draft]:
    def draft(title: str, shapes: Shapes, **fields: Any) -> Draft:
        layer, seed = fields.pop("layer", {}), fields.pop("seed", 0)
        grouping = fields.pop("groups", None)
        return case(
            title,
            Step(shapes, **fields),
            layer=layer,
            seed=seed,
            groups=grouping,
            checks=("grad_input",),
        )

    for seed in range(3):
        yield draft(f"uneven images, seed {seed}", uneven(ranks, 3, 5, 4), seed=seed)
    yield draft("even images", even(ranks, 4, 3, 5, 4))
    yield draft("batch and spatial sizes", varied(ranks, 3))
    yield draft("matrices", uneven(ranks, 3))
    yield draft("volumes", uneven(ranks, 3, 2, 3, 2))
    yield draft("affine=False", uneven(ranks, 3, 5), layer={"affine": False})
    yield draft(
        "track_running_stats=False", uneven(ranks, 3, 5), layer={"track_running_stats": False}
    )
    yield draft("eps=0.1", uneven(ranks, 3, 5), layer={"eps": 0.1})
    yield draft("float64", uneven(ranks, 3, 5), dtype="float64", layer={"dtype": "float64"})
    yield draft("dy of zero sum", uneven(ranks, 3, 40), dy_zero_sum=True)
    for title, grouping in groupings(ranks):
        yield draft(f"groups: {title}", uneven(ranks, 3, 5), groups=grouping)
    kinds = ("contiguous", "channels_last", "permuted", "sliced", "expanded")
    for layout in kinds:
        for dy_layout in kinds:
            if layout != dy_layout:
                yield draft(
                    f"x {layout}, dy {dy_layout}",
                    uneven(ranks, 3, 5, 4),
                    layout=layout,
                    dy_layout=dy_layout,
                )
    step = Step(uneven(ranks, 3, 4), beside=True)
    yield case("two layers in parallel branches", step, step, checks=("y", "grad_input"))


@cases_of("GRAD-2")
def parameter_gradients(ranks: int) -> Iterator[Draft]:
    checks = ("grad_weight", "grad_bias")
    for title, shapes in (
        ("even images", even(ranks, 4, 3, 5, 4)),
        ("uneven images", uneven(ranks, 3, 5, 4)),
        ("batch and spatial sizes", varied(ranks, 3)),
        ("matrices", uneven(ranks, 3)),
    ):
        yield case(title, Step(shapes), checks=checks)
    step = Step(uneven(ranks, 3, 5, 4), layout="channels_last", dy_layout="sliced")
    yield case("channels_last", step, checks=checks)
    step = Step(uneven(ranks, 3, 5, 4), dtype="float64")
    yield case("float64", step, layer={"dtype": "float64"}, checks=checks)
    for title, grouping in groupings(ranks):
        step = Step(uneven(ranks, 3, 5))
        yield case(f"groups: {title}", step, groups=grouping, checks=checks)
    step = Step(uneven(ranks, 3, 5))
    yield case("averaged by data parallelism", step, ddp=True, checks=checks)
    yield case("two layers in parallel branches", replace(step, beside=True), checks=checks)
    yield case("untracked training", step, layer={"track_running_stats": False}, checks=checks)
    for layout in ("contiguous", "channels_last"):
        evaluate = Step(uneven(ranks, 3, 5, 4), mode="eval", layout=layout)
        yield case(f"eval, {layout}", evaluate, checks=checks)


@cases_of("GRAD-3")
def empty_gradients(ranks: int) -> Iterator[Draft]:
    for title, empty in empty_patterns(ranks):
        for dtype in ("float32", "bfloat16"):
            step = Step(with_empty(ranks, empty, 3, 4), dtype=dtype)
            yield case(f"{title}, {dtype}", step, checks=GRADIENTS)
    step = Step(with_empty(ranks, {0}, 3, 4))
    yield case(
        "rank 0 is empty, affine=False", step, layer={"affine": False}, checks=("grad_input",)
    )
    for layer in ({}, {"track_running_stats": False}):
        evaluate = Step(with_empty(ranks, {0}, 3, 4), mode="eval")
        title = ", ".join(["rank 0 is empty, eval", *("untracked" for _ in layer)])
        yield case(title, evaluate, layer=layer, checks=("y", *GRADIENTS))


@cases_of("GRAD-4")
def frozen(ranks: int) -> Iterator[Draft]:
    all_ranks, shapes = tuple(range(ranks)), uneven(ranks, 3, 5)
    patterns: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
        ("input frozen", all_ranks, ()),
        ("parameters frozen", (), all_ranks),
    ]
    if ranks > 1:
        patterns += [
            ("input frozen on rank 0", (0,), ()),
            ("parameters frozen on rank 1", (), (1,)),
            ("input frozen on rank 0, parameters on the others", (0,), all_ranks[1:]),
        ]
    for title, inputs, parameters in patterns:
        step = Step(shapes, frozen_input=inputs, frozen_parameters=parameters)
        yield case(title, step, checks=GRADIENTS)
    if ranks > 1:
        alone = Step(
            shapes,
            frozen_input=(0,),
            frozen_parameters=(0,),
            error=ExpectedError("Exception", (0,)),
        )
        yield case(
            "rank 0 has nothing to differentiate", alone, Step(shapes), checks=("y", *GRADIENTS)
        )


@cases_of("GRAD-5")
def second_derivatives(ranks: int) -> Iterator[Draft]:
    def one(title: str, shapes: Shapes, **fields: Any) -> Draft:
        layer, grouping = fields.pop("layer", {}), fields.pop("groups", None)
        step = Step(shapes, second=fields.pop("second", SECOND), **fields)
        checks = tuple(f"grad_grad_{name.removeprefix('grad_')}" for name in step.second)
        return case(title, step, layer=layer, groups=grouping, checks=checks)

    constant_dy = ("input", "weight")
    yield one("uneven images", uneven(ranks, 3, 5, 4))
    yield one("even images", even(ranks, 4, 3, 5, 4))
    yield one("batch and spatial sizes", varied(ranks, 3))
    yield one("matrices", uneven(ranks, 3))
    yield one("a constant dy", uneven(ranks, 3, 5), second=constant_dy)
    for title, empty in empty_patterns(ranks):
        yield one(title, with_empty(ranks, empty, 3, 4))
    for title, grouping in groupings(ranks):
        yield one(f"groups: {title}", uneven(ranks, 3, 5), groups=grouping)
    yield one("affine=False", uneven(ranks, 3, 5), layer={"affine": False})
    yield one("eps=0.1", uneven(ranks, 3, 5), layer={"eps": 0.1})
    yield one("float64", uneven(ranks, 3, 5), dtype="float64", layer={"dtype": "float64"})
    yield one("bfloat16", uneven(ranks, 3, 5), dtype="bfloat16")
    yield one("float16", uneven(ranks, 3, 5), dtype="float16")
    yield one("channels_last", uneven(ranks, 3, 5, 4), layout="channels_last")
    everyone = tuple(range(ranks))
    yield one("parameters frozen", uneven(ranks, 3, 5), frozen_parameters=everyone)
    yield one("input frozen", uneven(ranks, 3, 5), frozen_input=everyone)
    untracked = {"track_running_stats": False}
    yield one("untracked training", uneven(ranks, 3, 5), layer=untracked)
    for title, layer in (("eval", {}), ("untracked eval", untracked)):
        yield one(title, uneven(ranks, 3, 5), mode="eval", layer=layer)
        yield one(f"{title}, empty", with_empty(ranks, {0}, 3, 4), mode="eval", layer=layer)
        yield one(
            f"{title}, a constant dy",
            uneven(ranks, 3, 5),
            mode="eval",
            layer=layer,
            second=constant_dy,
        )
