"""Eval mode, and layers that track nothing: EVAL-1 to EVAL-3, TRACK-1 to TRACK-3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from syncbn.conformance.case import Step
from syncbn.conformance.cases.build import (
    GRADIENTS,
    RUNNING,
    Draft,
    case,
    cases_of,
    even,
    uneven,
)


@cases_of("EVAL-1")
def evaluation(ranks: int) -> Iterator[Draft]:
    def draft(title: str, *steps: Step, **layer: Any) -> Draft:
        return case(title, *steps, layer=layer, checks=("y",))

    for spatial in ((), (5,), (5, 4), (3, 4, 2), (2, 3, 1, 2)):
        step = Step(uneven(ranks, 3, *spatial), mode="eval", backward=False)
        yield draft(f"{len(spatial) + 2} dimensions", step)
    step = Step(uneven(ranks, 3, 5), mode="eval", backward=False)
    yield draft("affine=False", step, affine=False)
    yield draft("one value", Step(even(ranks, 1, 3), mode="eval", backward=False))


@cases_of("EVAL-2")
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
    # The variance of one value is 0. Only training on it is an error (ERR-7).
    single = Step(even(ranks, 1, 3), mode="eval", present=(0,))
    layer = {"track_running_stats": False}
    yield case("rank 0 alone, one value", single, layer=layer, checks=("y", *GRADIENTS))


@cases_of("EVAL-3")
def eval_gradients(ranks: int) -> Iterator[Draft]:
    def draft(title: str, step: Step, **layer: Any) -> Draft:
        return case(title, step, layer=layer, checks=("grad_input",))

    for spatial in ((), (5,), (5, 4), (3, 4, 2)):
        yield draft(f"{len(spatial) + 2} dimensions", Step(uneven(ranks, 3, *spatial), mode="eval"))
    yield draft("channels_last", Step(uneven(ranks, 3, 5, 4), mode="eval", layout="channels_last"))
    yield draft("affine=False", Step(uneven(ranks, 3, 5), mode="eval"), affine=False)


@cases_of("TRACK-1")
def untracked_training(ranks: int) -> Iterator[Draft]:
    layer = {"track_running_stats": False}
    for title, shapes in (("images", uneven(ranks, 3, 5, 4)), ("matrices", uneven(ranks, 3))):
        yield case(
            title,
            Step(shapes),
            Step(shapes),
            layer=layer,
            checks=("y", "grad_input", *RUNNING),
        )


@cases_of("TRACK-2")
def untracked_eval(ranks: int) -> Iterator[Draft]:
    """Each rank is a group, so that the batch of the group is that of the rank."""
    alone = tuple((rank,) for rank in range(ranks))
    for title, shapes, eps in (
        ("images", uneven(ranks, 3, 5, 4), 1e-5),
        ("matrices", even(ranks, 4, 3), 1e-5),
        ("images, eps=0.1", uneven(ranks, 3, 5, 4), 0.1),
    ):
        yield case(
            f"{title}, each rank a group",
            Step(shapes, mode="eval"),
            layer={"track_running_stats": False, "eps": eps},
            groups=alone,
            checks=("y", "grad_input"),
        )


@cases_of("TRACK-3")
def local_eval(ranks: int) -> Iterator[Draft]:
    layer = {"track_running_stats": False}
    for title, shapes in (
        ("images", uneven(ranks, 3, 5, 4)),
        ("matrices", even(ranks, 4, 3)),
    ):
        step = Step(shapes, mode="eval")
        yield case(title, step, layer=layer, checks=("y", *GRADIENTS))
    step = Step(uneven(ranks, 3, 5), mode="eval")
    yield case("eps=0.1", step, layer={"eps": 0.1} | layer, checks=("y", *GRADIENTS))
