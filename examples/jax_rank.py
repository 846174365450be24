"""A rank of JAX: one process with one CPU device; see jax_framework.py.

All ranks of a group run the same program. If one raised before its first collective, the others
would wait for ever, and answer the next case with this one's results. So each rank traces and
compiles first, the ranks exchange whether that worked, and then all run or none.

Equal shards take the usual way, `axis_name` in shard_map. There Flax averages the statistics of the
devices, so uneven shards would weigh wrong. Those are padded to equal ones, and become one array of
all devices with a mask. That way gives the gradients of scale and bias only as sums over the group.
"""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from syncbn.conformance.case import Case, Step
from syncbn.conformance.ranks import network
from syncbn.conformance.ranks.base import Rank

_AXIS = "ranks"
_SPLIT, _WHOLE = PartitionSpec(_AXIS), PartitionSpec()
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


class JaxRank(Rank):
    """A process of jax.distributed. Its process groups are meshes of devices."""

    framework = jnp

    def __init__(self, target: dict[str, Any], rank: int, ranks: int, local_rank: int) -> None:
        if target["device"] != "cpu":
            raise ValueError(f"device must be cpu, got {target['device']!r}")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        super().__init__(target, rank, ranks, local_rank)
        self.world: Mesh | None = None
        self._programs: dict[Any, Any] = {}  # compiled, by what they were compiled for

    def versions(self) -> dict[str, str]:
        return {"jax": jax.__version__, "flax": flax.__version__, "collectives": "gloo"}

    def host(self) -> int:
        with socket.socket() as probe:  # JAX cannot choose a free port
            probe.bind((network.meeting(), 0))
            port: int = probe.getsockname()[1]
        return port

    def join(self, port: int) -> None:
        if self.world is None:
            address = f"{network.meeting()}:{port}"
            jax.distributed.initialize(
                address,
                self.ranks,
                self.rank,
                coordinator_bind_address=address,  # of rank 0
            )
            self.world = self.create_group(tuple(range(self.ranks)))
        # The old world is as good as a new one if a collective gives what the ranks send now.
        numbers = _gather(self.world, port + self.rank)
        if numbers != [port + rank for rank in range(self.ranks)]:
            raise RuntimeError(f"a rank sent what belongs to another case: {numbers}")

    def create_group(self, ranks: tuple[int, ...]) -> Mesh:
        devices = {device.process_index: device for device in jax.devices()}
        return Mesh(np.array([devices[rank] for rank in ranks]), (_AXIS,))

    def build(self, arguments: dict[str, Any]) -> Any:
        return self.cls(**arguments)

    def state(self, layer: Any) -> dict[str, Any]:
        flat = nnx.to_flat_state(nnx.state(layer))
        return {".".join(map(str, path)): variable[...] for path, variable in flat}

    def load_state(self, layer: Any, state: dict[str, Any]) -> Sequence[str]:
        known = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(layer))}
        for name in known.keys() & state.keys():
            known[name][...] = state[name]
        return sorted(state.keys() - known.keys())

    def parameters(self, layer: Any) -> dict[str, Any]:
        return self.state(layer)

    def tensor(self, values: npt.NDArray[Any], dtype: str) -> jax.Array:
        return jnp.asarray(values, getattr(jnp, dtype))

    def array(self, tensor: Any) -> npt.NDArray[Any]:
        values = np.array(tensor[...] if isinstance(tensor, nnx.Variable) else tensor)
        return values.astype(np.float32) if values.dtype == jnp.bfloat16 else values

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, jax.Array)

    def lay_out(self, values: npt.NDArray[Any], dtype: str, layout: str) -> jax.Array:
        return self.tensor(values, dtype)  # see `unsupported`

    def is_contiguous(self, tensor: jax.Array) -> bool:
        return True

    def writes(self, tensor: jax.Array) -> int:
        return 0  # an array of JAX cannot be changed

    def communicators(self) -> int:
        return 0  # XLA makes them, and does not count them

    def data_parallel(self, layer: Any) -> Any:
        raise NotImplementedError  # see `unsupported`

    def take_twice(self, *_: Any) -> dict[str, Any]:
        raise NotImplementedError  # see `unsupported`

    def unsupported(self, case: Case) -> str | None:
        settings = [case.layer, *(step.attributes for step in case.steps)]
        if case.error is None and any("momentum" in s and s["momentum"] is None for s in settings):
            return "Flax has no cumulative average (momentum=None)"
        if case.error is None and any(s.get("track_running_stats") is False for s in settings):
            return "Flax has no layer without running statistics"
        if "process_group" in case.layer:
            return "Flax takes devices as a group, not the ids of ranks"
        if case.layers:
            return "all ranks of JAX run one program, so their layers are the same"
        if case.cast or case.ddp:
            return "Flax has neither a cast of a layer nor a wrapper for data parallelism"
        for index, step in enumerate(case.steps):
            if reason := _unsupported(case, step) or self._uneven(case, index):
                return reason
        return super().unsupported(case)

    def _uneven(self, case: Case, index: int) -> str | None:
        """Why the shards of a step cannot be put together, or None."""
        step = case.steps[index]
        for group in case.groups_at(index) or (range(self.ranks),):
            shapes = {step.shapes[rank] for rank in group}
            if step.mode == "eval" or len(shapes) == 1:
                continue
            if len({len(shape) for shape in shapes}) > 1:
                return "shards of different dimensions are no array of JAX"
            if "collectives" in case.checks:
                return "the collectives of uneven shards are XLA's choice, not Flax's"
            if {"grad_weight", "grad_bias"}.intersection(case.checks):
                return (
                    "Flax takes uneven shards only as one array of all ranks, and there the "
                    "gradients of scale and bias are sums over the group"
                )
        return None

    def take(
        self, layer: Any, parallel: Any, x: Any, dy: Any, step: Step, counting: bool
    ) -> tuple[dict[str, Any], list[int]]:
        if step.mode == "eval":
            program = jax.jit(_program(nnx.graphdef(layer), False, None))
            found = program(*_variables(layer), x, dy, None)
            return _named(layer, *found), [0] if dy is None else [0, 0]
        mesh = self._mesh(layer)
        error = None
        try:
            program, given = self._compile(layer, mesh, x, dy, step)
            counted = self._count(layer, mesh, x, dy, step) if counting else []
        except Exception as caught:
            error = caught
        failed = _gather(mesh, int(error is not None))
        if error is not None:
            raise error
        if any(failed):
            device = mesh.devices.flat[failed.index(1)]
            raise RuntimeError(f"rank {device.process_index} could not trace the step")
        found = jax.tree.map(lambda array: array.addressable_data(0), program(*given))
        if _is_even(mesh, step):
            found = jax.tree.map(lambda array: array[0], found)
        y, moved, of_parameters, of_x = found
        own = tuple(slice(length) for length in x.shape)  # without padding
        of_x = None if of_x is None else of_x[own]
        return _named(layer, y[own], moved, of_parameters, of_x), counted

    def _mesh(self, layer: Any) -> Mesh:
        assert self.world is not None  # the suite joins first
        return layer.mesh or self.world

    def _compile(
        self, layer: Any, mesh: Mesh, x: Any, dy: Any, step: Step
    ) -> tuple[Any, tuple[Any, ...]]:
        """The step of all ranks of the mesh, and this rank's arguments. It does not communicate."""
        graph, even = nnx.graphdef(layer), _is_even(mesh, step)
        given = (*_variables(layer), *(_alone if even else _padded)(mesh, x, dy, step))
        kinds = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(given))
        key = (graph, mesh, even, dy is None, kinds)
        if key not in self._programs:
            program = (_of_equal_shards if even else _of_one_array)(graph, mesh)
            self._programs[key] = program.lower(*given).compile()
        return self._programs[key], given

    def _count(self, layer: Any, mesh: Mesh, x: Any, dy: Any, step: Step) -> list[int]:
        """The number of collectives in the forward and in the backward."""
        wanted = [None] if dy is None else [None, dy]
        counts = [_collectives(self._compile(layer, mesh, x, one, step)[0]) for one in wanted]
        return [counts[0], *(whole - counts[0] for whole in counts[1:])]


