"""The suite's own tests notice when the comparators, the reference or the data are sabotaged.

A sabotage replaces one attribute of one module, in a process of its own. There, each of the tests
named with it must fail, by an assertion and not by accident; without sabotage all of them pass.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from syncbn.conformance import verdict
from syncbn.conformance.case import Case
from syncbn.conformance.verdict import VERDICTS
from syncbn.reference import Bounded, second
from syncbn.reference.bounds import Scale, Statistics

Change: TypeAlias = Callable[[Any], Any]  # from what is there to what takes its place

_TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sabotage:
    """A change of one attribute."""

    place: str  # MODULE:NAME or MODULE:CLASS.NAME
    change: Change
    noticed_by: tuple[str, ...]  # tests as FILE::TEST

    def commit(self) -> None:
        module, _, path = self.place.partition(":")
        *classes, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for one in classes:
            owner = getattr(owner, one)
        setattr(owner, name, self.change(getattr(owner, name)))


# Changes


def becomes(value: Any) -> Change:
    return lambda original: value


def returns(value: Any) -> Change:
    return lambda original: lambda *args: value


def then(change: Change) -> Change:
    """The function's result is changed."""
    return lambda original: lambda *args: change(original(*args))


def given(change: Callable[..., tuple[Any, ...]]) -> Change:
    """The function's arguments are changed."""
    return lambda original: lambda *args: original(*change(*args))


def times_1000(bound: Any) -> Any:
    """Enlarge a bound, in any form that the functions of syncbn.reference.bounds return."""
    if isinstance(bound, Statistics):
        return replace(bound, mean=times_1000(bound.mean), var=times_1000(bound.var))
    if isinstance(bound, Bounded):
        return Bounded(bound.value, 1000 * bound.bound)
    if isinstance(bound, Scale):
        return Scale(bound.value, 1000 * bound.relative)
    return tuple(1000 * one for one in bound) if isinstance(bound, tuple) else 1000 * bound


def of_each_shard(forward: Callable[..., list[Bounded]]) -> Callable[..., list[Bounded]]:
    """Every rank normalizes with the statistics of its own shard."""

    def sabotaged(self: Any, shards: Sequence[Any], *rest: Any, **named: Any) -> list[Bounded]:
        ys, passes = [], []
        for shard in shards:
            ys += forward(self, [shard], *rest, **named)
            passes += self._passes
        self._passes = passes
        return ys

    return sabotaged


def accepts(which: Callable[[Any], Any]) -> Change:
    """The ratio is 0 where `which` is true of the result."""
    return lambda ratio: lambda got, expected: np.where(which(got), 0.0, ratio(got, expected))


def accepts_absence(compare: Callable[..., Any]) -> Callable[..., Any]:
    return lambda where, got, expected: (0.0, "") if got is None else compare(where, got, expected)


def accepts_what_is_frozen(compare: Callable[..., Any]) -> Callable[..., Any]:
    def sabotaged(where: str, got: Any, expected: Any) -> Any:
        return (0.0, "") if expected is None else compare(where, got, expected)

    return sabotaged


def case_with(**fields: Any) -> Change:
    return given(lambda case, *rest: (replace(case, **fields), *rest))


def steps_with(**fields: Any) -> Change:
    def changed(case: Case, *rest: Any) -> tuple[Any, ...]:
        steps = tuple(replace(step, **fields) for step in case.steps)
        return replace(case, steps=steps), *rest

    return given(changed)


def inputs_with(**fields: Any) -> Change:
    def changed(case: Case, *rest: Any) -> tuple[Any, ...]:
        steps = tuple(replace(step, x=replace(step.x, **fields)) for step in case.steps)
        return replace(case, steps=steps), *rest

    return given(changed)


# Faults of the comparators, the reference, its bounds, the expectations and the data.

