"""Errors in a step: ERR-6, ERR-7 and ERR-9."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from syncbn.conformance.case import ExpectedError, Step
from syncbn.conformance.cases.build import MOVED, Draft, case, cases_of, even, uneven


@cases_of("ERR-6")
def wrong_shapes(ranks: int) -> Iterator[Draft]:
    all_ranks = ExpectedError("ValueError", tuple(range(ranks)))
    for title, shape in (
        ("1 dimension", (3,)),
        ("0 channels", (4, 0, 5)),
        ("2 channels for 3", (4, 2, 5)),
        ("6 channels for 3", (4, 6, 5)),  # a reshape to 3 channels would accept it
    ):
        for mode in ("train", "eval"):
            step = Step(even(ranks, *shape), mode=mode, backward=False, error=all_ranks)
            yield case(f"{title}, {mode}", step, checks=MOVED)
    layer = {"affine": False}  # only num_features says how many channels there are
    for mode in ("train", "eval"):
        step = Step(even(ranks, 4, 6, 5), mode=mode, backward=False, error=all_ranks)
        yield case(f"6 channels for 3, affine=False, {mode}", step, layer=layer, checks=MOVED)


@cases_of("ERR-7")
def single_value(ranks: int) -> Iterator[Draft]:
    all_ranks = ExpectedError("ValueError", tuple(range(ranks)))
    for rest in ((3,), (3, 1, 1)):
        shapes = ((1, *rest), *even(ranks - 1, 0, *rest))
        step = Step(shapes, error=all_ranks)
        yield case(f"one value, {len(rest) + 1} dimensions", step, checks=MOVED)
    if ranks > 1:
        step = Step(even(ranks, 1, 3))
        yield case("one value on each rank is enough", step, checks=("y",))
        step = Step(((1, 3), *even(ranks - 1, 8, 3)))
        yield case("one value on rank 0, 8 on the others", step, checks=("y",))


@cases_of("ERR-9")
def failing_together(ranks: int) -> Iterator[Draft]:
    if ranks < 2:
        return
    good = Step(uneven(ranks, 3, 4))
    last = ranks - 1
    for title, at, shape in (
        ("rank 0 has 2 channels for 3", (0,), (2, 2, 4)),
        ("the last rank has 4 channels for 3", (last,), (2, 4, 4)),
        ("the last rank has 1 dimension", (last,), (3,)),
        ("the first and the last rank have 2 channels", (0, last), (2, 2, 4)),
    ):
        shapes = tuple(shape if r in at else fine for r, fine in enumerate(good.shapes))
        bad = Step(shapes, error=ExpectedError("ValueError", at))
        yield case(title, good, bad, good, checks=("y", *MOVED))
    shapes = ((2, 2, 4), *good.shapes[1:])
    error = ExpectedError("ValueError", (0,))
    both = Step(shapes, frozen_input=(1,), frozen_parameters=(1,), error=error)
    title = "rank 0 has 2 channels for 3, rank 1 nothing to differentiate"
    yield case(title, both, good, checks=("y", *MOVED))
    integers = tuple("int64" if rank == 1 else "float32" for rank in range(ranks))
    bad = Step(good.shapes, dtype=integers, error=ExpectedError("TypeError", (1,)))
    yield case("rank 1 has integers", bad, good, checks=("y", *MOVED))
    wide = tuple("float64" if rank == 1 else "float32" for rank in range(ranks))
    title = "rank 1 has float64 with parameters in float32"
    yield case(title, replace(bad, dtype=wide), good, checks=("y", *MOVED))
    # Without parameters, no dtype of theirs refuses the input.
    title, layer = "rank 1 has integers, affine=False", {"affine": False}
    yield case(title, bad, good, layer=layer, checks=("y", *MOVED))
    if ranks > 3:
        halves = (tuple(range(ranks // 2)), tuple(range(ranks // 2, ranks)))
        shapes = ((2, 2, 4), *good.shapes[1:])
        bad = Step(shapes, error=ExpectedError("ValueError", (0,)))
        yield case(
            "one group fails, the other goes on", bad, good, groups=halves, checks=("y", *MOVED)
        )
    mixed = (*["float32"] * last, "bfloat16")
    for title, own, step in (
        ("4 channels", {"num_features": 4}, Step((*good.shapes[:-1], (2, 4, 4)))),
        ("eps=0.1", {"eps": 0.1}, good),
        ("momentum=0.5", {"momentum": 0.5}, good),
        ("momentum=None", {"momentum": None}, good),
        ("track_running_stats=False", {"track_running_stats": False}, good),
        ("dtype=bfloat16", {"dtype": "bfloat16"}, replace(good, dtype=mixed)),
    ):
        differs = replace(step, error=ExpectedError("Exception", (last,)))
        title = f"the layer of the last rank has {title}"
        yield case(title, differs, layers=((last, own),), checks=MOVED)
    for rank in (0, last):
        error = ExpectedError("RuntimeError", (rank,), in_backward=True)
        bad = replace(good, lost=(rank,), error=error)
        title = f"rank {rank} cannot read what it saved for the backward"
        yield case(title, good, bad, good, checks=("y", *MOVED))
