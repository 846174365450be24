"""What the cases are built from: shapes, patterns over ranks, and the register of clauses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from syncbn.conformance.case import Step

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
Draft: TypeAlias = dict[str, Any]  # the fields of a Case, but for its clause and ranks
Builder: TypeAlias = Callable[[int], Iterator[Draft]]

GRADIENTS = ("grad_input", "grad_weight", "grad_bias")
RUNNING = ("running_mean", "running_var")
# Enough to see whether a step moved the statistics, without the question how var is unbiased.
MOVED = ("running_mean", "num_batches_tracked")
ALL = ("y", *GRADIENTS, *RUNNING)

BUILDERS: dict[str, Builder] = {}
SWEEPS: dict[str, Builder] = {}


def asks(clause: str, register: dict[str, Builder] = BUILDERS) -> Callable[[Builder], Builder]:
    """Register a function from a number of ranks to the cases of a clause."""

    def add(builder: Builder) -> Builder:
        assert clause not in register
        register[clause] = builder
        return builder

    return add


def sweeps(clause: str) -> Callable[[Builder], Builder]:
    """The same for cases that only the profile `full` has."""
    return asks(clause, SWEEPS)


def products(**factors: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each factor."""
    for values in itertools.product(*factors.values()):
        yield dict(zip(factors, values, strict=True))


def titled(**chosen: Any) -> str:
    """A title that names what was chosen."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items())


def case(title: str, *steps: Step, **fields: Any) -> Draft:
    """A case of a layer with 3 channels, unless `layer` says otherwise."""
    layer = {"num_features": 3} | fields.pop("layer", {})
    return {"title": title, "steps": steps, "layer": layer, **fields}


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


def empty_patterns(ranks: int) -> Iterator[tuple[str, set[int]]]:
    yield "every rank is empty", set(range(ranks))
    if ranks > 1:
        yield "rank 0 is empty", {0}
        yield "the last rank is empty", {ranks - 1}
        yield "all but rank 1 are empty", set(range(ranks)) - {1}


def groupings(ranks: int) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
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
