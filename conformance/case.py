"""A case: one question to a layer, as a small JSON document. Its id is a hash of the document.

A case names the clause that it is about, how the layer is built, the steps that every rank takes,
and what is checked. It holds no arrays: the ranks and the controller generate them, see
syncbn.conformance.data.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

STATES = ("random", "initial", "negative")
RECORDING = ("on", "no_grad", "inference_mode")
SECOND = ("input", "grad_output", "weight")

Groups: TypeAlias = "tuple[tuple[int, ...], ...]"  # the ranks of each process group


@dataclass(frozen=True)
class Data:
    """How an input is drawn: (z + ratio) * scale, z normal with a mean and a spread per rank.

    ratio: the mean of the input in units of its spread.
    scale: the spread of the input.
    constant: z is 0.
    flat: the channels in which z is constant on each rank, and differs between ranks.
    shared: z is cut from one batch that does not depend on the cut.
    poison: pairs of a place (rank, n, c, ...) and the value there, "nan", "inf" or "-inf".
    """

    ratio: float = 0.0
    scale: float = 1.0
    constant: bool = False
    flat: tuple[int, ...] = ()
    shared: bool = False
    poison: tuple[tuple[tuple[int, ...], str], ...] = ()


@dataclass(frozen=True)
class ExpectedError:
    """An error in a step. The peers of a rank at fault must raise an error that names such a rank.

    type: the name of the exception type that the ranks at fault must raise.
    ranks: the ranks at fault.
    in_backward: whether the forward succeeds, so that the running statistics move.
    """

    type: str
    ranks: tuple[int, ...]
    in_backward: bool = False


@dataclass(frozen=True)
class Step:
    """One forward on every rank that is present, and one backward unless `backward` is false.

    A layout is contiguous, channels_last, permuted, sliced or expanded.

    shapes: the shape of each rank's input.
    mode: "train" or "eval".
    dtype: of the input and of dy; one for all ranks, or one for each.
    x: how the input is drawn.
    dy_zero_sum: dy has the mean 0 in each channel of each rank.
    paired: the second half of the batch repeats the first, with dy of the other sign; then dy is
        orthogonal to x, and the computed sum of dy x is rounding alone.
    layout: of the input; one for all ranks, or one for each.
    dy_layout: of dy; one for all ranks, or one for each.
    backward: whether a backward follows the forward.
    frozen_input: the ranks that want no gradient of the input.
    frozen_parameters: the ranks that want no gradients of the parameters.
    present: the ranks that take the step; None is all.
    recompute: the forward is checkpointed, so that the backward runs it again.
    repeat: how often the same step is taken.
    reload: a new layer takes over the checkpoint of the old one before the step.
    groups: the process groups of that new layer, if they change.
    beside: a second layer normalizes -x in a parallel branch, and one backward runs through both;
        the results are those of the first.
    error: the error that the step must raise.
    attributes: attributes of the layer that are set before the step, as literals; they stay set.
    recording: one of RECORDING, whether the forward is recorded for a backward.
    autocast: the dtype of the mixed precision in which the forward runs; None for none.
    lost: the ranks that cannot read in the backward what the forward saved for it.
    second: the tensors to which the gradients are differentiated again, among SECOND; the others
        are constants. The second backward starts from random cotangents of all gradients.
    again: the input is the very tensor of the step before.
    copied: a deep copy of the layer takes the step and those after it.
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
    attributes: dict[str, Any] = field(default_factory=dict)
    recording: str = "on"
    autocast: str | None = None
    lost: tuple[int, ...] = ()
    second: tuple[str, ...] = ()
    again: bool = False
    copied: bool = False

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
    """One question to a layer; see the module.

    A literal is a JSON value, {"float": "nan"}, or {"numpy": "int64", "value": 4}; a dtype is its
    name.

    clause: the clause of the contract that the case is about.
    title: what the case does, in words; no part of the id.
    ranks: the number of ranks.
    layer: the arguments of the constructor that are given, as literals. A process_group in it is a
        list of rank ids, and stands for the group of these ranks.
    steps: what the ranks do, one after the other.
    checks: what is judged, except expected errors: names of syncbn.conformance.checks.CHECKS.
    groups: the ranks of each process group; None builds the layer without a process_group.
    state: one of STATES. "initial" leaves the layer as it was constructed; "random" draws
        parameters and running statistics; "negative" is random with a negative running_var in
        channel 0.
    ddp: the layer is wrapped in the framework's data parallelism, which averages the gradients of
        its parameters over all ranks.
    error: the name of the exception type that the constructor must raise.
    seed: of everything random.
    deadline: seconds after which a rank hangs.
    layers: pairs of a rank and the arguments in which its layer differs from `layer`.
    cast: the dtype that a new layer is cast to, as by `to(dtype)`, before it gets its state.
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
    layers: tuple[tuple[int, dict[str, Any]], ...] = ()
    cast: str | None = None

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
        return str(self.cast or self.layer.get("dtype") or "float32")

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of all parameters, and of every rank's input in every step."""
        inputs = {step.dtype_of(rank) for step in self.steps for rank in range(self.ranks)}
        return inputs | {self.of_rank(rank).parameter_dtype for rank in range(self.ranks)}

    def of_rank(self, rank: int) -> Case:
        """The case with the layer of a rank as the layer of all."""
        own = dict(self.layers).get(rank, {})
        return replace(self, layer=self.layer | own, layers=()) if self.layers else self

    def attributes_at(self, index: int) -> dict[str, Any]:
        """The attributes of the layer that have been set when a step begins."""
        return {
            name: value
            for step in self.steps[: index + 1]
            for name, value in step.attributes.items()
        }

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

    @functools.cached_property
    def id(self) -> str:
        """12 hexadecimal digits of the SHA-256 of the document without its title."""
        question = {key: v for key, v in self.document.items() if key != "title"}
        canonical = json.dumps(question, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def of_document(document: dict[str, Any]) -> Case:
    """The case of a document that the suite itself wrote; syncbn.conformance.document reads others.

    Raises:
        TypeError: a field does not exist, or is missing.
    """
    fields = dict(document)
    steps = tuple(_step(dict(step)) for step in fields.pop("steps", ()))
    return Case(steps=steps, **{key: _tuples(v, key) for key, v in fields.items()})


def _step(fields: dict[str, Any]) -> Step:
    if "x" in fields:
        fields["x"] = Data(**{key: _tuples(v, key) for key, v in fields["x"].items()})
    if fields.get("error"):
        error = fields["error"]
        fields["error"] = ExpectedError(**{key: _tuples(v, key) for key, v in error.items()})
    return Step(**{key: _tuples(v, key) for key, v in fields.items()})


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
