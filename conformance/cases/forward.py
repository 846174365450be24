"""The output of training: FWD-1 to FWD-9."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from syncbn.conformance.case import Data, Step
from syncbn.conformance.cases.build import (
    GRADIENTS,
    MOVED,
    Draft,
    Shapes,
    case,
    cases_of,
    empty_patterns,
    even,
    groupings,
    products,
    titled,
    uneven,
    varied,
    with_empty,
)


@cases_of("FWD-1")
def forward(ranks: int) -> Iterator[Draft]:
    def draft(title: str, shapes: Shapes, seed: int = 0, **layer: Any) -> Draft:
        step = Step(shapes, backward=False)
        return case(title, step, layer=layer, checks=("y",), seed=seed)

    for seed in range(3):
        yield draft(f"images, seed {seed}", even(ranks, 4, 3, 5, 6), seed)
    yield draft("matrices", even(ranks, 6, 3))
    yield draft("affine=False", even(ranks, 4, 3, 7), affine=False)
    yield draft("eps=0.1", even(ranks, 4, 3, 7), eps=0.1)
    for channels in (1, 64, 65, 257):
        yield draft(f"{channels} channels", even(ranks, 2, channels, 5), num_features=channels)
    # A layer may send the statistics of so many channels in parts.
    yield draft("4099 channels", even(ranks, 2, 4099, 2), num_features=4099)


@cases_of("FWD-2")
def dimensions(ranks: int) -> Iterator[Draft]:
    for title, step in _dimensions(ranks):
        yield case(title, step, checks=("y",))


@cases_of("FWD-3")
def uneven_shards(ranks: int) -> Iterator[Draft]:
    big = tuple((16 if rank == 0 else 1, 3, 6) for rank in range(ranks))
    for title, shapes in (
        ("batch sizes", uneven(ranks, 3, 5, 4)),
        ("batch sizes of matrices", uneven(ranks, 3)),
        ("batch and spatial sizes", varied(ranks, 3)),
        ("16 images on rank 0, 1 elsewhere", big),
        ("spatial sizes", tuple((2, 3, 1 + 2 * rank) for rank in range(ranks))),
    ):
        step = Step(shapes, backward=False)
        yield case(title, step, checks=("y",))


@cases_of("FWD-4")
def empty_shards(ranks: int) -> Iterator[Draft]:
    for title, empty in empty_patterns(ranks):
        for rest in ((3,), (3, 4, 3)):
            step = Step(with_empty(ranks, empty, *rest), backward=False)
            yield case(f"{title}, {len(rest) + 1} dimensions", step, checks=("y", "format"))
    for dtype in ("float16", "bfloat16"):
        step = Step(with_empty(ranks, {0}, 3, 4), dtype=dtype, backward=False)
        yield case(f"rank 0 is empty, {dtype}", step, checks=("y", "format"))
    step = Step(even(ranks, 0, 3, 4), mode="eval", backward=False)
    yield case("every rank is empty, eval", step, checks=("y", "format"))


@cases_of("FWD-5")
def groups(ranks: int) -> Iterator[Draft]:
    all_ranks = tuple(range(ranks))
    for title, grouping in groupings(ranks):
        step = Step(uneven(ranks, 3, 5), backward=False)
        yield case(title, step, groups=grouping, checks=("y",))
    step = Step(uneven(ranks, 3, 5))
    layer = {"process_group": [*all_ranks[::2], *all_ranks[1::2]]}
    checks = ("y", "running_mean")
    yield case("a list of all rank ids", step, step, layer=layer, checks=checks)
    if ranks > 1:
        half = all_ranks[ranks // 2 :]
        layer = {"process_group": [*half]}
        title = "a list of half of the rank ids"
        yield case(title, step, step, layer=layer, groups=(half,), checks=checks)
    if ranks > 2:
        before, after = (all_ranks[:1], all_ranks[1:]), (all_ranks[:2], all_ranks[2:])
        first, then = Step(uneven(ranks, 3, 5)), Step(uneven(ranks, 3, 5), groups=after)
        yield case("groups change", first, then, groups=before, checks=checks)


@cases_of("FWD-6")
def partitions(ranks: int) -> Iterator[Draft]:
    total = 6 * ranks
    skewed = [1] * (ranks - 1) + [total - ranks + 1]
    for title, batches in (
        ("even cut", [6] * ranks),
        ("skewed cut", skewed),
        ("all on rank 0", [total] + [0] * (ranks - 1)),
    ):
        shapes = tuple((batch, 3, 4) for batch in batches)
        step = Step(shapes, x=Data(shared=True, ratio=10.0))
        yield case(title, step, checks=("y", "grad_input"))
    steps = Step(uneven(ranks, 3, 40, 40)), Step(varied(ranks, 3))
    yield case("the same twice", *steps, checks=("repeatable",))


@cases_of("FWD-7")
def layouts(ranks: int) -> Iterator[Draft]:
    for spatial in ((5,), (5, 4), (3, 4, 2)):
        for layout in ("channels_last", "permuted", "sliced", "expanded"):
            step = Step(uneven(ranks, 3, *spatial), layout=layout, backward=False)
            yield case(f"{layout}, {len(spatial) + 2} dimensions", step, checks=("y",))
    mixed = tuple(("contiguous", "channels_last", "sliced")[rank % 3] for rank in range(ranks))
    step = Step(varied(ranks, 3), layout=mixed, backward=False)
    yield case("a different layout on each rank", step, checks=("y",))
    for channels in (63, 65, 96, 257):
        shapes = ((1, channels, 104, 100), *even(ranks - 1, 2, channels, 3, 5))
        step = Step(shapes, layout="channels_last", backward=False)
        layer = {"num_features": channels}
        yield case(f"channels_last, {channels} channels", step, layer=layer, checks=("y",))


@cases_of("FWD-8")
def contexts(ranks: int) -> Iterator[Draft]:
    shapes = uneven(ranks, 3, 4)
    checks = ("y", *MOVED, "format")
    for recording, mode in product(("no_grad", "inference_mode"), ("train", "eval")):
        quiet = Step(shapes, mode=mode, backward=False, recording=recording)
        # The recorded step after it shows whether the buffers are still what they were.
        yield case(f"{recording}, {mode}", quiet, Step(shapes), checks=checks)
    for recording in ("no_grad", "inference_mode"):
        quiet = Step(shapes, backward=False, recording=recording)
        layer = {"track_running_stats": False}
        title = f"{recording}, track_running_stats=False"
        yield case(title, quiet, layer=layer, checks=("y", "format"))
    for chosen in products(
        autocast=("bfloat16", "float16"), dtype=("float32", "the same"), mode=("train", "eval")
    ):
        autocast = chosen["autocast"]
        dtype = autocast if chosen["dtype"] == "the same" else chosen["dtype"]
        step = Step(shapes, mode=chosen["mode"], dtype=dtype, autocast=autocast)
        title = titled(autocast=autocast, input=dtype, mode=chosen["mode"])
        yield case(title, step, step, checks=(*checks, *GRADIENTS))
    for recording, mode in product(("on", "no_grad", "inference_mode"), ("train", "eval")):
        quiet = Step(shapes, mode=mode, backward=False, recording=recording)
        title = f"the input stays: recording {recording}, {mode}"
        yield case(title, quiet, checks=("y", "input_unmodified"))
    for mode in ("train", "eval"):
        mixed = Step(shapes, mode=mode, autocast="bfloat16")
        title = f"the input stays: autocast, {mode}"
        yield case(title, mixed, checks=("y", "grad_input", "input_unmodified"))
    everyone = tuple(range(ranks))
    idle = Step(shapes, backward=False, frozen_input=everyone, frozen_parameters=everyone)
    yield case("recorded, nothing wants a gradient", idle, Step(shapes), checks=checks)
    train, evaluate = Step(shapes), Step(shapes, mode="eval")
    turns = (train, evaluate, train, evaluate)
    yield case("train and eval in turn", *turns, checks=(*checks, *GRADIENTS))
    for modes in (("train", "train"), ("train", "eval"), ("eval", "train")):
        first, then = (Step(shapes, mode=mode) for mode in modes)
        title = f"the same tensor twice: {', then '.join(modes)}"
        again = replace(then, again=True)
        yield case(title, first, again, checks=(*checks, *GRADIENTS, "input_unmodified"))


@cases_of("FWD-9")
def formats(ranks: int) -> Iterator[Draft]:
    checks = ("y", "format", "input_unmodified")
    for title, step in _dimensions(ranks):
        yield case(title, step, checks=checks)
    images: tuple[tuple[int, ...], ...] = ((5,), (5, 4), (3, 4, 2))
    for spatial in images:
        step = Step(uneven(ranks, 3, *spatial), layout="channels_last")
        yield case(f"{len(spatial) + 2} dimensions, channels_last", step, checks=checks)
    for spatial, mode in product(images, ("train", "eval")):
        step = Step(uneven(ranks, 3, *spatial), mode=mode, layout="channels_last")
        title = f"format of the gradient, {len(spatial) + 2} dimensions, {mode}"
        yield case(title, step, checks=("grad_input", "grad_format"))
    step = Step(uneven(ranks, 3, 5, 4), mode="eval", layout="channels_last", dy_layout="sliced")
    title = "format of the gradient, eval, dy in another format"
    yield case(title, step, checks=("grad_input", "grad_format"))


def _dimensions(ranks: int) -> Iterator[tuple[str, Step]]:
    for spatial in ((), (5,), (5, 4), (3, 4, 2), (2, 3, 1, 2)):
        for mode in ("train", "eval"):
            step = Step(uneven(ranks, 3, *spatial), mode=mode)
            yield f"{len(spatial) + 2} dimensions, {mode}", step
