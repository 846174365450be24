"""Compare the ranks' answers with the expected results.

Every number is judged by its `ratio` to the bound (syncbn.reference.ratio); a case passes if its
largest ratio is at most THRESHOLD.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from syncbn.conformance.case import Case, Step
from syncbn.conformance.checks import CHECKS, STATISTICS
from syncbn.conformance.clauses import CLAUSES
from syncbn.conformance.expected import Expectations, Expected
from syncbn.conformance.pool import Outcome
from syncbn.conformance.wire import Message
from syncbn.reference import Bounded
from syncbn.reference.ratio import THRESHOLD, ratio

# The closed list of verdicts, worst first for a clause that has several.
VERDICTS = ("error", "crash", "hang", "fail", "unsupported", "not-run", "pass")

_DOCUMENTED = {
    "num_features": "<class 'inspect._empty'>",
    "eps": "1e-05",
    "momentum": "0.1",
    "affine": "True",
    "track_running_stats": "True",
    "process_group": "None",
    "dtype": "None",
}
_LEARNED = ("weight", "bias")
_RUNNING = ("running_mean", "running_var")
_INITIAL = {
    "weight": 1.0,
    "bias": 0.0,
    "running_mean": 0.0,
    "running_var": 1.0,
    "num_batches_tracked": 0.0,
}
_LARGEST = {name: float(np.finfo(name).max) for name in ("float16", "float32", "float64")}
_LARGEST["bfloat16"] = (2 - 2.0**-7) * 2.0**127
OF_INPUT = ("y", "grad_input", "grad_grad_input", "grad_grad_output")  # arrays of its shape


@dataclass(frozen=True)
class Verdict:
    """The verdict on one case.

    verdict: one of VERDICTS.
    ratio: the largest ratio of the case; None if it compares no numbers.
    message: why the case did not pass.
    raised: whether it did not pass because of an error that the target raised.
    """

    verdict: str
    ratio: float | None = None
    message: str | None = None
    raised: bool = False


class _Failure(Exception):
    """The answer differs from what is expected. The text says where."""


class _Raised(_Failure):
    """The target raised an error that was not expected, or of another type than expected."""


def judge(case: Case, outcome: Outcome, expected: Callable[[], Expectations]) -> Verdict:
    """Compare the answers of the ranks with the expected results.

    Args:
        case: the case that the ranks ran.
        outcome: their answers.
        expected: returns the expected results; called only if they are needed.
    """
    if outcome.error:
        return Verdict("error", None, outcome.error)
    for rank, answer in enumerate(outcome.answers):
        if answer is not None and "failed" in answer.content:
            return Verdict("error", None, f"rank {rank}: {answer.content['failed']}")
    if outcome.crashed:
        return Verdict("crash", None, outcome.details)
    if outcome.hung:
        return Verdict("hang", None, outcome.details)
    for rank, answer in enumerate(outcome.answers):
        if answer is not None and answer.content.get("patched"):
            names = ", ".join(answer.content["patched"][:3])
            return Verdict("fail", None, f"rank {rank}: the layer replaced {names}")
    for answer in outcome.answers:
        if answer is not None and "unsupported" in answer.content:
            return Verdict("unsupported", None, answer.content["unsupported"])
    if refused := _refused_dtype(case, outcome):
        return Verdict("unsupported", None, refused)
    ratios: list[float] = []
    try:
        for rank, answer in enumerate(outcome.answers):
            assert answer is not None
            _check_errors(case, rank, answer)
        if case.error is None:
            _check_facts(case, outcome)
            _check_numbers(case, outcome, expected(), ratios)
    except _Failure as failure:
        raised = isinstance(failure, _Raised)
        return Verdict("fail", max(ratios, default=None), str(failure), raised)
    return Verdict("pass", max(ratios, default=None))


def _refused_dtype(case: Case, outcome: Outcome) -> str | None:
    """Why a case of a documented clause stays open: a TypeError that names a dtype of the case.

    The page names no dtypes, so a layer may refuse every one except float32.
    """
    expects_error = case.error is not None or any(step.error for step in case.steps)
    if expects_error or not CLAUSES[case.clause].documented:
        return None
    for rank, answer in enumerate(outcome.answers):
        assert answer is not None
        for place in (answer.content, *answer.content.get("steps", [])):
            raised = place.get("error")
            if raised is None or "TypeError" not in raised["types"]:
                continue
            for dtype in case.dtypes - {"float32"}:
                if re.search(rf"\b{dtype}\b", raised["message"], re.IGNORECASE):
                    return f"rank {rank} refuses {dtype}: {_show(raised)}"
    return None


def judgeable(case: Case, expected: Expectations) -> bool:
    """Whether the dtype of every result can hold each number within the bound of that result.

    A variance of 0 together with eps = 0, for example, is outside the contract. If data are
    poisoned or a running variance is negative, the case is about numbers that are not finite.
    Without data, a negative variance is outside: the sum of no values times NaN is 0 or NaN.
    """
    poisoned = case.state == "negative" or any(step.x.poison for step in case.steps)
    for rank, steps in enumerate(expected):
        for step, at in zip(case.steps, steps, strict=True):
            if case.state == "negative" and at and not step.shapes[rank][0]:
                return False
            for name, bounded in (at.values if at else {}).items():
                if bounded is None:
                    continue
                dtype = step.dtype_of(rank) if name in OF_INPUT else case.parameter_dtype
                value, bound = bounded
                if poisoned:
                    bound, value = bound[np.isfinite(value)], value[np.isfinite(value)]
                with np.errstate(over="ignore"):
                    largest = np.abs(value) + THRESHOLD * bound
                if not np.all(largest <= _LARGEST[dtype]):
                    return False
    return True


def apart(case: Case, one: Outcome, other: Outcome, expected: Expectations) -> float | None:
    """The largest |one - other| / bound over all numbers that both have; None if there is none."""
    largest: float | None = None
    for rank, step, name, bounded in _numbers(case, expected):
        arrays = [_result(case, outcome, rank, step, name) for outcome in (one, other)]
        if bounded is None or any(a is None or a.shape != bounded.value.shape for a in arrays):
            continue
        if bounded.value.size:
            first, second = (np.asarray(array, np.float64) for array in arrays)
            difference = float(np.max(ratio(first, Bounded(second, bounded.bound))))
            largest = max(difference, largest or 0.0)
    return largest


def _check_errors(case: Case, rank: int, answer: Message) -> None:
    """Fail unless every expected error was raised, and no other."""
    raised = answer.content.get("error")
    if case.error is not None:
        if raised is None:
            raise _Failure(f"rank {rank}: the constructor raised nothing, expected {case.error}")
        if case.error not in raised["types"]:
            raise _Raised(
                f"rank {rank}: the constructor raised {_show(raised)}, expected {case.error}"
            )
        if (also := answer.content.get("error_if_sound")) is not None:
            raise _Raised(
                f"rank {rank}: the constructor raised {_show(raised)}, but it also refuses sound "
                f"arguments of these names: {_show(also)}"
            )
        return
    if raised is not None:
        raise _Raised(f"rank {rank}: the constructor raised {_show(raised)}")
    for index, facts in enumerate(answer.content["steps"]):
        step, raised = case.steps[index], facts.get("error")
        where = f"rank {rank}, step {index}"
        if step.error is None or not case.fails(index, rank):
            if raised is not None:
                raise _Raised(f"{where}: raised {_show(raised)}")
            continue
        at_fault = rank in step.error.ranks
        if raised is None:
            what = step.error.type if at_fault else "an error, because a peer failed"
            raise _Failure(f"{where}: raised nothing, expected {what}")
        if at_fault and step.error.type not in raised["types"]:
            raise _Raised(f"{where}: raised {_show(raised)}, expected {step.error.type}")
        if not at_fault and not _names(raised["message"], step.error.ranks):
            ranks = ", ".join(map(str, step.error.ranks))
            raise _Raised(f"{where}: raised {_show(raised)}, which does not name rank {ranks}")


def _names(message: str, ranks: tuple[int, ...]) -> bool:
    return any(re.search(rf"\brank\s+{rank}\b", message, re.IGNORECASE) for rank in ranks)


def _check_facts(case: Case, outcome: Outcome) -> None:
    for rank, answer in enumerate(outcome.answers):
        if answer is None or case.group_of(rank) is None:
            continue
        content = answer.content
        if "signature" in case.checks:
            _check_signature(content["signature"])
        if "parameters" in case.checks:
            _check_parameters(case, content["parameters"])
        if "statistics_dtype" in case.checks:
            _check_statistics_dtype(case, content["parameters"])
        if "state_names" in case.checks:
            _equal("state_dict names", sorted(content["state_names"]), sorted(_state(case)))
        if "initial_values" in case.checks:
            _check_initial_values(case, answer)
        for index, facts in enumerate(content["steps"]):
            if case.steps[index].takes_part(rank) and not case.fails(index, rank):
                _check_step_facts(case, case.steps[index], f"rank {rank}, step {index}", facts)
        if content.get("unlike"):
            raise _Failure(f"rank {rank}: a second run gives another {content['unlike'][0]}")
        counts = [facts["communicators"] for facts in content["steps"] if "communicators" in facts]
        if len(set(counts)) > 1:
            raise _Failure(f"rank {rank}: communicators after each step are {counts}")
    if "ranks_agree" in case.checks:
        _check_agreement(case, outcome)
    if "defined" in case.checks:
        _check_defined(outcome)


def _check_signature(signature: dict[str, str | None]) -> None:
    for name, default in _DOCUMENTED.items():
        if name not in signature:
            raise _Failure(f"the constructor has no argument {name}")
        if signature[name] is not None:  # otherwise what a layer does shows its defaults
            _equal(f"default of {name}", signature[name], default)


def _state(case: Case) -> list[str]:
    parameters = [*_LEARNED] if case.affine else []
    running = [*_RUNNING, "num_batches_tracked"]
    return parameters + (running if case.track_running_stats else [])


def _check_parameters(case: Case, parameters: dict[str, Any]) -> None:
    """The tensors that the page names: which of them exist, their shapes, the learned dtypes."""
    wanted = set(_state(case))
    for name in (*_LEARNED, *_RUNNING):
        _equal(f"whether the layer has {name}", name in parameters, name in wanted)
        if name in wanted:
            _equal(f"shape of {name}", parameters[name]["shape"], [case.num_features])
    for name in wanted.intersection(_LEARNED):
        _equal(f"dtype of {name}", parameters[name]["dtype"], case.parameter_dtype)


def _check_statistics_dtype(case: Case, parameters: dict[str, Any]) -> None:
    for name in _RUNNING if case.track_running_stats else ():
        found = parameters.get(name, {}).get("dtype")
        _equal(f"dtype of {name}", found, case.parameter_dtype)


def _check_initial_values(case: Case, answer: Message) -> None:
    for name in _state(case):
        values = answer.arrays.get(f"initial/{name}")
        if values is None:
            raise _Failure(f"the layer has no {name}")
        if not np.all(values == _INITIAL[name]):
            raise _Failure(f"{name} starts as {values.tolist()}, expected {_INITIAL[name]}")
    for name in set(_INITIAL) - set(_state(case)):
        if f"initial/{name}" in answer.arrays:
            raise _Failure(f"the layer has {name}, expected none")


def _check_step_facts(case: Case, step: Step, where: str, facts: dict[str, Any]) -> None:
    if "input_unmodified" in case.checks and facts["modified"]:
        raise _Failure(f"{where}: the {facts['modified'][0]} was modified")
    if "format" in case.checks:
        x, y = facts["format"]["x"], facts["format"]["y"]
        for aspect in ("shape", "dtype", "class"):
            _equal(f"{where}: {aspect} of y", y[aspect], x[aspect])
        for aspect in ("contiguous", "channels_last"):
            if x[aspect] and not y[aspect]:
                raise _Failure(f"{where}: x is {aspect}, y is not")
    if "grad_format" in case.checks and facts["format"]["x"]["channels_last"]:
        _equal(f"{where}: grad_input is channels_last", facts["format"]["grad_input"], True)
    if "collectives" in case.checks:
        each = 1 if step.mode == "train" and case.ranks > 1 else 0
        wanted = [each, each] if step.backward else [each]
        _equal(f"{where}: collectives in forward and backward", facts["collectives"], wanted)


def _check_defined(outcome: Outcome) -> None:
    """Fail if a number is NaN. A number may have overflowed to infinity."""
    for rank, answer in enumerate(outcome.answers):
        for name, values in answer.arrays.items() if answer else ():
            if np.isnan(values).any():
                raise _Failure(f"rank {rank}, step {name.replace('/', ': ')} has NaN")


def _check_agreement(case: Case, outcome: Outcome) -> None:
    """Fail unless all ranks of a group have bitwise equal buffers after every step."""
    for rank, answer in enumerate(outcome.answers):
        if answer is None or case.group_of(rank) is None:
            continue
        for name, values in answer.arrays.items():
            index, _, buffer = name.partition("/")
            if buffer not in STATISTICS or index == "initial":
                continue
            group = case.group_of(rank, int(index))
            assert group is not None
            first = outcome.answers[group[0]]
            assert first is not None
            if first.arrays[name].tobytes() != values.tobytes():
                raise _Failure(
                    f"step {index}: {buffer} differs between rank {group[0]} and rank {rank}: "
                    f"{first.arrays[name].tolist()} and {values.tolist()}"
                )


def _check_numbers(
    case: Case, outcome: Outcome, expected: Expectations, ratios: list[float]
) -> None:
    """Compare every number that the case checks. The message names the largest ratio."""
    if "num_batches_tracked" in case.checks:
        for rank, steps in enumerate(expected):
            for index, at in enumerate(steps):
                if at is not None:
                    got = _array(outcome, rank, f"{index}/num_batches_tracked")
                    _check_count(f"rank {rank}, step {index}", at, got)
    worst: tuple[float, str] = (0.0, "")
    for rank, index, name, bounded in _numbers(case, expected):
        got = _result(case, outcome, rank, index, name)
        largest, text = _compare(f"rank {rank}, step {index}: {name}", got, bounded)
        ratios.append(largest)
        worst = max(worst, (largest, text))
    if worst[0] > THRESHOLD:
        raise _Failure(worst[1])


def _numbers(case: Case, expected: Expectations) -> Iterator[tuple[int, int, str, Bounded | None]]:
    """Rank, step, name and expected value of every number that the case checks."""
    for rank, steps in enumerate(expected):
        for index, at in enumerate(steps):
            values = at.values if at is not None else {}
            for name, check in CHECKS.items():
                if check.numeric and name in case.checks and name in values:
                    yield rank, index, name, values[name]


def _result(
    case: Case, outcome: Outcome, rank: int, index: int, name: str
) -> npt.NDArray[Any] | None:
    """A number of a rank; of grad_grad_weight the sum over its group, as only that is defined."""
    own = _array(outcome, rank, f"{index}/{name}")
    if name != "grad_grad_weight" or own is None:
        return own
    ranks = [r for r in case.group_of(rank, index) or () if case.steps[index].takes_part(r)]
    parts = [_array(outcome, r, f"{index}/{name}") for r in ranks]
    there = [part.astype(np.float64) for part in parts if part is not None]
    if len(there) < len(parts) or len({part.shape for part in there}) > 1:
        return own  # a rank that lacks its part fails itself
    total: npt.NDArray[Any] = np.sum(there, axis=0)
    return total


def _array(outcome: Outcome, rank: int, name: str) -> npt.NDArray[Any] | None:
    answer = outcome.answers[rank]
    return None if answer is None else answer.arrays.get(name)


def _check_count(where: str, expected: Expected, got: npt.NDArray[Any] | None) -> None:
    count = None if got is None else int(got)
    _equal(f"{where}: num_batches_tracked", count, expected.num_batches_tracked)


def _compare(
    where: str, got: npt.NDArray[Any] | None, expected: Bounded | None
) -> tuple[float, str]:
    if expected is None or got is None:
        if expected is None and got is None:
            return 0.0, ""
        raise _Failure(f"{where} is {'missing' if got is None else 'present, expected none'}")
    _equal(f"{where}: shape", list(got.shape), list(expected.value.shape))
    if not got.size:
        return 0.0, ""
    ratios = ratio(got, expected)
    at = np.unravel_index(int(np.argmax(ratios)), ratios.shape)
    largest = float(ratios[at])
    place = ", ".join(str(int(i)) for i in at)
    return largest, (
        f"{where}[{place}] is {got[at]:.9g}, expected {expected.value[at]:.9g} within "
        f"{THRESHOLD * expected.bound[at]:.2g}: {largest:.3g} times the bound"
    )


def _equal(what: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise _Failure(f"{what} is {got}, expected {expected}")


def _show(raised: dict[str, Any]) -> str:
    return f"{raised['types'][0]}: {raised['message']}"


def worst_of(verdicts: list[str]) -> str:
    """The verdict of a clause from those of its cases."""
    return min(verdicts, key=VERDICTS.index) if verdicts else "not-run"


def required(clause: str, level: str) -> bool:
    """Whether a clause counts for the exit status."""
    row = CLAUSES[clause]
    return row.not_run is None and (level == "decided" or row.documented)