_DEPARTURES = "conformance/test_verdict.py::test_every_departure_fails"
_OUT_OF_BOUND = "conformance/test_verdict.py::test_a_number_just_out_of_bound_fails"
_UNSOUND = "reference/test_bounds.py::test_unsound_arithmetic_exceeds_the_threshold"
_TRAINING = "reference/test_bounds.py::test_every_bound_of_training_is_within_reach"
_EVAL = "reference/test_bounds.py::test_every_bound_of_eval_is_within_reach"
_SOUND = "reference/test_bounds.py::test_sound_eval_stays_within_the_bound"
_AVERAGE = (
    "reference/test_bounds.py::test_the_bound_of_an_average_over_ranks_is_kept_and_within_reach"
)
_DERIVATIVES = (
    "reference/test_reference.py::test_gradients_are_the_derivatives_of_the_forward_formula"
)
_EXACT = "reference/test_reference.py::test_values_are_those_of_exact_arithmetic"
_MERGED = "reference/test_reference.py::test_combine_merges_parts_and_ignores_empty_ones"
_SECOND = "syncbn.reference.second"
_SECOND_REACH = "reference/test_second_bounds.py::test_every_bound_is_within_reach"
_SECOND_VALUES = (
    "reference/test_second.py::test_they_are_the_derivatives_of_the_first_gradients",
    "reference/test_second.py::test_they_are_those_of_pytorch",
    "reference/test_second.py::test_values_are_those_of_exact_arithmetic",
)
_MOMENTUM = "reference/test_reference.py::test_running_statistics_move_by_the_momentum"
_GROUP = "conformance/test_expected.py::test_statistics_are_those_of_the_group"
_FORWARDS = "conformance/test_expected.py::test_every_forward_moves_the_statistics"
_FROZEN = "conformance/test_expected.py::test_what_is_frozen_or_missing_must_not_be_there"
_AVERAGED = (
    "conformance/test_expected.py"
    "::test_parameter_gradients_are_local_and_data_parallelism_averages_them"
)
_DRAWN = "conformance/test_data.py::test_ranks_steps_and_seeds_draw_for_themselves"

_VERDICT, _FORMULAS, _BOUNDS = (
    "syncbn.conformance.verdict",
    "syncbn.reference.formulas",
    "syncbn.reference.bounds",
)
_LAYER, _EXPECT, _DATA = (
    "syncbn.reference.layer:SyncBatchNorm",
    "syncbn.conformance.expected",
    "syncbn.conformance.data",
)

