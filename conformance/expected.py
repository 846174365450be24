"""The results that each rank of a case must get, from the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from syncbn.conformance import data
from syncbn.conformance.case import Case, Groups
from syncbn.reference import Bounded, Cotangents, SyncBatchNorm, averaged


@dataclass(frozen=True)
class Expected:
    """The results of one rank after one step.

    values: by the names of syncbn.conformance.checks.CHECKS. None means that there must be no
        value: a gradient that is not wanted, a statistic that is not tracked. A name that is
        absent is not defined for this step.
    num_batches_tracked: None if nothing is tracked.
    """

    values: dict[str, Bounded | None] = field(default_factory=dict)
    num_batches_tracked: int | None = None


# [rank][step]; None where the rank takes no part in the step.
Expectations: TypeAlias = "list[list[Expected | None]]"


def expect(case: Case) -> Expectations:
    """The expected results of every rank in every step of a case."""
    results: Expectations = [[None] * len(case.steps) for _ in range(case.ranks)]
    layers = _layers(case)
    with np.errstate(all="ignore"):  # poisoned and overflowing cases divide by 0
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


def _layers(case: Case) -> dict[int, SyncBatchNorm]:
    """The layer of each rank before the first step. Ranks whose layers are alike share one."""
    alike = _layer(case)
    differ = {rank: _layer(case.of_rank(rank)) for rank, _ in case.layers}
    return dict.fromkeys(range(case.ranks), alike) | differ


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
    """A copy of every layer for each group, because groups differ in statistics from now on."""
    copies: dict[tuple[int, tuple[int, ...]], SyncBatchNorm] = {}
    return {
        rank: copies.setdefault((id(layers[rank]), group), copy.copy(layers[rank]))
        for group in groups
        for rank in group
    }


def _step(
    case: Case, layer: SyncBatchNorm, group: tuple[int, ...], index: int
) -> dict[int, Expected]:
    """The results of the ranks of a group in a step. `layer` is in their state, and moves."""
    step = case.steps[index]
    ranks = [rank for rank in group if step.takes_part(rank)]
    values: dict[int, dict[str, Bounded | None]] = {rank: {} for rank in ranks}
    fails = bool(ranks) and case.fails(index, ranks[0])
    if ranks and (not fails or (step.error and step.error.in_backward)):
        _set_attributes(layer, case, index)
        shards = [data.shard(case, index, rank) for rank in ranks]
        training = step.mode == "train"
        passes = step.repeat * (2 if step.recompute else 1)  # backward runs the forward again
        for _ in range(passes):
            ys = layer.forward(shards, training, step.dtype_of(ranks[0]))
    if ranks and not fails:
        for rank, y in zip(ranks, ys, strict=True):
            values[rank]["y"] = y
        if step.backward:
            dys = [data.grad_output(case, index, rank) for rank in ranks]
            all_gradients = layer.backward(dys)
            if case.ddp:
                all_gradients = averaged(all_gradients, case.parameter_dtype)
            for rank, gradients in zip(ranks, all_gradients, strict=True):
                wants_input, wants_parameters = step.wants_grad(rank)
                wants_parameters &= case.affine
                values[rank] |= {
                    "grad_input": gradients.input if wants_input else None,
                    "grad_weight": gradients.weight if wants_parameters else None,
                    "grad_bias": gradients.bias if wants_parameters else None,
                }
        if step.second:
            for rank, second in _second(case, layer, index, dict(zip(ranks, dys, strict=True))):
                values[rank] |= second
    return {rank: _with_running(values[rank], case.of_rank(rank), layer) for rank in ranks}


def _second(
    case: Case, layer: SyncBatchNorm, index: int, grad_outputs: dict[int, data.Array]
) -> Iterator[tuple[int, dict[str, Bounded | None]]]:
    """What each rank gets from the second backward, given dy of each rank of the group."""
    step = case.steps[index]
    starts, wants = [], []
    for rank in grad_outputs:
        wants_input, wants_parameters = step.wants_grad(rank)
        wants_parameters &= case.affine
        given = data.cotangents(case, index, rank)
        starts.append(
            Cotangents(
                given["grad_input"] * wants_input,
                given["grad_weight"] * wants_parameters,
                given["grad_bias"] * wants_parameters,
            )
        )
        wants.append({"input": wants_input, "grad_output": True, "weight": wants_parameters})
    found = layer.double_backward(list(grad_outputs.values()), starts)
    for rank, wanted, gradients in zip(grad_outputs, wants, found, strict=True):
        yield (
            rank,
            {
                f"grad_grad_{name.removeprefix('grad_')}": getattr(gradients, name)
                if wanted[name]
                else None
                for name in step.second
            },
        )


def _set_attributes(layer: SyncBatchNorm, case: Case, index: int) -> None:
    """Give the layer the attributes that it has in a step (CTOR-6)."""
    given = case.attributes_at(index)
    layer.eps = given.get("eps", case.eps)
    layer.momentum = given.get("momentum", case.momentum)
    # Buffers that a layer has are used in eval, whether or not training moves them.
    moves = case.steps[index].mode == "eval" or given.get("track_running_stats", True)
    layer.track_running_stats = case.track_running_stats and moves


def _with_running(values: dict[str, Bounded | None], case: Case, layer: SyncBatchNorm) -> Expected:
    """The values of a step, and the running statistics after it."""
    if not case.track_running_stats:
        return Expected(values | {"running_mean": None, "running_var": None}, None)
    running: dict[str, Bounded | None] = {
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }
    return Expected(values | running, layer.num_batches_tracked)
