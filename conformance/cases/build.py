"""Parts of cases: shapes, patterns over ranks, and the register of what builds the cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from syncbn.conformance.case import Step

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
Draft: TypeAlias = dict[str, Any]  # the fields of a Case, except its clause and ranks
Builder: TypeAlias = Callable[[int], Iterator[Draft]]

GRADIENTS = ("grad_input", "grad_weight", "grad_bias")
RUNNING = ("running_mean", "running_var")
# Enough to see whether a step moved the statistics, whatever the layer does to make var unbiased.
MOVED = ("running_mean", "num_batches_tracked")
ALL = ("y", *GRADIENTS, *RUNNING)

BUILDERS: dict[str, Builder] = {}
SWEEPS: dict[str, Builder] = {}


def cases_of(clause: str, register: dict[str, Builder] = BUILDERS) -> Callable[[Builder], Builder]:
    """Register a function that builds the cases of a clause for a number of ranks."""

    def add(builder: Builder) -> Builder:
        assert clause not in register
        register[clause] = builder
        return builder

    return add


def sweep_of(clause: str) -> Callable[[Builder], Builder]:
    """The same for cases that only the profile `full` has."""
    return cases_of(clause, SWEEPS)


def products(**factors: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each factor."""
    for values in itertools.product(*factors.values()):
        yield dict(zip(factors, values, strict=True))


def titled(**chosen: Any) -> str:
    """A title made of names and values."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items())


def case(title: str, *steps: Step, **fields: Any) -> Draft:
    """A case of a layer with 3 channels, unless `layer` sets another number."""
    layer = {"num_features": 3} | fields.pop("layer", {})
    return {"title": title, "steps": steps, "layer": layer, **fields}


def even(ranks: int, *shape: int) -> Shapes:
    """The same shape on every rank."""
    return (shape,) * ranks


def uneven(ranks: int, *rest: int) -> Shapes:
    """Batches of 3, 2, 4, 1, 5, ... on shapes (N, *rest)."""
    return tuple(((3, 2, 4, 1, 5)[rank % 5], *rest) for rank in range(ranks))


def varied(ranks: int, channels: int) -> Shapes:
    """Images that differ between ranks in the batch and in both spatial sizes."""
    return tuple((1 + rank % 3, channels, 4 + rank, 5 - rank % 4) for rank in range(ranks))


def with_empty(ranks: int, empty: set[int], *rest: int) -> Shapes:
    """Uneven batches; the ranks in `empty` have an empty one."""
    shapes = uneven(ranks, *rest)
    return tuple((0, *rest) if r in empty else shape for r, shape in enumerate(shapes))


def empty_patterns(ranks: int) -> Iterator[tuple[str, set[int]]]:
    """Titles, and which ranks are empty."""
    yield "every rank is empty", set(range(ranks))
    if ranks > 1:
        yield "rank 0 is empty", {0}
        yield "the last rank is empty", {ranks - 1}
        yield "all but rank 1 are empty", set(range(ranks)) - {1}


def groupings(ranks: int) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    """Titles, and the ranks of each process group."""
    all_ranks = tuple(range(ranks))
    yield "all in one", (all_ranks,)
    if ranks > 1:
        yield "each alone", tuple((rank,) for rank in all_ranks)
    if ranks > 2:
        yield "unequal sizes", (all_ranks[:-1], all_ranks[-1:])
        yield "rank 1 in none", (tuple(rank for rank in all_ranks if rank != 1),)
    if ranks > 3:
        yield "neighbours", (all_ranks[: ranks // 2], all_ranks[ranks // 2 :])
        yield "every other", (all_ranks[::2], all_ranks[1::2])
