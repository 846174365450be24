"""Asks sound and unsound layers the same cases, and measures every number that they give."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import platform
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from audit.study import measures
from syncbn.conformance import ConformanceError, targets
from syncbn.conformance.case import Case, Data, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.expected import Expectations, expect
from syncbn.conformance.pool import Outcome, RankPool, went_wrong
from syncbn.conformance.targets import Target
from syncbn.reference import Bounded
from syncbn.reference.ratio import ratio

QUANTITIES = ("y", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
FAILED = ("it crashed", "it hung", "it raised an error")  # instead of an answer, or a reason

_OFFSETS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e5)  # mean/std
_SEEDS = 3
_DEADLINE = 120.0  # seconds; nobody is judged here for being slow
_TWIN = Path(__file__).resolve().parents[2] / ".toolchain" / "twin.so"
_PLAIN = targets.parse("torch:audit.study.layers:Layer")


class StudyError(ConformanceError, RuntimeError):
    """The study cannot be made; the text says why."""


@dataclass(frozen=True)
class Implementation:
    """A layer of the study.

    mutant: of the plain layer, see audit.study.layers.
    """

    name: str
    sound: bool
    target: Target
    mutant: str | None = None

    @property
    def why_left_out(self) -> str | None:
        if self.target.backend == "twin" and not _TWIN.is_file():
            return "the twin is not compiled (make kernels compiles it)"
        if importlib.util.find_spec(self.target.framework) is None:
            return f"{self.target.framework} is not installed"
        return None


def _ours(framework: str, backend: str) -> Implementation:
    target = targets.parse(f"syncbn.{framework}", backend=backend)
    return Implementation(f"{framework} {backend}", True, target)


# The first is what the others' RMS errors are compared with.
IMPLEMENTATIONS = (
    Implementation("two-pass float32", True, _PLAIN),
    Implementation("float64", True, _PLAIN, "Float64"),
    Implementation("Welford", True, _PLAIN, "Welford"),
    Implementation("float32 in chains", True, _PLAIN, "Chains"),
    _ours("torch", "composed"),
    _ours("torch", "aten"),
    _ours("torch", "twin"),
    _ours("mindspore", "composed"),
    _ours("mindspore", "aclnn"),
    Implementation("one-pass variance", False, _PLAIN, "OnePassVariance"),
    Implementation("raw-moment gradients", False, _PLAIN, "RawMoments"),
    Implementation("float16 statistics", False, _PLAIN, "OnePassInFloat16"),
    Implementation("float16 gradient sums", False, _PLAIN, "SumsInFloat16"),
)


@dataclass(frozen=True)
class Asked:
    """A case, and the family of its data.

    mean_over_std, scale: of x as drawn, the largest of all steps. dtype: of x. values: per channel
    over all ranks, in the first step. alike: all values of a rank are equal. orthogonal: dy is
    orthogonal to x. eps: the layer's.
    """

    id: str
    clause: str
    title: str
    mean_over_std: float
    scale: float
    dtype: str
    values: int
    alike: bool
    orthogonal: bool
    eps: float


@dataclass(frozen=True)
class Measured:
    """The numbers of one quantity of one case: the worst of all ranks and steps, but for rms.

    ratio: the largest |got - expected| / bound. mere, mare, mixed: as multiples of their limits,
    None for float64. rms: the RMS error over that of the first implementation.
    """

    implementation: str
    case: str
    quantity: str
    ratio: float
    mere: float | None
    mare: float | None
    mixed: float | None
    rms: float


@dataclass
class Study:
    """What was asked and measured.

    left_out: why, by implementation. cases: by id, those with numbers to compare. unanswered: by
    implementation, how many of them, by the reason.
    """

    environment: dict[str, str]
    implementations: tuple[Implementation, ...]
    left_out: dict[str, str]
    cases: dict[str, Asked] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    unanswered: dict[str, dict[str, int]] = field(default_factory=dict)

    def worst_by_case(self, implementation: str, quantities: Container[str]) -> dict[str, Measured]:
        """What is farthest from the reference in each case that was answered."""
        worst: dict[str, Measured] = {}
        for one in self.measured:
            chosen = one.implementation == implementation and one.quantity in quantities
            if chosen and (one.case not in worst or one.ratio > worst[one.case].ratio):
                worst[one.case] = one
        return worst


def run(ranks: int, profile: str, progress: Callable[[Case, int, int], None]) -> Study:
    """Ask all implementations; calls `progress` with each case, its place and how many there are.

    They are asked the cases of `profile` that compare numbers, and the study's own.

    Raises:
        StudyError: the first implementation does not answer.
        TargetError: an implementation cannot be loaded.
    """
    reasons = {one.name: one.why_left_out for one in IMPLEMENTATIONS}
    present = tuple(one for one in IMPLEMENTATIONS if reasons[one.name] is None)
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    study = Study(_environment(ranks), present, left_out)
    cases = [case for case in catalogue(ranks, profile) if _is_about_rounding(case)]
    cases += _offsets(ranks)
    with contextlib.ExitStack() as stack:
        pools = {
            target: stack.enter_context(RankPool(target, ranks))
            for target in dict.fromkeys(one.target for one in present)
        }
        for place, case in enumerate(cases):
            progress(case, place, len(cases))
            _ask(study, case, {one: pools[one.target] for one in present})
        for target, pool in pools.items():
            study.environment[target.framework] = pool.versions[target.framework]
    return study


def _is_about_rounding(case: Case) -> bool:
    """Whether it compares numbers, and expects no error, NaN or infinity."""
    other = any(step.error or step.x.poison for step in case.steps)
    return not other and not set(QUANTITIES).isdisjoint(case.checks)


def _offsets(ranks: int) -> Iterator[Case]:
    """From a mean of 0 to one far from it: as drawn, and with equal values on each rank.

    Roundings of equal values have one sign, which no sound way to add them up can help.
    """
    for mean_over_std, alike, seed in product(_OFFSETS, (False, True), range(_SEEDS)):
        data = Data(mean_over_std, flat=(0, 1, 2) if alike else ())
        step = Step(((8, 3, 16, 16),) * ranks, x=data, dy_zero_sum=True)
        yield Case(
            "NUM-1",
            f"mean/std {mean_over_std:g}{', equal values on each rank' * alike}, seed {seed}",
            ranks,
            {"num_features": 3, "momentum": 1.0},
            (step,),
            QUANTITIES,
            seed=seed,
        )


def _ask(study: Study, case: Case, pools: dict[Implementation, RankPool]) -> None:
    expected = expect(case)
    baseline: dict[str, float] = {}
    for one, pool in pools.items():
        layer = case.layer | ({} if one.mutant is None else {"mutant": one.mutant})
        outcome = pool.run(replace(case, layer=layer, deadline=_DEADLINE))
        if reason := _why_unanswered(outcome):
            if one is study.implementations[0]:
                raise StudyError(f"{one.name} must answer every case, got {reason} in {case.id}")
            reasons = study.unanswered.setdefault(one.name, {})
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        for quantity in QUANTITIES:
            if tensors := list(_tensors(case, outcome, expected, quantity)):
                found = _measure(one.name, case.id, quantity, tensors, baseline)
                study.measured.append(found)
                study.cases.setdefault(case.id, _family(case))


def _family(case: Case) -> Asked:
    first = case.steps[0]
    shapes = [shape for rank, shape in enumerate(first.shapes) if first.takes_part(rank)]
    return Asked(
        case.id,
        case.clause,
        case.title,
        max(abs(step.x.ratio) for step in case.steps),
        max(step.x.scale for step in case.steps),
        first.dtype_of(0),
        sum(math.prod(shape) // max(case.num_features, 1) for shape in shapes),
        first.x.constant or len(first.x.flat) == case.num_features,
        first.paired,
        case.eps,
    )


def _why_unanswered(outcome: Outcome) -> str | None:
    crashed, hung, raised = FAILED
    if outcome.crashed or outcome.hung:
        return crashed if outcome.crashed else hung
    for answer in outcome.answers:
        assert answer is not None
        if "unsupported" in answer.content:
            return str(answer.content["unsupported"])
        if went_wrong(answer):
            return raised
    return None


def _tensors(
    case: Case, outcome: Outcome, expected: Expectations, quantity: str
) -> Iterator[tuple[npt.NDArray[Any], Bounded, str]]:
    """What each rank got of a quantity in each step, what it should have, and the dtype."""
    if quantity not in case.checks:
        return
    of_input = quantity in ("y", "grad_input")
    for rank, (answer, steps) in enumerate(zip(outcome.answers, expected, strict=True)):
        for index, at in enumerate(steps):
            bounded = at.values.get(quantity) if at else None
            if answer is not None and bounded is not None and bounded.value.size:
                dtype = case.steps[index].dtype_of(rank) if of_input else case.parameter_dtype
                yield answer.arrays[f"{index}/{quantity}"], bounded, dtype


def _measure(
    implementation: str,
    case: str,
    quantity: str,
    tensors: Sequence[tuple[npt.NDArray[Any], Bounded, str]],
    baseline: dict[str, float],
) -> Measured:
    """baseline: the first implementation's RMS error of each quantity, which it adds itself."""
    ratios, all_errors = [], []
    beside: dict[str, list[float]] = {"mere": [], "mare": [], "mixed": []}
    for got, expected, dtype in tensors:
        ratios.append(float(np.max(ratio(got, expected))))
        error = measures.errors(got, expected.value)
        golden = expected.value[np.isfinite(expected.value)]
        all_errors.append(error)
        if dtype in measures.THRESHOLDS and error.size:
            threshold = measures.THRESHOLDS[dtype]
            beside["mere"].append(measures.mere(error, golden) / threshold)
            beside["mare"].append(measures.mare(error, golden) / (10 * threshold))
            beside["mixed"].append(measures.mixed(error, golden, dtype))
    rms = measures.rms(np.concatenate(all_errors))
    rms_ratio = measures.rms_ratio(rms, baseline.setdefault(quantity, rms))
    worst = {name: max(found, default=None) for name, found in beside.items()}
    return Measured(implementation, case, quantity, max(ratios), **worst, rms=rms_ratio)


def _environment(ranks: int) -> dict[str, str]:
    return {
        "ranks": str(ranks),
        "processor": f"{platform.machine()} CPU",
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
