"""Runs the same cases on sound and unsound layers, and measures every number of the results."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from audit.study import measures
from audit.study.families import FLOAT16_STATISTICS, FLOAT16_SUMS, ONE_PASS, RAW_MOMENTS
from syncbn.conformance import ConformanceError, targets
from syncbn.conformance.case import Case, Data, Step
from syncbn.conformance.cases import catalogue
from syncbn.conformance.expected import Expectations, expect
from syncbn.conformance.frameworks import FRAMEWORKS
from syncbn.conformance.pool import Outcome, RankPool, went_wrong
from syncbn.conformance.targets import Target
from syncbn.reference import Bounded
from syncbn.reference.ratio import ratio

QUANTITIES = ("y", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
# Reasons for having no result that are failures of the layer.
CRASHED, HUNG, RAISED = "it crashed", "it hung", "it raised an error"
FAILED = (CRASHED, HUNG, RAISED)

_OFFSETS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e5)  # mean/std
_SEEDS = 3
_DEADLINE = 120.0  # seconds, because the study does not judge speed
_TWIN = Path(__file__).resolve().parents[2] / ".toolchain" / "twin.so"
_PLAIN = targets.parse("torch:audit.study.layers:Layer")


class StudyError(ConformanceError, RuntimeError):
    """The study cannot be made; the text gives the reason."""


@dataclass(frozen=True)
class Layer:
    """A layer of the study.

    name: as the page shows it.
    sound: whether it must be under the threshold.
    target: the layer for the ranks.
    mutant: of the plain layer, see audit.study.layers; None for the layer itself.
    """

    name: str
    sound: bool
    target: Target
    mutant: str | None = None

    @property
    def why_left_out(self) -> str | None:
        if self.target.rung == "twin" and not _TWIN.is_file():
            return "the twin is not compiled (make kernels compiles it)"
        if not FRAMEWORKS[self.target.framework].installed:
            return f"{self.target.framework} is not installed"
        return None


def _layers_of_this_project() -> Iterator[Layer]:
    """One for each backend, except interpreted ones, which are too slow for so many cases."""
    for framework in FRAMEWORKS.values():
        for backend in framework.backends.values():
            if backend.on_cpu != "interpreted":
                target = targets.parse(f"syncbn.{framework.name}", backend=backend.name)
                yield Layer(f"{framework.name} {backend.name}", True, target)


# The first is the baseline of the others' RMS errors.
LAYERS = (
    Layer("two-pass float32", True, _PLAIN),
    Layer("float64", True, _PLAIN, "Float64"),
    Layer("Welford", True, _PLAIN, "Welford"),
    Layer("float32 in chains", True, _PLAIN, "Chains"),
    *_layers_of_this_project(),
    Layer(ONE_PASS, False, _PLAIN, "OnePassVariance"),
    Layer(RAW_MOMENTS, False, _PLAIN, "RawMoments"),
    Layer(FLOAT16_STATISTICS, False, _PLAIN, "OnePassInFloat16"),
    Layer(FLOAT16_SUMS, False, _PLAIN, "SumsInFloat16"),
)


@dataclass(frozen=True)
class Measurement:
    """The error of one quantity of one case: the worst of all ranks and steps, except for rms.

    layer: the name of the layer.
    case: the id of the case.
    quantity: one of QUANTITIES.
    ratio: the largest |got - expected| / bound.
    mere, mare, mixed: as multiples of their limits; None for float64, which has none.
    rms: the RMS error over that of the first layer.
    """

    layer: str
    case: str
    quantity: str
    ratio: float
    mere: float | None
    mare: float | None
    mixed: float | None
    rms: float


@dataclass
class Study:
    """The whole study.

    environment: versions and machine.
    layers: that took part.
    left_out: the other layers, and why.
    cases: those with numbers to compare, by id.
    measurements: one for each layer, case and quantity with a result.
    not_run: by layer, the number of cases without a result, by the reason.
    """

    environment: dict[str, str]
    layers: tuple[Layer, ...]
    left_out: dict[str, str]
    cases: dict[str, Case] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    not_run: dict[str, dict[str, int]] = field(default_factory=dict)


def run(ranks: int, profile: str, progress: Callable[[Case, int, int], None]) -> Study:
    """Run the cases of the profile that compare numbers, and the study's own, on all layers.

    progress: called with each case, its number and the count of all.

    Raises:
        StudyError: the first layer has no result for a case.
        TargetError: a layer cannot be loaded.
    """
    reasons = {layer.name: layer.why_left_out for layer in LAYERS}
    present = tuple(layer for layer in LAYERS if reasons[layer.name] is None)
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    study = Study(_environment(ranks), present, left_out)
    cases = [case for case in catalogue(ranks, profile) if is_about_rounding(case)]
    cases += offset_cases(ranks)
    with contextlib.ExitStack() as stack:
        pools = {
            target: stack.enter_context(RankPool(target, ranks))
            for target in dict.fromkeys(layer.target for layer in present)
        }
        for number, case in enumerate(cases):
            progress(case, number, len(cases))
            _run_case(study, case, {layer: pools[layer.target] for layer in present})
        for target, pool in pools.items():
            study.environment[target.framework] = pool.versions[target.framework]
    return study


def is_about_rounding(case: Case) -> bool:
    """Whether the case compares numbers and expects no error, NaN or infinity."""
    other = any(step.error or step.x.poison for step in case.steps)
    return not other and not set(QUANTITIES).isdisjoint(case.checks)


def offset_cases(ranks: int) -> Iterator[Case]:
    """The study's own cases: means from 0 to far from 0, random or equal values on each rank.

    The rounding errors of equal values have one sign, so no sound way to add them can cancel them.
    """
    for mean_over_std, equal, seed in product(_OFFSETS, (False, True), range(_SEEDS)):
        data = Data(mean_over_std, flat=(0, 1, 2) if equal else ())
        step = Step(((8, 3, 16, 16),) * ranks, x=data, dy_zero_sum=True)
        yield Case(
            "NUM-1",
            f"mean/std {mean_over_std:g}{', equal values on each rank' * equal}, seed {seed}",
            ranks,
            {"num_features": 3, "momentum": 1.0},
            (step,),
            QUANTITIES,
            seed=seed,
        )


def _run_case(study: Study, case: Case, pools: dict[Layer, RankPool]) -> None:
    expected = expect(case)
    baseline: dict[str, float] = {}
    for layer, pool in pools.items():
        arguments = case.layer | ({} if layer.mutant is None else {"mutant": layer.mutant})
        outcome = pool.run(replace(case, layer=arguments, deadline=_DEADLINE))
        if reason := _why_no_result(outcome):
            if layer is study.layers[0]:
                raise StudyError(f"{layer.name} must pass every case, got {reason} in {case.id}")
            reasons = study.not_run.setdefault(layer.name, {})
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        for quantity in QUANTITIES:
            if tensors := list(_tensors(case, outcome, expected, quantity)):
                study.cases[case.id] = case
                study.measurements.append(
                    _measure(layer.name, case.id, quantity, tensors, baseline)
                )


def _why_no_result(outcome: Outcome) -> str | None:
    if outcome.error:
        raise StudyError(outcome.error)
    if outcome.crashed or outcome.hung:
        return CRASHED if outcome.crashed else HUNG
    for answer in outcome.answers:
        assert answer is not None
        if "unsupported" in answer.content:
            return str(answer.content["unsupported"])
        if went_wrong(answer):
            return RAISED
    return None


def _tensors(
    case: Case, outcome: Outcome, expected: Expectations, quantity: str
) -> Iterator[tuple[npt.NDArray[Any], Bounded, str]]:
    """The value of a quantity on each rank in each step, its expected value, and its dtype."""
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
    layer: str,
    case: str,
    quantity: str,
    tensors: Sequence[tuple[npt.NDArray[Any], Bounded, str]],
    baseline: dict[str, float],
) -> Measurement:
    """baseline: the first layer's RMS error of each quantity, which its own measurement adds."""
    ratios, all_errors = [], []
    of_cann: dict[str, list[float]] = {"mere": [], "mare": [], "mixed": []}
    for got, expected, dtype in tensors:
        ratios.append(float(np.max(ratio(got, expected))))
        error = measures.errors(got, expected.value)
        golden = expected.value[np.isfinite(expected.value)]
        all_errors.append(error)
        if dtype in measures.THRESHOLDS and error.size:
            threshold = measures.THRESHOLDS[dtype]
            of_cann["mere"].append(measures.mere(error, golden) / threshold)
            of_cann["mare"].append(measures.mare(error, golden) / (10 * threshold))
            of_cann["mixed"].append(measures.mixed(error, golden, dtype))
    rms = measures.rms(np.concatenate(all_errors))
    rms_ratio = measures.rms_ratio(rms, baseline.setdefault(quantity, rms))
    worst = {name: max(values, default=None) for name, values in of_cann.items()}
    return Measurement(layer, case, quantity, max(ratios), **worst, rms=rms_ratio)


def _environment(ranks: int) -> dict[str, str]:
    return {
        "ranks": str(ranks),
        "processor": f"{platform.machine()} CPU",
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
