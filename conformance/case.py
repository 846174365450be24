"""A case: one question to a layer, as a small JSON document. Its id is the hash of the question.

A case names the clause it asks about, how the layer is built, the steps every rank takes and what
is checked. It holds no arrays: ranks and controller generate them (syncbn.conformance.data).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from syncbn.conformance import ConformanceError

# What can be checked, beside expected errors; see syncbn.conformance.verdict.
CHECKS = (
    "y",
    "grad_input",
    "grad_weight",
    "grad_bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "signature",
    "parameters",
    "initial_values",
    "state_names",
    "format",
    "grad_format",
    "defined",
    "input_unmodified",
    "ranks_agree",
    "repeatable",
    "collectives",
    "communicators",
)

STATES = ("random", "initial", "negative")

Groups: TypeAlias = "tuple[tuple[int, ...], ...]"  # the ranks of each process group


@dataclass(frozen=True)
class Data:
    """How an input is drawn: (z + ratio) * scale, z normal with a mean and spread per rank.

    constant: z = 0. flat: the channels in which z is the mean of the rank, a constant on each.
    shared: z is cut from one batch that does not depend on the cut.
    poison: pairs of a place [rank, n, c, ...] and "nan" or "inf".
    """

    ratio: float = 0.0
    scale: float = 1.0
    constant: bool = False
    flat: tuple[int, ...] = ()
    shared: bool = False
    poison: tuple[tuple[tuple[int, ...], str], ...] = ()


@dataclass(frozen=True)
class ExpectedError:
    """An error that the ranks at fault must raise, by the name of its type.

    Their peers in the group must raise as well, anything that names a rank at fault.
    """

    type: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One forward, and one backward unless `backward` is false, on every rank that is present.

    shapes holds each rank's input shape. dy_zero_sum takes its mean from dy, channel by channel;
    paired repeats the first half of the batch as the second, with dy of the other sign, so that
    dy is orthogonal to x and whatever is left of sum dy x is rounding. Layouts are contiguous,
    channels_last, permuted, sliced or expanded, one for all ranks or one each; dtype likewise.
    repeat: how often the same step is taken. reload: before it, the layer's checkpoint goes into a
    new layer, which takes its place; with other process groups if `groups` names them. beside: a
    second layer normalizes -x in a parallel branch, and one backward runs through both; grad_input
    is that of the first.
    """

    shapes: tuple[tuple[int, ...], ...]
    mode: str = "train"
    dtype: str | tuple[str, ...] = "float32"
    x: Data = field(default_factory=Data)
    dy_zero_sum: bool = False
    paired: bool = False
    layout: str | tuple[str, ...] = "contiguous"
    dy_layout: str | tuple[str, ...] = "contiguous"
    backward: bool = True
    frozen_input: tuple[int, ...] = ()
    frozen_parameters: tuple[int, ...] = ()
    present: tuple[int, ...] | None = None
    recompute: bool = False
    repeat: int = 1
    reload: bool = False
    groups: Groups | None = None
    beside: bool = False
    error: ExpectedError | None = None

    def dtype_of(self, rank: int) -> str:
        return self.dtype if isinstance(self.dtype, str) else self.dtype[rank]

    def layout_of(self, rank: int) -> str:
        return self.layout if isinstance(self.layout, str) else self.layout[rank]

    def dy_layout_of(self, rank: int) -> str:
        return self.dy_layout if isinstance(self.dy_layout, str) else self.dy_layout[rank]

    def takes_part(self, rank: int) -> bool:
        return self.present is None or rank in self.present

    def wants_grad(self, rank: int) -> tuple[bool, bool]:
        """Whether the gradients of the input and of the parameters are wanted."""
        return rank not in self.frozen_input, rank not in self.frozen_parameters


