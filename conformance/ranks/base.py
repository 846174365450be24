"""A rank: it builds the layer of a case, takes the steps and answers.

The answer holds facts as JSON values and named arrays. A rank never judges them; that is the work
of syncbn.conformance.verdict. The abstract methods are all that a framework must provide.
"""

from __future__ import annotations

import copy
import errno
import inspect
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from syncbn.conformance import data
from syncbn.conformance.case import Case, Step
from syncbn.conformance.checks import STATISTICS, arrays_of
from syncbn.conformance.frameworks import import_module
from syncbn.conformance.ranks.process import Generator, ProcessState, Setting, Suite
from syncbn.conformance.ranks.sources import sources_of

# The last part of a tensor's name, which says what it is; other names than the first are those of
# mindspore.nn, TensorFlow and Flax.
_ROLES = {
    "weight": ("weight", "gamma", "scale"),
    "bias": ("bias", "beta", "offset"),
    "running_mean": ("running_mean", "moving_mean", "mean"),
    "running_var": ("running_var", "moving_variance", "var"),
    "num_batches_tracked": ("num_batches_tracked",),
}

# A value of each documented argument that every layer must accept.
_SOUND = {
    "num_features": 3,
    "eps": 1e-5,
    "momentum": 0.1,
    "affine": True,
    "track_running_stats": True,
    "process_group": None,
    "dtype": None,
}

Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = dict[str, Array]
T = TypeVar("T")


class Unsupported(Exception):
    """The framework cannot do what a step needs; all ranks must raise it."""


class MachineError(Exception):
    """The machine could not do what the layer needed, so the layer cannot be judged."""


# A full disk, a full quota, a table of open files that is full for all processes, a broken disk.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.ENFILE, errno.EIO)
_LONGEST_TEXT = 4000  # of an error, in characters


