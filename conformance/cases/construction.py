"""How the layer is built: CTOR-1 to CTOR-8, and the arguments that it refuses: ERR-1 to ERR-8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from syncbn.conformance.case import Step
from syncbn.conformance.cases.build import GRADIENTS, MOVED, Draft, case, cases_of, uneven

_DTYPES = ("float32", "float16", "bfloat16", "float64")


@cases_of("CTOR-1")
def constructors(ranks: int) -> Iterator[Draft]:
    yield case("signature", checks=("signature",), state="initial")


@cases_of("CTOR-2")
def affine(ranks: int) -> Iterator[Draft]:
    for on in (True, False):
        yield _constructed({"affine": on}, "parameters")


@cases_of("CTOR-3")
def tracking(ranks: int) -> Iterator[Draft]:
    for on in (True, False):
        yield _constructed({"track_running_stats": on}, "parameters")


@cases_of("CTOR-4")
def dtypes(ranks: int) -> Iterator[Draft]:
    for dtype in _DTYPES:
        yield _constructed({"dtype": dtype}, "parameters")


@cases_of("CTOR-5")
def checkpoints(ranks: int) -> Iterator[Draft]:
    for on in (True, False):
        layer = {"affine": on, "track_running_stats": on}
        yield case(
            f"state_dict, affine and tracking {on}",
            layer=layer,
            checks=("state_names",),
            state="initial",
        )
    loaded = Step(uneven(ranks, 3, 4), mode="eval", backward=False)
    yield case("a BatchNorm's state_dict decides eval", loaded, checks=("y",))
    train, again = Step(uneven(ranks, 3, 4)), Step(uneven(ranks, 3, 4), reload=True)
    for momentum in (0.1, None):
        yield case(
            f"a checkpoint between steps, momentum={momentum}",
            *(train, again, again),
            layer={"momentum": momentum},
            checks=("y", *GRADIENTS, *MOVED),
        )


@cases_of("CTOR-6")
def live_attributes(ranks: int) -> Iterator[Draft]:
    def changed(mode: str = "train", **attributes: Any) -> Step:
        return Step(uneven(ranks, 3, 4), mode=mode, attributes=attributes)

    first, after = Step(uneven(ranks, 3, 4)), Step(uneven(ranks, 3, 4))
    evaluate = Step(uneven(ranks, 3, 4), mode="eval")
    checks = ("y", *GRADIENTS, *MOVED)
    yield case("eps is set to 0.1", first, changed(eps=0.1), after, checks=checks)
    yield case("eps is set to 0.1, eval", evaluate, changed("eval", eps=0.1), checks=checks)
    for start, then in ((0.1, 0.5), (0.1, None), (None, 0.1), (0.1, 0.0)):
        steps = (first, changed(momentum=then), after)
        title = f"momentum={start} is set to {then}"
        yield case(title, *steps, layer={"momentum": start}, checks=checks)
    off, on = changed(track_running_stats=False), changed(track_running_stats=True)
    title = "track_running_stats is set to False, then to True"
    yield case(title, off, evaluate, on, checks=checks)


@cases_of("CTOR-7")
def starts(ranks: int) -> Iterator[Draft]:
    for on in (True, False):
        yield _constructed({"affine": on}, "initial_values")
        yield _constructed({"track_running_stats": on}, "initial_values")
    yield _constructed({"dtype": None}, "parameters", "statistics_dtype", "initial_values")
    for dtype in _DTYPES:
        yield _constructed({"dtype": dtype}, "statistics_dtype", "initial_values")


@cases_of("CTOR-8")
def copies(ranks: int) -> Iterator[Draft]:
    step = Step(uneven(ranks, 3, 4))
    copied = replace(step, copied=True)
    for layer in ({"eps": 0.1}, {"momentum": None}, {"affine": False}):
        ((name, value),) = layer.items()
        title = f"a deep copy goes on, {name}={value}"
        yield case(title, step, copied, step, layer=layer, checks=("y", *GRADIENTS, *MOVED))
    evaluate = replace(copied, mode="eval")
    yield case("a deep copy in eval", step, evaluate, layer={"eps": 0.1}, checks=("y", *GRADIENTS))
    for dtype in ("float16", "bfloat16", "float64"):
        train = replace(step, dtype=dtype)
        steps = (train, train, replace(train, mode="eval"))
        checks = ("parameters", "statistics_dtype", "y", *GRADIENTS, *MOVED)
        yield case(f"a layer cast to {dtype}", *steps, cast=dtype, checks=checks)


@cases_of("ERR-1")
def wrong_num_features(ranks: int) -> Iterator[Draft]:
    for value in (3.0, "3", None, [3]):
        yield _refused("TypeError", num_features=value)


@cases_of("ERR-2")
def wrong_eps(ranks: int) -> Iterator[Draft]:
    for value in (1, "1e-5", "small", None, True):
        yield _refused("TypeError", eps=value)


@cases_of("ERR-3")
def too_few_features(ranks: int) -> Iterator[Draft]:
    for value in (0, -1):
        yield _refused("ValueError", num_features=value)


@cases_of("ERR-4")
def momentum_range(ranks: int) -> Iterator[Draft]:
    for value in (1.5, -0.1, {"float": "nan"}):
        yield _refused("ValueError", momentum=value)
    for limit in (0.0, 1.0):
        yield _accepted({"momentum": limit})


@cases_of("ERR-5")
def rank_ids(ranks: int) -> Iterator[Draft]:
    for value in ([0, ranks], [-1, 0]):
        yield _refused("ValueError", process_group=value)


@cases_of("ERR-8")
def wrong_arguments(ranks: int) -> Iterator[Draft]:
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
        yield _refused(error, **arguments)
    yield _refused("TypeError", num_features=True)
    yield _accepted({"num_features": {"numpy": "int64", "value": 4}})
    for momentum in (0, 1, None):
        yield _accepted({"momentum": momentum})
    for momentum in (0, 1):
        step = Step(uneven(ranks, 3, 4), backward=False)
        title = f"momentum={momentum}, an int, 2 steps"
        yield case(title, step, step, layer={"momentum": momentum}, checks=("running_mean",))


def _constructed(layer: dict[str, Any], *checks: str) -> Draft:
    ((name, value),) = layer.items()
    return case(f"{name}={value}", layer=layer, checks=checks, state="initial")


def _refused(error: str, **layer: Any) -> Draft:
    (name, value), *_ = layer.items()
    shown = value["float"] if isinstance(value, dict) else repr(value)
    return case(f"{name}={shown}", layer=layer, error=error)


def _accepted(layer: dict[str, Any]) -> Draft:
    (name, value), *_ = layer.items()
    title = f"{name}={value!r} is accepted"
    return case(title, layer=layer, checks=("parameters",), state="initial")