COMPARATORS = {
    "every ratio is 0": Sabotage(
        f"{_VERDICT}:ratio", then(np.zeros_like), (_OUT_OF_BOUND, _DEPARTURES)
    ),
    "the threshold is 3000": Sabotage(
        "syncbn.reference.ratio:THRESHOLD", becomes(3000.0), (_UNSOUND,)
    ),
    "NaN passes": Sabotage(f"{_VERDICT}:ratio", accepts(np.isnan), (_DEPARTURES,)),
    "infinity passes": Sabotage(f"{_VERDICT}:ratio", accepts(np.isinf), (_DEPARTURES,)),
    "a missing array passes": Sabotage(f"{_VERDICT}:_compare", accepts_absence, (_DEPARTURES,)),
    "an array too many passes": Sabotage(
        f"{_VERDICT}:_compare",
        accepts_what_is_frozen,
        ("conformance/test_verdict.py::test_a_frozen_gradient_that_is_there_fails",),
    ),
    "the parts of the ranks are not added": Sabotage(
        f"{_VERDICT}:_result",
        becomes(
            lambda case, outcome, rank, index, name: verdict._array(
                outcome, rank, f"{index}/{name}"
            )
        ),
        ("conformance/test_second.py::test_only_the_sum_of_the_ranks_counts_for_the_weight",),
    ),
    "no number is compared": Sabotage(f"{_VERDICT}:_numbers", returns(()), (_OUT_OF_BOUND,)),
    "any error passes": Sabotage(
        f"{_VERDICT}:_check_errors",
        returns(None),
        (
            "conformance/test_verdict.py::test_an_error_of_one_rank_must_reach_all",
            "conformance/test_verdict.py::test_a_constructor_must_raise_the_named_error",
        ),
    ),
    "a peer's error need not name the rank": Sabotage(
        f"{_VERDICT}:_names",
        returns(True),
        ("conformance/test_verdict.py::test_an_error_of_one_rank_must_reach_all",),
    ),
    "no fact is looked at": Sabotage(f"{_VERDICT}:_check_facts", returns(None), (_DEPARTURES,)),
    "any fact of a step passes": Sabotage(
        f"{_VERDICT}:_check_step_facts", returns(None), (_DEPARTURES,)
    ),
    "ranks need not agree": Sabotage(f"{_VERDICT}:_check_agreement", returns(None), (_DEPARTURES,)),
    "any initial value passes": Sabotage(
        f"{_VERDICT}:_check_initial_values", returns(None), (_DEPARTURES,)
    ),
    "any num_batches_tracked passes": Sabotage(
        f"{_VERDICT}:_check_count", returns(None), (_DEPARTURES,)
    ),
    "any two facts are equal": Sabotage(f"{_VERDICT}:_equal", returns(None), (_DEPARTURES,)),
    "every verdict is pass": Sabotage(
        f"{_VERDICT}:judge",
        then(lambda found: replace(found, verdict="pass")),
        (_DEPARTURES, "conformance/test_verdict.py::test_crash_and_hang_come_before_every_answer"),
    ),
    "a clause has its best verdict": Sabotage(
        f"{_VERDICT}:worst_of",
        becomes(lambda found: max(found, key=VERDICTS.index, default="not-run")),
        (
            "conformance/test_verdict.py::test_a_clause_has_the_verdict_of_its_worst_case",
            "conformance/test_report.py::test_one_bad_case_fails_the_run",
        ),
    ),
    "no clause counts": Sabotage(
        f"{_VERDICT}:required",
        returns(False),
        (
            "conformance/test_verdict.py::test_which_clauses_count_for_the_exit_status",
            "conformance/test_report.py::test_a_run_in_which_all_cases_pass_passes",
        ),
    ),
    "every step is expected to fail": Sabotage(
        "syncbn.conformance.case:Case.fails", returns(True), (_OUT_OF_BOUND,)
    ),
}
REFERENCE = {
    "running_var takes the biased variance": Sabotage(
        f"{_FORMULAS}:unbiased", becomes(lambda var, n: var), (_EXACT, _MOMENTUM, _GROUP)
    ),
    "y takes the unbiased variance": Sabotage(
        f"{_FORMULAS}:stats",
        lambda stats: lambda x: (stats(x)[0], x.var(axis=1) * x.shape[1] / (x.shape[1] - 1)),
        (_EXACT, _GROUP),
    ),
    "shards have equal weights": Sabotage(
        f"{_FORMULAS}:combine",
        given(lambda means, variances, counts: (means, variances, [1] * len(counts))),
        (_GROUP, _MERGED),
    ),
    "statistics are those of each shard": Sabotage(f"{_LAYER}.forward", of_each_shard, (_GROUP,)),
    "eps is added to the root": Sabotage(
        f"{_FORMULAS}:normalize",
        given(lambda x, mean, var, eps, *rest: (x, mean, (np.sqrt(var) + eps) ** 2, 0.0, *rest)),
        (_EXACT, _DERIVATIVES),
    ),
    "the weight has no sign": Sabotage(
        f"{_FORMULAS}:normalize",
        given(lambda x, mean, var, eps, weight, bias: (x, mean, var, eps, abs(weight), bias)),
        (_EXACT, _DERIVATIVES),
    ),
    "grad_input lacks the term of the mean": Sabotage(
        f"{_FORMULAS}:input_grad",
        given(lambda *args: (*args[:6], 0 * args[6], *args[7:])),
        (_EXACT, _DERIVATIVES),
    ),
    "grad_input lacks the term of the variance": Sabotage(
        f"{_FORMULAS}:input_grad",
        given(lambda *args: (*args[:7], 0 * args[7], *args[8:])),
        (_EXACT, _DERIVATIVES),
    ),
    "grad_input in eval lacks the weight": Sabotage(
        f"{_FORMULAS}:input_grad_in_eval",
        given(lambda dy, var, eps, weight: (dy, var, eps, np.ones_like(weight))),
        (_DERIVATIVES,),
    ),
    "the momentum is that of the old value": Sabotage(
        f"{_FORMULAS}:running",
        given(lambda old, batch, momentum: (old, batch, 1 - momentum)),
        (_EXACT, _MOMENTUM, _GROUP),
    ),
}
BOUNDS = {
    f"1000 {name}": Sabotage(f"{_BOUNDS}:{name}", then(times_1000), noticed_by)
    for name, noticed_by in {
        "of_combine": (_TRAINING,),
        "of_scale": (_TRAINING, _EVAL),
        "of_normalize": (_TRAINING, _EVAL),
        "of_reduce_grad": (_TRAINING, _EVAL),
        "of_grad_weight": (_TRAINING, _EVAL),
        "of_input_grad": (_TRAINING,),
        "of_input_grad_in_eval": (_EVAL,),
        "of_running": (_TRAINING,),
        "of_average": (_AVERAGE,),
        "rounded": (_TRAINING, _EVAL),
    }.items()
} | {
    "results are not rounded": Sabotage(
        f"{_BOUNDS}:rounded", becomes(lambda result, dtype: result), (_SOUND,)
    ),
    "sums have no depth": Sabotage(f"{_BOUNDS}:depth", returns(0.0), (_SOUND, _AVERAGE)),
}
EXPECTATIONS = {
    "what is frozen has cotangents": Sabotage(
        f"{_EXPECT}:Cotangents",
        lambda made: lambda a, p, q: made(a + 1, p, q),
        (
            "conformance/test_second.py::test_what_is_frozen_has_no_second_derivative_and_no_cotangent",
        ),
    ),
    "groups are ignored": Sabotage(
        f"{_EXPECT}:expect",
        case_with(groups=None),
        (_GROUP, "conformance/test_expected.py::test_a_rank_in_no_group_gets_nothing"),
    ),
    "later groups are ignored": Sabotage(
        f"{_EXPECT}:expect",
        steps_with(groups=None),
        ("conformance/test_expected.py::test_groups_may_change_between_steps",),
    ),
    "recomputation is ignored": Sabotage(
        f"{_EXPECT}:expect", steps_with(recompute=False), (_FORWARDS,)
    ),
    "repetition is ignored": Sabotage(f"{_EXPECT}:expect", steps_with(repeat=1), (_FORWARDS,)),
    "data parallelism is ignored": Sabotage(
        f"{_EXPECT}:expect", case_with(ddp=False), (_AVERAGED,)
    ),
    "frozen tensors are ignored": Sabotage(
        f"{_EXPECT}:expect", steps_with(frozen_input=(), frozen_parameters=()), (_FROZEN,)
    ),
    "absent ranks are ignored": Sabotage(
        f"{_EXPECT}:expect",
        steps_with(present=None),
        ("conformance/test_expected.py::test_a_rank_that_is_absent_gets_nothing",),
    ),
    "eval is training": Sabotage(
        f"{_EXPECT}:expect",
        steps_with(mode="train"),
        ("conformance/test_expected.py::test_eval_uses_the_running_statistics_and_leaves_them",),
    ),
    "the momentum is always 0.1": Sabotage(
        "syncbn.conformance.case:Case.momentum",
        becomes(property(lambda case: 0.1)),
        ("conformance/test_expected.py::test_momentum",),
    ),
}
DATA = {
    "all ranks draw the same": Sabotage(
        f"{_DATA}:_generator", given(lambda seed, name, rank: (seed, name, 0)), (_DRAWN,)
    ),
    "all steps draw the same": Sabotage(
        f"{_DATA}:_generator",
        given(lambda seed, name, rank: (seed, name.rstrip("0123456789"), rank)),
        (_DRAWN,),
    ),
    "all seeds draw the same": Sabotage(
        f"{_DATA}:_generator", given(lambda seed, name, rank: (0, name, rank)), (_DRAWN,)
    ),
    "ranks have one mean and spread": Sabotage(
        f"{_DATA}:shard",
        then(lambda x: (x - x.mean()) / x.std()),
        ("conformance/test_data.py::test_ranks_differ_in_mean_and_spread",),
    ),
    "grad_output is 1": Sabotage(
        f"{_DATA}:grad_output",
        then(np.ones_like),
        ("conformance/test_data.py::test_grad_outputs_have_a_mean_and_a_spread_of_their_own",),
    ),
    "weights are 1": Sabotage(
        f"{_DATA}:initial_state",
        then(lambda state: state | {"weight": np.ones_like(state["weight"])}),
        ("conformance/test_data.py::test_the_state_is_not_the_initial_one",),
    ),
    "nothing is rounded": Sabotage(
        f"{_DATA}:round_to",
        becomes(lambda values, dtype: np.asarray(values, float)),
        ("conformance/test_data.py::test_tensors_are_representable_in_their_dtype",),
    ),
    "the ratio is 0": Sabotage(
        f"{_DATA}:shard",
        inputs_with(ratio=0.0),
        ("conformance/test_data.py::test_ratio_and_scale",),
    ),
    "the scale is 1": Sabotage(
        f"{_DATA}:shard",
        inputs_with(scale=1.0),
        ("conformance/test_data.py::test_ratio_and_scale",),
    ),
    "nothing is constant": Sabotage(
        f"{_DATA}:shard", inputs_with(constant=False), ("conformance/test_data.py::test_constant",)
    ),
    "no batch is shared": Sabotage(
        f"{_DATA}:shard",
        inputs_with(shared=False),
        ("conformance/test_data.py::test_a_shared_batch_does_not_depend_on_the_cut",),
    ),
    "nothing is poisoned": Sabotage(
        f"{_DATA}:shard",
        inputs_with(poison=()),
        ("conformance/test_data.py::test_poison_is_in_its_place_and_nowhere_else",),
    ),
    "no gradients are paired": Sabotage(
        f"{_DATA}:grad_output",
        steps_with(paired=False),
        ("conformance/test_data.py::test_paired_steps_are_orthogonal",),
    ),
    "no gradients sum to zero": Sabotage(
        f"{_DATA}:grad_output",
        steps_with(dy_zero_sum=False),
        ("conformance/test_data.py::test_gradients_that_sum_to_zero",),
    ),
}
SECOND = {
    f"1000 {name} of second derivatives": Sabotage(
        f"{_SECOND}:{name}", then(times_1000), (_SECOND_REACH,)
    )
    for name in ("of_e", "of_b", "weight_term_bound", "slopes_term_bound", "scale_term_bound")
} | {
    "second derivatives lack the term of the variance": Sabotage(
        f"{_SECOND}:of_b", then(lambda b: Bounded(0 * b.value, b.bound)), _SECOND_VALUES
    ),
    "second derivatives lack the slopes": Sabotage(
        f"{_SECOND}:_reduced",
        then(lambda one: one._replace(slope=Bounded(0 * one.slope.value, one.slope.bound))),
        _SECOND_VALUES,
    ),
    "second derivatives in eval are those of training": Sabotage(
        f"{_SECOND}:in_eval",
        lambda in_eval: lambda *args: second.in_training(*args),
        _SECOND_VALUES[:2],
    ),
}
SABOTAGES = COMPARATORS | SECOND | REFERENCE | BOUNDS | EXPECTATIONS | DATA