class Rank(ABC):
    """One process of a target. It builds the layer with the documented arguments, and with those
    that the user gives for every layer.

    Args:
        target: a syncbn.conformance.targets.Target as a document.
        rank: the id of this process.
        ranks: the number of processes.
        local_rank: the id of this process among those of this machine, for the choice of a device.

    `groups` holds the framework's process groups by their ranks. The methods from `is_tensor` to
    `writes` suit tensors with the methods of PyTorch's; a framework with others replaces them.
    """

    framework: Any  # the module of the framework, which names the dtypes

    def __init__(self, target: dict[str, Any], rank: int, ranks: int, local_rank: int) -> None:
        if target["backend"] is not None:
            os.environ["SYNCBN_BACKEND"] = target["backend"]
        self.rank = rank
        self.ranks = ranks
        self.rank_ids = target["rank_ids"]
        self.float64 = target["float64"]
        self.layer_args: dict[str, Any] = target["layer_args"]
        self._suite = Suite()
        self._module = import_module(target["module"])
        self.cls: Callable[..., Any] = getattr(self._module, target["cls"])
        if patched := self._suite.patched():
            raise RuntimeError(f"the module of the layer replaces {', '.join(patched[:3])}")
        self.groups: dict[tuple[int, ...], Any] = {}

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Names and versions of the software that the results depend on."""

    def sources(self) -> dict[str, Any]:
        """The files of the layer that this process has loaded, and the distribution it is from."""
        return sources_of(self._module.__name__)

    @abstractmethod
    def host(self) -> int:
        """The port of MASTER_ADDR where the ranks are to meet, a new number every time.

        Only rank 0 hosts.
        """

    @abstractmethod
    def join(self, port: int) -> None:
        """Form a world with the other ranks: a new one, or an old one that is proven to work.

        Raises:
            Exception: this process can form none. The controller then starts other processes.
        """

    @abstractmethod
    def build(self, arguments: dict[str, Any]) -> Any:
        """The target's layer, on the device."""

    def cast(self, layer: Any, dtype: str) -> Any:
        """The layer with parameters and running statistics of a dtype, as a user casts it."""
        raise NotImplementedError  # a framework without it says so in `unsupported`

    @abstractmethod
    def load_state(self, layer: Any, state: dict[str, Any]) -> Sequence[str]:
        """Set parameters and running statistics. Returns the names that the layer does not have."""

    @abstractmethod
    def state(self, layer: Any) -> dict[str, Any]:
        """The tensors of a checkpoint of the layer, by name."""

    @abstractmethod
    def parameters(self, layer: Any) -> dict[str, Any]:
        """The parameters and buffers of the layer, by name."""

    @abstractmethod
    def create_group(self, ranks: tuple[int, ...]) -> Any:
        """The process_group of these ranks. Every rank calls this for every group of a case."""

    @abstractmethod
    def tensor(self, values: Array, dtype: str) -> Any:
        """A new contiguous tensor on the device."""

    @abstractmethod
    def array(self, tensor: Any) -> Array:
        """A copy of the values; bfloat16 as float32, because NumPy does not have it."""

    @abstractmethod
    def data_parallel(self, layer: Any) -> Any:
        """The layer wrapped in the framework's data parallelism over all ranks."""

    @abstractmethod
    def communicators(self) -> int:
        """How many process groups there are."""

    @abstractmethod
    def take(
        self, layer: Any, parallel: Any, x: Any, dy: Any, step: Step, counting: bool
    ) -> tuple[dict[str, Any], list[int]]:
        """One forward, and one backward unless dy is None.

        Args:
            layer: the layer, or the layer in data parallelism.
            parallel: a second layer in a parallel branch, or None.
            x: the input.
            dy: the gradient of the loss in y.
            step: the step of the case, for its mode, contexts and frozen tensors.
            counting: whether to count collectives.

        Returns:
            The tensors `y`, `grad_input` and `grad_NAME` of each parameter, None where there is
            none, and `grad_input_format`, whether the gradient is channels_last as it leaves the
            layer; then, if counting, the numbers of collectives of the forward and the backward.
        """

    @abstractmethod
    def take_twice(
        self, layer: Any, x: Any, dy: Any, cotangents: dict[str, Any], step: Step
    ) -> dict[str, Any]:
        """One forward and two backwards.

        Args:
            layer: the layer.
            x: the input.
            dy: the gradient of the loss in y.
            cotangents: what the second backward starts from, by the name of the first gradient.
            step: the step of the case.

        Returns:
            The tensors `y`, `grad_NAME` and `grad_grad_NAME`; None where there is none.
        """

    def unsupported(self, case: Case) -> str | None:
        """Why this target cannot run the case, or None. All ranks must give the same answer."""
        if not self.float64 and "float64" in case.dtypes:
            return "Ascend and its kernels have no float64"
        return None

    def is_tensor(self, value: Any) -> bool:
        """Whether a layer may return this."""
        return isinstance(value, self.framework.Tensor)

    def lay_out(self, values: Array, dtype: str, layout: str) -> Any:
        """A tensor with these values in a memory layout; see syncbn.conformance.case.Step."""
        if layout == "sliced":
            wider = np.full((*values.shape[:-1], 2 * values.shape[-1]), 7.0)
            wider[..., ::2] = values
            return self.tensor(wider, dtype)[..., ::2]
        tensor = self.tensor(values, dtype)
        axes = tuple(range(values.ndim))
        if layout == "channels_last":
            tensor = _permuted(tensor, (0, *axes[2:], 1))
        if layout == "permuted":
            tensor = _permuted(tensor, axes[::-1])
        if layout == "expanded":
            tensor = tensor[:1].expand(values.shape)
        return tensor

    def is_contiguous(self, tensor: Any) -> bool:
        contiguous: bool = tensor.is_contiguous()
        return contiguous

    def is_channels_last(self, tensor: Any) -> bool:
        return False

    def writes(self, tensor: Any) -> int:
        """How often something has written to a tensor."""
        count: int = tensor._version
        return count

    def describe(self, error: Exception) -> dict[str, Any]:
        """An error of the target as JSON: the names of its types, and its text.

        Raises:
            MachineError: the machine is at fault, and not the target.
        """
        _check_machine(error)
        return {"types": [cls.__name__ for cls in type(error).__mro__], "message": _text(error)}

    def run(self, case: Case) -> tuple[dict[str, Any], Arrays]:
        # On accelerators and in graphs, our layer raises an error on all ranks only in debug mode.
        # Cases without an error run without it, as a user runs them.
        os.environ["SYNCBN_DEBUG"] = str(int(any(step.error for step in case.steps)))
        if reason := self.unsupported(case):
            return {"unsupported": reason}, {}
        state = ProcessState(self.settings(), self.generators())
        try:
            answer, arrays = self._answer(case.of_rank(self.rank))
        except Unsupported as reason:
            answer, arrays = {"unsupported": str(reason)}, {}
        finally:
            changes, patched = state.restore(), self._suite.patched()
        answer["changed"] = [*changes.names, *patched]
        answer["lasting"] = changes.lasting or bool(patched)
        answer["patched"] = patched
        return answer, arrays

    def settings(self) -> tuple[Setting, ...]:
        """The global settings of the framework that a layer may change."""
        return ()

    def generators(self) -> tuple[Generator, ...]:
        """The random number generators of the framework."""
        return ()

    def _answer(self, case: Case) -> tuple[dict[str, Any], Arrays]:
        answer, arrays = self._run(case)
        if "repeatable" in case.checks:
            again = self._run(case)[1]
            answer["unlike"] = [
                name
                for name, array in arrays.items()
                if name not in again or array.tobytes() != again[name].tobytes()
            ]
        return answer, arrays

    def _run(self, case: Case) -> tuple[dict[str, Any], Arrays]:
        """Errors in the work of the layer are facts; all others are raised, as they are ours."""
        answer: dict[str, Any] = {"steps": []}
        arrays: Arrays = {}
        state = self._start_state(case)
        try:
            for index in range(max(1, len(case.steps))):
                for ranks in case.groups_at(index) or ():
                    self._group(ranks)
            if case.group_of(self.rank) is None:
                return answer, arrays
            layer = self._build(case, state)
            self._look(layer, case, answer, arrays)
        except Exception as error:
            answer["error"] = self.describe(error)
            if case.error is not None:
                answer["error_if_sound"] = self._error_if_sound(case)
            return answer, arrays
        for index, step in enumerate(case.steps):
            if not step.takes_part(self.rank):
                answer["steps"].append({})
                continue
            try:
                if step.reload or step.groups:
                    layer = self._reload(layer, case, state, index)
                if step.copied:
                    layer = copy.deepcopy(layer)
                self._set_attributes(layer, step.attributes)
            except Exception as error:
                answer["steps"].append({"error": self.describe(error)})
                break
            facts = self._step(layer, case, state, index, arrays)
            answer["steps"].append(facts)
            if "error" in facts and not case.fails(index, self.rank):
                break
        return answer, arrays

    def _error_if_sound(self, case: Case) -> dict[str, Any] | None:
        """The error of a constructor that gets the arguments of a case by name, but sound ones.

        A constructor that has no such argument refuses every value of it, for another reason than
        that of the clause.
        """
        try:
            sound = {name: _SOUND.get(name, value) for name, value in case.layer.items()}
            self.build(self.layer_args | sound)
        except Exception as error:
            return self.describe(error)
        return None

    def _look(self, layer: Any, case: Case, answer: dict[str, Any], arrays: Arrays) -> None:
        """Add what the case checks of a new layer."""
        if "signature" in case.checks:
            answer["signature"] = self._signature()
        if {"parameters", "statistics_dtype"}.intersection(case.checks):
            answer["parameters"] = {
                name: {"shape": list(tensor.shape), "dtype": _dtype(tensor)}
                for name, tensor in by_role(self.parameters(layer)).items()
            }
        if "state_names" in case.checks:
            answer["state_names"] = list(self.state(layer))
        if "initial_values" in case.checks:
            tensors = by_role(self.state(layer))
            arrays |= {f"initial/{name}": self.array(tensor) for name, tensor in tensors.items()}

    def _signature(self) -> dict[str, str | None]:
        """The defaults of the arguments of the constructor.

        None is the default of an argument that it takes but does not show, because it passes
        `**options` on.
        """
        parameters = inspect.signature(self.cls).parameters
        shown = {name: repr(parameter.default) for name, parameter in parameters.items()}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            return {**shown}
        return {**{name: None for name in _SOUND if self._takes(name)}, **shown}

    def _takes(self, name: str) -> bool:
        sound = {one: _SOUND[one] for one in ("num_features", name)}
        try:
            self.build(self.layer_args | sound)
        except Exception:
            return False
        return True

    def _group(self, ranks: tuple[int, ...]) -> Any:
        if ranks not in self.groups:
            self.groups[ranks] = self.create_group(ranks)
        return self.groups[ranks]

    def _reload(self, layer: Any, case: Case, state: Arrays | None, index: int) -> Any:
        """A new layer in the process groups of the step, with the checkpoint of the old one."""
        fresh = self._build(case, state, index)
        self.load_state(fresh, self.state(layer))
        self._set_attributes(fresh, case.attributes_at(index))
        return fresh

    def _set_attributes(self, layer: Any, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(layer, name, self._literal(name, value))

    def _start_state(self, case: Case) -> Arrays | None:
        """The values that a new layer gets; None if it keeps its own."""
        own = case.state == "initial" or case.error is not None or case.group_of(self.rank) is None
        return None if own else data.initial_state(case)

    def _build(self, case: Case, state: Arrays | None, index: int = 0) -> Any:
        given = self.layer_args | case.layer
        arguments = {name: self._literal(name, value) for name, value in given.items()}
        group = case.group_of(self.rank, index)
        if "process_group" not in arguments:
            if case.groups_at(index) is not None and group is not None:
                arguments["process_group"] = self._group(group)
        elif not self.rank_ids:
            arguments["process_group"] = self._group(tuple(arguments["process_group"]))
        layer = self.build(arguments)
        if case.cast is not None:
            layer = self.cast(layer, case.cast)
        if state is not None:
            names = names_by_role(self.state(layer))
            tensors = {
                names.get(role, role): self.tensor(values, case.parameter_dtype)
                for role, values in state.items()
            }
            if unknown := self.load_state(layer, tensors):
                raise RuntimeError(f"the layer's state has no {', '.join(unknown)}")
        return layer

    def _step(
        self, layer: Any, case: Case, state: Arrays | None, index: int, arrays: Arrays
    ) -> dict[str, Any]:
        """Take one step. Adds the arrays that the case checks to `arrays`."""
        step = case.steps[index]
        dtype = step.dtype_of(self.rank)
        if not step.again:
            values = data.shard(case, index, self.rank)
            self._input = self.lay_out(values, dtype, step.layout_of(self.rank))
        x = self._input
        dy = None
        if step.backward:
            values = data.grad_output(case, index, self.rank)
            dy = self.lay_out(values, dtype, step.dy_layout_of(self.rank))
        cotangents = self._cotangents(case, index) if step.second else {}
        given = {"input": x} if dy is None else {"input": x, "grad_output": dy}
        untouched = {name: self._content(tensor) for name, tensor in given.items()}
        facts: dict[str, Any] = {}
        results: dict[str, Any] = {}
        try:
            counting = "collectives" in case.checks
            parallel = self._build(case, state, index) if step.beside else None
            module = self.data_parallel(layer) if case.ddp else layer
            if step.second:
                results = self.take_twice(layer, x, dy, cotangents, step)
            else:
                for turn in range(step.repeat):
                    counted = counting and turn == step.repeat - 1
                    taken = self.take(module, parallel, x, dy, step, counted)
                results, facts["collectives"] = taken
            if not self.is_tensor(results["y"]):
                kind = type(results.pop("y")).__name__
                raise TypeError(f"the layer must return a tensor, got {kind}")
            facts["format"] = {
                "x": self._format(x),
                "y": self._format(results["y"]),
                "grad_input": results.pop("grad_input_format", None),
            }
        except Unsupported:
            raise
        except Exception as error:
            facts["error"] = self.describe(error)
        if "communicators" in case.checks:
            facts["communicators"] = self.communicators()
        facts["modified"] = list(given)  # unless they can be read
        try:
            facts["modified"] = [
                name for name, tensor in given.items() if self._content(tensor) != untouched[name]
            ]
            buffers = by_role(self.parameters(layer))
            results |= {name: getattr(layer, name, buffers.get(name)) for name in STATISTICS}
            for name in arrays_of(case.checks):
                if results.get(name) is not None:
                    arrays[f"{index}/{name}"] = self.array(results[name])
        except Exception as error:  # of tensors that hold no values, for example
            facts.setdefault("error", self.describe(error))
        return facts

    def _content(self, tensor: Any) -> tuple[bytes, int]:
        """The values of a tensor, and how often they were written."""
        return self.array(tensor).tobytes(), self.writes(tensor)

    def _cotangents(self, case: Case, index: int) -> dict[str, Any]:
        values = data.cotangents(case, index, self.rank)
        of_input = case.steps[index].dtype_of(self.rank)
        return {
            name: self.tensor(one, of_input if name == "grad_input" else case.parameter_dtype)
            for name, one in values.items()
        }

    def _format(self, tensor: Any) -> dict[str, Any]:
        cls = type(tensor)
        return {
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "shape": list(tensor.shape),
            "dtype": _dtype(tensor),
            "contiguous": self.is_contiguous(tensor),
            "channels_last": self.is_channels_last(tensor),
        }

    def _literal(self, name: str, value: Any) -> Any:
        """The Python value of a literal; see syncbn.conformance.case.Case."""
        if isinstance(value, dict) and "float" in value:
            return float(value["float"])
        if isinstance(value, dict) and "numpy" in value:
            return np.dtype(value["numpy"]).type(value["value"])
        if name == "dtype" and isinstance(value, str):
            return getattr(self.framework, value, value)
        return value


def names_by_role(names: Iterable[str]) -> dict[str, str]:
    """The names of the tensors of a layer by what they are: "weight" for "inner.weight".

    So a layer in an adapter can be judged. Only CTOR-5 is about the names themselves. Of several
    tensors of one role, the one whose name comes first in _ROLES is meant, and of these, as in a
    layer of two parts, the one with the shortest name.
    """
    found: dict[str, str] = {}
    by_depth = sorted(names, key=lambda name: (name.count("."), len(name)))
    for role, known in _ROLES.items():
        for last in known:
            mine = (name for name in by_depth if name.rpartition(".")[2] == last)
            if role not in found and (name := next(mine, None)) is not None:
                found[role] = name
    return found


def by_role(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a layer by what they are; see `names_by_role`."""
    return {role: tensors[name] for role, name in names_by_role(tensors).items()}


def _permuted(tensor: Any, order: tuple[int, ...]) -> Any:
    """The same tensor with its axes in this order in memory."""
    back = tuple(int(axis) for axis in np.argsort(order))
    return tensor.permute(order).contiguous().permute(back)


def _dtype(tensor: Any) -> str:
    """The name of the dtype, alike for all frameworks: "float32"."""
    return str(tensor.dtype).removeprefix("torch.").lower()


def _text(error: Exception) -> str:
    """The text of an error, which may be of any length, may lack UTF-8, and may itself raise."""
    try:
        text = str(error)
    except Exception:
        return "its text cannot be read"
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= _LONGEST_TEXT:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters left out ... {text[-half:]}"


def _check_machine(error: BaseException | None) -> None:
    """Raise a MachineError if an error, or one that led to it, is the machine's."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise MachineError(f"the machine {socket.gethostname()} failed: {error}") from error
        chain.append(error)
        error = error.__cause__ or error.__context__
