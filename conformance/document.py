"""Case documents from outside: their schema, its limits, and what the fields must mean together.

`schema/case-1.json` limits every number, length and list, so that nothing large starts because of
a document. What a schema cannot state is checked here. A case that obeys both can be run on every
target; what goes wrong then is not the fault of its document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from syncbn.conformance import ConformanceError
from syncbn.conformance.case import RECORDING, SECOND, STATES, Case, Step, of_document
from syncbn.conformance.checks import CHECKS, SECOND_GRADIENTS
from syncbn.conformance.clauses import CLAUSES
from syncbn.reports.schema import Schema, parse

SCHEMA: dict[str, Any] = json.loads(
    Path(__file__).with_name("schema").joinpath("case-1.json").read_bytes()
)
MOST_RANKS: int = SCHEMA["properties"]["ranks"]["maximum"]
_SCHEMA = Schema(SCHEMA)
_LARGEST_FILE = 1_000_000  # bytes
_MOST_VALUES = (
    2**26
)  # of one step on all ranks, and of one layer; the controller has them as float64
_MOST_STEPS = 10_000  # with repetitions
_OF_NEW_LAYER = {"signature", "parameters", "statistics_dtype", "initial_values", "state_names"}
_OF_BACKWARD = {"grad_input", "grad_weight", "grad_bias", "grad_format"}


class CaseError(ConformanceError, ValueError):
    """A document that is not a case. The message is one line."""


def read(path: Path) -> Case:
    """The case of a file.

    Raises:
        CaseError: the file cannot be read, or holds no case.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise CaseError(f"cannot read case {path}: {error.strerror or error}") from error
    if len(text) > _LARGEST_FILE:
        raise CaseError(f"{path} holds no case: it must have at most {_LARGEST_FILE} bytes")
    try:
        return load(parse(text))
    except ValueError as error:
        raise CaseError(f"{path} holds no case: {error}") from error


def load(document: Any) -> Case:
    """The case of a document.

    Raises:
        CaseError: naming the place, the value and the rule.
    """
    if violation := _SCHEMA.violation(document):
        raise CaseError(violation)
    case = of_document(document)
    _check_names(case)
    _check_layer(case)
    grouped = {rank for rank in range(case.ranks) if case.group_of(rank) is not None}
    for groups in (case.groups, *(step.groups for step in case.steps)):
        _check_groups(case, groups)
    for index, step in enumerate(case.steps):
        where = f"steps[{index}]"
        _check_ranks(case, step, where)
        _check_shapes(case, step, where)
        _check_second(case, step, where)
        _check_again(case, index, where)
        _check_batch(case, index, where)
        if step.recording not in RECORDING:
            known = ", ".join(RECORDING)
            raise CaseError(f"{where}.recording must be one of {known}, got {step.recording!r}")
        if step.recording != "on" and step.backward:
            raise CaseError(f"{where}.backward must be false, because the step does not record")
        if {r for r in range(case.ranks) if case.group_of(r, index) is not None} != grouped:
            raise CaseError(f"{where}.groups must hold the same ranks as before, got {step.groups}")
    if sum(step.repeat for step in case.steps) > _MOST_STEPS:
        raise CaseError(f"steps must be at most {_MOST_STEPS} with their repetitions")
    _check_that_it_checks(case)
    return case


def _check_names(case: Case) -> None:
    if case.clause not in CLAUSES:
        raise CaseError(f"clause must be one of the contract, got {case.clause!r}")
    if unknown := sorted(set(case.checks) - set(CHECKS)):
        raise CaseError(f"checks must be among {', '.join(CHECKS)}, got {', '.join(unknown)}")
    if case.state not in STATES:
        raise CaseError(f"state must be one of {', '.join(STATES)}, got {case.state!r}")


def _check_layer(case: Case) -> None:
    """The arguments of a layer that can be built are what the reference computes with."""
    if case.error is not None:
        if case.steps:
            raise CaseError("steps must be none if the constructor must raise")
        return
    for rank, own in case.layers:
        if rank >= case.ranks:
            raise CaseError(f"layers must name ranks below {case.ranks}, got {rank}")
        _check_arguments(case.layer | own, f"layers of rank {rank}")
    _check_arguments(case.layer, "layer")
    for step in case.steps:
        _check_arguments(case.layer | step.attributes, "attributes")


def _check_arguments(layer: dict[str, Any], where: str) -> None:
    features: Any = layer.get("num_features")
    features = features.get("value") if isinstance(features, dict) else features
    if not _is(features, int) or not 1 <= features <= 2**20:
        raise CaseError(f"num_features of {where} must be an int from 1 to 2^20, got {features!r}")
    eps: Any = layer.get("eps", 1e-5)
    momentum: Any = layer.get("momentum", 0.1)
    if not isinstance(eps, float) or not 0 <= eps <= 1e30:
        raise CaseError(f"eps of {where} must be a float from 0 to 1e30, got {eps!r}")
    if momentum is not None and (not _is(momentum, (int, float)) or not 0 <= momentum <= 1):
        raise CaseError(f"momentum of {where} must be null or from 0 to 1, got {momentum!r}")
    for name in ("affine", "track_running_stats"):
        if not isinstance(layer.get(name, True), bool):
            raise CaseError(f"{name} of {where} must be a bool, got {layer[name]!r}")
    if layer.get("dtype") not in (None, "float32", "float16", "bfloat16", "float64"):
        raise CaseError(f"dtype of {where} must be a floating dtype, got {layer['dtype']!r}")
    group = layer.get("process_group", [])
    if not isinstance(group, list) or not all(_is(rank, int) for rank in group):
        raise CaseError(f"process_group of {where} must be a list of rank ids, got {group!r}")


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_groups(case: Case, groups: Any) -> None:
    ranks = [rank for group in groups or () for rank in group]
    if len(set(ranks)) < len(ranks) or max(ranks, default=0) >= case.ranks:
        raise CaseError(f"groups must hold ranks below {case.ranks}, each once, got {groups}")