def _unsupported(case: Case, step: Step) -> str | None:
    """Why JAX has no such step, or None."""
    everyone = set(range(case.ranks))
    if step.second:
        return "the suite takes no second derivatives of JAX"
    if {step.layout, step.dy_layout} != {"contiguous"}:
        return "an array of JAX has no strides"
    if not isinstance(step.dtype, str):
        return "all ranks of JAX run one program, so their dtypes are the same"
    if step.frozen_input or step.frozen_parameters:
        return "JAX has no frozen tensors: a program differentiates what it names"
    if step.recompute:
        return "JAX recomputes operations, not the forward of a layer"
    if step.beside:
        return "the suite has no parallel branches of JAX"
    if step.recording != "on" or step.lost:
        return "JAX records nothing for a backward"
    if step.autocast:
        return "JAX has no autocast"
    if step.error and set(step.error.ranks) != everyone:
        return "no rank of JAX starts a step that another rank could not trace"
    if step.mode == "train" and step.present is not None and set(step.present) != everyone:
        return "all ranks of JAX run one program together"
    return None


def _is_even(mesh: Mesh, step: Step) -> bool:
    return len({step.shapes[device.process_index] for device in mesh.devices.flat}) == 1


def _program(graph: Any, training: bool, axis_name: str | None) -> Any:
    """The step of a layer as a function: y, the moved statistics, and the gradients."""

    def run(parameters: Any, statistics: Any, x: Any, dy: Any, mask: Any) -> Any:
        def forward(parameters: Any, x: Any) -> Any:
            new = jax.tree.map(lambda array: array, statistics)  # Flax: variables of this trace
            layer = nnx.merge(graph, parameters, new)
            y = layer(x, training, axis_name, mask)
            return y, nnx.state(layer, nnx.BatchStat)

        if dy is None:
            return (*forward(parameters, x), None, None)
        y, backward, moved = jax.vjp(forward, parameters, x, has_aux=True)
        return (y, moved, *backward(dy))

    return run


