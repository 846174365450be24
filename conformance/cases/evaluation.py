"""Eval mode, and layers that track nothing: EVAL-1 to EVAL-3, TRACK-1, TRACK-2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from syncbn.conformance.case import Step
from syncbn.conformance.cases.build import (
    GRADIENTS,
    RUNNING,
    Draft,
    asks,
    case,
    even,
    holes,
    uneven,
)


@asks("EVAL-1")
def evaluation(ranks: int) -> Iterator[Draft]:
    def one(title: str, *steps: Step, **layer: Any) -> Draft:
        return case(title, *steps, layer=layer, checks=("y",))

    for spatial in ((), (5,), (5, 4), (3, 4, 2), (2, 3, 1, 2)):
        step = Step(uneven(ranks, 3, *spatial), mode="eval", backward=False)
        yield one(f"{len(spatial) + 2} dimensions", step)
    step = Step(uneven(ranks, 3, 5), mode="eval", backward=False)
    yield one("affine=False", step, affine=False)
    yield one("eps=0.0", step, eps=0.0)
    yield case("a negative running_var", step, state="negative", checks=("y",))
    yield one("one value", Step(even(ranks, 1, 3), mode="eval", backward=False))
    yield one("no data", Step(even(ranks, 0, 3, 4), mode="eval", backward=False))


@asks("EVAL-2")
def silent_eval(ranks: int) -> Iterator[Draft]:
    for tracked in (True, False):
        layer = {"track_running_stats": tracked}
        step = Step(uneven(ranks, 3, 4), mode="eval", present=(0,))
        yield case(
            f"rank 0 alone, track_running_stats={tracked}",
            step,
            layer=layer,
            checks=("y", "collectives"),
        )
    # Its variance is 0; only training on one value is an error (ERR-7).
    one = Step(even(ranks, 1, 3), mode="eval", present=(0,))
    layer = {"track_running_stats": False}
    yield case("rank 0 alone, one value", one, layer=layer, checks=("y", *GRADIENTS))


@asks("EVAL-3")
def eval_gradients(ranks: int) -> Iterator[Draft]:
    def one(title: str, step: Step, **layer: Any) -> Draft:
        return case(title, step, layer=layer, checks=GRADIENTS)

    for spatial in ((), (5,), (5, 4), (3, 4, 2)):
        yield one(f"{len(spatial) + 2} dimensions", Step(uneven(ranks, 3, *spatial), mode="eval"))
    yield one("channels_last", Step(uneven(ranks, 3, 5, 4), mode="eval", layout="channels_last"))
    yield one("affine=False", Step(uneven(ranks, 3, 5), mode="eval"), affine=False)
    yield one("no data on rank 0", Step(holes(ranks, {0}, 3, 4), mode="eval"))


@asks("TRACK-1")
def untracked_training(ranks: int) -> Iterator[Draft]:
    layer = {"track_running_stats": False}
    for title, shapes in (("images", uneven(ranks, 3, 5, 4)), ("matrices", uneven(ranks, 3))):
        yield case(
            title,
            Step(shapes),
            Step(shapes),
            layer=layer,
            checks=("y", *GRADIENTS, *RUNNING, "num_batches_tracked"),
        )


@asks("TRACK-2")
def untracked_eval(ranks: int) -> Iterator[Draft]:
    layer = {"track_running_stats": False}
    for title, shapes in (
        ("images", uneven(ranks, 3, 5, 4)),
        ("matrices", even(ranks, 4, 3)),
        ("no data on rank 0", holes(ranks, {0}, 3, 4)),
    ):
        step = Step(shapes, mode="eval")
        yield case(title, step, layer=layer, checks=("y", *GRADIENTS))
    step = Step(uneven(ranks, 3, 5), mode="eval")
    yield case("eps=0.1", step, layer={"eps": 0.1} | layer, checks=("y", *GRADIENTS))
