"""Random sequences of steps, the cases of exploration.

A Hypothesis state machine builds a case: first the layer, then each rule adds a step, or a
checkpoint before the next one. At the end it hands over the whole case. The contract defines the
result of everything that is drawn; where it demands an error, the step expects the error.

Every rule always draws the same choices. One of them is whether its step is kept; what the others
mean for the case is decided afterwards. So a simpler case differs in one choice, and that is how
Hypothesis searches for it. The first option of every choice is the simplest.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from syncbn.conformance.case import RECORDING, SECOND, Case, Data, ExpectedError, Groups, Step
from syncbn.conformance.checks import CHECKS, SECOND_GRADIENTS

T = TypeVar("T")
Choices: TypeAlias = dict[str, Any]

_RULES = 6  # rules that build a case; fewer in a simplified one
_DEADLINE = 10.0  # seconds for a case, which takes a fraction of a second
_LARGEST_IMAGE = 8192  # values

_LAYOUTS = st.sampled_from(("contiguous", "channels_last", "permuted", "sliced", "expanded"))
_ANY = st.integers(0, 10**6)  # modulo the number of options
_HALVES = ("float16", "bfloat16")
DTYPES = ("float32", *_HALVES, "float64")
# The dtypes of input that fit a dtype of the parameters.
_INPUTS = {"float32": ("float32", *_HALVES)} | {name: (name,) for name in (*_HALVES, "float64")}

# Inputs that the layer must refuse: the new shape, or "integers" for the dtype int64.
_FAULTS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "a channel too many": lambda shape: (shape[0], shape[1] + 1, *shape[2:]),
    "no channels": lambda shape: (shape[0], 0, *shape[2:]),
    "1 dimension": lambda shape: shape[1:2],
    "integers": lambda shape: shape,
}

_UNCOUNTED = ("frozen", "recompute", "beside")

_DEFAULTS = {
    "eps": 1e-5,
    "momentum": 0.1,
    "affine": True,
    "track_running_stats": True,
    "dtype": "float32",
}


def explore(
    ranks: int,
    run: Callable[[Case], None],
    from_seed: int,
    cases: int,
    dtypes: Sequence[str] = DTYPES,
) -> None:
    """Draw cases and call `run` with each.

    If `run` raises, Hypothesis tries simpler and simpler cases, and at last the simplest one that
    made it raise. That exception comes out.

    Args:
        ranks: the number of ranks of every case.
        run: runs a case.
        from_seed: the seed of the draws.
        cases: how many cases to draw.
        dtypes: those of DTYPES to draw, float32 first.
    """
    chosen = settings(
        max_examples=cases,
        stateful_step_count=_RULES + 1,
        database=None,  # what was found is kept as a case, which outlives versions of Hypothesis
        print_blob=False,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=tuple(HealthCheck),
        verbosity=Verbosity.quiet,
    )

    @seed(from_seed)
    class Running(_Sequence):
        def __init__(self) -> None:
            super().__init__(ranks, run, dtypes)

    run_state_machine_as_test(Running, settings=chosen)


class _Sequence(RuleBasedStateMachine):
    """Builds a case and runs it at the end. `checkpoint` holds fields of the next step."""

    def __init__(self, ranks: int, run: Callable[[Case], None], dtypes: Sequence[str]) -> None:
        super().__init__()
        self.run = run
        self.dtypes = dtypes
        self.case = Case("FWD-1", "explored", ranks, {}, deadline=_DEADLINE)
        self.checkpoint: dict[str, Any] = {}

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        layer = data.draw(_of_layer(tuple(self.dtypes)))
        self.case = _built(self.case, layer, data.draw(_of_case(self.case.ranks)))

    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        self._add(data, "train", _accepted)

    @rule(data=st.data())
    def evaluate(self, data: st.DataObject) -> None:
        self._add(data, "eval", _accepted)

    @rule(data=st.data())
    def fail_in_training(self, data: st.DataObject) -> None:
        self._add(data, "train", _refused)

    @rule(data=st.data())
    def fail_in_eval(self, data: st.DataObject) -> None:
        self._add(data, "eval", _refused)

    @rule(data=st.data())
    def reload(self, data: st.DataObject) -> None:
        """A new layer takes over the checkpoint, in the same groups or in others."""
        kind, labels = data.draw(
            st.tuples(st.sampled_from(("none", "reload", "groups")), _labels(self.case.ranks))
        )
        if kind == "groups" and not self.case.ddp:
            self.checkpoint = {"groups": _grouped(_members(self.case), labels)}
        elif kind != "none":
            self.checkpoint = {"reload": True}

    def teardown(self) -> None:
        drawn_to_the_end = sys.exc_info()[0] is None
        if drawn_to_the_end and self.case.steps:
            self.run(replace(self.case, checks=_applying(self.case)))

    def _add(
        self, data: st.DataObject, mode: str, finish: Callable[[Case, Step, Choices], Step]
    ) -> None:
        drawn = data.draw(_of_step(self.case.ranks))
        if drawn["kept"]:
            if "collectives" in self.case.checks:
                # Collectives are counted only where no step raises and all do the same work.
                finish = _accepted
                extras = [name for name in drawn["extras"] if name not in _UNCOUNTED]
                drawn = drawn | {"extras": extras}
            step = _shaped(self.case, Step((), mode, **self.checkpoint), drawn, self.dtypes)
            step = finish(self.case, step, drawn)
            self.case = replace(self.case, steps=(*self.case.steps, step))
            self.checkpoint = {}


@functools.cache
def _of_layer(dtypes: tuple[str, ...]) -> st.SearchStrategy[Choices]:
    return st.fixed_dictionaries(
        {
            "num_features": st.sampled_from((2, 1, 3, 5, 8, 17, 64, 65)),
            "eps": st.sampled_from((1e-5, 0.1, 1e-3, 0.0, 1e-12, 1.0)),
            "momentum": st.sampled_from((0.1, None, 0.0, 1.0, 0, 1, 0.35, 0.999)),
            "affine": st.sampled_from((True, False)),
            "track_running_stats": st.sampled_from((True, True, True, False)),
            "dtype": st.sampled_from(("float32", *dtypes)),
        }
    )


@functools.cache
def _of_case(ranks: int) -> st.SearchStrategy[Choices]:
    return st.fixed_dictionaries(
        {
            "grouped": st.booleans(),
            "labels": _labels(ranks),
            "outside": _some(ranks),
            "state": _ANY,
            "seed": _ANY,
            "extras": _extras("ddp", "outside", "repeatable", "collectives"),
        }
    )


@functools.cache
def _of_step(ranks: int) -> st.SearchStrategy[Choices]:
    size = st.sampled_from((2, 1, 3, 4, 5, 7, 2, 3, 33, 129, 2049))
    return st.fixed_dictionaries(
        {
            "kept": st.sampled_from((False,) + (True,) * 9),
            "batches": _each(ranks, st.sampled_from((2, 1, 3, 0, 5, 8, 16))),
            "spatial": _each(ranks, st.lists(size, max_size=4).map(tuple)),
            "inputs": _each(ranks, _ANY),
            "layout": _each(ranks, _LAYOUTS),
            "dy_layout": _each(ranks, _LAYOUTS),
            "backward": st.sampled_from((True, False)),
            "ratio": _ANY,
            "scale": _ANY,
            "extras": _extras(
                *("constant", "flat", "shared", "poison", "dy_zero_sum", "paired"),
                *("frozen", "present", "repeat", "recompute", "beside"),
                *("attributes", "recording", "autocast"),
                *("second",) * 5,  # more often, because few steps can be differentiated again
            ),
            "context": _ANY,
            "poison": st.tuples(_ANY, st.sampled_from(("nan", "inf"))),
            "frozen_input": _some(ranks),
            "frozen_parameters": _some(ranks),
            "fault": st.sampled_from([*_FAULTS]),
            "ranks": _some(ranks),
        }
    )


def _each(ranks: int, values: st.SearchStrategy[T]) -> st.SearchStrategy[tuple[T, ...]]:
    """One value for all ranks, or one each."""
    drawn = st.tuples(st.booleans(), st.tuples(*[values] * ranks))
    return drawn.map(lambda pair: pair[1] if pair[0] else pair[1][:1] * ranks)


def _some(ranks: int) -> st.SearchStrategy[set[int]]:
    """Any ranks, or none."""
    bits = st.integers(0, 2**ranks - 1)
    return bits.map(lambda drawn: {rank for rank in range(ranks) if drawn >> rank & 1})


def _labels(ranks: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(0, ranks - 1)] * ranks)


def _extras(*names: str) -> st.SearchStrategy[list[str]]:
    """A few unusual properties at a time."""
    return st.lists(st.sampled_from(names), max_size=3)


def _built(case: Case, layer: dict[str, Any], drawn: Choices) -> Case:
    """The case with a layer, groups and an initial state."""
    layer = {name: v for name, v in layer.items() if name not in _DEFAULTS or v != _DEFAULTS[name]}
    case = replace(case, layer=layer, seed=drawn["seed"] % 100)
    all_ranks = set(range(case.ranks))
    outside = drawn["outside"] if "outside" in drawn["extras"] else set()
    members = sorted(all_ranks - outside or all_ranks)
    groups = _grouped(members, drawn["labels"]) if drawn["grouped"] else None
    # With eps = 0, the NaN of a negative variance looks like an undefined result.
    states = ("random", "initial", "negative") if case.eps else ("random", "initial")
    return replace(
        case,
        groups=groups,
        state=_pick(states, drawn["state"]),
        # In float16, gradients may overflow before they are averaged, which would not be seen.
        ddp="ddp" in drawn["extras"]
        and "collectives" not in drawn["extras"]
        and (groups is None and case.affine and case.parameter_dtype != "float16"),
        checks=tuple({"repeatable", "collectives"}.intersection(drawn["extras"])),
    )


def _shaped(case: Case, step: Step, drawn: Choices, dtypes: Sequence[str]) -> Step:
    """The step with shapes and dtypes. Ranks of one group share a dtype, as in the reference."""
    inputs = list(drawn["inputs"])
    for group in _groups(case, step):
        for rank in group:
            inputs[rank] = inputs[group[0]]
    fitting = [dtype for dtype in _INPUTS[case.parameter_dtype] if dtype in dtypes]
    drawn_dtypes = tuple(_pick(fitting, index) for index in inputs)
    shapes = []
    for batch, spatial in zip(drawn["batches"], drawn["spatial"], strict=True):
        while case.num_features * math.prod(spatial) > _LARGEST_IMAGE:
            spatial = spatial[:-1]
        shapes.append((batch, case.num_features, *spatial))
    return replace(
        step, shapes=tuple(shapes), dtype=_one_or_each(drawn_dtypes), backward=drawn["backward"]
    )


def _accepted(case: Case, step: Step, drawn: Choices) -> Step:
    """The step with inputs that every rank accepts."""
    extras = drawn["extras"]
    step = replace(
        step,
        layout=_one_or_each(drawn["layout"]),
        dy_layout=_one_or_each(drawn["dy_layout"]),
        dy_zero_sum="dy_zero_sum" in extras,
        paired="paired" in extras and all(shape[0] % 2 == 0 for shape in step.shapes),
    )
    step = replace(step, x=_data(case, step, drawn))
    # An absent rank cannot join new groups.
    present = drawn["ranks"].intersection(_members(case)) if "present" in extras else set()
    if present and step.mode == "eval" and not step.groups and not case.ddp:
        step = replace(step, present=tuple(sorted(present)))
    if step.backward and "frozen" in extras:
        step = _frozen(case, step, drawn)
    if "attributes" in extras:
        step = replace(step, attributes=_attributes(drawn["context"]))
    step = _expecting(case, step)
    if step.error:
        return step
    if "autocast" in extras:
        step = replace(step, autocast=_pick(_HALVES, drawn["context"]))
    if "recording" in extras and not step.backward:
        step = replace(step, recording=_pick(RECORDING[1:], drawn["context"]))
    if "second" in extras and _can_be_differentiated_again(case, step):
        return replace(step, second=SECOND)
    return replace(
        step,
        repeat=1 + extras.count("repeat"),
        recompute="recompute" in extras and step.backward and not case.ddp,
        beside="beside" in extras and step.mode == "train",
    )


def _attributes(drawn: int) -> dict[str, Any]:
    """One or more attributes to set on the layer."""
    values = {
        "eps": _pick((0.1, 1e-3), drawn),
        "momentum": _pick((0.5, None, 0.0, 1.0), drawn),
        "track_running_stats": _pick((False, True), drawn),
    }
    chosen = 1 + drawn // 4 % 7  # every subset but the empty one
    return {name: value for i, (name, value) in enumerate(values.items()) if chosen >> i & 1}


def _can_be_differentiated_again(case: Case, step: Step) -> bool:
    """Whether a second backward is defined, and no term of it leaves the range of its dtype."""
    regrouped = step.groups or any(before.groups for before in case.steps)
    frozen = step.frozen_input or step.frozen_parameters
    half = any(step.dtype_of(rank) in _HALVES for rank in range(case.ranks))
    imprecise = half and step.mode == "eval"  # the contract requires no precision there
    ordinary = step.x.scale == 1 and not step.x.poison and case.eps > 0
    elsewhere = step.autocast or step.lost  # `second` does not stand with these
    odd = regrouped or frozen or imprecise or elsewhere or case.ddp
    return step.backward and ordinary and not odd


def _refused(case: Case, step: Step, drawn: Choices) -> Step:
    """The step with inputs that some ranks must refuse; in eval all ranks, as none sees a peer."""
    members = _members(case)
    some = sorted(drawn["ranks"].intersection(members))
    refusing = some if some and step.mode == "train" else members
    if drawn["fault"] == "integers":
        dtypes = tuple("int64" if r in refusing else step.dtype_of(r) for r in range(case.ranks))
        return _expecting(case, replace(step, dtype=_one_or_each(dtypes)), refusing, "Exception")
    fault = _FAULTS[drawn["fault"]]
    shapes = tuple(fault(s) if r in refusing else s for r, s in enumerate(step.shapes))
    return _expecting(case, replace(step, shapes=shapes), refusing)


def _data(case: Case, step: Step, drawn: Choices) -> Data:
    half = any(step.dtype_of(rank) in _HALVES for rank in range(case.ranks))
    ratios = (0.0, 1.0, 30.0) if half else (0.0, 1.0, 30.0, 1e3, 1e5)
    scales = (1.0, 0.01, 100.0) if half else (1.0, 1e-3, 1e3, 1e-9, 1e9, 1e-18, 1e18)
    extras = drawn["extras"]
    return Data(
        ratio=_pick(ratios, drawn["ratio"]),
        scale=_pick(scales, drawn["scale"]),
        constant="constant" in extras and case.eps > 0,
        flat=(case.num_features - 1,) if "flat" in extras else (),
        shared="shared" in extras and len({shape[1:] for shape in step.shapes}) == 1,
        poison=_poison(case, step, *drawn["poison"]) if "poison" in extras else (),
    )


def _poison(case: Case, step: Step, at: int, value: str) -> tuple[tuple[tuple[int, ...], str], ...]:
    """One poisoned value, in a tensor whose images do not share their memory."""
    filled = [rank for rank, shape in enumerate(step.shapes) if shape[0]]
    separate = [rank for rank in filled if step.layout_of(rank) != "expanded"]
    if not case.eps or not separate:
        return ()
    rank = _pick(separate, at)
    place = np.unravel_index(at % math.prod(step.shapes[rank]), step.shapes[rank])
    return (((rank, *map(int, place)), value),)


def _frozen(case: Case, step: Step, drawn: Choices) -> Step:
    """The step with inputs and parameters frozen on some ranks, but not everything in a group.

    Parameters are not frozen in data parallelism, which looks at them when it wraps the layer.
    """
    members = set(_members(case))
    inputs = drawn["frozen_input"] & members
    parameters = set() if case.ddp else drawn["frozen_parameters"] & members
    idle = inputs & parameters if case.affine else inputs
    for together in _groups(case, step) if step.mode == "train" else ((rank,) for rank in members):
        if idle.issuperset(together):
            inputs = inputs.difference(together)
    return replace(
        step, frozen_input=tuple(sorted(inputs)), frozen_parameters=tuple(sorted(parameters))
    )


def _expecting(
    case: Case, step: Step, refusing: Sequence[int] = (), kind: str = "ValueError"
) -> Step:
    """The step with the errors that the contract demands: ERR-6 or ERR-9, ERR-7, GRAD-4."""
    single: set[int] = set()
    for group in _groups(case, step) if step.mode == "train" else ():
        if not set(group) & set(refusing) and sum(_values(step.shapes[r]) for r in group) == 1:
            single.update(group)
    idle = set(step.frozen_input)
    if case.affine:
        idle &= set(step.frozen_parameters)
    if at_fault := {*refusing, *single, *idle}:
        error = ExpectedError("Exception" if idle else kind, tuple(sorted(at_fault)))
        return replace(step, error=error)
    return step


def _applying(case: Case) -> tuple[str, ...]:
    """All checks that apply to the case. A slow one applies only if the case has it already."""
    steps = case.steps
    groups = [group for i in range(len(steps)) for group in case.groups_at(i) or ()]
    odd = any(s.recompute or s.beside or s.frozen_input or s.error or s.second for s in steps)
    odd = odd or case.ddp
    applies = {
        **dict.fromkeys(SECOND_GRADIENTS, any(step.second for step in steps)),
        "initial_values": case.state == "initial",
        # Ranks that were in other groups before have other statistics.
        "ranks_agree": not any(step.groups or step.present for step in steps),
        "grad_format": all(step.backward and not step.frozen_input for step in steps),
        "repeatable": "repeatable" in case.checks,
        "collectives": "collectives" in case.checks and not odd and all(len(g) > 1 for g in groups),
    }
    return tuple(name for name, check in CHECKS.items() if check.always or applies.get(name))


def _members(case: Case) -> list[int]:
    """The ranks that are in a group; they are the same in every step."""
    return [rank for rank in range(case.ranks) if case.group_of(rank) is not None]


def _groups(case: Case, step: Step) -> Groups:
    """The groups of the next step of the case."""
    all_ranks = (tuple(range(case.ranks)),)
    return step.groups or case.groups_at(len(case.steps) - 1) or all_ranks


def _grouped(members: Sequence[int], labels: Sequence[int]) -> Groups:
    """Groups of the ranks that have the same label."""
    by_label = {
        labels[rank]: tuple(r for r in members if labels[r] == labels[rank]) for rank in members
    }
    return tuple(by_label.values())


def _values(shape: tuple[int, ...]) -> int:
    """The number of values per channel."""
    return shape[0] * math.prod(shape[2:])


def _pick(options: Sequence[T], index: int) -> T:
    return options[index % len(options)]


def _one_or_each(values: tuple[str, ...]) -> str | tuple[str, ...]:
    """One value if all ranks have the same, as the fields of Step allow."""
    return values[0] if len(set(values)) == 1 else values