# Processes


class _Collector:
    """A pytest plugin: the tests that passed, and those that failed by an assertion."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.noticed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path, _, test = report.nodeid.partition("[")[0].partition("::")
        name = f"{path.removeprefix('tests/')}::{test}"
        if report.passed and report.when == "call":
            self.passed.add(name)
        crash = getattr(report.longrepr, "reprcrash", None)
        if report.failed and crash and crash.message.startswith(("assert", "AssertionError")):
            self.noticed.add(name)


def _serve(name: str | None, tests: Sequence[str], answer: Connection) -> None:
    """Run the tests under a sabotage, and send pytest's exit status and the collector's names."""
    if name is not None:
        SABOTAGES[name].commit()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    collector = _Collector()
    arguments = ["-p", "no:cacheprovider", *(str(_TESTS / test) for test in tests)]
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main(arguments, plugins=[collector])
    answer.send((int(status), collector.passed, collector.noticed))


def outcome(name: str | None, tests: Sequence[str]) -> tuple[int, set[str], set[str]]:
    """Pytest's exit status under a sabotage, and the tests that passed and that noticed it."""
    context = multiprocessing.get_context("forkserver")  # fast, and without pytest's state
    context.set_forkserver_preload(["hypothesis", "mpmath", "tests.conformance.test_guards"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(name, tests, theirs))
    process.start()
    theirs.close()
    try:
        found: tuple[int, set[str], set[str]] = ours.recv()
    finally:
        process.join()
    return found


# Tests


def test_without_sabotage_all_tests_pass() -> None:
    tests = sorted({test for one in SABOTAGES.values() for test in one.noticed_by})
    status, passed, _ = outcome(None, tests)
    assert status == pytest.ExitCode.OK
    assert sorted(passed) == tests


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_noticed(name: str) -> None:
    tests = SABOTAGES[name].noticed_by
    status, _, noticed = outcome(name, tests)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert sorted(noticed) == sorted(tests)