def _of_equal_shards(graph: Any, mesh: Mesh) -> Any:
    """The step in which Flax averages over an axis. Arguments and results have an axis of ranks."""
    program = _program(graph, True, _AXIS)

    def of_rank(parameters: Any, statistics: Any, x: Any, dy: Any) -> Any:
        inner = None if dy is None else dy[0]
        found = program(parameters, statistics, x[0], inner, None)
        return jax.tree.map(lambda array: array[None], found)

    specs = (_WHOLE, _WHOLE, _SPLIT, _SPLIT)
    # Checked, it would give the gradients of scale and bias as sums over the ranks.
    return jax.jit(
        jax.shard_map(of_rank, mesh=mesh, in_specs=specs, out_specs=_SPLIT, check_vma=False)
    )


def _of_one_array(graph: Any, mesh: Mesh) -> Any:
    """The step on one masked array, for which XLA chooses the collectives."""
    whole, parts = (NamedSharding(mesh, spec) for spec in (_WHOLE, _SPLIT))
    return jax.jit(_program(graph, True, None), out_shardings=(parts, whole, whole, parts))


def _alone(mesh: Mesh, x: Any, dy: Any, step: Step) -> list[Any]:
    """x and dy of this rank with a first axis of all ranks."""
    return [None if a is None else _split(mesh, np.asarray(a)[None]) for a in (x, dy)]


def _padded(mesh: Mesh, x: Any, dy: Any, step: Step) -> list[Any]:
    """x and dy of this rank in an array of all ranks, and a mask of what is no padding."""
    shapes = [step.shapes[device.process_index] for device in mesh.devices.flat]
    largest = [max(lengths) for lengths in zip(*shapes, strict=True)]
    mask = np.ones((x.shape[0], 1, *x.shape[2:]), bool)
    arrays = []
    for array in (x, dy, mask):
        if array is not None:
            ends = [n - length for n, length in zip(largest, array.shape, strict=True)]
            ends[1] = 0  # the mask has one channel
            array = _split(mesh, np.pad(np.asarray(array), [(0, end) for end in ends]))
        arrays.append(array)
    return arrays


def _split(mesh: Mesh, array: npt.NDArray[Any]) -> jax.Array:
    """The arrays of all ranks, one after the other, as one."""
    shape = (len(array) * mesh.size, *array.shape[1:])
    return jax.make_array_from_process_local_data(NamedSharding(mesh, _SPLIT), array, shape)


def _variables(layer: Any) -> tuple[Any, Any]:
    """Parameters and statistics as NumPy arrays, which belong to no device."""
    states = nnx.split(layer, nnx.Param, nnx.BatchStat)[1:]
    parameters, statistics = (jax.tree.map(np.asarray, state) for state in states)
    return parameters, statistics


def _named(layer: Any, y: Any, moved: Any, of_parameters: Any, of_x: Any) -> dict[str, Any]:
    """The results by the suite's names. The layer gets its moved statistics."""
    nnx.update(layer, moved)
    results = {"y": y, "grad_input": of_x}
    for path, variable in nnx.to_flat_state(of_parameters or nnx.State({})):
        results["grad_weight" if path[-1] == "scale" else "grad_bias"] = variable[...]
    return results


def _gather(mesh: Mesh, number: int) -> list[int]:
    """The numbers of all ranks of the mesh, which must all call this."""
    given = _split(mesh, np.array([number], np.int64))
    return [int(n) for n in np.asarray(_gatherer(mesh)(given).addressable_data(0))]


@functools.cache
def _gatherer(mesh: Mesh) -> Any:
    return jax.jit(lambda numbers: numbers, out_shardings=NamedSharding(mesh, _WHOLE))


def _collectives(program: Any) -> int:
    return len(_COLLECTIVE.findall(program.as_text()))