def _check_ranks(case: Case, step: Step, where: str) -> None:
    """Every list of ranks names ranks of the case, and every list for each rank has one for all."""
    for name, ranks in _ranks_of(step):
        if max(ranks, default=0) >= case.ranks:
            raise CaseError(f"{where}.{name} must hold ranks below {case.ranks}, got {max(ranks)}")
    for name in ("shapes", "dtype", "layout", "dy_layout"):
        each = getattr(step, name)
        if isinstance(each, tuple) and len(each) != case.ranks:
            raise CaseError(
                f"{where}.{name} must have one for each rank ({case.ranks}), got {len(each)}"
            )


def _ranks_of(step: Step) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("frozen_input", "frozen_parameters", "lost"):
        yield name, getattr(step, name)
    yield "present", step.present or ()
    yield "error.ranks", step.error.ranks if step.error else ()


def _check_shapes(case: Case, step: Step, where: str) -> None:
    if sum(math.prod(shape) for shape in step.shapes) > _MOST_VALUES:
        raise CaseError(f"{where}.shapes must hold at most {_MOST_VALUES} values on all ranks")
    for rank, shape in enumerate(step.shapes):
        if step.error is None and (len(shape) < 2 or shape[1] != case.of_rank(rank).num_features):
            raise CaseError(
                f"{where}.shapes must be (N, num_features, ...) unless an error is expected, got "
                f"{list(shape)}"
            )
        if step.paired and shape[0] % 2:
            raise CaseError(f"{where}.shapes must have even batches if paired, got {list(shape)}")
        if any(len(shape) < 2 or channel >= shape[1] for channel in step.x.flat):
            raise CaseError(
                f"{where}.x.flat must name channels of {list(shape)}, got {step.x.flat}"
            )
    if step.x.shared and len({shape[1:] for shape in step.shapes}) > 1:
        raise CaseError(f"{where}.shapes must differ in the batch only if x.shared")
    for at, _ in step.x.poison:
        rank, *place = at
        inside = rank < case.ranks and len(place) == len(step.shapes[rank])
        if not inside or any(i >= n for i, n in zip(place, step.shapes[rank], strict=True)):
            raise CaseError(f"{where}.x.poison must be at a place of the input, got {list(at)}")


def _check_batch(case: Case, index: int, where: str) -> None:
    """One value per channel in a training group has no variance: an error must be expected."""
    step = case.steps[index]
    for group in case.groups_at(index) or (range(case.ranks),):
        ranks = [rank for rank in group if step.takes_part(rank)]
        fails = bool(ranks) and case.fails(index, ranks[0])
        if step.mode == "eval" or (fails and step.error and not step.error.in_backward):
            continue
        shapes = [step.shapes[rank] for rank in ranks]
        if sum(math.prod(shape[:1] + shape[2:]) for shape in shapes) == 1:
            raise CaseError(
                f"{where}.shapes must not hold one value per channel of a group in training unless "
                f"an error is expected, got {[list(shape) for shape in shapes]}"
            )


def _check_again(case: Case, index: int, where: str) -> None:
    """A step that takes the tensor of the step before describes its input as that step does."""
    step, before = case.steps[index], case.steps[index - 1]
    if not step.again:
        return
    alike = all(
        getattr(step, name) == getattr(before, name)
        for name in ("shapes", "dtype", "layout", "x", "paired", "present")
    )
    if not index or not alike:
        raise CaseError(f"{where} must have the input of the step before if it is taken again")


def _check_second(case: Case, step: Step, where: str) -> None:
    if unknown := sorted(set(step.second) - set(SECOND)):
        known = ", ".join(SECOND)
        raise CaseError(f"{where}.second must be among {known}, got {', '.join(unknown)}")
    plain = step.backward and step.repeat == 1
    odd = step.recompute or step.beside or case.ddp or step.autocast or step.lost
    if step.second and (odd or not plain):
        raise CaseError(
            f"{where}.second must stand with one backward, and with neither repeat, recompute, "
            "beside, autocast, lost nor ddp"
        )


def _check_that_it_checks(case: Case) -> None:
    """A case that can only pass shows nothing."""
    if case.error is not None or any(step.error for step in case.steps):
        return
    checks = set(case.checks)
    if not case.steps:
        checks &= _OF_NEW_LAYER
    if not any(step.backward for step in case.steps):
        checks -= _OF_BACKWARD
    if not any(step.second for step in case.steps):
        checks.difference_update(SECOND_GRADIENTS)
    if not checks:
        raise CaseError(
            "checks must name something that the case can fail, got nothing of the kind"
        )
