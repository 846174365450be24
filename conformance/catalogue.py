"""The cases of the suite, clause by clause, for any number of ranks.

Shards differ per rank, dy is random, uneven and empty shards are ordinary. A case checks what its
clause says and no more, so that a layer with one fault fails the clauses of that fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from conformance.case import Case, Data, ExpectedError, Step
from conformance.clauses import CLAUSES

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
Builder: TypeAlias = Callable[[int], Iterator[Case]]

GRADIENTS = ("grad_input", "grad_weight", "grad_bias")
RUNNING = ("running_mean", "running_var")
# Enough to see whether a step moved the statistics, without the question how var is unbiased.
MOVED = ("running_mean", "num_batches_tracked")
ALL = ("y", *GRADIENTS, *RUNNING)

PROFILES = ("smoke", "full")


def cases(ranks: int, profile: str = "full") -> list[Case]:
    """The cases of a profile: all of them, or (smoke) the first of each clause."""
    by_clause = [list(build(ranks)) for build in _BUILDERS]
    return [case for found in by_clause for case in (found if profile == "full" else found[:1])]


def why_none(clause: str, ranks: int) -> str:
    """Why a clause has no case on this many ranks."""
    return CLAUSES[clause].not_run or f"needs more than {ranks} rank{'s' * (ranks > 1)}"


def even(ranks: int, *shape: int) -> Shapes:
    """The same shape on every rank."""
    return (shape,) * ranks


def uneven(ranks: int, *rest: int) -> Shapes:
    """Batches of 3, 2, 4, 1, 5, ... on shapes (N, *rest)."""
    return tuple(((3, 2, 4, 1, 5)[rank % 5], *rest) for rank in range(ranks))


def ragged(ranks: int, channels: int) -> Shapes:
    """Images that differ in batch and in both spatial sizes."""
    return tuple((1 + rank % 3, channels, 4 + rank, 5 - rank % 4) for rank in range(ranks))


def holes(ranks: int, empty: set[int], *rest: int) -> Shapes:
    """Uneven batches, none on the ranks in `empty`."""
    shapes = uneven(ranks, *rest)
    return tuple((0, *rest) if r in empty else shape for r, shape in enumerate(shapes))


def case(clause: str, title: str, ranks: int, *steps: Step, **fields: Any) -> Case:
    """A case of a layer with 3 channels, unless `layer` says otherwise."""
    layer = {"num_features": 3} | fields.pop("layer", {})
    return Case(clause, title, ranks, layer, steps, **fields)


def constructors(ranks: int) -> Iterator[Case]:
    yield case("CTOR-1", "signature", ranks, checks=("signature",), state="initial")


def affine(ranks: int) -> Iterator[Case]:
    for on in (True, False):
        yield _constructed("CTOR-2", f"affine={on}", ranks, {"affine": on})


def tracking(ranks: int) -> Iterator[Case]:
    for on in (True, False):
        yield _constructed(
            "CTOR-3", f"track_running_stats={on}", ranks, {"track_running_stats": on}
        )


def dtypes(ranks: int) -> Iterator[Case]:
    for dtype in (None, "float32", "float16", "bfloat16", "float64"):
        yield _constructed("CTOR-4", f"dtype={dtype}", ranks, {"dtype": dtype})


def _constructed(clause: str, title: str, ranks: int, layer: dict[str, Any]) -> Case:
    checks = ("parameters", "initial_values")
    return case(clause, title, ranks, layer=layer, checks=checks, state="initial")


def checkpoints(ranks: int) -> Iterator[Case]:
    for on in (True, False):
        layer = {"affine": on, "track_running_stats": on}
        yield case(
            "CTOR-5",
            f"state_dict, affine and tracking {on}",
            ranks,
            layer=layer,
            checks=("state_names",),
            state="initial",
        )
    loaded = Step(uneven(ranks, 3, 4), mode="eval", backward=False)
    yield case("CTOR-5", "a BatchNorm's state_dict decides eval", ranks, loaded, checks=("y",))


def wrong_num_features(ranks: int) -> Iterator[Case]:
    for value in (3.0, "3", None, True, [3]):
        yield _refused("ERR-1", ranks, "TypeError", num_features=value)
    integer = {"num_features": {"numpy": "int64", "value": 4}}
    yield _accepted("ERR-1", ranks, integer)


def wrong_eps(ranks: int) -> Iterator[Case]:
    for value in (1, "1e-5", None, True):
        yield _refused("ERR-2", ranks, "TypeError", eps=value)


def too_few_features(ranks: int) -> Iterator[Case]:
    for value in (0, -1):
        yield _refused("ERR-3", ranks, "ValueError", num_features=value)


def momentum_range(ranks: int) -> Iterator[Case]:
    for value in (1.5, -0.1, {"float": "nan"}):
        yield _refused("ERR-4", ranks, "ValueError", momentum=value)
    for limit in (0, 1, 0.0, 1.0, None):
        yield _accepted("ERR-4", ranks, {"momentum": limit})


def rank_ids(ranks: int) -> Iterator[Case]:
    for value in ([0, ranks], [-1, 0]):
        yield _refused("ERR-5", ranks, "ValueError", process_group=value)


def wrong_arguments(ranks: int) -> Iterator[Case]:
    for error, arguments in (
        ("TypeError", {"momentum": "0.1"}),
        ("TypeError", {"momentum": True}),
        ("TypeError", {"affine": 1}),
        ("TypeError", {"affine": None}),
        ("TypeError", {"track_running_stats": "yes"}),
        ("TypeError", {"dtype": "float33"}),
        ("TypeError", {"dtype": "int32"}),
        ("ValueError", {"eps": -1e-5}),
        ("ValueError", {"eps": {"float": "nan"}}),
    ):
        yield _refused("ERR-8", ranks, error, **arguments)


def _refused(clause: str, ranks: int, error: str, **layer: Any) -> Case:
    (name, value), *_ = layer.items()
    return case(clause, f"{name}={value!r}", ranks, layer=layer, error=error)


def _accepted(clause: str, ranks: int, layer: dict[str, Any]) -> Case:
    (name, value), *_ = layer.items()
    title = f"{name}={value!r} is accepted"
    return case(clause, title, ranks, layer=layer, checks=("parameters",), state="initial")


def wrong_shapes(ranks: int) -> Iterator[Case]:
    everyone = ExpectedError("ValueError", tuple(range(ranks)))
    for title, shape in (
        ("1 dimension", (3,)),
        ("0 channels", (4, 0, 5)),
        ("2 channels for 3", (4, 2, 5)),
    ):
        for mode in ("train", "eval"):
            step = Step(even(ranks, *shape), mode=mode, backward=False, error=everyone)
            yield case("ERR-6", f"{title}, {mode}", ranks, step, checks=MOVED)


def single_value(ranks: int) -> Iterator[Case]:
    everyone = ExpectedError("ValueError", tuple(range(ranks)))
    for rest in ((3,), (3, 1, 1)):
        shapes = ((1, *rest), *even(ranks - 1, 0, *rest))
        step = Step(shapes, error=everyone)
        yield case("ERR-7", f"one value, {len(rest) + 1} dimensions", ranks, step, checks=MOVED)
    if ranks > 1:
        step = Step(even(ranks, 1, 3))
        yield case("ERR-7", "one value on each rank is enough", ranks, step, checks=("y",))


def failing_together(ranks: int) -> Iterator[Case]:
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
        shapes = tuple(shape if r in at else one for r, one in enumerate(good.shapes))
        bad = Step(shapes, error=ExpectedError("Exception", at))
        yield case("ERR-9", title, ranks, good, bad, good, checks=("y", *MOVED))
    integers = tuple("int64" if rank == 1 else "float32" for rank in range(ranks))
    bad = Step(good.shapes, dtype=integers, error=ExpectedError("Exception", (1,)))
    yield case("ERR-9", "rank 1 has integers", ranks, bad, good, checks=("y", *MOVED))
    if ranks > 3:
        halves = (tuple(range(ranks // 2)), tuple(range(ranks // 2, ranks)))
        shapes = ((2, 2, 4), *good.shapes[1:])
        bad = Step(shapes, error=ExpectedError("Exception", (0,)))
        yield case(
            "ERR-9",
            "one group fails, the other goes on",
            ranks,
            bad,
            good,
            groups=halves,
            checks=("y", *MOVED),
        )


def forward(ranks: int) -> Iterator[Case]:
    def one(title: str, shapes: Shapes, seed: int = 0, **layer: Any) -> Case:
        step = Step(shapes, backward=False)
        return case("FWD-1", title, ranks, step, layer=layer, checks=("y",), seed=seed)

    for seed in range(3):
        yield one(f"images, seed {seed}", even(ranks, 4, 3, 5, 6), seed)
    yield one("matrices", even(ranks, 6, 3))
    yield one("affine=False", even(ranks, 4, 3, 7), affine=False)
    yield one("eps=0.1", even(ranks, 4, 3, 7), eps=0.1)
    yield one("eps=0.0", even(ranks, 4, 3, 7), eps=0.0)
    for channels in (1, 64, 65, 257):
        yield one(f"{channels} channels", even(ranks, 2, channels, 5), num_features=channels)


def dimensions(ranks: int) -> Iterator[Case]:
    checks = ("y", "format", "input_unmodified")
    for spatial in ((), (5,), (5, 4), (3, 4, 2), (2, 3, 1, 2)):
        for mode in ("train", "eval"):
            step = Step(uneven(ranks, 3, *spatial), mode=mode)
            yield case(
                "FWD-2", f"{len(spatial) + 2} dimensions, {mode}", ranks, step, checks=checks
            )
    for spatial in ((5,), (5, 4), (3, 4, 2)):
        step = Step(uneven(ranks, 3, *spatial), layout="channels_last")
        yield case(
            "FWD-2", f"{len(spatial) + 2} dimensions, channels_last", ranks, step, checks=checks
        )


def uneven_shards(ranks: int) -> Iterator[Case]:
    big = tuple((16 if rank == 0 else 1, 3, 6) for rank in range(ranks))
    for title, shapes in (
        ("batch sizes", uneven(ranks, 3, 5, 4)),
        ("batch sizes of matrices", uneven(ranks, 3)),
        ("batch and spatial sizes", ragged(ranks, 3)),
        ("16 images on rank 0, 1 elsewhere", big),
        ("spatial sizes", tuple((2, 3, 1 + 2 * rank) for rank in range(ranks))),
    ):
        step = Step(shapes, backward=False)
        yield case("FWD-3", title, ranks, step, checks=("y",))


def _empty_patterns(ranks: int) -> Iterator[tuple[str, set[int]]]:
    yield "every rank is empty", set(range(ranks))
    if ranks > 1:
        yield "rank 0 is empty", {0}
        yield "the last rank is empty", {ranks - 1}
        yield "all but rank 1 are empty", set(range(ranks)) - {1}


def empty_shards(ranks: int) -> Iterator[Case]:
    for title, empty in _empty_patterns(ranks):
        for rest in ((3,), (3, 4, 3)):
            step = Step(holes(ranks, empty, *rest), backward=False)
            yield case(
                "FWD-4", f"{title}, {len(rest) + 1} dimensions", ranks, step, checks=("y", "format")
            )
    for dtype in ("float16", "bfloat16"):
        step = Step(holes(ranks, {0}, 3, 4), dtype=dtype, backward=False)
        yield case("FWD-4", f"rank 0 is empty, {dtype}", ranks, step, checks=("y", "format"))


def _groupings(ranks: int) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    everyone = tuple(range(ranks))
    yield "all in one", (everyone,)
    if ranks > 1:
        yield "each alone", tuple((rank,) for rank in everyone)
    if ranks > 2:
        yield "unequal sizes", (everyone[:-1], everyone[-1:])
        yield "rank 1 in none", (tuple(rank for rank in everyone if rank != 1),)
    if ranks > 3:
        yield "neighbours", (everyone[: ranks // 2], everyone[ranks // 2 :])
        yield "every other", (everyone[::2], everyone[1::2])


def groups(ranks: int) -> Iterator[Case]:
    for title, grouping in _groupings(ranks):
        step = Step(uneven(ranks, 3, 5), backward=False)
        yield case("FWD-5", title, ranks, step, groups=grouping, checks=("y",))


def partitions(ranks: int) -> Iterator[Case]:
    total = 6 * ranks
    skewed = [1] * (ranks - 1) + [total - ranks + 1]
    for title, batches in (
        ("even cut", [6] * ranks),
        ("skewed cut", skewed),
        ("all on rank 0", [total] + [0] * (ranks - 1)),
    ):
        shapes = tuple((batch, 3, 4) for batch in batches)
        step = Step(shapes, x=Data(shared=True, ratio=10.0))
        yield case("FWD-6", title, ranks, step, checks=("y", "grad_input"))


def layouts(ranks: int) -> Iterator[Case]:
    for spatial in ((5,), (5, 4), (3, 4, 2)):
        for layout in ("channels_last", "permuted", "sliced", "expanded"):
            step = Step(uneven(ranks, 3, *spatial), layout=layout, backward=False)
            yield case(
                "FWD-7", f"{layout}, {len(spatial) + 2} dimensions", ranks, step, checks=("y",)
            )
    mixed = tuple(("contiguous", "channels_last", "sliced")[rank % 3] for rank in range(ranks))
    step = Step(ragged(ranks, 3), layout=mixed, backward=False)
    yield case("FWD-7", "a different layout on each rank", ranks, step, checks=("y",))


def input_gradients(ranks: int) -> Iterator[Case]:
    def one(title: str, shapes: Shapes, **fields: Any) -> Case:
        layer, seed = fields.pop("layer", {}), fields.pop("seed", 0)
        grouping = fields.pop("groups", None)
        return case(
            "GRAD-1",
            title,
            ranks,
            Step(shapes, **fields),
            layer=layer,
            seed=seed,
            groups=grouping,
            checks=("grad_input",),
        )

    for seed in range(3):
        yield one(f"uneven images, seed {seed}", uneven(ranks, 3, 5, 4), seed=seed)
    yield one("even images", even(ranks, 4, 3, 5, 4))
    yield one("batch and spatial sizes", ragged(ranks, 3))
    yield one("matrices", uneven(ranks, 3))
    yield one("volumes", uneven(ranks, 3, 2, 3, 2))
    yield one("affine=False", uneven(ranks, 3, 5), layer={"affine": False})
    yield one(
        "track_running_stats=False", uneven(ranks, 3, 5), layer={"track_running_stats": False}
    )
    yield one("eps=0.1", uneven(ranks, 3, 5), layer={"eps": 0.1})
    yield one("dy of zero sum", uneven(ranks, 3, 40), dy_zero_sum=True)
    for title, grouping in _groupings(ranks):
        yield one(f"groups: {title}", uneven(ranks, 3, 5), groups=grouping)
    kinds = ("contiguous", "channels_last", "permuted", "sliced", "expanded")
    for layout in kinds:
        for dy_layout in kinds:
            if layout != dy_layout:
                yield one(
                    f"x {layout}, dy {dy_layout}",
                    uneven(ranks, 3, 5, 4),
                    layout=layout,
                    dy_layout=dy_layout,
                )


def parameter_gradients(ranks: int) -> Iterator[Case]:
    checks = ("grad_weight", "grad_bias")
    for title, shapes in (
        ("even images", even(ranks, 4, 3, 5, 4)),
        ("uneven images", uneven(ranks, 3, 5, 4)),
        ("batch and spatial sizes", ragged(ranks, 3)),
        ("matrices", uneven(ranks, 3)),
    ):
        yield case("GRAD-2", title, ranks, Step(shapes), checks=checks)
    step = Step(uneven(ranks, 3, 5, 4), layout="channels_last", dy_layout="sliced")
    yield case("GRAD-2", "channels_last", ranks, step, checks=checks)
    for title, grouping in _groupings(ranks):
        step = Step(uneven(ranks, 3, 5))
        yield case("GRAD-2", f"groups: {title}", ranks, step, groups=grouping, checks=checks)


def empty_gradients(ranks: int) -> Iterator[Case]:
    for title, empty in _empty_patterns(ranks):
        for dtype in ("float32", "bfloat16"):
            step = Step(holes(ranks, empty, 3, 4), dtype=dtype)
            yield case("GRAD-3", f"{title}, {dtype}", ranks, step, checks=GRADIENTS)
    step = Step(holes(ranks, {0}, 3, 4))
    yield case(
        "GRAD-3",
        "rank 0 is empty, affine=False",
        ranks,
        step,
        layer={"affine": False},
        checks=("grad_input",),
    )


def frozen(ranks: int) -> Iterator[Case]:
    everyone, shapes = tuple(range(ranks)), uneven(ranks, 3, 5)
    patterns: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
        ("input frozen", everyone, ()),
        ("parameters frozen", (), everyone),
    ]
    if ranks > 1:
        patterns += [
            ("input frozen on rank 0", (0,), ()),
            ("parameters frozen on rank 1", (), (1,)),
            ("input frozen on rank 0, parameters on the others", (0,), everyone[1:]),
        ]
    for title, inputs, parameters in patterns:
        step = Step(shapes, frozen_input=inputs, frozen_parameters=parameters)
        yield case("GRAD-4", title, ranks, step, checks=GRADIENTS)
    if ranks > 1:
        alone = Step(
            shapes,
            frozen_input=(0,),
            frozen_parameters=(0,),
            error=ExpectedError("Exception", (0,)),
        )
        yield case(
            "GRAD-4",
            "rank 0 has nothing to differentiate",
            ranks,
            alone,
            Step(shapes),
            checks=("y", *GRADIENTS),
        )


def running_mean(ranks: int) -> Iterator[Case]:
    for momentum in (0.1, 0.0, 1.0, 0.35, 0, 1):
        yield case(
            "STAT-1",
            f"momentum={momentum!r}, 3 steps",
            ranks,
            *_three(ranks),
            layer={"momentum": momentum},
            checks=("running_mean",),
        )


def running_var(ranks: int) -> Iterator[Case]:
    for title, shapes in (
        ("even shards", even(ranks, 2, 3, 2)),
        ("uneven shards", uneven(ranks, 3, 2)),
        ("batch and spatial sizes", ragged(ranks, 3)),
        ("few values", even(ranks, 2 if ranks == 1 else 1, 3)),
    ):
        step = Step(shapes, backward=False)
        yield case("STAT-2", title, ranks, step, layer={"momentum": 1.0}, checks=("running_var",))
    yield case("STAT-2", "3 steps", ranks, *_three(ranks), checks=("running_var",))
    for title, grouping in _groupings(ranks):
        if all(len(group) > 1 for group in grouping):
            step = Step(even(ranks, 1, 3, 2), backward=False)
            yield case(
                "STAT-2", f"groups: {title}", ranks, step, groups=grouping, checks=("running_var",)
            )


def agreement(ranks: int) -> Iterator[Case]:
    if ranks < 2:
        return
    checks = ("ranks_agree",)
    for momentum in (0.1, None):
        yield case(
            "STAT-3",
            f"momentum={momentum}",
            ranks,
            *_three(ranks),
            layer={"momentum": momentum},
            checks=checks,
        )
    for dtype in ("float16", "bfloat16", "float64"):
        yield case(
            "STAT-3",
            dtype,
            ranks,
            *_three(ranks, dtype=dtype),
            layer={"dtype": dtype},
            checks=checks,
        )
    step = Step(holes(ranks, {0}, 3, 4), backward=False)
    yield case("STAT-3", "rank 0 is empty", ranks, step, step, checks=checks)
    for title, grouping in _groupings(ranks):
        yield case(
            "STAT-3", f"groups: {title}", ranks, *_three(ranks), groups=grouping, checks=checks
        )


def cumulative(ranks: int) -> Iterator[Case]:
    layer = {"momentum": None}
    checks = ("running_mean",)
    yield case("STAT-4", "3 uneven steps", ranks, *_three(ranks), layer=layer, checks=checks)
    empty = Step(even(ranks, 0, 3, 4), backward=False)
    first, *rest = _three(ranks)
    yield case(
        "STAT-4",
        "a step without data does not weigh",
        ranks,
        first,
        empty,
        *rest,
        layer=layer,
        checks=checks,
    )


def batches_tracked(ranks: int) -> Iterator[Case]:
    evaluation = Step(uneven(ranks, 3, 4), mode="eval", backward=False)
    for momentum in (0.1, 0.0, None):
        yield case(
            "STAT-5",
            f"momentum={momentum}",
            ranks,
            *_three(ranks),
            evaluation,
            layer={"momentum": momentum},
            checks=("num_batches_tracked",),
        )


def unchanged(ranks: int) -> Iterator[Case]:
    train = Step(uneven(ranks, 3, 4), backward=False)
    evaluation = Step(uneven(ranks, 3, 4), mode="eval")
    empty = Step(even(ranks, 0, 3, 4))
    yield case("STAT-6", "eval", ranks, train, evaluation, evaluation, checks=MOVED)
    yield case("STAT-6", "a group without data", ranks, train, empty, checks=MOVED)
    yield case("STAT-6", "a group without data comes first", ranks, empty, train, checks=MOVED)


def repeated(ranks: int) -> Iterator[Case]:
    step = Step(uneven(ranks, 3, 4), recompute=True)
    yield case(
        "STAT-7",
        "a recomputed forward counts twice, gradients once",
        ranks,
        step,
        step,
        checks=(*GRADIENTS, *MOVED),
    )
    everyone = tuple(range(ranks))
    aborted = Step(even(ranks, 2, 4, 5), error=ExpectedError("ValueError", everyone))
    good = Step(uneven(ranks, 3, 4))
    yield case(
        "STAT-7",
        "an aborted step changes nothing",
        ranks,
        good,
        aborted,
        good,
        checks=("y", *MOVED),
    )


def _three(ranks: int, **fields: Any) -> tuple[Step, Step, Step]:
    """Three training steps of different sizes."""
    matrices = tuple((2 + rank % 3, 3) for rank in range(ranks))
    shapes = (uneven(ranks, 3, 4), matrices, ragged(ranks, 3))
    one, two, three = (Step(shape, backward=False, **fields) for shape in shapes)
    return one, two, three


def evaluation(ranks: int) -> Iterator[Case]:
    def one(title: str, *steps: Step, **layer: Any) -> Case:
        return case("EVAL-1", title, ranks, *steps, layer=layer, checks=("y",))

    for spatial in ((), (5,), (5, 4), (3, 4, 2), (2, 3, 1, 2)):
        step = Step(uneven(ranks, 3, *spatial), mode="eval", backward=False)
        yield one(f"{len(spatial) + 2} dimensions", step)
    step = Step(uneven(ranks, 3, 5), mode="eval", backward=False)
    yield one("affine=False", step, affine=False)
    yield one("one value", Step(even(ranks, 1, 3), mode="eval", backward=False))
    yield one("no data", Step(even(ranks, 0, 3, 4), mode="eval", backward=False))


def silent_eval(ranks: int) -> Iterator[Case]:
    for tracked in (True, False):
        layer = {"track_running_stats": tracked}
        step = Step(uneven(ranks, 3, 4), mode="eval", present=(0,))
        yield case(
            "EVAL-2",
            f"rank 0 alone, track_running_stats={tracked}",
            ranks,
            step,
            layer=layer,
            checks=("y", "collectives"),
        )


def eval_gradients(ranks: int) -> Iterator[Case]:
    def one(title: str, step: Step, **layer: Any) -> Case:
        return case("EVAL-3", title, ranks, step, layer=layer, checks=GRADIENTS)

    for spatial in ((), (5,), (5, 4), (3, 4, 2)):
        yield one(f"{len(spatial) + 2} dimensions", Step(uneven(ranks, 3, *spatial), mode="eval"))
    yield one("channels_last", Step(uneven(ranks, 3, 5, 4), mode="eval", layout="channels_last"))
    yield one("affine=False", Step(uneven(ranks, 3, 5), mode="eval"), affine=False)
    yield one("no data on rank 0", Step(holes(ranks, {0}, 3, 4), mode="eval"))


def untracked_training(ranks: int) -> Iterator[Case]:
    layer = {"track_running_stats": False}
    for title, shapes in (("images", uneven(ranks, 3, 5, 4)), ("matrices", uneven(ranks, 3))):
        yield case(
            "TRACK-1",
            title,
            ranks,
            Step(shapes),
            Step(shapes),
            layer=layer,
            checks=("y", *GRADIENTS, *RUNNING, "num_batches_tracked"),
        )


def untracked_eval(ranks: int) -> Iterator[Case]:
    layer = {"track_running_stats": False}
    for title, shapes in (
        ("images", uneven(ranks, 3, 5, 4)),
        ("matrices", even(ranks, 4, 3)),
        ("no data on rank 0", holes(ranks, {0}, 3, 4)),
    ):
        step = Step(shapes, mode="eval")
        yield case("TRACK-2", title, ranks, step, layer=layer, checks=("y", *GRADIENTS))


def numerics(ranks: int) -> Iterator[Case]:
    def one(title: str, step: Step, **layer: Any) -> Case:
        return case("NUM-1", title, ranks, step, layer={"momentum": 1.0} | layer, checks=ALL)

    shapes = tuple((8 + rank, 3, 16, 16) for rank in range(ranks))
    for ratio in (0.0, 1.0, 30.0, 1e3, 1e4, 1e5):
        for layout in ("contiguous", "channels_last"):
            step = Step(
                shapes, x=Data(ratio=ratio), layout=layout, dy_layout=layout, dy_zero_sum=True
            )
            yield one(f"mean/std {ratio:g}, {layout}", step)
    yield one(
        "mean/std 1e5, matrices",
        Step(tuple((500 + rank, 3) for rank in range(ranks)), x=Data(ratio=1e5)),
    )
    for scale in (1e-18, 1e-9, 1e9, 1e18):
        step = Step(shapes, x=Data(ratio=1.0, scale=scale))
        yield one(f"scale {scale:g}", step, eps=0.0)
    for scale in (1e-4, 1e-6):
        yield one(f"std {scale:g}, far below sqrt(eps)", Step(shapes, x=Data(10.0, scale)))
    yield one("constant channels", Step(shapes, x=Data(ratio=1e3, constant=True)))
    for ratio in (0.0, 1e5):
        step = Step(shapes, dtype="float64", x=Data(ratio=ratio), dy_zero_sum=True)
        yield one(f"float64, mean/std {ratio:g}", step, dtype="float64")


def halves(ranks: int) -> Iterator[Case]:
    for dtype in ("float16", "bfloat16"):
        for parameters in ("float32", dtype):
            for title, shapes, layout in (
                ("images", ragged(ranks, 3), "contiguous"),
                ("channels_last", uneven(ranks, 3, 16, 16), "channels_last"),
                ("matrices", uneven(ranks, 3), "contiguous"),
                ("many values", even(ranks, 16, 3, 40, 40), "contiguous"),
            ):
                step = Step(shapes, dtype=dtype, x=Data(ratio=3.0), layout=layout)
                evaluate = Step(shapes, dtype=dtype, mode="eval", layout=layout)
                yield case(
                    "NUM-2",
                    f"{dtype}, parameters {parameters}, {title}",
                    ranks,
                    step,
                    evaluate,
                    layer={"dtype": parameters},
                    checks=ALL,
                )


def counts(ranks: int) -> Iterator[Case]:
    for dtype in ("float32", "float16", "bfloat16"):
        for count in (2049, 65521):
            shapes = tuple((1, 1, count + rank) for rank in range(ranks))
            step = Step(shapes, dtype=dtype, x=Data(ratio=1.0))
            yield case(
                "NUM-3",
                f"{count} values per rank, {dtype}",
                ranks,
                step,
                layer={"num_features": 1, "dtype": dtype, "momentum": 1.0},
                checks=ALL,
            )
    shapes = tuple((1, 1, 2**24 + 3 if rank == 0 else 5) for rank in range(ranks))
    step = Step(shapes, x=Data(ratio=1.0), backward=False)
    yield case(
        "NUM-3",
        "2^24 + 3 values on rank 0",
        ranks,
        step,
        deadline=120.0,
        layer={"num_features": 1, "momentum": 1.0},
        checks=RUNNING,
    )


def poison(ranks: int) -> Iterator[Case]:
    for value in ("nan", "inf"):
        for mode in ("train", "eval"):
            place = (ranks - 1, 0, 1, 0)
            step = Step(even(ranks, 2, 3, 4), mode=mode, x=Data(poison=((place, value),)))
            yield case(
                "NUM-4",
                f"{value} in channel 1 of the last rank, {mode}",
                ranks,
                step,
                checks=("y", *GRADIENTS, "running_mean"),
            )


def collectives(ranks: int) -> Iterator[Case]:
    train = Step(uneven(ranks, 3, 4))
    evaluate = Step(uneven(ranks, 3, 4), mode="eval")
    for layer in ({}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}):
        title = ", ".join(f"{name}={value}" for name, value in layer.items()) or "defaults"
        yield case("COMM-1", title, ranks, train, evaluate, layer=layer, checks=("collectives",))
    step = Step(holes(ranks, {0}, 3, 4))
    yield case("COMM-1", "rank 0 is empty", ranks, step, checks=("collectives",))


_BUILDERS: tuple[Builder, ...] = (
    constructors,
    affine,
    tracking,
    dtypes,
    checkpoints,
    wrong_num_features,
    wrong_eps,
    too_few_features,
    momentum_range,
    rank_ids,
    wrong_shapes,
    single_value,
    wrong_arguments,
    failing_together,
    forward,
    dimensions,
    uneven_shards,
    empty_shards,
    groups,
    partitions,
    layouts,
    input_gradients,
    parameter_gradients,
    empty_gradients,
    frozen,
    running_mean,
    running_var,
    agreement,
    cumulative,
    batches_tracked,
    unchanged,
    repeated,
    evaluation,
    silent_eval,
    eval_gradients,
    untracked_training,
    untracked_eval,
    numerics,
    halves,
    counts,
    poison,
    collectives,
)