@dataclass(frozen=True)
class Case:
    """See the module. layer holds the constructor's arguments that are given, as literals.

    A literal is JSON, or {"float": "nan"}, or {"numpy": "int64", "value": 4}; dtypes are names.
    groups lists the ranks of each process group; None builds the layer without one. A process_group
    in layer, a list of rank ids, stands for the group of these ranks.
    state is one of STATES: "initial" leaves the layer as it was constructed, "negative" is random,
    but for a negative running_var in channel 0. ddp: the layer is wrapped in the framework's data
    parallelism, which averages the gradients of its parameters over all ranks.
    error is the name of the exception type that the constructor must raise.
    """

    clause: str
    title: str
    ranks: int
    layer: dict[str, Any]
    steps: tuple[Step, ...] = ()
    checks: tuple[str, ...] = ()
    groups: Groups | None = None
    state: str = "random"
    ddp: bool = False
    error: str | None = None
    seed: int = 0
    deadline: float = 20.0

    @property
    def num_features(self) -> int:
        given = self.layer["num_features"]
        return int(given["value"] if isinstance(given, dict) else given)

    @property
    def eps(self) -> float:
        return float(self.layer.get("eps", 1e-5))

    @property
    def momentum(self) -> float | None:
        momentum = self.layer.get("momentum", 0.1)
        return None if momentum is None else float(momentum)

    @property
    def affine(self) -> bool:
        return bool(self.layer.get("affine", True))

    @property
    def track_running_stats(self) -> bool:
        return bool(self.layer.get("track_running_stats", True))

    @property
    def parameter_dtype(self) -> str:
        return str(self.layer.get("dtype") or "float32")

    @property
    def dtypes(self) -> set[str]:
        """Of the parameters and of every rank's input in every step."""
        inputs = {step.dtype_of(rank) for step in self.steps for rank in range(self.ranks)}
        return inputs | {self.parameter_dtype}

    def groups_at(self, index: int) -> Groups | None:
        """The process groups that the layer is built with, as of a step."""
        given = [self.groups, *(step.groups for step in self.steps[: index + 1])]
        return next((groups for groups in reversed(given) if groups is not None), None)

    def group_of(self, rank: int, index: int = 0) -> tuple[int, ...] | None:
        """The ranks that `rank` shares its statistics with, or None if it is in no group."""
        groups = self.groups_at(index)
        if groups is None:
            return tuple(range(self.ranks))
        return next((group for group in groups if rank in group), None)

    def fails(self, index: int, rank: int) -> bool:
        """Whether an error is expected of this rank in this step: its own, or a peer's."""
        step, group = self.steps[index], self.group_of(rank, index)
        if step.error is None or group is None or not step.takes_part(rank):
            return False
        return not set(group).isdisjoint(step.error.ranks)

    @property
    def document(self) -> dict[str, Any]:
        """The case as JSON values, defaults left out."""
        document = _document(self)
        assert isinstance(document, dict)
        return document

    @property
    def id(self) -> str:
        """12 hexadecimal digits of the SHA-256 of the document without its title."""
        asked = {key: v for key, v in self.document.items() if key != "title"}
        canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


class CaseError(ConformanceError, ValueError):
    """A document that is not a case."""


def load(document: Any) -> Case:
    """The case of a document.

    Raises:
        CaseError: naming what is wrong with it.
    """
    try:
        fields = dict(document)
        steps = tuple(_step(dict(step)) for step in fields.pop("steps", ()))
        case: Case = Case(steps=steps, **{key: _tuples(v, key) for key, v in fields.items()})
    except (TypeError, ValueError, KeyError) as error:
        raise CaseError(f"not a case document: {error}") from error
    _validate(case)
    return case


def _step(fields: dict[str, Any]) -> Step:
    if "x" in fields:
        fields["x"] = Data(**{key: _tuples(v, key) for key, v in fields["x"].items()})
    if fields.get("error"):
        error = fields["error"]
        fields["error"] = ExpectedError(error["type"], tuple(error["ranks"]))
    return Step(**{key: _tuples(v, key) for key, v in fields.items()})


def _validate(case: Case) -> None:
    if not isinstance(case.ranks, int) or case.ranks < 1:
        raise CaseError(f"ranks must be a positive int, got {case.ranks!r}")
    if unknown := set(case.checks) - set(CHECKS):
        raise CaseError(f"checks must be among {', '.join(CHECKS)}, got {', '.join(unknown)}")
    if case.state not in STATES:
        raise CaseError(f"state must be one of {', '.join(STATES)}, got {case.state!r}")
    grouped = {rank for rank in range(case.ranks) if case.group_of(rank) is not None}
    for index, step in enumerate(case.steps):
        if len(step.shapes) != case.ranks:
            raise CaseError(
                f"every step must have one shape per rank ({case.ranks}), got {len(step.shapes)}"
            )
        if {r for r in range(case.ranks) if case.group_of(r, index) is not None} != grouped:
            raise CaseError(
                f"groups must hold the same ranks in every step, got {step.groups} in step {index}"
            )


def _document(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _document(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if getattr(value, f.name) != _default(f)
        }
    if isinstance(value, (tuple, list)):
        return [_document(item) for item in value]
    return value


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _tuples(value: Any, key: str) -> Any:
    """JSON lists as tuples, except in the layer's arguments, which stay what they are."""
    if isinstance(value, list) and key != "layer":
        return tuple(_tuples(item, key) for item in value)
    return value
