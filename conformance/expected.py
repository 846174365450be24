"""What the reference says that each rank of a case must get."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from syncbn.conformance import data
from syncbn.conformance.case import Case, Groups
from syncbn.reference import Bounded, SyncBatchNorm, averaged


@dataclass(frozen=True)
class Expected:
    """One rank after one step, by the names of syncbn.conformance.case.CHECKS.

    A value of None means that there must be none: a gradient that was not asked for, a statistic
    that is not tracked. A check that is missing is not defined for this step.
    """

    values: dict[str, Bounded | None] = field(default_factory=dict)
    num_batches_tracked: int | None = None


# [rank][step]; None where the rank takes no part in the step.
Expectations: TypeAlias = "list[list[Expected | None]]"


def expect(case: Case) -> Expectations:
    results: Expectations = [[None] * len(case.steps) for _ in range(case.ranks)]
    layers = dict.fromkeys(range(case.ranks), _layer(case))  # ranks with one past share one layer
    with np.errstate(all="ignore"):  # poisoned and overflowing cases are meant to
        for index, step in enumerate(case.steps):
            groups = case.groups_at(index) or (tuple(range(case.ranks)),)
            if index == 0 or step.groups:
                layers = _regrouped(layers, groups)
            for group in groups:
                for layer in {id(layers[rank]): layers[rank] for rank in group}.values():
                    for rank, expected in _step(case, layer, group, index).items():
                        if layers[rank] is layer:
                            results[rank][index] = expected
    return results


def _layer(case: Case) -> SyncBatchNorm:
    state = {} if case.state == "initial" else data.initial_state(case)
    return SyncBatchNorm(
        case.num_features,
        case.eps,
        case.momentum,
        case.affine,
        case.track_running_stats,
        dtype=case.parameter_dtype,
        weight=state.get("weight"),
        bias=state.get("bias"),
        running_mean=state.get("running_mean"),
        running_var=state.get("running_var"),
    )


def _regrouped(layers: dict[int, SyncBatchNorm], groups: Groups) -> dict[int, SyncBatchNorm]:
    """For each group a copy of every layer in it: its ranks go different ways from here on."""
    copies: dict[tuple[int, tuple[int, ...]], SyncBatchNorm] = {}
    return {
        rank: copies.setdefault((id(layers[rank]), group), copy.copy(layers[rank]))
        for group in groups
        for rank in group
    }


def _step(
    case: Case, layer: SyncBatchNorm, group: tuple[int, ...], index: int
) -> dict[int, Expected]:
    """What the ranks of a group get from a step whose state before it is that of `layer`."""
    step = case.steps[index]
    ranks = [rank for rank in group if step.takes_part(rank)]
    values: dict[int, dict[str, Bounded | None]] = {rank: {} for rank in ranks}
    if ranks and not case.fails(index, ranks[0]):
        shards = [data.shard(case, index, rank) for rank in ranks]
        training = step.mode == "train"
        passes = step.repeat * (2 if step.recompute else 1)  # backward runs the forward again
        for _ in range(passes):
            ys = layer.forward(shards, training, step.dtype_of(ranks[0]))
        for rank, y in zip(ranks, ys, strict=True):
            values[rank]["y"] = y
        if step.backward:
            dys = [data.grad_output(case, index, rank) for rank in ranks]
            found = layer.backward(dys)
            if case.ddp:
                found = averaged(found, case.parameter_dtype)
            for rank, gradients in zip(ranks, found, strict=True):
                wants_input, wants_parameters = step.wants_grad(rank)
                wants_parameters &= case.affine
                values[rank] |= {
                    "grad_input": gradients.input if wants_input else None,
                    "grad_weight": gradients.weight if wants_parameters else None,
                    "grad_bias": gradients.bias if wants_parameters else None,
                }
    tracked = case.track_running_stats
    running = {
        "running_mean": layer.running_mean if tracked else None,
        "running_var": layer.running_var if tracked else None,
    }
    count = layer.num_batches_tracked if tracked else None
    return {rank: Expected(values[rank] | running, count) for rank in ranks}
