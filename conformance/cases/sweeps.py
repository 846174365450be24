"""Sweeps, which only the profile `full` has: every combination of what may matter to a clause.

Tensors are small, because there are many combinations and a few values show what a sweep finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np

from syncbn.conformance.case import SECOND, Data, ExpectedError, Groups, Step
from syncbn.conformance.cases.build import (
    ALL,
    GRADIENTS,
    MOVED,
    Draft,
    Shapes,
    case,
    empty_patterns,
    even,
    groupings,
    products,
    sweep_of,
    titled,
    uneven,
    varied,
    with_empty,
)
from syncbn.conformance.checks import SECOND_GRADIENTS

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SPATIAL = ((), (5,), (5, 4), (3, 4, 2), (2, 3, 1, 2))
_LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "expanded")
_MOMENTA = (0.0, 0.1, 0.35, 1.0, None)


@sweep_of("FWD-1")
def channels(ranks: int) -> Iterator[Draft]:
    for title, layer, step in _channels(ranks):
        yield case(title, replace(step, backward=False), layer=layer, checks=("y",))


@sweep_of("FWD-9")
def formats(ranks: int) -> Iterator[Draft]:
    for chosen in products(
        spatial=_SPATIAL, layout=_LAYOUTS, dtype=_DTYPES, mode=("train", "eval")
    ):
        shapes = tuple((2 + rank % 2, 3, *chosen["spatial"]) for rank in range(ranks))
        step = Step(
            shapes,
            mode=chosen["mode"],
            dtype=chosen["dtype"],
            layout=chosen["layout"],
            dy_layout=chosen["layout"],
        )
        checks = ("y", "format", "grad_format", "input_unmodified")
        yield case(titled(**chosen), step, layer={"dtype": chosen["dtype"]}, checks=checks)
    for title, layer, step in _gradient_layouts(ranks):
        yield case(title, step, layer=layer, checks=("grad_format",))
    for title, step in _eval_layouts(ranks):
        yield case(f"eval, {title}", step, checks=("grad_format",))


@sweep_of("FWD-3")
def random_shards(ranks: int) -> Iterator[Draft]:
    draw = np.random.default_rng(3)
    for dims, dtype, trial in product(range(4), ("float32", "float16"), range(6)):
        shapes = tuple(
            (int(draw.integers(1, 9)), 3, *map(int, draw.integers(1, 7, dims)))
            for _ in range(ranks)
        )
        if ranks > 1 or shapes[0] != (1, 3, *[1] * dims):
            step = Step(shapes, dtype=dtype, backward=False)
            title = titled(dimensions=dims + 2, dtype=dtype, draw=trial)
            yield case(title, step, checks=("y",))


@sweep_of("FWD-4")
def empty_shards(ranks: int) -> Iterator[Draft]:
    for pattern, dtype, spatial in product(empty_patterns(ranks), _DTYPES, _SPATIAL):
        title, empty = pattern
        step = Step(with_empty(ranks, empty, 3, *spatial), dtype=dtype, backward=False)
        layer = {"dtype": dtype}
        yield case(
            f"{title}, {titled(dtype=dtype, spatial=spatial)}",
            step,
            layer=layer,
            checks=("y", "format"),
        )
    for title, grouping, step in _groups(ranks, {0}, {ranks - 1}, set(range(ranks)) - {1}):
        yield case(title, step, step, groups=grouping, checks=("y", "running_mean"))


@sweep_of("FWD-5")
def groups(ranks: int) -> Iterator[Draft]:
    for title, grouping, step in _groups(ranks, set()):
        yield case(title, step, step, groups=grouping, checks=("y", "running_mean"))


@sweep_of("FWD-6")
def cuts(ranks: int) -> Iterator[Draft]:
    draw = np.random.default_rng(6)
    total = 6 * ranks
    for ratio, spatial, trial in product((0.0, 10.0, 1e3), ((), (4,), (3, 2)), range(5)):
        ends = sorted(int(end) for end in draw.integers(0, total + 1, ranks - 1))
        batches = np.diff([0, *ends, total])
        shapes = tuple((int(batch), 3, *spatial) for batch in batches)
        step = Step(shapes, x=Data(shared=True, ratio=ratio))
        title = titled(cut=batches.tolist(), ratio=f"{ratio:g}", spatial=spatial)
        yield case(title, step, seed=trial, checks=("y", "grad_input"))


@sweep_of("FWD-7")
def layouts_of_ranks(ranks: int) -> Iterator[Draft]:
    for even_rank, odd_rank, spatial in product(_LAYOUTS, _LAYOUTS, ((5,), (5, 4), (3, 4, 2))):
        layout = tuple((even_rank, odd_rank)[rank % 2] for rank in range(ranks))
        shapes = even(ranks, 2, 3, *spatial)
        if even_rank != odd_rank and ranks > 1:
            step = Step(shapes, layout=layout, dy_layout=layout[::-1])
            title = titled(even_ranks=even_rank, odd_ranks=odd_rank, spatial=spatial)
            yield case(title, step, checks=("y", *GRADIENTS))


@sweep_of("GRAD-1")
def input_gradients(ranks: int) -> Iterator[Draft]:
    checks = ("grad_input",)
    for title, layer, step in _gradient_layouts(ranks):
        yield case(title, step, layer=layer, checks=checks)
    for title, layer, step in _channels(ranks):
        yield case(title, step, layer=layer, checks=checks)
    for title, grouping, step in _groups(ranks, set()):
        yield case(title, step, groups=grouping, checks=checks)


@sweep_of("GRAD-2")
def parameter_gradients(ranks: int) -> Iterator[Draft]:
    checks = ("grad_weight", "grad_bias")
    for title, layer, step in _gradient_layouts(ranks):
        yield case(title, step, layer=layer, checks=checks)
    for dtype, spatial, empty in product(
        ("float32", "float64"), ((5,), (5, 4)), (set[int](), {0}, {ranks - 1})
    ):
        step = Step(with_empty(ranks, empty, 3, *spatial), dtype=dtype)
        title = f"data parallel, {titled(dtype=dtype, spatial=spatial, empty=sorted(empty))}"
        yield case(title, step, step, layer={"dtype": dtype}, ddp=True, checks=checks)
    for title, step in _eval_layouts(ranks):
        yield case(f"eval, {title}", step, checks=checks)


@sweep_of("GRAD-3")
def empty_gradients(ranks: int) -> Iterator[Draft]:
    for pattern, dtype, spatial in product(empty_patterns(ranks), _DTYPES, _SPATIAL[1:]):
        title, empty = pattern
        step = Step(with_empty(ranks, empty, 3, *spatial), dtype=dtype)
        yield case(
            f"{title}, {titled(dtype=dtype, spatial=spatial)}",
            step,
            layer={"dtype": dtype},
            checks=GRADIENTS,
        )
    for title, grouping, step in _groups(ranks, {0}, {ranks - 1}, set(range(ranks)) - {1}):
        yield case(title, step, groups=grouping, checks=("grad_input",))


@sweep_of("GRAD-4")
def frozen(ranks: int) -> Iterator[Draft]:
    """Every way in which each rank freezes its input, its parameters or nothing."""
    for choice in product(("nothing", "input", "parameters"), repeat=min(ranks, 4)):
        frozen = dict(enumerate(choice))
        step = Step(
            uneven(ranks, 3, 5),
            frozen_input=tuple(r for r, what in frozen.items() if what == "input"),
            frozen_parameters=tuple(r for r, what in frozen.items() if what == "parameters"),
        )
        yield case(f"frozen: {', '.join(choice)}", step, checks=GRADIENTS)


@sweep_of("GRAD-5")
def second_derivatives(ranks: int) -> Iterator[Draft]:
    shapes = {
        "even": even(ranks, 3, 3, 4),
        "uneven": uneven(ranks, 3, 4),
        "rank 0 is empty": with_empty(ranks, {0}, 3, 4),
    }
    for chosen in products(
        shapes=shapes, dtype=_DTYPES, mode=("train", "eval"), tracked=(True, False)
    ):
        mode, tracked, dtype = chosen["mode"], chosen["tracked"], chosen["dtype"]
        if mode == "eval" and tracked and dtype in ("float16", "bfloat16"):
            continue  # the contract requires no precision there
        step = Step(shapes[chosen["shapes"]], mode=mode, dtype=dtype, second=SECOND)
        layer = {"dtype": dtype, "track_running_stats": tracked}
        yield case(titled(**chosen), step, layer=layer, checks=SECOND_GRADIENTS)
    for chosen in products(layout=_LAYOUTS, dy_layout=_LAYOUTS):
        step = Step(uneven(ranks, 3, 5, 4), **chosen, second=SECOND)
        yield case(titled(**chosen), step, checks=SECOND_GRADIENTS)


@sweep_of("ERR-9")
def faults(ranks: int) -> Iterator[Draft]:
    if ranks < 2:
        return
    good = Step(uneven(ranks, 3, 4))
    shapes = {"2 channels": (2, 2, 4), "no channel": (2, 0, 4), "1 dimension": (3,)}
    for at, (what, shape) in product(range(ranks), shapes.items()):
        wrong = tuple(shape if rank == at else fine for rank, fine in enumerate(good.shapes))
        bad = Step(wrong, error=ExpectedError("ValueError", (at,)))
        yield case(f"rank {at}: {what}", bad, good, bad, checks=("y", *MOVED))
    for at, dtype in product(range(ranks), ("int32", "float64")):
        dtypes = tuple(dtype if rank == at else "float32" for rank in range(ranks))
        bad = Step(good.shapes, dtype=dtypes, error=ExpectedError("TypeError", (at,)))
        yield case(f"rank {at}: {dtype}", bad, good, checks=("y", *MOVED))


@sweep_of("STAT-1")
def moving(ranks: int) -> Iterator[Draft]:
    for chosen in products(
        momentum=_MOMENTA[:-1], affine=(True, False), dtype=_DTYPES, repeat=(1, 3)
    ):
        steps = (
            Step(shapes, dtype=chosen["dtype"], backward=False, repeat=chosen["repeat"])
            for shapes in (uneven(ranks, 3, 4), varied(ranks, 3))
        )
        layer = {name: chosen[name] for name in ("momentum", "affine", "dtype")}
        yield case(titled(**chosen), *steps, layer=layer, checks=("running_mean",))


@sweep_of("STAT-2")
def few_values(ranks: int) -> Iterator[Draft]:
    """Few values, where n - 1 and n are far apart."""
    for batches in product((1, 2, 3), repeat=min(ranks, 3)):
        if sum(batches) > 1:
            shapes = tuple((n, 3) for n in (*batches, *[1] * (ranks - len(batches))))
            step = Step(shapes, backward=False)
            title = titled(batches=batches)
            yield case(title, step, layer={"momentum": 1.0}, checks=("running_var",))


@sweep_of("STAT-3")
def agreement(ranks: int) -> Iterator[Draft]:
    for grouping, dtype, momentum in product(groupings(ranks), _DTYPES, (0.1, None)):
        title, ranks_of_groups = grouping
        steps = (
            Step(shapes, dtype=dtype, backward=False)
            for shapes in (uneven(ranks, 3, 4), varied(ranks, 3), with_empty(ranks, {0}, 3, 7))
        )
        yield case(
            f"{title}, {titled(dtype=dtype, momentum=momentum)}",
            *steps,
            layer={"dtype": dtype, "momentum": momentum},
            groups=ranks_of_groups,
            checks=("ranks_agree",),
        )


@sweep_of("STAT-4")
def cumulative(ranks: int) -> Iterator[Draft]:
    for dtype, repeat, reload in product(_DTYPES, (1, 2, 5), (False, True)):
        first = Step(uneven(ranks, 3, 4), dtype=dtype, backward=False, repeat=repeat)
        second = Step(varied(ranks, 3), dtype=dtype, backward=False, reload=reload)
        layer = {"momentum": None, "dtype": dtype}
        title = titled(dtype=dtype, repeat=repeat, reload=reload)
        yield case(title, first, second, layer=layer, checks=("running_mean",))


@sweep_of("STAT-6")
def sequences(ranks: int) -> Iterator[Draft]:
    """Every sequence of three steps that train, evaluate or have no data."""
    kinds = {
        "train": Step(uneven(ranks, 3, 4)),
        "eval": Step(uneven(ranks, 3, 4), mode="eval"),
        "no data": Step(even(ranks, 0, 3, 4)),
    }
    for names, momentum in product(product(kinds, repeat=3), (0.1, None)):
        yield case(
            f"{', '.join(names)}; {titled(momentum=momentum)}",
            *(kinds[name] for name in names),
            layer={"momentum": momentum},
            checks=(*MOVED, "y"),
        )


@sweep_of("STAT-7")
def recomputed(ranks: int) -> Iterator[Draft]:
    for grouping, dtype, momentum in product(
        groupings(ranks), ("float32", "bfloat16"), (0.1, None)
    ):
        title, ranks_of_groups = grouping
        step = Step(uneven(ranks, 3, 4), dtype=dtype, recompute=True)
        yield case(
            f"{title}, {titled(dtype=dtype, momentum=momentum)}",
            step,
            step,
            layer={"momentum": momentum},
            groups=ranks_of_groups,
            checks=(*GRADIENTS, *MOVED),
        )


@sweep_of("CTOR-5")
def reloaded(ranks: int) -> Iterator[Draft]:
    """A checkpoint goes into a new layer before one of four steps."""
    for at, dtype, momentum in product(range(1, 4), _DTYPES, (0.1, None)):
        steps = (Step(uneven(ranks, 3, 4), dtype=dtype, reload=index == at) for index in range(4))
        layer = {"dtype": dtype, "momentum": momentum}
        title = titled(reloaded_before_step=at, dtype=dtype, momentum=momentum)
        yield case(title, *steps, layer=layer, checks=("y", *MOVED))


@sweep_of("EVAL-1")
def evaluation(ranks: int) -> Iterator[Draft]:
    for chosen in products(spatial=_SPATIAL, layout=_LAYOUTS, dtype=_DTYPES, affine=(True, False)):
        step = Step(
            uneven(ranks, 3, *chosen["spatial"]),
            mode="eval",
            dtype=chosen["dtype"],
            layout=chosen["layout"],
            backward=False,
        )
        layer = {"dtype": chosen["dtype"], "affine": chosen["affine"]}
        yield case(titled(**chosen), step, layer=layer, checks=("y",))


@sweep_of("EVAL-2")
def absent_ranks(ranks: int) -> Iterator[Draft]:
    """Every choice of the ranks that evaluate."""
    sizes = range(1, min(ranks, 5) + 1)
    for present in (chosen for size in sizes for chosen in combinations(range(ranks), size)):
        for tracked in (True, False):
            step = Step(uneven(ranks, 3, 4), mode="eval", present=present)
            yield case(
                titled(ranks=present, tracked=tracked),
                step,
                layer={"track_running_stats": tracked},
                checks=("y", *GRADIENTS),
            )


@sweep_of("EVAL-3")
def eval_gradients(ranks: int) -> Iterator[Draft]:
    for title, step in _eval_layouts(ranks):
        yield case(title, step, checks=("grad_input",))


@sweep_of("TRACK-1")
def untracked_training(ranks: int) -> Iterator[Draft]:
    for chosen in products(
        affine=(True, False), spatial=_SPATIAL[1:], dtype=_DTYPES, layout=_LAYOUTS[:3]
    ):
        yield _untracked(ranks, "train", ("y", "grad_input", "running_mean"), chosen)


@sweep_of("TRACK-3")
def local_eval(ranks: int) -> Iterator[Draft]:
    for chosen in products(
        affine=(True, False), spatial=_SPATIAL[1:], dtype=_DTYPES, layout=_LAYOUTS[:3]
    ):
        yield _untracked(ranks, "eval", ("y", *GRADIENTS), chosen)


@sweep_of("NUM-1")
def offsets_and_scales(ranks: int) -> Iterator[Draft]:
    shapes: dict[str, Shapes] = {
        "images": tuple((3 + rank, 3, 8, 8) for rank in range(ranks)),
        "matrices": tuple((90 + rank, 3) for rank in range(ranks)),
        "one image each": even(ranks, 1, 3, 12, 12),
    }
    for shape, ratio, scale, zero_sum in product(
        shapes, (0.0, 1.0, 30.0, 1e3, 1e4, 1e5), (1.0, 1e-18, 1e-9, 1e9, 1e18), (False, True)
    ):
        step = Step(shapes[shape], x=Data(ratio, scale), dy_zero_sum=zero_sum)
        layer = {"momentum": 1.0} if scale == 1.0 else {"momentum": 1.0, "eps": 0.0}
        title = titled(ratio=f"{ratio:g}", scale=f"{scale:g}", dy_of_zero_sum=zero_sum)
        yield case(f"{shape}, {title}", step, layer=layer, checks=ALL)
    for ratio, scale, dtype in product(
        (0.0, 1.0, 10.0), (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8), ("float32", "float64")
    ):
        step = Step(shapes["images"], dtype=dtype, x=Data(ratio, scale))
        title = titled(ratio=f"{ratio:g}", std=f"{scale:g}", eps=1e-5, dtype=dtype)
        yield case(title, step, layer={"momentum": 1.0, "dtype": dtype}, checks=ALL)


@sweep_of("NUM-2")
def halves(ranks: int) -> Iterator[Draft]:
    for chosen in products(
        dtype=("float16", "bfloat16"),
        parameters=("float32", "the same"),
        layout=_LAYOUTS,
        ratio=(0.0, 3.0, 30.0),
        mode=("train", "eval"),
    ):
        step = Step(
            tuple((5 + rank, 3, 6, 5) for rank in range(ranks)),
            mode=chosen["mode"],
            dtype=chosen["dtype"],
            layout=chosen["layout"],
            x=Data(chosen["ratio"]),
        )
        parameters = chosen["dtype"] if chosen["parameters"] == "the same" else "float32"
        yield case(titled(**chosen), step, layer={"dtype": parameters}, checks=ALL)


@sweep_of("NUM-3")
def counts(ranks: int) -> Iterator[Draft]:
    for count, dtype in product(
        (255, 256, 257, 2047, 2048, 2050, 4097, 65503, 65504, 65537),
        ("float32", "float16", "bfloat16"),
    ):
        shapes = tuple((1, 1, count if rank == ranks - 1 else 3) for rank in range(ranks))
        step = Step(shapes, dtype=dtype, x=Data(1.0))
        layer = {"num_features": 1, "dtype": dtype, "momentum": 1.0}
        yield case(f"{count} values on the last rank, {dtype}", step, layer=layer, checks=ALL)


@sweep_of("NUM-4")
def poison(ranks: int) -> Iterator[Draft]:
    for value, rank, channel, mode, dtype in product(
        ("nan", "inf", "-inf"), range(ranks), range(3), ("train", "eval"), ("float32", "bfloat16")
    ):
        place = (rank, 0, channel, 1)
        step = Step(even(ranks, 2, 3, 4), mode=mode, dtype=dtype, x=Data(poison=((place, value),)))
        title = titled(rank=rank, channel=channel, value=value, mode=mode, dtype=dtype)
        yield case(title, step, checks=("y", *GRADIENTS, "running_mean"))


def _channels(ranks: int) -> Iterator[tuple[str, dict[str, Any], Step]]:
    for chosen in products(
        channels=(1, 2, 3, 63, 64, 65, 96, 257),
        spatial=((), (3,), (3, 5), (2, 2, 2)),
        layout=("contiguous", "channels_last"),
        dtype=("float32", "bfloat16"),
    ):
        channels, layout = chosen["channels"], chosen["layout"]
        if ranks > 1 or chosen["spatial"]:
            shapes = tuple((2 + rank % 3, channels, *chosen["spatial"]) for rank in range(ranks))
            step = Step(shapes, dtype=chosen["dtype"], layout=layout, dy_layout=layout)
            yield titled(**chosen), {"num_features": channels}, step


def _groups(ranks: int, *empties: set[int]) -> Iterator[tuple[str, Groups, Step]]:
    """Every grouping, with the ranks of each of `empties` empty."""
    for grouping, empty, spatial, dtype in product(
        groupings(ranks), empties, _SPATIAL[1:4], ("float32", "float16")
    ):
        title, groups = grouping
        step = Step(with_empty(ranks, empty, 3, *spatial), dtype=dtype)
        chosen = titled(empty=sorted(empty), spatial=spatial, dtype=dtype)
        yield f"{title}, {chosen}", groups, step


def _gradient_layouts(ranks: int) -> Iterator[tuple[str, dict[str, Any], Step]]:
    others = [(dtype, (4, 3)) for dtype in ("float16", "bfloat16", "float64")]
    for (dtype, spatial), layout, dy_layout in product(
        [("float32", (7,)), ("float32", (3, 4, 2)), *others], _LAYOUTS, _LAYOUTS
    ):
        step = Step(
            tuple((2 + rank % 3, 3, *spatial) for rank in range(ranks)),
            dtype=dtype,
            layout=layout,
            dy_layout=dy_layout,
        )
        title = titled(x=layout, dy=dy_layout, dtype=dtype, spatial=spatial)
        yield title, {"dtype": dtype}, step


def _eval_layouts(ranks: int) -> Iterator[tuple[str, Step]]:
    for layout, dy_layout, spatial, dtype in product(
        _LAYOUTS, _LAYOUTS, ((), (5, 4)), ("float32", "bfloat16")
    ):
        step = Step(
            uneven(ranks, 3, *spatial),
            mode="eval",
            dtype=dtype,
            layout=layout,
            dy_layout=dy_layout,
        )
        yield titled(x=layout, dy=dy_layout, spatial=spatial, dtype=dtype), step


def _untracked(ranks: int, mode: str, checks: tuple[str, ...], chosen: dict[str, Any]) -> Draft:
    step = Step(
        uneven(ranks, 3, *chosen["spatial"]),
        mode=mode,
        dtype=chosen["dtype"],
        layout=chosen["layout"],
    )
    layer = {"track_running_stats": False, "affine": chosen["affine"], "dtype": chosen["dtype"]}
    return case(titled(**chosen), step, step, layer=layer, checks=checks)
